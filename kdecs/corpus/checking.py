"""Check corpus files: bytes to JSON values, then JSON values to dialogues, with every fault and its place.

`decode_json` accepts any bytes and either returns a value or raises NotJson. `Checker` turns the decoded values of one
file into dialogues and collects all faults instead of stopping at the first, so that a user can repair a file in one
go. No content may crash either of them: repeated keys, huge integers, half of a surrogate pair and deep nesting are
faults like any other.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kdecs.corpus.schema import EMOTION_VARIANTS, KNOWN_EMOTIONS, Dialogue, Evidence, Fault, Utterance

_BOM_UTF8 = b"\xef\xbb\xbf"
_BOMS_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# Any such number fits into 64 bits.
_MAX_INTEGER_DIGITS = 18
_FOUND_CHARACTERS = 60
OTHER_ENCODING = "UTF-16 or UTF-32 text or binary data"


class NotJson(ValueError):
    """The bytes are not JSON; `found` and `expected` are the two halves of a fault."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}, expected {expected}")
        self.found = found
        self.expected = expected


class RepeatedKeys(dict[str, Any]):
    """A JSON object that contains a key more than once; `pairs` holds every occurrence."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs

    def repeated(self) -> list[str]:
        """The repeated keys, each once, in order."""
        counts = Counter(key for key, _ in self.pairs)
        return [key for key in self if counts[key] > 1]


class AbsurdInteger:
    """An integer literal with more digits than any count or turn needs: kept as text, since parsing it costs n²."""

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
    """Parse UTF-8 JSON. Raises NotJson with what was found and expected, and no other exception."""
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
    """Decode UTF-8 without its byte-order mark. Raises NotJson for UTF-16 and for bytes that are not UTF-8."""
    if is_other_encoding(data):
        raise NotJson(OTHER_ENCODING, "UTF-8; save the file as UTF-8")
    data = data.removeprefix(_BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"the byte 0x{data[error.start]:02x} at offset {error.start}", "UTF-8 text") from None


def is_other_encoding(data: bytes) -> bool:
    """Whether bytes begin like UTF-16 or UTF-32 text or binary data."""
    # UTF-8 JSON cannot begin with NUL characters, while UTF-16 and UTF-32 text has them between its ASCII letters.
    return data.startswith(_BOMS_UTF16) or b"\0" in data[:4]


def iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number (from 1) and bytes of each line that is not blank, without the byte-order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM_UTF8)
            if line.strip():
                yield number, line


def shorten(value: object) -> str:
    """A value as it appears in a message: one line of at most about 60 characters."""
    if isinstance(value, AbsurdInteger):
        return repr(value)
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        # Cut before repr, which would copy a text of any length.
        value = value[: _FOUND_CHARACTERS + 1]
    text = repr(value)
    return text if len(text) <= _FOUND_CHARACTERS else text[:_FOUND_CHARACTERS] + "…"


def _parse_int(literal: str) -> int | AbsurdInteger:
    return int(literal) if len(literal) <= _MAX_INTEGER_DIGITS else AbsurdInteger(literal)


def _refuse_constant(name: str) -> None:
    raise NotJson(name, "JSON, which has no NaN or Infinity")


EVIDENCE_KEY = "expanded emotion cause evidence"
SPAN_KEY = "expanded emotion cause span"
OUTSIDE = "b"
# No text, since RECCON's schema refuses an empty span: only a reader can say that its format has none.
WHOLE_UTTERANCE = object()
"""In the place of a span: the format names the utterance of a cause and no span in it."""

RawDialogue = tuple[Any, Any]
"""The id and the utterances of a dialogue in RECCON's schema, before they are checked."""
# Far above any real dialogue (RECCON's longest has 31 turns and 1,158 characters). The number of pairs grows as n²,
# so a broken file could otherwise fill the memory.
MAX_UTTERANCES = 2_000
MAX_CHARACTERS = 100_000
MAX_ID_CHARACTERS = 500


# A file converted from one in which later causes are data would fill the log.
_MOST_FUTURE_WARNINGS = 10
# Keys that look like those of causes: named where a file has no cause.
_LIKE_CAUSES = re.compile("cause|evidence|span", re.IGNORECASE)
_MOST_ODD_KEYS = 4


class Checker:
    """Checks the dialogues of one file; collects faults, replaced label variants and warnings.

    Memory grows by the ids of the dialogues, which must be unique.
    """

    def __init__(
        self,
        file: str,
        *,
        labelled: bool = True,
        emotions: Collection[str] = KNOWN_EMOTIONS,
        own_labels: Collection[str] = (),
    ) -> None:
        self.file = file
        self.fields: Mapping[str, str] = MappingProxyType({})
        """How the file's format names RECCON's keys; faults use its names."""
        self.labels: Mapping[str, str] = MappingProxyType({})
        """How the file's format names labels of kdecs."""
        self.has_later_causes = False
        """Whether causes after their target are data in this format, and no slip."""
        self.num_later_causes = 0
        self.labelled = labelled
        self.emotions = emotions
        self.own_labels = own_labels
        self.faults: list[Fault] = []
        self.normalised: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._ids: set[str] = set()
        self._has_causes = False
        self._odd_keys: dict[str, None] = {}
        self._located: set[int] = set()

    def use(self, fields: Mapping[str, str], labels: Mapping[str, str], *, has_later_causes: bool) -> None:
        """Speak of fields, labels and later causes as the file's format does."""
        self.fields, self.labels, self.has_later_causes = fields, labels, has_later_causes

    def fault(
        self,
        found: str,
        expected: str,
        *,
        dialogue: str | None = None,
        turn: int | None = None,
        field: str | None = None,
    ) -> None:
        """Note one fault of the file."""
        name = field if field is None else self.fields.get(field, field)
        self.faults.append(Fault(self.file, dialogue, turn, name, found, expected))

    @property
    def num_dialogues(self) -> int:
        """How many different dialogue ids the file has so far."""
        return len(self._ids)

    def dialogue(self, identifier: Any, utterances: Any, part: str) -> Dialogue | None:
        """The dialogue of raw values, or None if it has a fault; all of its faults are noted."""
        before = len(self.faults)
        if not isinstance(identifier, str) or not identifier.strip() or not is_unicode(identifier):
            self.fault(shorten(identifier), "a dialogue id: a string that is not empty", field="id")
            identifier = str(identifier) if isinstance(identifier, str) else None
        elif len(identifier) > MAX_ID_CHARACTERS:
            found, expected = f"{len(identifier)} characters", f"at most {MAX_ID_CHARACTERS}"
            self.fault(found, expected, dialogue=identifier, field="id")
        elif identifier in self._ids:
            self.fault("a second dialogue of this id", "each id once", dialogue=identifier, field="id")
        else:
            self._ids.add(identifier)
        if not isinstance(utterances, list):
            self.fault(shorten(utterances), "a list of utterances", dialogue=identifier, field="utterances")
            return None
        if not 1 <= len(utterances) <= MAX_UTTERANCES:
            expected = f"1 to {MAX_UTTERANCES} utterances"
            self.fault(f"{len(utterances)}", expected, dialogue=identifier, field="utterances")
            return None
        # Spans are searched in them, also if other fields of those utterances are faulty.
        texts = [u.get("utterance") if isinstance(u, dict) else None for u in utterances]
        parsed = [self._utterance(raw, n, texts, identifier) for n, raw in enumerate(utterances, start=1)]
        if len(self.faults) > before or identifier is None:
            return None
        return Dialogue(identifier, tuple(u for u in parsed if u is not None), part)

    def warn_without_causes(self) -> None:
        """Add a warning if no utterance of a labelled file has a cause, with the keys that may be misspelt."""
        if not self.labelled or self._has_causes or not self._ids:
            return
        if self.fields:
            self.warnings.append(f"{self.file}: no utterance has a cause")
            return
        odd = f" (there are {', '.join(map(shorten, self._odd_keys))})" if self._odd_keys else ""
        self.warnings.append(
            f'{self.file}: no utterance has a cause; causes are under the keys "{EVIDENCE_KEY}" and "{SPAN_KEY}"{odd}'
        )

    def count_later_causes(self) -> None:
        """Add a warning, once a file has been read, for the later causes that were not named one by one."""
        named = 0 if self.has_later_causes else _MOST_FUTURE_WARNINGS
        if self.num_later_causes > named:
            number, more = self.num_later_causes - named, "more " if named else ""
            lie = "cause lies" if number == 1 else "causes lie"
            self.warnings.append(
                f"{self.file}: {number} {more}{lie} after the target; no pair is made of that unless candidates.after "
                "reaches it"
            )

    def note_repeated(self, value: Any, *, dialogue: str | None, turn: int | None = None) -> None:
        """Note the keys that an object at a known place contains more than once."""
        if isinstance(value, RepeatedKeys) and id(value) not in self._located:
            self._located.add(id(value))
            for key in value.repeated():
                self.fault("the key more than once", "each key once", dialogue=dialogue, turn=turn, field=key)

    def note_unlocated_repeats(self, decoded: Decoded, *, dialogue: str | None = None) -> None:
        """Note repeated keys inside the values of free keys, which no other check looks into."""
        for value in decoded.repeated:
            self.note_repeated(value, dialogue=dialogue)

    def _utterance(self, raw: Any, number: int, texts: list[Any], dialogue: str | None) -> Utterance | None:
        before = len(self.faults)
        if not isinstance(raw, dict):
            self.fault(shorten(raw), "an utterance: an object", dialogue=dialogue, turn=number)
            return None
        self.note_repeated(raw, dialogue=dialogue, turn=number)
        self._turn(raw, number, dialogue)
        for key in ("speaker", "utterance"):
            self._text(raw, key, number, dialogue)
        emotion = self._emotion(raw, number, dialogue)
        evidence = self._evidence(raw, number, texts, dialogue)
        self._has_causes = self._has_causes or any(item.turn is not None for item in evidence or ())
        if not self._has_causes and len(self._odd_keys) < _MOST_ODD_KEYS:
            odd = (key for key in raw.keys() - {EVIDENCE_KEY, SPAN_KEY} if _LIKE_CAUSES.search(key))
            self._odd_keys.update(dict.fromkeys(sorted(odd)))
        if len(self.faults) > before:
            return None
        return Utterance(number, raw["speaker"], raw["utterance"], emotion, evidence)

    def _turn(self, raw: dict[str, Any], number: int, dialogue: str | None) -> None:
        expected = f"{number} (turns run from 1 without gaps, repeats or disorder)"
        if "turn" not in raw:
            self.fault("no such key", expected, dialogue=dialogue, turn=number, field="turn")
        # Not isinstance: true is an int to Python.
        elif type(raw["turn"]) is not int or raw["turn"] != number:
            self.fault(shorten(raw["turn"]), expected, dialogue=dialogue, turn=number, field="turn")

    def _text(self, raw: dict[str, Any], key: str, number: int, dialogue: str | None) -> None:
        value = raw.get(key)
        if key not in raw:
            found, expected = "no such key", "a string"
        elif not isinstance(value, str):
            found, expected = shorten(value), "a string"
        elif not value.strip():
            found, expected = shorten(value), "a string that is not empty"
        elif len(value) > MAX_CHARACTERS:
            found, expected = f"{len(value)} characters", f"at most {MAX_CHARACTERS}"
        elif not is_unicode(value):
            found, expected = shorten(value), "valid Unicode (it holds half of a surrogate pair)"
        else:
            return
        self.fault(found, expected, dialogue=dialogue, turn=number, field=key)

    def _emotion(self, raw: dict[str, Any], number: int, dialogue: str | None) -> str | None:
        value = raw.get("emotion")
        if value is None and not self.labelled:
            return None
        if (
            isinstance(value, str) and value in self.own_labels
        ):  # before the variants: a table may map them, too
            return value
        if isinstance(value, str):
            value = self.labels.get(value, value)
        if isinstance(value, str) and value in EMOTION_VARIANTS:
            self.normalised[value] += 1
            value = EMOTION_VARIANTS[value]
        if isinstance(value, str) and value in self.emotions:
            return value
        found = shorten(value) if "emotion" in raw else "no such key"
        expected = f"one of {', '.join(sorted(self.emotions))}"
        self.fault(found, expected, dialogue=dialogue, turn=number, field="emotion")
        return None

    def _evidence(
        self, raw: dict[str, Any], number: int, texts: list[Any], dialogue: str | None
    ) -> tuple[Evidence, ...] | None:
        if EVIDENCE_KEY not in raw and SPAN_KEY not in raw:
            return None
        before = len(self.faults)
        for key, other in ((EVIDENCE_KEY, SPAN_KEY), (SPAN_KEY, EVIDENCE_KEY)):
            if key not in raw:
                self.fault(
                    "no such key", f"a list, as {other} is there", dialogue=dialogue, turn=number, field=key
                )
            elif not isinstance(raw[key], list):
                self.fault(shorten(raw[key]), "a list", dialogue=dialogue, turn=number, field=key)
        if len(self.faults) > before:
            return None
        turns, spans = raw[EVIDENCE_KEY], raw[SPAN_KEY]
        if len(turns) != len(spans):
            expected = f"{len(turns)}, one for each of {EVIDENCE_KEY}"
            self.fault(f"{len(spans)} spans", expected, dialogue=dialogue, turn=number, field=SPAN_KEY)
        kept = []
        for position, turn in enumerate(turns):
            if not self._evidence_turn(turn, number, len(texts), dialogue) or position >= len(spans):
                continue
            if self._span(spans[position], turn, number, texts, dialogue):
                span = "" if spans[position] is WHOLE_UTTERANCE else spans[position]
                kept.append(Evidence(None, None) if turn == OUTSIDE else Evidence(turn, span))
        return tuple(kept) if len(self.faults) == before else None

    def _evidence_turn(self, turn: Any, number: int, num_utterances: int, dialogue: str | None) -> bool:
        if turn == OUTSIDE:
            return True
        if type(turn) is not int or not 1 <= turn <= num_utterances:
            expected = f'a turn from 1 to {num_utterances}, or "{OUTSIDE}"'
            self.fault(shorten(turn), expected, dialogue=dialogue, turn=number, field=EVIDENCE_KEY)
            return False
        # A warning, not a fault: only this pair is lost.
        if turn > number:
            self.num_later_causes += 1
            if not self.has_later_causes and self.num_later_causes <= _MOST_FUTURE_WARNINGS:
                self.warnings.append(
                    f"{self.file}, dialogue {dialogue}, turn {number}: "
                    f"the cause in turn {turn} lies in the future; the pair is dropped"
                )
        return True

    def _span(self, span: Any, turn: int | str, number: int, texts: list[Any], dialogue: str | None) -> bool:
        if span is WHOLE_UTTERANCE:
            return True
        if not isinstance(span, str):
            found, expected = shorten(span), "a string"
        # Only RECCON's schema has the sign; elsewhere "b" is a text like any other.
        elif not self.fields and (turn == OUTSIDE) != (span == OUTSIDE):
            found = f"{shorten(span)} beside the evidence {shorten(turn)}"
            expected = f'"{OUTSIDE}" beside "{OUTSIDE}" and nowhere else'
        elif turn == OUTSIDE:
            return True
        elif not span.strip():
            found, expected = shorten(span), "a span that is not empty"
        else:
            assert isinstance(turn, int)
            text = texts[turn - 1]
            # An utterance that is not a string has its own fault already.
            if not isinstance(text, str) or span in text:
                return True
            found, expected = shorten(span), f"an exact substring of utterance {turn}"
        self.fault(found, expected, dialogue=dialogue, turn=number, field=SPAN_KEY)
        return False


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON escapes can produce half of a surrogate pair, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
