"""Dialogues without causes: tables (CSV, TSV) and transcripts.

table        a first line with the columns dialogue, turn, speaker, text and perhaps emotion, in any order and case,
             separated by commas, semicolons or tabs; then an utterance per line, a dialogue's lines together.
             Other columns are free
transcript   SPEAKER: TEXT, an utterance per line, with a blank line between dialogues, which are numbered from 1
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from kdecs.corpus.checking import Checker, NotJson, RawDialogue, decode_text, shorten

COLUMNS = ("dialogue", "turn", "speaker", "text")
_FREE = "emotion"
TABLE_FIELDS: Mapping[str, str] = {"id": "dialogue", "utterance": "text"}
TRANSCRIPT_FIELDS: Mapping[str, str] = {"utterance": "text"}
_DELIMITERS = ("\t", ",", ";")
# No quotes or brackets: a piece of JSON is no transcript.
_SPEAKER = re.compile(r"""\s*([^\s:{}\[\]"|,][^:{}\[\]"|]{0,79}):(?!//)""")
# csv refuses longer cells with an error that names no turn; the length of texts is checked later.
_MAX_CELL = 1_000_000


def columns_of(line: str) -> tuple[str, dict[str, int]] | None:
    """The delimiter of a table and the place of each known column by its first line; None if it is no such line."""
    for delimiter in _DELIMITERS:
        names = [name.strip().strip('"').strip().lower() for name in line.rstrip("\r\n").split(delimiter)]
        if set(COLUMNS) <= set(names):
            return delimiter, {name: names.index(name) for name in (*COLUMNS, _FREE) if name in names}
    return None


def said(line: str) -> tuple[str, str] | None:
    """Speaker and text of a transcript's line; None if it has another form."""
    found = _SPEAKER.match(line)
    if found is None or not (text := line[found.end() :].strip()):
        return None
    return found[1].strip(), text


def read_table(path: Path, checker: Checker) -> Iterator[RawDialogue]:
    """The raw dialogues of a table."""
    try:
        text = decode_text(path.read_bytes())
    except NotJson as error:
        checker.fault(error.found, error.expected)
        return
    start = len(text) - len(text.lstrip())
    head, _, body = text[start:].partition("\n")
    found = columns_of(head)
    if found is None:
        checker.fault(f"the line {shorten(head)}", f"the columns {', '.join(COLUMNS)}")
        return
    delimiter, places = found
    width = len(head.rstrip("\r").split(delimiter))
    first = text[:start].count("\n") + 2
    for identifier, rows in groupby(
        _rows(body, delimiter, width, first, checker), key=lambda row: row[places["dialogue"]]
    ):
        utterances: list[dict[str, Any]] = []
        for row in rows:
            turn = row[places["turn"]].strip()
            # A text that is no number is left for the checker, which says where it stands.
            number: Any = int(turn) if re.fullmatch("[0-9]{1,9}", turn) else turn
            values = {
                "turn": number,
                "speaker": row[places["speaker"]].strip(),
                "utterance": row[places["text"]].strip(),
            }
            if _FREE in places and row[places[_FREE]].strip():
                values["emotion"] = row[places[_FREE]].strip().lower()
            utterances.append(values)
        yield identifier.strip(), utterances


def _rows(body: str, delimiter: str, width: int, first: int, checker: Checker) -> Iterator[list[str]]:
    """The rows of the right width; the others are faults."""
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) == width:
                yield row
            else:
                place = f"line {first + reader.line_num - 1}"
                expected = f"{width}, as in the first line (quote a text that holds the separator)"
                checker.fault(f"{len(row)} cells", expected, dialogue=place)
    except csv.Error as error:
        checker.fault(
            f"a table that cannot be read ({error})",
            "quotes that close",
            dialogue=f"line {first + reader.line_num - 1}",
        )
    finally:
        csv.field_size_limit(limit)


def read_transcript(path: Path, checker: Checker) -> Iterator[RawDialogue]:
    """The raw dialogues of a transcript; a line of another form is a fault."""
    try:
        lines = decode_text(path.read_bytes()).splitlines()
    except NotJson as error:
        checker.fault(error.found, error.expected)
        return
    blocks = [
        list(block) for is_text, block in groupby(lines, key=lambda line: bool(line.strip())) if is_text
    ]
    for number, block in enumerate(blocks, start=1):
        utterances = []
        for turn, line in enumerate(block, start=1):
            found = said(line)
            if found is None:
                checker.fault(
                    f"the line {shorten(line.strip())}", "SPEAKER: TEXT", dialogue=str(number), turn=turn
                )
                continue
            utterances.append({"turn": turn, "speaker": found[0], "utterance": found[1]})
        # Its faults are noted; what is left of it has gaps.
        if len(utterances) == len(block):
            yield str(number), utterances
