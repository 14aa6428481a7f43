"""A dialogue for people: every span marked where it stands, at any width, with colours and without."""

import re
from io import StringIO

import pytest
from rich.console import Console

from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.evaluation.predictions import Prediction
from kdecs.student.predict.render import MARKS, render_dialogue
from kdecs.student.predict.streaming import PairPrediction

TEXTS = (
    "I got the job , after all those weeks of waiting by the telephone and hoping that somebody would call !",
    "That is wonderful news 😀 , we have to celebrate 你好 tonight .",
    "Yes .",
)


def dialogue_of(*texts, speaker="Speaker"):
    turns = (Utterance(n, f"{speaker}{n % 2}", t, None, None) for n, t in enumerate(texts, start=1))
    return Dialogue("d1", tuple(turns))


def cause(dialogue, target, candidate, span, emotion="happiness"):
    start = dialogue.utterances[candidate - 1].text.index(span)
    prediction = Prediction(dialogue.id, target, candidate, emotion, True, span)
    return PairPrediction(prediction, 0.9, (start, start + len(span)))


def no_cause(dialogue, target, emotion="neutral"):
    return PairPrediction(Prediction(dialogue.id, target, target, emotion, False, ""), 0.1, None)


def printed(dialogue, found, *, width=100, colours=False, **options):
    buffer = StringIO()
    console = Console(
        file=buffer, width=width, force_terminal=colours, color_system="truecolor" if colours else None
    )
    console.print(render_dialogue(dialogue, found, marks=not colours, **options))
    return buffer.getvalue()


@pytest.fixture
def dialogue():
    return dialogue_of(*TEXTS)


@pytest.fixture
def found(dialogue):
    return [
        cause(dialogue, 1, 1, "I got the job"),
        cause(dialogue, 2, 1, "got the job , after all", "surprise"),
        cause(dialogue, 2, 2, "wonderful news 😀", "surprise"),
        no_cause(dialogue, 3),
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(dialogue, found, width):
    from rich.cells import cell_len

    text = printed(dialogue, found, width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    words = re.sub("[⟦⟧]", "", text).split()
    for utterance in TEXTS:
        rest = iter(words)
        assert all(word in rest for word in utterance.split())


def test_spans_stand_between_brackets_where_there_is_no_colour(dialogue, found):
    text = " ".join(printed(dialogue, found, width=200).split())
    assert "\x1b" not in text
    assert "⟦I ⟦got the job⟧ , after all⟧ those weeks" in text
    assert "That is ⟦wonderful news 😀⟧ , we have" in text
    assert "because of this: “I got the job”" in text
    assert "because of 1, Speaker1: “got the job , after all”" in text
    assert all(emotion in text for emotion in ("happiness", "surprise", "neutral"))


def test_colours_underline_in_their_place(dialogue, found):
    text = printed(dialogue, found, width=200, colours=True)
    assert not any(mark in text for mark in MARKS)
    assert "\x1b[1;4;33mwonderful news 😀\x1b[0m" in text


def test_neutral_and_causeless_targets_have_no_reason(dialogue):
    text = printed(dialogue, [no_cause(dialogue, 1), no_cause(dialogue, 2, "fear")])
    assert "because" not in text and "fear" in text


def test_a_cause_without_a_span_is_named_by_its_turn(dialogue):
    found = [PairPrediction(Prediction("d1", 2, 1, "fear", True, ""), 0.9, None)]
    lines = [line.strip() for line in printed(dialogue, found).splitlines()]
    assert "because of 1, Speaker1" in lines


def test_a_whole_utterance_is_not_repeated(dialogue):
    text = printed(dialogue, [cause(dialogue, 2, 1, TEXTS[0]), cause(dialogue, 3, 3, "Yes .")], width=200)
    assert text.count(TEXTS[0]) == 1
    assert "because of 1, Speaker1: all of it" in text and "because of this: all of it" in text


def test_wrapped_reasons_keep_their_indent(dialogue):
    lines = printed(dialogue, [cause(dialogue, 2, 1, TEXTS[0][:80])], width=60).splitlines()
    first = next(n for n, line in enumerate(lines) if "because" in line)
    indent = lines[first].index("because")
    assert lines[first + 1].strip() and len(lines[first + 1]) - len(lines[first + 1].lstrip()) == indent


def test_text_cannot_drive_the_terminal():
    dialogue = dialogue_of("red \x1b[31m text\nand a line", speaker="E\x1b]0;title\x07")
    text = printed(dialogue, [no_cause(dialogue, 1)])
    assert "\x1b" not in text and "\x07" not in text
    assert "red  [31m text and a line" in text


def test_a_limit_tells_how_many_it_hides():
    dialogue = dialogue_of(*["Hello ."] * 20)
    assert "… 6 more utterances" in printed(dialogue, [])
    assert "more utterance" not in printed(dialogue, [], limit=None)
