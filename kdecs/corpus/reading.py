"""Read corpus files of any format (`kdecs.corpus.formats`), which their content tells.

Every stage reads its corpus here, and each function suits one purpose:

    read_corpus      all dialogues in memory: for evaluation, statistics and small files
    open_dialogues   a sequence that reads JSON lines on demand: for labelling and training at any size; of several
                     training files, the dialogues follow one another
    iter_dialogues   one pass over a file that may be unlabelled: for prediction
    scan_file        every fault of a file: for `kdecs corpus verify`
    iter_raw         one pass with the values of the file beside each dialogue: for `kdecs corpus convert`
    parse_dialogue   one dialogue from a request or from a line of standard input
"""

import logging
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from kdecs.corpus.checking import Checker, NotJson, RepeatedKeys, decode_json, is_unicode, shorten
from kdecs.corpus.formats.reccon import read_line
from kdecs.corpus.formats.recognise import format_of, holds_lines
from kdecs.corpus.schema import (
    COARSE_EMOTIONS,
    FINE_EMOTIONS,
    FINE_TO_COARSE,
    KNOWN_EMOTIONS,
    NO_TABLE,
    Corpus,
    Dialogue,
    Fault,
    LabelSet,
    emotions_of,
)
from kdecs.errors import CorpusError

logger = logging.getLogger(__name__)

DAILYDIALOG, IEMOCAP = "dailydialog", "iemocap"
# RECCON's files put the split before IEMOCAP's own ids, sometimes twice (test.test.Ses05F_impro01).
_IEMOCAP_ID = re.compile(r"(\w+\.)*Ses\d\d[FM]_")
_CHANGED = "the file changed while it was in use: put it back and run the same command again"


class Dialogues(Protocol):
    """Dialogues by position: a tuple, or a file that is read on demand."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Dialogue]: ...

    def __getitem__(self, position: int, /) -> Dialogue: ...


def read_corpus(
    path: Path | str,
    *,
    labelled: bool = True,
    label_set: LabelSet = "any",
    part: str | None = None,
    log: bool = True,
    table: Mapping[str, str] = NO_TABLE,
) -> Corpus:
    """Read a whole file into memory; label variants are replaced and counted.

    Replaced variants and causes in the future are logged (`log_notes`) unless `log` is false, which suits callers
    that may still refuse something else. `labelled=False` accepts utterances without emotion and evidence.
    `label_set` narrows the known emotions, and the labels of `table` are known, too: the caller maps them with it.
    `part` is the first word of the row ids; None derives it from the dialogue id (`corpus_part`).

    Raises CorpusError, one line: the first fault and how many there are.
    """
    path = Path(path)
    checker = Checker(str(path), labelled=labelled, emotions=emotions_of(label_set), own_labels=table)
    dialogues = tuple(_dialogues(path, checker, part))
    if checker.faults:
        raise CorpusError(_first_fault(checker.faults, path))
    corpus = Corpus(path, dialogues, Counter(checker.normalised), tuple(checker.warnings))
    if log:
        log_notes(corpus)
    return corpus


def open_dialogues(
    path: Path | tuple[Path, ...], table: Mapping[str, str] = NO_TABLE, *, labelled: bool = True
) -> Dialogues:
    """The dialogues of a file, or of several: JSON lines are read on demand, other formats are loaded.

    The labels of `table` are known, too: the caller maps them with it. `labelled=False` accepts utterances without
    emotion and evidence.
    Raises CorpusError for a loaded file that has a fault; JSON lines are checked when they are iterated.
    """
    if isinstance(path, tuple):
        return JoinedDialogues(path, table, labelled=labelled)
    # A missing file goes to read_corpus, which reports it.
    is_lines = path.is_file() and holds_lines(path)
    if is_lines:
        return LineDialogues(path, table, labelled=labelled)
    return read_corpus(path, labelled=labelled, table=table).dialogues


class JoinedDialogues:
    """The dialogues of several files, one file after another.

    Iterating raises CorpusError for an id that two files have, since pairs are known by it. The first complete pass
    warns if one file has fine labels and another has none.
    """

    def __init__(
        self, paths: Sequence[Path], table: Mapping[str, str] = NO_TABLE, *, labelled: bool = True
    ) -> None:
        self._paths = paths
        self._table = table
        self._parts = [open_dialogues(path, table, labelled=labelled) for path in paths]
        self._is_warned = False

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[Dialogue]:
        file_of: dict[str, Path] = {}
        labels: dict[Path, set[str]] = {path: set() for path in self._paths}
        for path, part in zip(self._paths, self._parts, strict=True):
            for dialogue in part:
                if (first := file_of.setdefault(dialogue.id, path)) != path:
                    raise CorpusError(
                        f"{path}: has a dialogue with the id {shorten(dialogue.id)}, and so has {first}; training "
                        "files that are used together need different ids: kdecs corpus convert --id-prefix writes a "
                        "copy with other ones"
                    )
                labels[path].update(u.emotion for u in dialogue.utterances if u.emotion is not None)
                yield dialogue
        if not self._is_warned:
            self._is_warned = True
            _warn_of_label_sets(labels, self._table)

    def __getitem__(self, position: int, /) -> Dialogue:
        for part in self._parts:
            if position < len(part):
                return part[position]
            position -= len(part)
        raise IndexError(position)


def _warn_of_label_sets(labels: Mapping[Path, Set[str]], table: Mapping[str, str]) -> None:
    """Warn of files of which one calls "worry" what another calls "fear", unless a table maps both."""
    if table:
        return
    only_fine = set(FINE_EMOTIONS) - set(COARSE_EMOTIONS)
    fine = [path for path, found in labels.items() if found & only_fine]
    coarse = [path for path, found in labels.items() if found and not found & only_fine]
    if fine and coarse:
        logger.warning(
            "%s: has fine emotions (such as %s), and %s has coarse ones alone, so that a student learns two labels for "
            "one emotion; set corpus.emotions=coarse to map the fine ones",
            fine[0],
            min(labels[fine[0]] & only_fine),
            coarse[0],
        )


class LineDialogues:
    """The dialogues of a JSON-lines file, each parsed when it is needed; memory holds 8 bytes for each.

    Iterating checks the file as a whole (repeated ids, for instance), and the first complete pass logs its notes.
    Access by position parses that line alone. Threads may share an instance.
    """

    def __init__(self, path: Path, table: Mapping[str, str] = NO_TABLE, *, labelled: bool = True) -> None:
        self.path = path
        self._table = table
        self._labelled = labelled
        self._starts: array[int] | None = None
        self._is_logged = False

    def __iter__(self) -> Iterator[Dialogue]:
        checker = self._checker()
        yield from _dialogues(self.path, checker, None, on_dialogue=lambda: _refuse(checker))
        _refuse(checker)
        if not self._is_logged:
            # A training iterates once per epoch and should not repeat the notes.
            self._is_logged = True
            log_notes(Corpus(self.path, (), checker.normalised, tuple(checker.warnings)))

    def __len__(self) -> int:
        return len(self._line_starts())

    def __getitem__(self, position: int, /) -> Dialogue:
        starts = self._line_starts()
        if position >= len(starts):
            raise CorpusError(f"{self.path}: found {len(starts)} dialogues, expected more; {_CHANGED}")
        # Opened for each access: threads that share an instance cannot share a file position.
        with self.path.open("rb") as file:
            file.seek(starts[position])
            line = file.readline()
        checker, dialogue = self._checker(), None
        # Checked again as when it was iterated: the file may have been replaced since, and positions mean nothing then.
        for identifier, utterances in read_line(line, f"at byte {starts[position]}", checker):
            part = corpus_part(identifier if isinstance(identifier, str) else "")
            dialogue = checker.dialogue(identifier, utterances, part)
        if checker.faults or dialogue is None:
            raise CorpusError(f"{checker.faults[0]}; {_CHANGED}")
        return dialogue

    def _checker(self) -> Checker:
        return Checker(str(self.path), labelled=self._labelled, own_labels=self._table)

    def _line_starts(self) -> "array[int]":
        """The byte at which each line that is not blank begins: a scan for line ends, without parsing."""
        if self._starts is None:
            # A list of integers would take four times the memory.
            starts, place = array("q"), 0
            with self.path.open("rb") as file:
                for line in file:
                    if line.strip():
                        starts.append(place)
                    place += len(line)
            self._starts = starts
        return self._starts


def iter_dialogues(
    path: Path | str,
    *,
    labelled: bool = True,
    part: str | None = None,
    table: Mapping[str, str] = NO_TABLE,
) -> Iterator[Dialogue]:
    """Yield the dialogues one by one: JSON lines are streamed, other formats are loaded as a whole.

    The labels of `table` are known, too. Raises CorpusError at the first dialogue that has a fault.
    """
    path = Path(path)
    checker = Checker(str(path), labelled=labelled, own_labels=table)
    # Also after a dialogue that is not yielded: the first fault ends the pass.
    yield from _dialogues(path, checker, part, on_dialogue=lambda: _refuse(checker))
    _refuse(checker)


def iter_raw(path: Path, checker: Checker) -> Iterator[tuple[Dialogue, Any]]:
    """Yield each dialogue with its utterances as the file has them, in RECCON's schema with all free keys.

    Raises CorpusError at the first dialogue that has a fault.
    """
    yield from _with_raw(path, checker, None, on_dialogue=lambda: _refuse(checker))
    _refuse(checker)


def find_faults(path: Path | str, *, labelled: bool = True, label_set: LabelSet = "any") -> list[Fault]:
    """Every fault of a file in its order; an empty list if the file is valid. A missing file is one fault."""
    return scan_file(path, lambda dialogue: None, labelled=labelled, label_set=label_set).faults


def scan_file(
    path: Path | str,
    on_dialogue: Callable[[Dialogue], object],
    *,
    labelled: bool = True,
    label_set: LabelSet = "any",
    part: str | None = None,
    table: Mapping[str, str] = NO_TABLE,
) -> Checker:
    """Pass each valid dialogue to `on_dialogue` and collect every fault of the others; no dialogue is kept."""
    path = Path(path)
    checker = Checker(str(path), labelled=labelled, emotions=emotions_of(label_set), own_labels=table)
    for dialogue in _dialogues(path, checker, part):
        on_dialogue(dialogue)
    return checker


def check_file(
    path: Path | str, *, label_set: LabelSet = "any", table: Mapping[str, str] = NO_TABLE
) -> tuple[Corpus, list[Fault]]:
    """The valid dialogues of a file and every fault of the others, so that a faulty file can be counted, too."""
    dialogues: list[Dialogue] = []
    checker = scan_file(path, dialogues.append, label_set=label_set, table=table)
    return Corpus(Path(path), tuple(dialogues), checker.normalised, tuple(checker.warnings)), checker.faults


def parse_dialogue(row: Any, place: str, *, default_id: str | None = None) -> Dialogue:
    """Parse one dialogue from JSON text or bytes, or from the decoded object; `id` and `turn` are optional.

    Raises CorpusError, one line, which names `place` and the first fault.
    """
    checker = Checker(place, labelled=False)
    decoded = None
    if isinstance(row, str | bytes):
        try:
            # A lone surrogate survives this encoding, so that the decoder reports it as any other fault.
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


def read_table(path: Path | str) -> dict[str, str]:
    """FINE_TO_COARSE, overridden by the entries of a file that holds a JSON object {label: label}.

    The labels on the left may be a corpus' own; those on the right are known ones.
    Raises CorpusError, one line, if the file is not such an object, has a label twice or maps one to an unknown one.
    """
    path = Path(path)
    try:
        decoded = decode_json(path.read_bytes())
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror or error}, expected a table of labels") from None
    except NotJson as error:
        raise CorpusError(f"{path}: found {error.found}, expected {error.expected}") from None
    if not isinstance(decoded.value, dict):
        raise CorpusError(f"{path}: found {shorten(decoded.value)}, expected an object {{label: label}}")
    if isinstance(decoded.value, RepeatedKeys):
        label = decoded.value.repeated()[0]
        raise CorpusError(f"{path}: found the label {shorten(label)} more than once, expected each once")
    for label, coarse in decoded.value.items():
        if not label.strip() or not is_unicode(label):
            raise CorpusError(f"{path}: found the label {shorten(label)}, expected a text that is not empty")
        if not isinstance(coarse, str) or coarse not in KNOWN_EMOTIONS:
            known = ", ".join(sorted(KNOWN_EMOTIONS))
            raise CorpusError(
                f"{path}: the entry {shorten(label)}: found {shorten(coarse)}, expected one of {known}"
            )
    return {**FINE_TO_COARSE, **decoded.value}


def log_notes(corpus: Corpus) -> None:
    """Log what reading changed (label variants with their counts) and what it warns about (dropped pairs)."""
    for warning in corpus.warnings:
        logger.warning("%s", warning)
    if corpus.normalised:
        logger.warning("%s: label variants replaced: %s", corpus.path, count_variants(corpus.normalised))


def count_variants(normalised: Mapping[str, int]) -> str:
    """The replaced label variants with their counts, sorted by name."""
    return ", ".join(f"{label} ({count})" for label, count in sorted(normalised.items()))


def corpus_part(dialogue_id: str) -> str:
    """The part of RECCON that a dialogue belongs to, by its id: IEMOCAP's are Ses01F_… or train.Ses01F_…"""
    return IEMOCAP if _IEMOCAP_ID.match(dialogue_id) else DAILYDIALOG


def bundled_sample(split: str) -> Path:
    """The path of a bundled sample file: train, valid, test or unlabelled. Raises CorpusError for another name."""
    path = Path(str(resources.files("kdecs.corpus") / "sample" / f"{split}.json"))
    if not path.is_file():
        raise CorpusError(f"no bundled sample {split!r}, expected train, valid, test or unlabelled")
    return path


def _dialogues(
    path: Path, checker: Checker, part: str | None, on_dialogue: Callable[[], None] | None = None
) -> Iterator[Dialogue]:
    """Yield the valid dialogues; faults go to the checker. `on_dialogue` is called after each one, valid or not."""
    return (dialogue for dialogue, _ in _with_raw(path, checker, part, on_dialogue))


def _with_raw(
    path: Path, checker: Checker, part: str | None, on_dialogue: Callable[[], None] | None = None
) -> Iterator[tuple[Dialogue, Any]]:
    num_seen = 0
    if "\0" in str(path):
        checker.fault("a path with a NUL character", "a corpus file")
        return
    try:
        if (
            path.is_fifo() or path.is_char_device()
        ):  # its format shows only in a first read, which a pipe allows once
            checker.fault("a pipe or a device", "a corpus file, which can be read more than once")
            return
        found = format_of(path)
        checker.use(found.fields, found.labels, has_later_causes=found.has_later_causes)
        for identifier, utterances in found.read(path, checker):
            num_seen += 1
            dialogue_part = part or corpus_part(identifier if isinstance(identifier, str) else "")
            dialogue = checker.dialogue(identifier, utterances, dialogue_part)
            if on_dialogue:
                on_dialogue()
            if dialogue is not None:
                yield dialogue, utterances
    except OSError as error:
        checker.fault(f"no readable file ({error.strerror or error})", "a corpus file")
    # An empty file is more likely an accident than a corpus.
    if num_seen == 0 and not checker.faults:
        checker.fault("no dialogue", "at least one")
    checker.count_later_causes()


def _refuse(checker: Checker) -> None:
    """Raise at the first fault, without a count: the rest of the file has not been read yet."""
    if checker.faults:
        raise CorpusError(str(checker.faults[0]))


def _first_fault(faults: list[Fault], path: Path) -> str:
    if len(faults) == 1:
        return str(faults[0])
    return f"{faults[0]} (the first of {len(faults)} faults; kdecs corpus verify {path} lists all)"
