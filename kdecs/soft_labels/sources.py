"""The dialogues of a split by place: a loaded list (RECCON JSON), or lines of a file that is never held whole.

A place is (offset, length): the index in the list and 0, or the line's bytes in the file. Memory is that of one line,
apart from 16 bytes for each dialogue of the evaluation splits where `drop_cross_split` is set.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.cross_split import text_digest
from kdecs.corpus.decoding import NotJson, decode_json, shorten
from kdecs.corpus.labels import map_dialogue
from kdecs.corpus.reading import corpus_part, count_variants, holds_lines
from kdecs.corpus.schema import Dialogue
from kdecs.corpus.splits import emotion_table, read_split, training_dialogues
from kdecs.corpus.validation import Checker
from kdecs.errors import CorpusError

logger = logging.getLogger(__name__)

Place = tuple[int, int]
_BUCKETS = 1 << 16


class Source(Protocol):
    """The labelled dialogues of one split."""

    def scan(self) -> Iterator[tuple[Place, Dialogue]]:
        """Every dialogue of the split with its place, in the file's order. Raises CorpusError."""
        ...

    def read(self, place: Place) -> Dialogue:
        """The dialogue at a place. Raises CorpusError where the file changed."""
        ...


class LoadedSource:
    """Dialogues that are in memory."""

    def __init__(self, dialogues: Sequence[Dialogue]) -> None:
        self.dialogues = dialogues

    def scan(self) -> Iterator[tuple[Place, Dialogue]]:
        """Every dialogue with its index."""
        for index, dialogue in enumerate(self.dialogues):
            yield (index, 0), dialogue

    def read(self, place: Place) -> Dialogue:
        """The dialogue of an index."""
        return self.dialogues[place[0]]


class LinesSource:
    """Dialogues of a JSON-lines file, read one by one."""

    def __init__(
        self,
        path: Path,
        *,
        table: Mapping[str, str] | None = None,
        dropped: frozenset[bytes] = frozenset(),
        share: float = 1.0,
        share_seed: int = 0,
    ) -> None:
        self.path = path
        self._table = table
        self._dropped = dropped
        self._share_seed = share_seed
        self._file: BinaryIO | None = None
        self._last_kept = self._threshold(share) if share < 1 else b""

    def scan(self) -> Iterator[tuple[Place, Dialogue]]:
        """Every dialogue that is kept with its bytes in the file; replaced label variants are logged.

        Raises CorpusError for a fault, or where no dialogue is there or left.
        """
        num_lines = num_kept = 0
        replaced: Counter[str] = Counter()
        for number, offset, line in self._lines():
            num_lines = number
            dialogue = self._parse(line, f"line {number}", replaced)
            if self._is_kept(dialogue):
                num_kept += 1
                yield (offset, len(line)), dialogue
        if not num_lines:
            raise CorpusError(f"{self.path}: found no dialogue, expected at least one")
        if not num_kept:
            raise _none_left(self.path)
        if replaced:
            logger.warning("%s: label variants replaced: %s", self.path, count_variants(replaced))

    def read(self, place: Place) -> Dialogue:
        """The dialogue of a line; a file that changed since it was scanned is refused."""
        offset, length = place
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(offset)
        return self._parse(self._file.read(length), f"byte {offset}")

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, byte offset and bytes of each line that is not blank."""
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)

    def _parse(self, line: bytes, place: str, replaced: Counter[str] | None = None) -> Dialogue:
        # A checker of its own for each line: one for the file would keep every id.
        checker = Checker(str(self.path))
        dialogue = None
        try:
            decoded = decode_json(line)
        except NotJson as error:
            checker.fault(error.found, error.expected, dialogue=place)
        else:
            value = decoded.value
            if not isinstance(value, dict) or "id" not in value or "utterances" not in value:
                checker.fault(shorten(value), 'an object {"id": …, "utterances": […]}', dialogue=place)
            else:
                checker.note_repeated(value, dialogue=place)
                identifier = value["id"] if isinstance(value["id"], str) else ""
                part = corpus_part(self.path, identifier)
                dialogue = checker.dialogue(value["id"], value["utterances"], part)
                checker.note_unlocated_repeats(decoded, dialogue=place)
        if checker.faults or dialogue is None:
            raise CorpusError(f"{checker.faults[0]} (kdecs corpus verify {self.path} lists all faults)")
        if replaced is not None:
            replaced.update(checker.normalised)
        return dialogue if self._table is None else map_dialogue(dialogue, self._table)

    def _is_kept(self, dialogue: Dialogue) -> bool:
        if self._dropped and text_digest(dialogue) in self._dropped:
            return False
        return not self._last_kept or self._rank(dialogue) <= self._last_kept

    def _rank(self, dialogue: Dialogue) -> bytes:
        """The place of a dialogue among all, as `training_subset` ranks them."""
        return hashlib.blake2b(f"{self._share_seed}\0{dialogue.id}".encode()).digest()

    def _threshold(self, share: float) -> bytes:
        """The rank of the last dialogue that a share keeps: counted by bucket first, then exactly in one bucket."""
        counts = [0] * _BUCKETS
        for rank in self._ranks():
            counts[int.from_bytes(rank[:2], "big")] += 1
        if not any(counts):
            return b""  # nothing to choose from, which the scan refuses
        keep = math.ceil(share * sum(counts) - 1e-9)
        bucket = before = 0
        while before + counts[bucket] < keep:
            before += counts[bucket]
            bucket += 1
        ranks = sorted(rank for rank in self._ranks() if int.from_bytes(rank[:2], "big") == bucket)
        return ranks[keep - before - 1]

    def _ranks(self) -> Iterator[bytes]:
        for number, _, line in self._lines():
            dialogue = self._parse(line, f"line {number}")
            if not (self._dropped and text_digest(dialogue) in self._dropped):
                yield self._rank(dialogue)


def open_sources(config: CorpusConfig) -> dict[str, Source]:
    """The labelled dialogues by split; the training split as `training_dialogues` gives it. Raises CorpusError."""
    table = emotion_table(config)
    sources: dict[str, Source] = {"train": _training_source(config, table)}
    for split, path in (("valid", config.valid), ("test", config.test)):
        if path is not None:
            sources[split] = _source(config, path, table)
    return sources


def _source(config: CorpusConfig, path: Path, table: Mapping[str, str] | None) -> Source:
    if _is_lines(path):
        return LinesSource(path, table=table)
    return LoadedSource(read_split(config, path).dialogues)


def _training_source(config: CorpusConfig, table: Mapping[str, str] | None) -> Source:
    if not _is_lines(config.train):
        if not (dialogues := training_dialogues(config)):
            raise _none_left(config.train)
        return LoadedSource(dialogues)
    dropped: frozenset[bytes] = frozenset()
    if config.drop_cross_split:
        others = [path for path in (config.valid, config.test) if path is not None]
        dropped = frozenset(
            text_digest(dialogue) for path in others for _, dialogue in _source(config, path, None).scan()
        )
    return LinesSource(
        config.train,
        table=table,
        dropped=dropped,
        share=config.train_share,
        share_seed=config.train_share_seed,
    )


def _none_left(path: Path) -> CorpusError:
    return CorpusError(
        f"{path}: every dialogue's text stands in another split too, none is left to train on; "
        "set drop_cross_split: false, or name other files"
    )


def _is_lines(path: Path) -> bool:
    """Whether a file is JSON lines; a missing one is left to the reader, which says so."""
    return path.is_file() and holds_lines(path)
