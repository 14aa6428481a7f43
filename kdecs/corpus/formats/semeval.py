"""The JSON of SemEval-2024 Task 3 (ECF 2.0), and how its emotions and spans stand for those of kdecs.

    [{"conversation_ID": 1,
      "conversation": [{"utterance_ID": 1, "text": …, "speaker": …, "emotion": …}, …],
      "emotion-cause_pairs": [["3_surprise", "1_I realize I am totally naked"], …]}, …]

A pair has the emotional utterance with its emotion, and the utterance of the cause with the text of the span. Subtask 2
has no spans: ["3_surprise", "1"]. Emotions and pairs may be missing, and other keys are free. A cause in a later
utterance is data in this corpus.

A target has causes (perhaps none) if the conversation has the key of the pairs and the target is emotional or part of a
pair. The label joy is kdecs' happiness.

Source: Wang et al. 2024, SemEval-2024 Task 3.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdecs.corpus.checking import (
    EVIDENCE_KEY,
    SPAN_KEY,
    WHOLE_UTTERANCE,
    Checker,
    NotJson,
    RawDialogue,
    decode_json,
    shorten,
)
from kdecs.corpus.schema import EMOTION_VARIANTS, FINE_TO_COARSE, NEUTRAL, Dialogue

PAIRS_KEY = "emotion-cause_pairs"
EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
"""The emotional labels of the task, in the order of its scorer; the seventh label is neutral."""

# Each label of kdecs in the task's words. Those of RECCON's IEMOCAP part have no coarse label in kdecs.
LABELS: Mapping[str, str] = {
    label: {"happiness": "joy"}.get(coarse, coarse)
    for label, coarse in (
        FINE_TO_COARSE
        | {coarse: coarse for coarse in FINE_TO_COARSE.values()}
        | {"excited": "happiness", "frustrated": "anger"}
    ).items()
}
JOY: Mapping[str, str] = {"joy": "happiness"}

FIELDS: Mapping[str, str] = {
    "id": "conversation_ID",
    "utterances": "conversation",
    "turn": "utterance_ID",
    "utterance": "text",
    EVIDENCE_KEY: PAIRS_KEY,
    SPAN_KEY: PAIRS_KEY,
}
"""The names of the fields in faults of such a file."""

_OWN_KEYS = {"utterance_ID": "turn", "text": "utterance"}
# More digits than any turn needs, and few enough to be parsed at once.
_MAX_DIGITS = 18
_EMOTION_SIDE = re.compile(r"([0-9]{1,9})_(.+)", re.DOTALL)
_CAUSE_SIDE = re.compile(r"([0-9]{1,9})(?:_(.*))?", re.DOTALL)
_PAIR = '["3_surprise", "1_the span\'s text"], or ["3_surprise", "1"] without spans'


def conversation_id(dialogue: Dialogue) -> int | str:
    """A dialogue's id as the task writes it: a number, which is what most ids are, or else the id itself."""
    is_number = dialogue.id.isascii() and dialogue.id.isdecimal() and len(dialogue.id) <= _MAX_DIGITS
    return int(dialogue.id) if is_number and str(int(dialogue.id)) == dialogue.id else dialogue.id


def read_conversations(path: Path, checker: Checker) -> Iterator[RawDialogue]:
    """The raw dialogues of a file of either subtask, labelled or not."""
    try:
        decoded = decode_json(path.read_bytes())
    except NotJson as error:
        checker.fault(error.found, error.expected)
        return
    if not isinstance(decoded.value, list):
        checker.fault(shorten(decoded.value), "a list of conversations")
        return
    for number, raw in enumerate(decoded.value, start=1):
        place = f"conversation {number} of the list"
        if not isinstance(raw, dict):
            checker.fault(shorten(raw), "an object with conversation_ID and conversation", dialogue=place)
            continue
        identifier = raw.get("conversation_ID")
        # Not isinstance for numbers: true is an int to Python.
        if type(identifier) is not int and not isinstance(identifier, str):
            found = shorten(identifier) if "conversation_ID" in raw else "no such key"
            checker.fault(found, "an integer", dialogue=place, field="conversation_ID")
            continue
        name = str(identifier)
        checker.note_repeated(raw, dialogue=name)
        utterances = raw.get("conversation")
        if not isinstance(utterances, list):
            found = shorten(utterances) if "conversation" in raw else "no such key"
            checker.fault(found, "a list of utterances", dialogue=name, field="conversation")
            continue
        renamed = [_renamed(utterance) for utterance in utterances]
        for turn, utterance in enumerate(utterances, start=1):
            checker.note_repeated(utterance, dialogue=name, turn=turn)
        if PAIRS_KEY in raw:
            _add_causes(renamed, raw[PAIRS_KEY], name, checker)
        yield name, renamed
    checker.note_unlocated_repeats(decoded)


def _renamed(utterance: Any) -> Any:
    """An utterance under the names of RECCON's schema; what is no object is left for the checker."""
    if not isinstance(utterance, dict):
        return utterance
    # RECCON's keys of causes would be taken for annotations that the pairs do not have.
    kept = {key: value for key, value in utterance.items() if key not in (EVIDENCE_KEY, SPAN_KEY)}
    return {_OWN_KEYS.get(key, key): value for key, value in kept.items()}


def _add_causes(utterances: list[Any], pairs: Any, dialogue: str, checker: Checker) -> None:
    """Give each target its causes as RECCON writes them; a pair with a fault is noted and left out."""
    if not isinstance(pairs, list):
        checker.fault(shorten(pairs), "a list of pairs", dialogue=dialogue, field=PAIRS_KEY)
        return
    causes: dict[int, list[tuple[int, object]]] = {
        turn: []
        for turn, utterance in enumerate(utterances, start=1)
        if isinstance(utterance, dict) and utterance.get("emotion") not in (None, NEUTRAL)
    }
    for pair in pairs:
        sides = pair if isinstance(pair, list) and len(pair) == 2 else ()
        if not sides or not all(isinstance(side, str) for side in sides):
            checker.fault(shorten(pair), f"a pair {_PAIR}", dialogue=dialogue, field=PAIRS_KEY)
            continue
        left, right = _EMOTION_SIDE.fullmatch(sides[0]), _CAUSE_SIDE.fullmatch(sides[1])
        if left is None or right is None:
            odd = sides[0] if left is None else sides[1]
            checker.fault(shorten(odd), f"a side of a pair {_PAIR}", dialogue=dialogue, field=PAIRS_KEY)
            continue
        target, cause, span = int(left[1]), int(right[1]), right[2]
        where: dict[str, Any] = {"dialogue": dialogue, "field": PAIRS_KEY}
        if outside := [turn for turn in (target, cause) if not 1 <= turn <= len(utterances)]:
            checker.fault(f"the utterance {outside[0]}", f"an utterance from 1 to {len(utterances)}", **where)
            continue
        if not isinstance(utterances[target - 1], dict):
            continue  # reported where the utterances are checked
        said = utterances[target - 1].get("emotion")
        if isinstance(said, str) and _canonical(said) != _canonical(left[2]):
            checker.fault(
                f"the emotion {shorten(left[2])}",
                f"{shorten(said)}, as the utterance has it",
                turn=target,
                **where,
            )
            continue
        if span is not None and not span.strip():
            checker.fault(shorten(sides[1]), f"a side of a pair {_PAIR}", turn=target, **where)
            continue
        causes.setdefault(target, []).append((cause, WHOLE_UTTERANCE if span is None else span))
    for target, found in causes.items():
        utterances[target - 1] |= {EVIDENCE_KEY: [turn for turn, _ in found], SPAN_KEY: [s for _, s in found]}


def _canonical(emotion: str) -> str:
    return JOY.get(emotion, EMOTION_VARIANTS.get(emotion, emotion))
