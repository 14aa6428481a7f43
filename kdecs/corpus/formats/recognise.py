"""Which format a corpus file has, by its content; a name decides only between two that a damaged file could have.

| format | how it begins |
|---|---|
| `semeval` | `[` and `{` |
| `jsonl` | a line that is a whole object with `id` and `utterances` |
| `table` | a line with the columns dialogue, turn, speaker and text |
| `ecpe` | a line with an id and a number, then one with pairs |
| `transcript` | a line `SPEAKER: TEXT` |
| `reccon` | anything else |
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from kdecs.corpus.checking import (
    Checker,
    NotJson,
    RawDialogue,
    decode_json,
    decode_text,
    is_other_encoding,
    iter_lines,
)
from kdecs.corpus.formats import ecpe, plain, reccon, semeval

FormatName = Literal["reccon", "jsonl", "semeval", "ecpe", "table", "transcript"]
_LINES_SUFFIXES = (".jsonl", ".ndjson")
# {"tr_1": [[: what RECCON's JSON begins with.
_OBJECT_OF_DIALOGUES = re.compile(rb'\s*\{\s*("(?:[^"\\]|\\.)*"\s*:\s*\[\s*\[|$)')
_LIST_OF_OBJECTS = re.compile(rb"\s*\[\s*\{")
_PREFIX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Format:
    """A reader of raw dialogues, the names of its fields in faults, and the labels that it has for kdecs' labels."""

    name: FormatName
    read: Callable[[Path, Checker], Iterator[RawDialogue]]
    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    has_later_causes: bool = False
    """Whether a cause after its target is data, and not a slip that deserves a warning."""


_FORMATS = {
    known.name: known
    for known in (
        Format("reccon", reccon.read_object),
        Format("jsonl", reccon.read_lines),
        Format("semeval", semeval.read_conversations, semeval.FIELDS, semeval.JOY, True),
        Format("ecpe", ecpe.read_blocks, ecpe.FIELDS, semeval.JOY, True),
        Format("table", plain.read_table, plain.TABLE_FIELDS, semeval.JOY),
        Format("transcript", plain.read_transcript, plain.TRANSCRIPT_FIELDS),
    )
}


def format_of(path: Path) -> Format:
    """The format of a file that can be read more than once."""
    return _FORMATS[_name_of(path)]


def holds_lines(path: Path) -> bool:
    """Whether a file is JSON lines, which can be read one dialogue at a time."""
    return _name_of(path) == "jsonl"


def _name_of(path: Path) -> FormatName:
    with path.open("rb") as file:
        prefix = file.read(_PREFIX_BYTES).removeprefix(b"\xef\xbb\xbf")
    # RECCON's reader names such a fault, too.
    by_suffix: FormatName = "jsonl" if path.suffix.lower() in _LINES_SUFFIXES else "reccon"
    if is_other_encoding(prefix):
        return by_suffix
    text = prefix.lstrip()
    if _LIST_OF_OBJECTS.match(text):
        return "semeval"
    if text.startswith(b"{"):
        return _object_or_lines(path, by_suffix)
    if not text or text.startswith((b"[", b'"')):
        return by_suffix
    # As text: a first line beyond the prefix is none of a table, block or transcript that anybody writes.
    try:
        lines = decode_text(_cut(prefix)).lstrip().splitlines()
    except NotJson:
        return by_suffix
    first, second = (*lines, "", "")[:2]
    if plain.columns_of(first):
        return "table"
    if ecpe.is_block(first, second):
        return "ecpe"
    return "transcript" if plain.said(first) else by_suffix


def _object_or_lines(path: Path, by_suffix: FormatName) -> FormatName:
    """JSON lines if the first line that is not blank is a complete dialogue."""
    for _, line in islice(iter_lines(path), 1):
        if line.rstrip().endswith(b"}") and b'"utterances"' in line:
            try:
                value = decode_json(line).value
            except NotJson:
                break
            if isinstance(value, dict) and isinstance(value.get("id"), str) and "utterances" in value:
                return "jsonl"
        if _OBJECT_OF_DIALOGUES.match(line.rstrip()):
            return "reccon"
    return by_suffix


def _cut(prefix: bytes) -> bytes:
    """A prefix without a character that its end cuts in two."""
    return prefix.decode("utf-8", "ignore").encode() if len(prefix) == _PREFIX_BYTES else prefix
