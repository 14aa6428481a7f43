"""The text blocks of ECF 1.0, which systems for emotion-cause pairs (ECPE) read.

    12 3                                      a dialogue: its id and its number of utterances
    (3,1),(3,3)                               its pairs: emotional utterance, utterance of the cause
    1 | Chandler | neutral | We are late . | 00:20:06,166-00:20:07,208
    2 | Joey | neutral | So ?                 the times are optional
    3 | Chandler | anger | So we are late !

There are no spans, so the span of a cause is unknown. Spaces around the bars and blank lines between blocks are free.
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
    decode_text,
    shorten,
)
from kdecs.corpus.schema import NEUTRAL

_HEAD = re.compile(r"\s*(\S+)\s+([0-9]{1,9})\s*")
_UTTERANCE = re.compile(r"\s*[0-9]{1,9}\s*\|.*")
_PAIRS = re.compile(r"\s*(\(\s*[0-9]{1,9}\s*,\s*[0-9]{1,9}\s*\)[\s,]*)*")
_PAIR = re.compile(r"\(\s*([0-9]+)\s*,\s*([0-9]+)\s*\)")
_PAIRS_FIELD = "pairs"
FIELDS: Mapping[str, str] = {
    "turn": "number",
    "utterance": "text",
    EVIDENCE_KEY: _PAIRS_FIELD,
    SPAN_KEY: _PAIRS_FIELD,
}


def is_block(first: str, second: str) -> bool:
    """Whether two lines begin a block: an id with a number, then pairs (an empty line if there are none)."""
    return _HEAD.fullmatch(first) is not None and _PAIRS.fullmatch(second) is not None


def read_blocks(path: Path, checker: Checker) -> Iterator[RawDialogue]:
    """The raw dialogues of a file of blocks."""
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except NotJson as error:
        checker.fault(error.found, error.expected)
        return
    place = 0
    while place < len(lines):
        if not lines[place].strip():
            place += 1
            continue
        head = _HEAD.fullmatch(lines[place])
        if head is None:
            found = f"the line {shorten(lines[place])}"
            checker.fault(
                found, "the id of a dialogue and its number of utterances", dialogue=f"line {place + 1}"
            )
            # The rest of a block without a head is not worth a fault for each line.
            place += 1
            while place < len(lines) and _HEAD.fullmatch(lines[place]) is None:
                place += 1
            continue
        identifier, wanted = head[1], int(head[2])
        pairs = lines[place + 1] if place + 1 < len(lines) else ""
        place += 2
        utterances = []
        while place < len(lines) and _UTTERANCE.fullmatch(lines[place]):
            utterances.append(_utterance(lines[place]))
            place += 1
        if len(utterances) != wanted:
            checker.fault(
                f"{len(utterances)} utterances", f"{wanted}, as its first line says", dialogue=identifier
            )
        if _PAIRS.fullmatch(pairs) is None:
            expected = 'pairs such as "(3,1),(3,3)", or an empty line'
            checker.fault(f"the line {shorten(pairs)}", expected, dialogue=identifier, field=_PAIRS_FIELD)
        else:
            _add_causes(utterances, pairs, identifier, checker)
        yield identifier, utterances


def _utterance(line: str) -> dict[str, Any]:
    """The fields of a line by RECCON's keys; a missing one is left for the checker."""
    number, *rest = (field.strip() for field in line.split("|"))
    values: dict[str, Any] = {"turn": int(number)}
    return values | dict(zip(("speaker", "emotion", "utterance", "time"), rest, strict=False))


def _add_causes(utterances: list[dict[str, Any]], pairs: str, dialogue: str, checker: Checker) -> None:
    causes: dict[int, list[int]] = {
        turn: []
        for turn, utterance in enumerate(utterances, start=1)
        if utterance.get("emotion") not in (None, NEUTRAL)
    }
    for target, cause in ((int(a), int(b)) for a, b in _PAIR.findall(pairs)):
        if outside := [turn for turn in (target, cause) if not 1 <= turn <= len(utterances)]:
            expected = f"an utterance from 1 to {len(utterances)}"
            checker.fault(f"the utterance {outside[0]}", expected, dialogue=dialogue, field=_PAIRS_FIELD)
        else:
            causes.setdefault(target, []).append(cause)
    for target, turns in causes.items():
        utterances[target - 1] |= {EVIDENCE_KEY: turns, SPAN_KEY: [WHOLE_UTTERANCE] * len(turns)}
