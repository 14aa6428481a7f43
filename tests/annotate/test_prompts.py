"""The paper's question, and answers that are read strictly: every fault by its name, and no label that was guessed."""

import json
from collections import Counter

import pytest

from kdecs.annotate.prompts import (
    FAULTS,
    answer_schema,
    causes_prompt,
    emotions_prompt,
    read_causes,
    read_emotions,
    repeated_question,
)
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.endpoint.answers import Cause

LABELS = ("happiness", "worry", "neutral")
TEXTS = ("We  won !", "Good for you .", "I hope so , I hope .")
DIALOGUE = Dialogue(
    "d", tuple(Utterance(n, "AB"[n % 2], text, None, None) for n, text in enumerate(TEXTS, start=1))
)


def test_the_first_question_is_the_papers() -> None:
    assert emotions_prompt(DIALOGUE, LABELS).startswith(
        "Identify the emotion in each turn of the following dialogue. The emotion labels can only be selected from the "
        "following: happiness, worry, neutral.\n"
    )
    assert emotions_prompt(DIALOGUE, LABELS).endswith(
        "The dialogue is as follows:\n1 B: We won !\n2 A: Good for you .\n3 B: I hope so , I hope .\n"
    )
    asked = causes_prompt(DIALOGUE, {1: "happiness", 3: "worry"}, 0)
    assert "For each of the turns 1, 3 find" in asked
    assert asked.endswith(
        "1 B (happiness): We won !\n2 A: Good for you .\n3 B (worry): I hope so , I hope .\n"
    )
    assert "at most 2 after it" in causes_prompt(DIALOGUE, {1: "happiness"}, 2)
    schema = answer_schema("emotions", DIALOGUE, LABELS)["json_schema"]["schema"]
    assert schema["properties"]["emotions"]["items"]["properties"]["emotion"]["enum"] == list(LABELS)


def emotions(*pairs: object) -> str:
    return json.dumps({"emotions": [{"turn": turn, "emotion": label} for turn, label in pairs]})  # type: ignore[misc]


GOOD = ((1, "happiness"), (2, "neutral"), (3, "worry"))


@pytest.mark.parametrize(
    ("answer", "found", "faults"),
    [
        (emotions(*GOOD), {1: "happiness", 2: "neutral", 3: "worry"}, {}),
        (f"```json\n{emotions(*reversed(GOOD))}\n```", {1: "happiness", 2: "neutral", 3: "worry"}, {}),
        (emotions((1, " Happiness"), *GOOD[1:]), {1: "happiness", 2: "neutral", 3: "worry"}, {}),
        ("", {}, {"not in the form": 1}),
        ("Turn 1: happiness", {}, {"not in the form": 1}),
        (emotions(*GOOD)[:-5], {}, {"not in the form": 1}),
        (emotions(*GOOD) + " I hope this helps!", {}, {"not in the form": 1}),
        ('{"emotions": {}}', {}, {"not in the form": 1}),
        ('{"emotions": [], "note": ""}', {}, {"not in the form": 1}),
        (emotions(*GOOD[:2]), {1: "happiness", 2: "neutral"}, {"missing turn": 1}),
        (emotions(*GOOD[:2], (3, "joy")), {1: "happiness", 2: "neutral"}, {"unknown label": 1}),
        (emotions(*GOOD[:2], (3, None)), {1: "happiness", 2: "neutral"}, {"unknown label": 1}),
        (emotions(*GOOD, (4, "worry")), {1: "happiness", 2: "neutral", 3: "worry"}, {"no such turn": 1}),
        # Even if both say the same: whoever counts badly is asked again.
        (emotions(*GOOD, (3, "worry")), {1: "happiness", 2: "neutral"}, {"turn twice": 1}),
        (emotions(*GOOD, (3, "neutral")), {1: "happiness", 2: "neutral"}, {"turn twice": 1}),
        (
            emotions(("1", "worry"), *GOOD[1:]),
            {2: "neutral", 3: "worry"},
            {"malformed entry": 1, "missing turn": 1},
        ),
        (
            emotions((True, "worry"), *GOOD[1:]),
            {2: "neutral", 3: "worry"},
            {"malformed entry": 1, "missing turn": 1},
        ),
        ('{"emotions": [3]}', {}, {"malformed entry": 1, "missing turn": 3}),
    ],
)
def test_emotions_are_read_strictly(answer: str, found: dict[int, str], faults: dict[str, int]) -> None:
    reading = read_emotions(answer, DIALOGUE, LABELS)
    assert (reading.found, reading.kinds) == (found, Counter(faults))


def causes(*targets: object) -> str:
    return json.dumps(
        {
            "targets": [
                {"target": target, "causes": [{"turn": turn, "span": span} for turn, span in named]}
                for target, named in targets  # type: ignore[misc]
            ]
        }
    )


@pytest.mark.parametrize(
    ("answer", "found", "faults"),
    [
        (
            causes((1, [(1, "We won")]), (3, [(2, "Good"), (1, "We won !")])),
            {1: (Cause(1, "We  won"),), 3: (Cause(1, "We  won !"), Cause(2, "Good"))},
            {},
        ),
        (causes((1, []), (3, [])), {1: (), 3: ()}, {}),
        (causes((3, [])), {3: ()}, {"missing turn": 1}),
        (causes((1, []), (3, []), (3, [])), {1: ()}, {"turn twice": 1}),
        (causes((1, []), (2, []), (3, [])), {1: (), 3: ()}, {"not asked": 1}),
        (causes((1, []), (9, []), (3, [])), {1: (), 3: ()}, {"no such turn": 1}),
        # One bad cause spoils its target: the good one alone would pass for all of them.
        (causes((1, []), (3, [(1, "We won"), (2, "we lost")])), {1: ()}, {"span not in the turn": 1}),
        (causes((1, [(2, "Good")]), (3, [])), {3: ()}, {"later turn": 1}),
        (causes((1, [(1, " ")]), (3, [(4, "x")])), {}, {"empty span": 1, "no such turn": 1}),
        (causes((1, []), (3, [(1, "We"), (1, "won")])), {1: ()}, {"repeated turn": 1}),
        (causes((1, []), (3, [(1, 5)])), {1: ()}, {"malformed cause": 1}),
        (
            '{"targets": [{"target": 1, "causes": "none"}, {"target": 3, "causes": []}]}',
            {3: ()},
            {"malformed entry": 1},
        ),
    ],
)
def test_causes_are_read_strictly(
    answer: str, found: dict[int, tuple[Cause, ...]], faults: dict[str, int]
) -> None:
    reading = read_causes(answer, DIALOGUE, [1, 3], 0)
    assert (reading.found, reading.kinds) == (found, Counter(faults))
    assert reading.kinds.keys() <= FAULTS.keys()
    if faults:
        asked_again = repeated_question(reading.faults)
        assert all(text in asked_again for _, text in reading.faults)


def test_later_causes_are_taken_where_the_project_allows_them() -> None:
    answer = causes((1, [(2, "Good")]), (3, []))
    assert read_causes(answer, DIALOGUE, [1, 3], 1).found[1] == (Cause(2, "Good"),)


def test_a_repeated_question_stays_short() -> None:
    reading = read_emotions(emotions(*((n, "x") for n in range(100, 400))), DIALOGUE, LABELS)
    assert len(repeated_question(reading.faults).splitlines()) < 30
