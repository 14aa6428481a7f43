"""Reading a corpus file: RECCON JSON or JSON lines (formats in kdecs.corpus.schema).

`read_corpus` refuses a faulty file with one line, `find_faults` lists every fault, `iter_dialogues` streams.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from kdecs.corpus.checking import OTHER_ENCODING, Checker, NotJson, decode_json, iter_lines, shorten
from kdecs.corpus.labels import LabelSet, emotions_of
from kdecs.corpus.schema import Corpus, Dialogue, Fault
from kdecs.errors import CorpusError

logger = logging.getLogger(__name__)

DAILYDIALOG, IEMOCAP = "dailydialog", "iemocap"
_IEMOCAP_ID = re.compile(r"Ses\d\d[FM]_")
_LINES_SUFFIXES = (".jsonl", ".ndjson")


def read_corpus(
    path: Path | str,
    *,
    labelled: bool = True,
    label_set: LabelSet = "any",
    part: str | None = None,
    log: bool = True,
) -> Corpus:
    """The dialogues of a file, label variants replaced and counted, pairs to the future warned of.

    Both are logged (`log_notes`) unless `log` is false, for callers that may yet refuse something else.
    `labelled=False` accepts utterances without emotion and evidence. `label_set` narrows the known emotions.
    `part` is the first word of the row ids; None finds it from the ids and the file's name (`corpus_part`).
    Raises CorpusError, one line: the first fault and how many there are.
    """
    path = Path(path)
    checker = Checker(str(path), labelled=labelled, emotions=emotions_of(label_set))
    dialogues = tuple(_dialogues(path, checker, part))
    if checker.faults:
        raise CorpusError(_first_fault(checker.faults, path))
    corpus = Corpus(path, dialogues, Counter(checker.normalised), tuple(checker.warnings))
    if log:
        log_notes(corpus)
    return corpus


def log_notes(corpus: Corpus) -> None:
    """Log what reading a corpus changed or warns of: label variants with their counts, dropped pairs."""
    for warning in corpus.warnings:
        logger.warning("%s", warning)
    if corpus.normalised:
        logger.warning("%s: label variants replaced: %s", corpus.path, count_variants(corpus.normalised))


def count_variants(normalised: Mapping[str, int]) -> str:
    """The replaced label variants with their counts, by name."""
    return ", ".join(f"{label} ({count})" for label, count in sorted(normalised.items()))


def iter_dialogues(path: Path | str, *, labelled: bool = True, part: str | None = None) -> Iterator[Dialogue]:
    """The dialogues one by one: JSON lines are streamed, RECCON JSON is loaded whole.

    Raises CorpusError at the first dialogue that has a fault.
    """
    path = Path(path)
    checker = Checker(str(path), labelled=labelled)
    yield from _dialogues(path, checker, part, on_dialogue=lambda: _refuse(checker))
    _refuse(checker)


def find_faults(path: Path | str, *, labelled: bool = True, label_set: LabelSet = "any") -> list[Fault]:
    """Every fault of a file in its order; an empty list where it passes. A missing file is one fault."""
    return scan_file(path, lambda dialogue: None, labelled=labelled, label_set=label_set).faults


def scan_file(
    path: Path | str,
    on_dialogue: Callable[[Dialogue], object],
    *,
    labelled: bool = True,
    label_set: LabelSet = "any",
    part: str | None = None,
) -> Checker:
    """Hand each sound dialogue over and note every fault of the others; keeps no dialogue itself."""
    path = Path(path)
    checker = Checker(str(path), labelled=labelled, emotions=emotions_of(label_set))
    for dialogue in _dialogues(path, checker, part):
        on_dialogue(dialogue)
    return checker


def check_file(path: Path | str, *, label_set: LabelSet = "any") -> tuple[Corpus, list[Fault]]:
    """The sound dialogues of a file and every fault of the others: for counting what a faulty file holds."""
    dialogues: list[Dialogue] = []
    checker = scan_file(path, dialogues.append, label_set=label_set)
    return Corpus(Path(path), tuple(dialogues), checker.normalised, tuple(checker.warnings)), checker.faults


def corpus_part(path: Path, dialogue_id: str) -> str:
    """The part of RECCON that a dialogue is of: "iemocap" by its id (Ses01F_…) or the file's name."""
    if _IEMOCAP_ID.match(dialogue_id) or IEMOCAP in path.name.lower():
        return IEMOCAP
    return DAILYDIALOG


def bundled_sample(split: str) -> Path:
    """The path of a bundled sample file: train, valid, test or unlabelled. Raises CorpusError if unknown."""
    path = Path(str(resources.files("kdecs.corpus") / "sample" / f"{split}.json"))
    if not path.is_file():
        raise CorpusError(f"no bundled sample {split!r}, expected train, valid, test or unlabelled")
    return path


def _dialogues(
    path: Path, checker: Checker, part: str | None, on_dialogue: Callable[[], None] | None = None
) -> Iterator[Dialogue]:
    """Sound dialogues; faults go to the checker. `on_dialogue` is called after each one, sound or not."""
    num_seen = 0
    if "\0" in str(path):
        checker.fault("a path with a NUL character", "a corpus file")
        return
    try:
        for identifier, utterances in _raw_dialogues(path, checker):
            num_seen += 1
            dialogue_part = part or corpus_part(path, identifier if isinstance(identifier, str) else "")
            dialogue = checker.dialogue(identifier, utterances, dialogue_part)
            if on_dialogue:
                on_dialogue()
            if dialogue is not None:
                yield dialogue
    except OSError as error:
        checker.fault(f"no readable file ({error.strerror or error})", "a corpus file")
    if num_seen == 0 and not checker.faults:
        checker.fault("no dialogue", "at least one")


def _raw_dialogues(path: Path, checker: Checker) -> Iterator[tuple[Any, Any]]:
    if holds_lines(path):
        yield from _raw_from_lines(path, checker)
        return
    try:
        decoded = decode_json(path.read_bytes())
    except NotJson as error:
        checker.fault(error.found, error.expected)
        return
    if not isinstance(decoded.value, dict):
        checker.fault(shorten(decoded.value), "an object {dialogue id: [[utterance, …]]}")
        return
    # Where an id stands twice both dialogues are checked; the checker notes the second one.
    items = getattr(decoded.value, "pairs", None) or list(decoded.value.items())
    for identifier, nested in items:
        if isinstance(nested, list) and len(nested) == 1 and isinstance(nested[0], list):
            yield identifier, nested[0]
        else:
            found = f"a list of {len(nested)}" if isinstance(nested, list) else shorten(nested)
            if isinstance(nested, list) and len(nested) == 1:
                found = f"a list of {shorten(nested[0])}"
            checker.fault(found, "a list of one list of utterances: [[utterance, …]]", dialogue=identifier)
    decoded.repeated = [value for value in decoded.repeated if value is not decoded.value]
    checker.note_unlocated_repeats(decoded)


def _raw_from_lines(path: Path, checker: Checker) -> Iterator[tuple[Any, Any]]:
    for number, line in iter_lines(path):
        place = f"line {number}"
        try:
            decoded = decode_json(line)
        except NotJson as error:
            is_other_encoding = number == 1 and error.found == OTHER_ENCODING
            checker.fault(error.found, error.expected, dialogue=None if is_other_encoding else place)
            if is_other_encoding:
                return  # all other lines would be faults too
            continue
        value = decoded.value
        if not isinstance(value, dict) or "id" not in value or "utterances" not in value:
            checker.fault(shorten(value), 'an object {"id": …, "utterances": […]}', dialogue=place)
            continue
        checker.note_repeated(value, dialogue=place)
        yield value["id"], value["utterances"]
        checker.note_unlocated_repeats(decoded, dialogue=place)


def holds_lines(path: Path) -> bool:
    """Whether a file is JSON lines: by its name, or by a first line that is a whole dialogue."""
    if path.suffix.lower() in _LINES_SUFFIXES:
        return True
    for _, line in iter_lines(path):
        if not line.rstrip().endswith(b"}") or b'"utterances"' not in line:
            return False
        try:
            value = decode_json(line).value
        except NotJson:
            return False
        return isinstance(value, dict) and isinstance(value.get("id"), str) and "utterances" in value
    return False


def _refuse(checker: Checker) -> None:
    if checker.faults:
        raise CorpusError(str(checker.faults[0]))


def _first_fault(faults: list[Fault], path: Path) -> str:
    if len(faults) == 1:
        return str(faults[0])
    return f"{faults[0]} (the first of {len(faults)} faults; kdecs corpus verify {path} lists all)"


def parse_dialogue(row: Any, place: str, *, default_id: str | None = None) -> Dialogue:
    """A dialogue from a JSON text (or its bytes) or from its object; `id` and `turn` may be left out.

    Raises CorpusError, one line, naming the place and the first fault.
    """
    checker = Checker(place, labelled=False)
    decoded = None
    if isinstance(row, str | bytes):
        try:
            decoded = decode_json(row.encode("utf-8", "surrogatepass") if isinstance(row, str) else row)
        except NotJson as error:
            raise CorpusError(f"{place}: not JSON: found {error.found}, expected one dialogue") from None
        row = decoded.value
    if not isinstance(row, dict) or not isinstance(row.get("utterances"), list):
        raise CorpusError(f"{place}: found {shorten(row)}, expected an object with a list `utterances`")
    checker.note_repeated(row, dialogue=None)
    utterances = [
        {"turn": turn, **utterance} if isinstance(utterance, dict) and "turn" not in utterance else utterance
        for turn, utterance in enumerate(row["utterances"], start=1)
    ]
    dialogue = checker.dialogue(row.get("id", default_id or place), utterances, "dailydialog")
    if decoded is not None:
        checker.note_unlocated_repeats(decoded)
    if checker.faults or dialogue is None:
        raise CorpusError(str(checker.faults[0]) if checker.faults else f"{place}: no dialogue")
    return dialogue
