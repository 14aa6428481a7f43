"""Read what a language model answers, strictly: JSON, labels of a list, and words that stand in the named turn.

White space around an answer and a Markdown fence, which chat models like to add, are no faults, nor are capitals in a
label. Nothing else is repaired: what cannot be used is counted by the name of its fault.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdecs.corpus.checking import NotJson, decode_json
from kdecs.corpus.schema import Dialogue, Utterance

_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Cause:
    """A turn that causes the emotion, and the words in it that say so."""

    turn: int
    span: str


def json_object(text: str, keys: set[str]) -> dict[str, Any] | None:
    """The JSON object that an answer is, if it has exactly these keys; None for anything else."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        decoded = decode_json((fenced[1] if fenced else text).encode("utf-8", "surrogatepass"))
    except NotJson:
        return None
    value = decoded.value
    return value if isinstance(value, dict) and not decoded.repeated and value.keys() == keys else None


def known_label(value: Any, labels: Sequence[str]) -> str | None:
    """The label of the list that a value names, or None."""
    if not isinstance(value, str):
        return None
    wanted = value.strip().casefold()
    return next((label for label in labels if label.casefold() == wanted), None)


def read_cause(item: Any, dialogue: Dialogue, last: int) -> Cause | str:
    """A cause of an answer, or the kind of its fault; `last` is the last turn that may be one.

    The span is looked for inside the named turn alone, because a sentence may occur in a dialogue twice.
    """
    if not isinstance(item, dict) or item.keys() != {"turn", "span"}:
        return "malformed cause"
    turn, span = item["turn"], item["span"]
    # Not isinstance: true is an int to Python.
    if type(turn) is not int or not isinstance(span, str):
        return "malformed cause"
    if not 1 <= turn <= len(dialogue.utterances):
        return "no such turn"
    if turn > last:
        return "later turn"
    if not span.strip():
        return "empty span"
    found = words_in(span, dialogue.utterances[turn - 1].text)
    return "span not in the turn" if found is None else Cause(turn, found)


def words_in(span: str, text: str) -> str | None:
    """The characters of a text that a span names, or None if the text does not contain them.

    They may differ from the span in white space alone, because a question shows each turn on one line.
    """
    for candidate in (span, span.strip()):
        if candidate in text:
            return candidate
    found = re.search(r"\s+".join(map(re.escape, span.split())), text)
    return found[0] if found else None


def turn_line(utterance: Utterance, note: str = "") -> str:
    """A turn as a question shows it, on one line; `note` stands behind the speaker."""
    return f"{utterance.turn} {one_line(utterance.speaker)}{note}: {one_line(utterance.text)}"


def one_line(text: str) -> str:
    """A text with each run of white space as one space."""
    return " ".join(text.split())
