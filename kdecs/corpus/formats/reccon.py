"""RECCON's JSON, one object for a whole file, and JSON lines, one dialogue per line.

    RECCON JSON   {dialogue id: [[utterance, …]]}, the outer list always of length 1
    JSON lines    {"id": …, "utterances": [utterance, …]}

    utterance     turn (1..n), speaker, utterance (the text), emotion; an emotional one may also have
                  "expanded emotion cause evidence" (turns, or "b" for a cause outside the dialogue) and
                  "expanded emotion cause span" (of the same length, with "b" for each "b"); other keys are free

Source of the schema: RECCON (Poria et al. 2021). The readers of the other formats yield utterances in this schema, so
that one check serves all of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdecs.corpus.checking import (
    OTHER_ENCODING,
    Checker,
    NotJson,
    RawDialogue,
    decode_json,
    is_other_encoding,
    iter_lines,
    shorten,
)


def read_object(path: Path, checker: Checker) -> Iterator[RawDialogue]:
    """The raw dialogues of RECCON JSON."""
    try:
        # Whole, since in one JSON object only the parser knows where a dialogue ends.
        decoded = decode_json(path.read_bytes())
    except NotJson as error:
        checker.fault(error.found, error.expected)
        return
    if not isinstance(decoded.value, dict):
        checker.fault(shorten(decoded.value), "an object {dialogue id: [[utterance, …]]}")
        return
    # Both dialogues of a repeated id are checked; the checker reports the second one.
    items = getattr(decoded.value, "pairs", None) or list(decoded.value.items())
    for identifier, nested in items:
        if isinstance(nested, list) and len(nested) == 1 and isinstance(nested[0], list):
            yield identifier, nested[0]
        else:
            found = f"a list of {len(nested)}" if isinstance(nested, list) else shorten(nested)
            if isinstance(nested, list) and len(nested) == 1:
                found = f"a list of {shorten(nested[0])}"
            checker.fault(found, "a list of one list of utterances: [[utterance, …]]", dialogue=identifier)
    # Repeated dialogue ids are reported by the loop above.
    decoded.repeated = [value for value in decoded.repeated if value is not decoded.value]
    checker.note_unlocated_repeats(decoded)


def read_lines(path: Path, checker: Checker) -> Iterator[RawDialogue]:
    """The raw dialogues of JSON lines, one line in memory at a time."""
    for number, line in iter_lines(path):
        if number == 1 and is_other_encoding(line):
            checker.fault(OTHER_ENCODING, "UTF-8; save the file as UTF-8")
            return  # every other line would be a fault, too
        yield from read_line(line, f"line {number}", checker)


def read_line(line: bytes, place: str, checker: Checker) -> Iterator[RawDialogue]:
    """The id and the utterances of one line; nothing after a fault. A generator, since repeats are noted after use."""
    try:
        decoded = decode_json(line)
    except NotJson as error:
        checker.fault(error.found, error.expected, dialogue=place)
        return
    value: Any = decoded.value
    if not isinstance(value, dict) or "id" not in value or "utterances" not in value:
        checker.fault(shorten(value), 'an object {"id": …, "utterances": […]}', dialogue=place)
        return
    checker.note_repeated(value, dialogue=place)
    yield value["id"], value["utterances"]
    checker.note_unlocated_repeats(decoded, dialogue=place)
