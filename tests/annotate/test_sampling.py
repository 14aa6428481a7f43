"""Lists of what people should look at: every reason by hand, the order, and who gets what."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdecs.annotate.labels import Annotation, ReviewedTurn, TurnLabel, add_reviews
from kdecs.annotate.project import Project
from kdecs.annotate.sampling import Reason, Scored, annotation_of_predictions, ranked, ranked_by, work_list
from kdecs.cli import app
from kdecs.corpus.schema import FINE_EMOTIONS, Dialogue, Utterance
from kdecs.endpoint.answers import Cause
from kdecs.errors import PredictionError
from kdecs.evaluation.predictions import Prediction, write_predictions

CALM, TENSE = (
    Dialogue(name, tuple(Utterance(turn, "A", f"{name} {turn}", None, None) for turn in (1, 2)))
    for name in ("calm", "tense")
)
DIALOGUES = {"calm": CALM, "tense": TENSE}


def run_of(name: str, labels: dict[tuple[str, int], tuple[str | None, tuple[int, ...] | None]]) -> Annotation:
    turns = {
        key: TurnLabel(emotion, None if causes is None else tuple(Cause(turn, key[0]) for turn in causes))
        for key, (emotion, causes) in labels.items()
    }
    return Annotation(name, "model", turns)


FIRST = run_of(
    "first",
    {
        ("calm", 1): ("neutral", ()),
        ("calm", 2): ("hope", (1, 2)),
        ("tense", 1): ("worry", (1,)),
        ("tense", 2): ("hope", (1,)),
    },
)
SECOND = run_of(
    "second",
    {
        ("calm", 1): ("neutral", ()),
        ("calm", 2): ("hope", (1, 2)),
        ("tense", 1): ("anger", (1,)),
        ("tense", 2): ("hope", None),
    },
)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("disagreement", {("tense", 1): 0.5}),
        ("open", {("tense", 2): 1.0}),
        # hope is there four times, neutral twice, worry (the first of two) once.
        ("rare", {("calm", 1): 0.5, ("tense", 1): 0.75}),
        ("rule", {("tense", 2): 1.0}),
        ("confidence", {("tense", 2): 0.9}),
        ("causes", {}),
    ],
)
def test_every_reason_by_hand(reason: Reason, expected: dict[tuple[str, int], float]) -> None:
    scored = ranked([FIRST, SECOND], DIALOGUES, [reason], {("tense", 2): 0.9})
    found = {(item.dialogue.id, turn): score for item in scored for turn, score, _ in item.turns if score > 0}
    assert found == pytest.approx(expected)
    assert [item.dialogue.id for item in scored] == (["tense", "calm"] if expected else ["calm", "tense"])


def test_causes_that_differ_count_by_their_f1() -> None:
    other = run_of("other", {("calm", 2): ("hope", (1,))})
    [first, _] = ranked([FIRST, other], DIALOGUES, ["causes"], {})
    assert first.dialogue.id == "calm" and first.turns[1][1] == pytest.approx(1 - 2 / 3)


def test_a_system_that_predicts_causes_alone_has_a_say_about_them() -> None:
    teacher = run_of("teacher", {("calm", 2): (None, (1,)), ("tense", 2): (None, (1, 2))})
    [first, _] = ranked([FIRST, teacher], DIALOGUES, ["causes"], {})
    assert first.turns[1][1] == pytest.approx(1 - 2 / 3)
    scored = ranked([FIRST, teacher], DIALOGUES, ["open", "rule"], {})
    reasons = {item.dialogue.id: item.turns[1][2] for item in scored}
    # Both differ from the rule about one of the two dialogues, and no label of theirs is open.
    assert reasons == {"calm": {"open": 0.0, "rule": 0.5}, "tense": {"open": 0.0, "rule": 0.5}}


def test_a_system_that_predicts_causes_alone_has_no_say_about_neutral_turns() -> None:
    """It has no word for neutral: without a cause it agrees, and yet its causes are not those of the rule."""
    teacher = run_of("teacher", {("calm", 1): (None, ()), ("tense", 1): (None, ())})
    student = run_of("student", {("calm", 1): ("neutral", ()), ("tense", 1): ("worry", (1,))})
    reasons = {
        item.dialogue.id: item.turns[0][2] for item in ranked([student, teacher], DIALOGUES, ["rule"], {})
    }
    assert reasons == {"calm": {"rule": 0.0}, "tense": {"rule": 0.5}}
    # Where somebody else finds the turn emotional, all count again.
    other = run_of("other", {("calm", 1): ("hope", (1,))})
    scored = ranked([student, teacher, other], DIALOGUES, ["rule"], {})
    assert {item.dialogue.id: item.turns[0][2] for item in scored}["calm"] == {"rule": 0.5}


def test_strategies_order_by_their_reasons_and_chance_decides_the_rest() -> None:
    many = {str(n): Dialogue(str(n), CALM.utterances) for n in range(8)}
    unsure = {("5", 1): 0.5, ("2", 2): 0.9}

    def order(strategy: Any, seed: int, dialogues: dict[str, Dialogue] = many) -> list[str]:
        return [item.dialogue.id for item in ranked_by(strategy, [], dialogues, unsure, seed)]

    by_chance = order("random", 0)
    assert sorted(by_chance) == sorted(many) and order("random", 0) == by_chance != order("random", 1)
    # Dialogues that come later change nothing in the order of the others.
    fewer = {name: many[name] for name in reversed(many) if name != by_chance[0]}
    assert order("random", 0, fewer) == by_chance[1:]
    assert order("uncertainty", 0) == ["2", "5", *(name for name in by_chance if name not in ("2", "5"))]
    found = ranked_by("disagreement", [FIRST, SECOND], DIALOGUES, {}, 0)
    assert [item.dialogue.id for item in found] == ["tense", "calm"]


def test_the_work_is_shared_out_evenly_and_never_twice() -> None:
    dialogues = [Dialogue(str(n), CALM.utterances) for n in range(6)]
    scored = [Scored(dialogue, 1.0, [(1, 1.0, {"open": 1.0})]) for dialogue in dialogues]
    reviewers = {"ann": {"0"}, "ben": {"0", "1"}, "cem": set[str]()}
    lines = list(work_list(scored, reviewers, number=None, each=2))
    # Two have done dialogue 0, and one has done dialogue 1.
    assert [line["dialogue_id"] for line in lines] == ["1", "2", "3", "4", "5"]
    assert len(lines[0]["annotators"]) == 1 and lines[0]["annotators"] != ["ben"]
    counts = Counter(name for line in lines for name in line["annotators"])
    assert max(counts.values()) - min(counts.values()) <= 1 and counts.total() == 9
    assert [line["rank"] for line in work_list(scored, {}, number=2, each=None)] == [1, 2]


def test_the_command_needs_no_run_where_a_student_predicted(
    project: Project, gold: list[Dialogue], tmp_path: Path
) -> None:
    predictions, output = tmp_path / "student.jsonl", tmp_path / "list.jsonl"
    write_predictions(
        predictions,
        [Prediction(gold[1].id, 1, 1, "worry", True, gold[1].utterances[0].text.split()[0])],
    )
    lines = [{**json.loads(line), "score": 0.55} for line in predictions.read_text().splitlines()]
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    annotation, unsure = annotation_of_predictions(predictions, project.dialogues, FINE_EMOTIONS)
    assert unsure == {(gold[1].id, 1): pytest.approx(0.9)}
    assert annotation.labels[gold[1].id, 1].emotion == "worry"

    def run(*arguments: object) -> Any:
        words = ["annotate", "sample", project.root, "--output", output, *arguments]
        return CliRunner().invoke(app, list(map(str, words)))

    listed = run("--predictions", predictions, "--by", "confidence", "--number", 1, "--each", 2)
    assert listed.exit_code == 0, listed.output
    [line] = [json.loads(text) for text in output.read_text().splitlines()]
    assert (line["dialogue_id"], len(line["annotators"])) == (gold[1].id, 2)
    assert line["turns"] == [{"turn": 1, "score": 0.9, "reasons": {"confidence": 0.9}}]
    assert run("--by", "confidence").exit_code == 2
    assert "nobody has labelled" in str(run().exception)
    predictions.write_text(json.dumps(lines[0] | {"score": 2}))
    assert isinstance(run("--predictions", predictions).exception, PredictionError)


def test_next_leaves_out_what_somebody_has_labelled(
    project: Project, gold: list[Dialogue], tmp_path: Path
) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["annotate", "next", str(project.root), *map(str, arguments)])

    def names(*arguments: object) -> list[str]:
        found = run(*arguments)
        assert found.exit_code == 0, found.output
        return [json.loads(line)["dialogue_id"] for line in found.stdout.splitlines()]

    assert sorted(names("--by", "random")) == sorted(project.dialogues)
    assert "nobody has labelled" in str(run().exception)
    assert run("--by", "uncertainty").exit_code == 2
    predictions = tmp_path / "student.jsonl"
    write_predictions(predictions, [Prediction(dialogue.id, 1, 1, "worry", False, "") for dialogue in gold])
    assert "found no line with a score" in str(
        run("--by", "uncertainty", "--predictions", predictions).exception
    )
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    scores = dict(zip((dialogue.id for dialogue in gold), (0.1, 0.5, 0.8), strict=True))
    predictions.write_text(
        "".join(f"{json.dumps(line | {'score': scores[line['dialogue_id']]})}\n" for line in lines)
    )
    one, two, three = (dialogue.id for dialogue in gold)
    unsure = ("--by", "uncertainty", "--predictions", predictions)
    # The mean over the turns counts, and the dialogues differ in their number.
    means = {d.id: (1 - abs(2 * scores[d.id] - 1)) / len(d.utterances) for d in gold}
    expected = sorted(means, key=lambda name: -means[name])
    assert names(*unsure) == expected and names(*unsure, "-n", 1) == expected[:1]
    done = [
        ReviewedTurn(dialogue_id=two, turn=u.turn, emotion="neutral", causes=[], at="2026-01-01T00:00:00Z")
        for u in gold[1].utterances
    ]
    # A dialogue that is labelled in part is still to be finished.
    add_reviews(project.review_file("ben"), done[:-1])
    assert two in names(*unsure)
    add_reviews(project.review_file("ben"), done)
    assert set(names(*unsure)) == {one, three} == set(names("--predictions", predictions))
    output = tmp_path / "next.jsonl"
    listed = run(*unsure, "--output", output, "--each", 1)
    assert "2 of 3 dialogues, by uncertainty" in listed.stdout
    assert [len(json.loads(line)["annotators"]) for line in output.read_text().splitlines()] == [1, 1]
