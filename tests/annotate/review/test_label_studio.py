"""Tasks for Label Studio, and what is taken from its exports."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from kdecs.annotate.labels import Annotation, TurnLabel
from kdecs.annotate.project import Project, create_project
from kdecs.annotate.review.label_studio import label_studio_tasks, labelling_configuration
from kdecs.annotate.running import read_annotations
from kdecs.cli import app
from kdecs.corpus.schema import FINE_EMOTIONS, Dialogue
from kdecs.endpoint.answers import Cause
from kdecs.errors import ConfigError, PredictionError

LATER, EARLIER = "2026-02-02T02:02:02.000200Z", "2026-01-01T01:01:01Z"
CHAT = ("We won 🎉🎉 at  last !", "I lost my job , I lost it .", "Oh no !\nAgain ?")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["annotate", *map(str, arguments)])


def exported(
    tasks: list[dict[str, Any]], *, user: Any = 1, at: str = LATER, **changes: Any
) -> list[dict[str, Any]]:
    """Label Studio's export after a user has submitted the first prediction of each task as it stands."""
    found = []
    for number, task in enumerate(tasks, start=1):
        result = task["predictions"][0]["result"]
        annotation = {"id": 70 + number, "completed_by": user, "was_cancelled": False, "result": result}
        annotation |= {"created_at": EARLIER, "updated_at": at, "lead_time": 8.5} | changes
        found.append({"id": number, "data": task["data"], "annotations": [annotation], "drafts": []})
    return found


@pytest.fixture
def chat(tmp_path: Path) -> Project:
    """A project of one dialogue of three turns, with signs that UTF-16 counts twice, spaces and a line break."""
    file = tmp_path / "chat.jsonl"
    turns = [{"turn": n, "speaker": "AB"[n % 2], "utterance": text} for n, text in enumerate(CHAT, start=1)]
    file.write_text(json.dumps({"id": "d", "utterances": turns}))
    return create_project(tmp_path / "chat", [file], labels="fine")


def labels(**turns: tuple[str, list[tuple[int, str]] | None]) -> Annotation:
    found = {}
    for turn, (emotion, causes) in turns.items():
        spans = None if causes is None else tuple(Cause(*cause) for cause in causes)
        found["d", int(turn[1:])] = TurnLabel(emotion, spans)
    return Annotation("model", "model", found)


ALL = labels(
    t1=("happiness", [(1, "won 🎉🎉 at  last")]),
    t2=("worry", None),
    t3=("surprise", [(1, "🎉 at"), (2, "I lost my job"), (3, "Oh no !\nAgain ?")]),
)


def test_the_gold_labels_of_a_corpus_come_back_as_they_were(
    project: Project, gold: list[Dialogue], corpus: Path, tmp_path: Path
) -> None:
    assert run("review", "import", project.root, corpus, "--annotator", "gold").exit_code == 0
    tasks_file = tmp_path / "tasks.json"
    made = run("review", "export", project.root, "--label-studio", tasks_file, "--suggest", "gold")
    assert made.exit_code == 0 and "tasks.xml" in made.output, made.output
    assert (tmp_path / "tasks.xml").read_text() == labelling_configuration(FINE_EMOTIONS)
    tasks = json.loads(tasks_file.read_text(encoding="utf-8"))
    assert [task["data"]["dialogue_id"] for task in tasks] == [d.id for d in gold]
    export = tmp_path / "project-1.json"
    export.write_text(json.dumps(exported(tasks)))
    taken = run("review", "import", project.root, export, "--annotator", "ann")
    num_turns = sum(len(d.utterances) for d in gold)
    assert f"{num_turns} new of {num_turns} decisions of ann\n" in taken.output, taken.exception
    assert (
        f"0 new of {num_turns}"
        in run("review", "import", project.root, export, "--annotator", "1=ann").output
    )
    ann, first = read_annotations(project)
    assert {key: (label.emotion, label.causes) for key, label in ann.labels.items()} == {
        key: (label.emotion, label.causes) for key, label in first.labels.items()
    }
    assert {label.at for label in ann.labels.values()} == {LATER}


def test_offsets_count_as_in_a_browser_and_open_causes_stay_open(chat: Project, tmp_path: Path) -> None:
    [task] = label_studio_tasks(chat, list(chat.dialogues.values()), [ALL])
    regions = [item["value"] for item in task["predictions"][0]["result"] if item["from_name"] == "cause"]
    assert [(value["start"], value["startOffset"], value["endOffset"]) for value in regions] == [
        ("0", 3, 20),
        ("0", 9, 14),
        ("1", 0, 13),
        ("2", 0, 15),
    ]
    assert [value["text"] for value in regions] == ["won 🎉🎉 at  last", "🎉 at", "I lost my job", CHAT[2]]
    # As the browser tells it: without the second space and the line break.
    for item in task["predictions"][0]["result"]:
        item["value"]["text"] = " ".join(item["value"]["text"].split())
    none_said = labels(t1=("anger", []), t2=("neutral", []))
    [other] = label_studio_tasks(chat, list(chat.dialogues.values()), [none_said])
    file, second = tmp_path / "one.json", tmp_path / "two.json"
    file.write_text(json.dumps(exported([task], user={"id": 5, "email": "ann@example.org"})))
    second.write_text(json.dumps(exported([other], user={"id": 6, "email": "ben@example.org"})))
    taken = run("review", "import", chat.root, file, second)
    assert "3 new of 3 decisions of ann" in taken.output and "2 new of 2 decisions of ben" in taken.output
    ann, ben = read_annotations(chat)
    for found, given in ((ann, ALL), (ben, none_said)):
        assert {key: (label.emotion, label.causes) for key, label in found.labels.items()} == {
            key: (label.emotion, label.causes) for key, label in given.labels.items()
        }


def test_words_that_cause_two_emotions_are_one_region(chat: Project) -> None:
    both = labels(t2=("worry", [(1, "last")]), t3=("worry", [(1, "last")]))
    [task] = label_studio_tasks(
        chat, list(chat.dialogues.values()), [both, replace(labels(t1=("anger", None)), name="other")]
    )
    assert [prediction["model_version"] for prediction in task["predictions"]] == ["other", "model"]
    result = task["predictions"][1]["result"]
    [effect] = [item for item in result if item["from_name"] == "effect"]
    assert (
        effect["value"]["choices"] == [choice["value"] for choice in task["data"]["turns"]][1:] == ["2", "3"]
    )
    assert [item["id"] for item in result].count(effect["id"]) == 2
    with pytest.raises(ConfigError, match="no dialogue is left"):
        label_studio_tasks(chat, [], [])


def test_the_configuration_names_the_controls_and_every_label() -> None:
    odd = ["joy", 'quite "so" & <b>', "neutral"]
    root = ElementTree.fromstring(labelling_configuration(odd))
    controls = {tag.get("name"): tag for tag in root.iter() if tag.get("toName") == "dialogue"}
    assert set(controls) == {"emotion", "cause", "effect", "no_cause"}
    assert [tag.get("value") for tag in controls["emotion"]] == odd
    assert controls["effect"].get("required") == controls["effect"].get("perRegion") == "true"


def test_the_newest_annotation_of_a_person_counts_and_a_skipped_one_does_not(
    chat: Project, tmp_path: Path
) -> None:
    tasks = label_studio_tasks(chat, list(chat.dialogues.values()), [labels(t1=("anger", None))])
    newer = label_studio_tasks(chat, list(chat.dialogues.values()), [labels(t2=("worry", None))])
    file = tmp_path / "export.json"
    # The same dialogue as two tasks, and a newer annotation that was skipped.
    value = exported(newer) + exported(tasks, at=EARLIER)
    value[1]["annotations"] += exported(tasks, was_cancelled=True, at="2026-03-03T00:00:00Z")[0][
        "annotations"
    ]
    value[1]["annotations"] += exported(tasks, user=None)[0]["annotations"]
    file.write_text(json.dumps(value))
    taken = run("review", "import", chat.root, file, "--annotator", "1=ann", "--annotator", "deleted=old")
    assert (
        "1 new of 1 decisions of ann (annotations left out: 1 older than another of the same dialogue, 1 skipped)"
        in taken.output
    ), taken.exception
    ann, old = read_annotations(chat)
    assert ann.emotions() == {("d", 2): "worry"} and old.emotions() == {("d", 1): "anger"}


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """The export after a change to its only annotation."""

    def apply(export: list[dict[str, Any]]) -> list[dict[str, Any]]:
        change(export[0]["annotations"][0])
        return export

    return apply


def results(control: str, number: int = 0, **value: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """The export after a change to the value of a result."""

    def change(annotation: dict[str, Any]) -> None:
        [item for item in annotation["result"] if item["from_name"] == control][number]["value"].update(value)

    return changed(change)


def without(control: str) -> Callable[[list[dict[str, Any]]], Any]:
    return changed(
        lambda found: found.update(result=[r for r in found["result"] if r["from_name"] != control])
    )


def no_cause_too(annotation: dict[str, Any]) -> None:
    first = annotation["result"][0]
    annotation["result"].append(
        first | {"from_name": "no_cause", "value": first["value"] | {"choices": ["x"]}}
    )


def another_emotion(annotation: dict[str, Any]) -> None:
    first = annotation["result"][0]
    value = first["value"] | {"paragraphlabels": ["anger"]}
    annotation["result"].append(first | {"id": "x", "value": value})


FAULTS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "label": (results("emotion", paragraphlabels=["joy"]), "d/1: the emotion 'joy', expected one of"),
    "two emotions": (changed(another_emotion), "turn 1 is happiness and anger, expected one emotion"),
    "control": (
        changed(lambda found: found["result"][0].update(from_name="sentiment")),
        "a label of 'sentiment', expected one of emotion, cause, effect and no_cause; give the project",
    ),
    "two turns": (results("cause", end="1"), "a region from turn 1 to turn 2, expected words of one turn"),
    "no such turn": (results("cause", start="7", end="7"), "turn 8, expected one from 1 to 3"),
    "outside the turn": (
        results("cause", endOffset=99),
        "the words from 3 to 99 of turn 1, expected them within",
    ),
    "backwards": (results("cause", endOffset=1), "the words from 3 to 1 of turn 1, expected them within"),
    "half a sign": (results("cause", startOffset=8), "cuts a character in two"),
    "other words": (results("cause", endOffset=19), "mark 'won 🎉🎉 at  las' and its text is"),
    "no word": (results("cause", endOffset=3, text=""), "d/1: the cause '', expected words of turn 1"),
    "no effect": (without("effect"), "the cause 'won 🎉🎉 at  last' in turn 1 belongs to no emotion"),
    "no emotion": (without("emotion"), "belongs to turn 1, which has no emotion"),
    "odd effect": (results("effect", choices=["the last"]), "belongs to turn 0, which has no emotion"),
    "earlier effect": (results("effect", 2, choices=["1"]), "a cause in turn 2, expected one up to turn 1"),
    "neutral": (results("emotion", paragraphlabels=["neutral"]), "is neutral and has causes"),
    "both": (changed(no_cause_too), "turn 1 has causes and the choice that it has none"),
    "twice in a turn": (results("effect", choices=["3"]), "two causes in turn 1, expected one span"),
    "value": (results("cause", startOffset="x"), "value.startOffset: Input should be a valid integer"),
    "no time": (changed(lambda found: found.pop("updated_at")), "annotations.0.updated_at: Field required"),
    "dialogue": (
        lambda export: [export[0] | {"data": export[0]["data"] | {"dialogue_id": "e"}}],
        "task 1: the dialogue 'e' is not in this project",
    ),
    "texts": (
        lambda export: [export[0] | {"data": {"dialogue_id": "d", "dialogue": [{"text": "Hi !"}]}}],
        "the dialogue d has other texts than in this project",
    ),
    "nothing done": (lambda export: [export[0] | {"annotations": []}], "holds no annotations"),
    "tasks": (lambda export: [{"data": export[0]["data"]}], "holds tasks without annotations"),
    "JSON-MIN": (
        lambda export: [{"dialogue_id": "d", "annotation_id": 1, "annotator": 1}],
        "is Label Studio's JSON-MIN, which lacks regions; export the project as JSON",
    ),
    "users": (
        lambda export: (
            export + exported([{"data": export[0]["data"], "predictions": [{"result": []}]}], user=2)
        ),
        "users of Label Studio: 1 (1 annotations), 2 (1 annotations); say who they are with --annotator 1=NAME",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_is_refused_in_one_line_and_nothing_is_kept(
    fault: str, chat: Project, tmp_path: Path
) -> None:
    change, message = FAULTS[fault]
    file = tmp_path / "export.json"
    file.write_text(
        json.dumps(change(exported(label_studio_tasks(chat, list(chat.dialogues.values()), [ALL]))))
    )
    result = run("review", "import", chat.root, file, "--annotator", "ann")
    assert isinstance(result.exception, PredictionError), result.exception
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert str(result.exception).startswith(str(file)) and chat.reviewers == []


def test_the_number_of_faulty_annotations_is_told(chat: Project, tmp_path: Path) -> None:
    export = exported(label_studio_tasks(chat, list(chat.dialogues.values()), [ALL]), user=1)
    export = results("emotion", paragraphlabels=["joy"])(export)
    other = [export[0]["annotations"][0] | {"id": 99, "completed_by": 2}]
    file = tmp_path / "export.json"
    file.write_text(json.dumps([export[0] | {"annotations": export[0]["annotations"] + other}]))
    refused = run("review", "import", chat.root, file, "--annotator", "1=ann", "--annotator", "2=ben")
    assert "the emotion 'joy'" in str(refused.exception) and chat.reviewers == []
    assert str(refused.exception).endswith("; further annotations with faults: 1")


def test_users_whose_addresses_begin_alike_are_asked_about(chat: Project, tmp_path: Path) -> None:
    tasks = label_studio_tasks(chat, list(chat.dialogues.values()), [ALL])
    users = [{"id": 3, "email": "ann@a.org"}, {"id": 4, "email": "ann@b.org"}]
    file = tmp_path / "export.json"
    file.write_text(json.dumps([task for user in users for task in exported(tasks, user=user)]))
    refused = run("review", "import", chat.root, file)
    assert "with --annotator ann@a.org=NAME" in str(refused.exception)
    taken = run("review", "import", chat.root, file, "--annotator", "ann@b.org=ben")
    assert taken.exit_code == 0 and chat.reviewers == ["ann", "ben"], taken.exception


def test_options_that_do_not_fit_are_refused(project: Project, corpus: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["export", project.root], "name what to write"),
        (["export", project.root, "--label-studio", tmp_path / "tasks.xml"], "ends in .json"),
        (
            ["export", project.root, "--html", tmp_path / "p.html", "--suggest", "a", "--suggest", "b"],
            "of one run",
        ),
        (["import", project.root, corpus, "--annotator", "a", "--annotator", "b"], "expected one NAME"),
        (["import", project.root, corpus, "--annotator", "a", "--annotator", "1=b"], "expected one NAME"),
    ):
        refused = run("review", *arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.output.split("│")).replace("\n", ""), (
            refused.output
        )
    refused = run("review", "import", project.root, corpus, "--annotator", "1=ann")
    assert "is no export of Label Studio" in str(refused.exception)
    link = tmp_path / "tasks.xml"
    link.symlink_to(project.root / "project.yaml")
    refused = run("review", "export", project.root, "--label-studio", tmp_path / "tasks.json")
    assert "which would be lost" in str(refused.exception)
