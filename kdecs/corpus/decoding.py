"""From bytes to JSON values, with what Python's parser lets pass made visible.

Repeated keys, integers of absurd length, NaN, UTF-16 and deep nesting all reach the caller as a value to
judge or as `NotJson`, never as another exception.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BOM_UTF8 = b"\xef\xbb\xbf"
_BOMS_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MAX_INTEGER_DIGITS = 18
_FOUND_CHARACTERS = 60
OTHER_ENCODING = "UTF-16 or UTF-32 text or binary data"


class NotJson(ValueError):
    """Bytes that hold no JSON; `found` and `expected` are the two halves of a fault."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}, expected {expected}")
        self.found = found
        self.expected = expected


class RepeatedKeys(dict[str, Any]):
    """A JSON object that gives a key more than once; `pairs` holds every occurrence."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs

    def repeated(self) -> list[str]:
        """The keys that stand more than once, each once, in order."""
        counts = Counter(key for key, _ in self.pairs)
        return [key for key in self if counts[key] > 1]


class AbsurdInteger:
    """An integer literal with more digits than any count or turn needs."""

    def __init__(self, literal: str) -> None:
        self.num_digits = len(literal.lstrip("-"))

    def __repr__(self) -> str:
        return f"an integer of {self.num_digits} digits"


@dataclass
class Decoded:
    """A JSON value and the objects in it that repeat a key."""

    value: Any
    repeated: list[RepeatedKeys] = field(default_factory=list)


def decode_json(data: bytes) -> Decoded:
    """Parse UTF-8 JSON; raises NotJson with what was found and expected, never anything else."""
    text = decode_text(data)
    if not text.strip():
        raise NotJson("nothing", "JSON")
    repeated: list[RepeatedKeys] = []

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        plain = dict(pairs)
        if len(plain) == len(pairs):
            return plain
        repeated.append(RepeatedKeys(pairs))
        return repeated[-1]

    try:
        value = json.loads(
            text, object_pairs_hook=make_object, parse_int=_parse_int, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise NotJson(f"no JSON at {place} ({error.msg})", "JSON") from None
    except RecursionError:
        raise NotJson("JSON nested too deeply to read", "lists and objects a few levels deep") from None
    return Decoded(value, repeated)


def decode_text(data: bytes) -> str:
    """UTF-8 text without its byte-order mark; raises NotJson for UTF-16 and for bytes that are not UTF-8."""
    if data.startswith(_BOMS_UTF16) or b"\0" in data[:4]:
        raise NotJson(OTHER_ENCODING, "UTF-8; save the file as UTF-8")
    data = data.removeprefix(_BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"the byte 0x{data[error.start]:02x} at offset {error.start}", "UTF-8 text") from None


def iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank, streamed; the byte-order mark is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM_UTF8)
            if line.strip():
                yield number, line


def shorten(value: object) -> str:
    """A value for a message: one line of at most about 60 characters."""
    if isinstance(value, AbsurdInteger):
        return repr(value)
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value = value[: _FOUND_CHARACTERS + 1]
    text = repr(value)
    return text if len(text) <= _FOUND_CHARACTERS else text[:_FOUND_CHARACTERS] + "…"


def _parse_int(literal: str) -> int | AbsurdInteger:
    return int(literal) if len(literal) <= _MAX_INTEGER_DIGITS else AbsurdInteger(literal)


def _refuse_constant(name: str) -> None:
    raise NotJson(name, "JSON, which has no NaN or Infinity")
