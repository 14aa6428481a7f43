"""The merged corpus: the span rule worked by hand, votes, what stays open, and where every label comes from."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, gold_causes
from typer.testing import CliRunner

from kdecs.annotate.labels import Annotation, ReviewedCause, ReviewedTurn, TurnLabel, add_reviews
from kdecs.annotate.merging import accuracies, decide_span, merge, union_of
from kdecs.annotate.project import Project, create_project
from kdecs.cli import app
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import NEUTRAL, Dialogue, Utterance
from kdecs.endpoint.answers import Cause
from kdecs.errors import AnnotationError, OutputError

TEXT = "I lost my job and the rent is due ."


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        # One annotator, or two who say the same.
        (["my job"], "my job"),
        (["my job", "my job"], "my job"),
        # "lost my job" (11) and "my job and the rent" (19) share "my job" (6): at least half of 11.
        (["lost my job", "my job and the rent"], "lost my job and the rent"),
        # One inside the other: the intersection is the shorter one.
        (["I lost my job and the rent is due", "job"], "I lost my job and the rent is due"),
        # "I lost my job" (13) and "my job and the rent" (19) share 6: less than 6.5, and nobody else decides.
        (["I lost my job", "my job and the rent"], None),
        # "lost my" (7) and "my job and" (10) share 2.
        (["lost my", "my job and"], None),
        # Exactly half: "job and " (8) and "and the" (7) share 4 of 7; "my j" and "y job" share 3 of 4.
        (["job and ", "and the"], "job and the"),
        # Half of an even length: "lo" + "st" of "lost" (4) and "st my job" (9) share 2.
        (["lost", "st my job"], "lost my job"),
        # Apart: a third annotator decides for the one of the two that goes with the third span.
        (["lost my job", "rent is due", "the rent is due"], "rent is due"),
        (["lost my job", "rent is due", "lost my job"], "lost my job"),
        # The third goes with both, or with neither.
        (["lost my job", "rent is due", "I lost my job and the rent is due"], None),
        (["lost my job", "rent is due", "and"], None),
        # A fourth decides where the third did not.
        (["lost my job", "rent is due", "and", "rent"], "rent is due"),
        # Two that agree need no third.
        (["lost my job", "my job", "rent is due"], "lost my job"),
    ],
)
def test_the_span_rule_by_hand(spans: list[str], expected: str | None) -> None:
    assert decide_span(TEXT, spans) == expected


def test_a_repeated_span_counts_where_it_shares_most() -> None:
    text = "so sad , so very sad"
    assert union_of(text, "sad", "very sad") == "very sad"
    assert union_of(text, "so", "so very") == "so very"
    assert union_of("ab", "a", "b") is None


DIALOGUE = Dialogue(
    "d", tuple(Utterance(turn, "A", text, None, None) for turn, text in enumerate((TEXT, "Oh no !"), start=1))
)


def labels(name: str, *turns: tuple[str | None, dict[int, str] | None], kind: Any = "person") -> Annotation:
    found = {
        ("d", turn): TurnLabel(
            emotion, None if causes is None else tuple(Cause(*cause) for cause in causes.items())
        )
        for turn, (emotion, causes) in enumerate(turns, start=1)
    }
    return Annotation(name, kind, found)


def test_more_than_half_decide_emotions_and_cause_turns() -> None:
    ann = labels("ann", ("worry", {1: "lost my job"}), ("worry", {1: "my job", 2: "no"}))
    ben = labels("ben", ("worry", {1: "my job"}), ("sadness", {1: "job"}))
    cem = labels("cem", (NEUTRAL, {}), ("worry", {1: "rent"}))
    decided = merge([ann, ben, cem], {"d": DIALOGUE})
    assert (decided["d", 1].emotion, decided["d", 1].causes) == ("worry", {1: "lost my job"})
    # Turn 2 is named by one of three as its own cause; the emotion is that of two.
    assert (decided["d", 2].emotion, decided["d", 2].causes) == ("worry", {1: "my job"})
    rows = accuracies([ann, ben, cem], decided)
    assert [row["emotion_accuracy"] for row in rows] == [1.0, 0.5, 0.5]
    assert rows[0]["exact"] == 1.0 and rows[2]["exact"] == 0.0 and rows[0]["voted"] == 2


@pytest.mark.parametrize(
    ("annotations", "why"),
    [
        ([], "emotion: nobody labelled it"),
        ([labels("a", (None, None))], "emotion: nobody labelled it"),
        ([labels("a", ("worry", {})), labels("b", ("anger", {}))], "emotion: a worry, b anger"),
        ([labels("a", ("worry", None))], "causes: nobody decided them"),
        (
            [labels("a", ("worry", {1: "job"})), labels("b", ("worry", {}))],
            "causes: turn 1 is a cause to a of a, b",
        ),
        (
            [labels("a", ("worry", {1: "job"})), labels("b", ("worry", {1: "rent"}))],
            'causes: spans in turn 1: a "job", b "rent"',
        ),
    ],
)
def test_what_nobody_can_decide_stays_open(annotations: list[Annotation], why: str) -> None:
    decision = merge(annotations, {"d": DIALOGUE})["d", 1]
    assert [str(conflict) for conflict in decision.conflicts] == [f"d/1: {why}"]
    assert decision.causes is None and (decision.emotion is None) == why.startswith("emotion")


def test_people_outvote_models_on_the_turns_that_they_labelled() -> None:
    model = labels("m", ("anger", {}), ("anger", {}), kind="model")
    other = labels("n", ("anger", {}), ("anger", {}), kind="model")
    ann = labels("ann", ("worry", {}))
    decided = merge([ann, model, other], {"d": DIALOGUE})
    assert [decided["d", turn].emotion for turn in (1, 2)] == ["worry", "anger"]


def review(project: Project, name: str, gold: list[Dialogue], **changes: Any) -> None:
    lines = []
    for dialogue in gold:
        for u in dialogue.utterances:
            causes = {} if u.emotion == NEUTRAL else gold_causes(dialogue, u.turn)
            lines.append(
                ReviewedTurn(
                    dialogue_id=dialogue.id,
                    turn=u.turn,
                    emotion=str(u.emotion),
                    causes=[ReviewedCause(turn=turn, span=span) for turn, span in causes.items()],
                    at="2026-01-01T00:00:00Z",
                )
            )
    lines[0] = lines[0].model_copy(update=changes)
    add_reviews(project.review_file(name), lines)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["annotate", *map(str, arguments)])


def test_a_merged_corpus_is_valid_and_every_label_has_its_votes(
    project: Project, gold: list[Dialogue], server: ChatServer, tmp_path: Path
) -> None:
    assert run("run", project.root, "--model", "m", "--base-url", server.url).exit_code == 0
    output = project.root / "merged.json"
    merged = run("merge", project.root, "--output", output)
    assert merged.exit_code == 0, merged.output
    assert "100.0%" in merged.output and "Emotions of utterances (Table 1)" in merged.output
    assert CliRunner().invoke(app, ["corpus", "verify", str(output), "--labels", "fine"]).exit_code == 0
    for dialogue, found in zip(gold, read_corpus(output).dialogues, strict=True):
        for expected, utterance in zip(dialogue.utterances, found.utterances, strict=True):
            assert (utterance.text, utterance.emotion) == (expected.text, expected.emotion)
            spans = {item.turn: item.span for item in utterance.evidence or () if item.turn is not None}
            assert spans == ({} if expected.emotion == NEUTRAL else gold_causes(dialogue, expected.turn))
    lines = [json.loads(line) for line in (project.root / "merged.json.provenance.jsonl").open()]
    assert len(lines) == sum(len(dialogue.utterances) for dialogue in gold)
    recorded = {json.loads(line)["call"] for line in (project.run_folder("m") / "answers.jsonl").open()}
    for line in lines:
        [vote] = line["votes"]
        assert (vote["annotator"], vote["kind"], vote["model"]) == ("m", "model", "m")
        assert vote["emotion_call"] in recorded and vote["emotion"] == line["emotion"] and vote["at"]
        assert (vote["causes_call"] in recorded) == (line["emotion"] != NEUTRAL)
    # Once more over the same files, and as JSON lines.
    assert run("merge", project.root, "--output", output).exit_code == 0
    assert run("merge", project.root, "--output", tmp_path / "m.jsonl").exit_code == 0
    assert read_corpus(tmp_path / "m.jsonl").dialogues == read_corpus(output).dialogues
    for wrong, error in ((project.root / "dialogues.jsonl", OutputError), (Path("-"), SystemExit)):
        assert isinstance(run("merge", project.root, "--output", wrong).exception, error)


def test_open_decisions_are_listed_and_refused_or_left_out(
    project: Project, gold: list[Dialogue], tmp_path: Path
) -> None:
    review(project, "ann", gold)
    other = next(
        label for label in project.config.labels if label not in (NEUTRAL, gold[0].utterances[0].emotion)
    )
    review(project, "ben", gold, emotion=other, causes=[])
    output = tmp_path / "merged.json"
    refused = run("merge", project.root, "--output", output)
    assert isinstance(refused.exception, AnnotationError) and not output.exists()
    assert f"open: {gold[0].id}/1: emotion: ann" in refused.output
    listed = json.loads(run("merge", project.root, "--output", output, "--json").stdout)
    assert [(each["turn"], each["what"]) for each in listed["conflicts"]] == [(1, "emotion")]
    found = json.loads(run("merge", project.root, "--output", output, "--allow-open", "--json").stdout)
    assert found["statistics"]["dialogues"] == 2 and found["annotators"][1]["emotion_accuracy"] == 1.0
    output.unlink()
    allowed = run("merge", project.root, "--output", output, "--allow-open")
    assert allowed.exit_code == 0 and "2 dialogues (1 left out)" in allowed.output, allowed.output
    assert [dialogue.id for dialogue in read_corpus(output).dialogues] == [d.id for d in gold[1:]]
    # The third annotator settles it.
    review(project, "cem", gold)
    assert run("merge", project.root, "--output", output).exit_code == 0
    assert len(read_corpus(output).dialogues) == len(gold)
    # One annotator alone may be asked for.
    assert run("merge", project.root, "--output", output, "--annotator", "ben").exit_code == 0
    assert read_corpus(output).dialogues[0].utterances[0].emotion == other


def test_causes_outside_the_dialogue_and_labels_of_ones_own(tmp_path: Path) -> None:
    table, chat, output = (tmp_path / name for name in ("table.json", "chat.txt", "merged.json"))
    table.write_text('{"joy": "happiness", "neutral": "neutral"}')
    chat.write_text("Anna: We won !\nBen: Good .\n")
    project = create_project(tmp_path / "p", [chat], labels=str(table))
    turns = (("joy", []), ("neutral", []))
    lines = [
        ReviewedTurn(dialogue_id="1", turn=turn, emotion=emotion, causes=causes, at="2026-01-01T00:00:00Z")
        for turn, (emotion, causes) in enumerate(turns, start=1)
    ]
    add_reviews(project.review_file("ann"), lines)
    assert run("merge", project.root, "--output", output).exit_code == 0
    verified = CliRunner().invoke(app, ["corpus", "verify", str(output), "--table", str(table)])
    assert verified.exit_code == 0, verified.output
    [[first, second]] = json.loads(output.read_text())["1"]
    assert first["expanded emotion cause evidence"] == ["b"] and "expanded emotion cause span" not in second
