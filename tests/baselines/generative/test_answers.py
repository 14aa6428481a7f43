"""The fixed form of an answer: what is rendered is read back, and every fault is counted and never repaired."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdecs.baselines.generative.answers import (
    FAULTS,
    Answer,
    few_shot_prompt,
    gold_answer,
    labels_of,
    parse,
    predictions_of,
    prompt,
    render,
)
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS, Dialogue, Evidence, Utterance
from kdecs.endpoint.answers import Cause
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import by_pair

LABELS = COARSE_EMOTIONS
TEXT = st.text(st.sampled_from(string.ascii_letters + " \n\t\"'\\{}[]:,é中"), min_size=1).filter(str.strip)


def dialogue_of(*texts: str, evidence: tuple[Evidence, ...] = ()) -> Dialogue:
    """A dialogue of two speakers whose last turn is happy for the given reasons."""
    turns = [Utterance(n, "AB"[n % 2], text, "neutral", None) for n, text in enumerate(texts, start=1)]
    last = turns[-1]
    turns[-1] = Utterance(last.turn, last.speaker, last.text, "happiness", evidence)
    return Dialogue("d", tuple(turns))


@st.composite
def answered(draw: st.DrawFn) -> tuple[Dialogue, int, Answer]:
    """A dialogue of random texts, a target, and a random right answer about it."""
    dialogue = dialogue_of(*draw(st.lists(TEXT, min_size=1, max_size=6)))
    target = draw(st.integers(1, len(dialogue.utterances)))
    causes = []
    for turn in draw(st.sets(st.integers(1, target))):
        text = dialogue.utterances[turn - 1].text
        start = draw(st.integers(0, len(text) - 1))
        span = text[start : draw(st.integers(start + 1, len(text)))]
        if span.strip():
            causes.append(Cause(turn, span))
    return dialogue, target, Answer(draw(st.sampled_from(LABELS)), tuple(causes))


@given(answered())
def test_what_is_rendered_is_read_back(case: tuple[Dialogue, int, Answer]) -> None:
    dialogue, target, answer = case
    assert "\n" not in render(answer)
    for written in (render(answer), f"\n{render(answer)}\n", f"```json\n{render(answer)}\n```"):
        parsed = parse(written, dialogue, target, LABELS)
        assert parsed.answer == answer
        assert not parsed.faults


def answer(emotion: object = "happiness", *causes: object) -> str:
    return json.dumps({"emotion": emotion, "causes": list(causes)})


@pytest.mark.parametrize(
    ("text", "faults", "emotion", "turns"),
    [
        ("", ["not in the form"], None, []),
        ("The emotion is happiness.", ["not in the form"], None, []),
        ('{"emotion": "happiness", "causes": [', ["not in the form"], None, []),
        ('{"emotion": "happiness"}', ["not in the form"], None, []),
        ('{"emotion": "happiness", "causes": [], "why": ""}', ["not in the form"], None, []),
        ('{"emotion": "anger", "emotion": "happiness", "causes": []}', ["not in the form"], None, []),
        ('{"emotion": "happiness", "causes": {}}', ["not in the form"], None, []),
        ("[]", ["not in the form"], None, []),
        ('{"emotion": "happiness", "causes": []} so', ["not in the form"], None, []),
        (f"{answer()}\n{answer()}", ["not in the form"], None, []),
        ('{"emotion": NaN, "causes": []}', ["not in the form"], None, []),
        ("\ud800", ["not in the form"], None, []),
        (answer("joy"), ["unknown emotion"], None, []),
        (answer(None), ["unknown emotion"], None, []),
        (answer(7), ["unknown emotion"], None, []),
        (answer(" Happiness"), [], "happiness", []),
        (answer("joy", {"turn": 1, "span": "We won"}), ["unknown emotion"], None, [1]),
        (answer("happiness", "We won"), ["malformed cause"], "happiness", []),
        (answer("happiness", {"turn": 1}), ["malformed cause"], "happiness", []),
        (answer("happiness", {"turn": True, "span": "We won"}), ["malformed cause"], "happiness", []),
        (answer("happiness", {"turn": "1", "span": "We won"}), ["malformed cause"], "happiness", []),
        (answer("happiness", {"turn": 1, "span": None}), ["malformed cause"], "happiness", []),
        (answer("happiness", {"turn": 0, "span": "We won"}), ["no such turn"], "happiness", []),
        (answer("happiness", {"turn": 9, "span": "We won"}), ["no such turn"], "happiness", []),
        (answer("happiness", {"turn": 3, "span": "Great"}), ["later turn"], "happiness", []),
        (answer("happiness", {"turn": 1, "span": " "}), ["empty span"], "happiness", []),
        # It stands in another turn.
        (answer("happiness", {"turn": 1, "span": "I scored"}), ["span not in the turn"], "happiness", []),
        (answer("happiness", {"turn": 1, "span": "we won"}), ["span not in the turn"], "happiness", []),
        (
            answer("happiness", {"turn": 1, "span": "We won"}, {"turn": 1, "span": "won"}, {"turn": 2, "span": "I"}),
            ["repeated turn"],
            "happiness",
            [1, 2],
        ),
    ],
)  # fmt: skip
def test_every_fault_is_counted_by_kind(
    text: str, faults: list[str], emotion: str | None, turns: list[int]
) -> None:
    dialogue = dialogue_of("We won the game !", "And I scored .", "Great !")
    parsed = parse(text, dialogue, 2, LABELS)
    assert list(parsed.faults) == faults
    assert set(faults) <= FAULTS.keys()
    assert (parsed.answer.emotion, [cause.turn for cause in parsed.answer.causes]) == (emotion, turns)


def test_a_span_may_differ_from_the_turn_in_white_space_alone() -> None:
    dialogue = dialogue_of("We  won\nthe game", "Yes .")
    assert "1 B: We won the game\n" in prompt(dialogue, 2, LABELS)
    parsed = parse(answer("happiness", {"turn": 1, "span": "won the game"}), dialogue, 2, LABELS)
    assert parsed.answer.causes == (Cause(1, "won\nthe game"),)
    # Where both occur, the one that is written exactly so.
    dialogue = dialogue_of("a  b a b", "Yes .")
    parsed = parse(answer("happiness", {"turn": 1, "span": "a b"}), dialogue, 2, LABELS)
    assert parsed.answer.causes == (Cause(1, "a b"),)


def test_the_gold_answer_names_the_longest_span_of_each_turn_that_is_shown() -> None:
    evidence = (
        Evidence(2, "scored"),
        Evidence(1, "We won"),
        Evidence(None, None),
        Evidence(2, "I scored"),
        Evidence(4, "So what"),
    )
    dialogue = dialogue_of("We won", "I scored", "Great !", evidence=evidence)
    assert gold_answer(dialogue, 3) == Answer("happiness", (Cause(1, "We won"), Cause(2, "I scored")))
    assert gold_answer(dialogue, 3, first=2).causes == (Cause(2, "I scored"),)
    assert gold_answer(dialogue, 1) == Answer("neutral")


def test_a_question_shows_nothing_after_the_target() -> None:
    dialogue, example = dialogue_of("We won", "I scored", "Bye"), dialogue_of("He left")
    for text in (prompt(dialogue, 2, LABELS), few_shot_prompt(dialogue, 2, LABELS, (example, 1))):
        assert "2 A: I scored\nTarget: turn 2, A\nAnswer:\n" in text
        assert "Bye" not in text
    assert render(gold_answer(example, 1)) in few_shot_prompt(dialogue, 2, LABELS, (example, 1))
    # The questions about a dialogue's targets begin alike, which is what lets a model read the beginning once.
    ends = [prompt(dialogue, target, LABELS).index("Target:") for target in (2, 3)]
    assert prompt(dialogue, 3, LABELS).startswith(prompt(dialogue, 2, LABELS)[: ends[0]])


def test_gold_answers_of_a_corpus_score_full_marks() -> None:
    corpus = read_corpus(bundled_sample("test"))
    labels = labels_of(corpus.dialogues)
    predictions = []
    for dialogue in corpus.dialogues:
        for target in range(1, len(dialogue.utterances) + 1):
            parsed = parse(render(gold_answer(dialogue, target)), dialogue, target, labels)
            assert not parsed.faults
            predictions += predictions_of(parsed.answer, dialogue, target)
    scores = evaluate(corpus, by_pair(predictions), universe="all")
    assert scores.values["utterance_macro_f1"] == scores.values["emotion_accuracy"] == 100
    assert {"neutral", "gratitude"} < set(labels)
    assert "excited" not in labels
