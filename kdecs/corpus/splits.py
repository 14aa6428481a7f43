"""The dialogues of a split by place: a loaded list (RECCON JSON), or lines of a file that is never held whole.

A place is (offset, length): the index in the list and 0, or the line's bytes in the file. Memory is that of one line,
apart from 16 bytes for each dialogue of the evaluation splits where `drop_cross_split` is set.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from pydantic import Field, model_validator

from kdecs.config import Config, InputPath
from kdecs.corpus.checking import Checker, NotJson, decode_json, shorten
from kdecs.corpus.labels import map_corpus, map_dialogue, read_table
from kdecs.corpus.pairs import training_subset
from kdecs.corpus.reading import corpus_part, count_variants, holds_lines, read_corpus
from kdecs.corpus.schema import FINE_TO_COARSE, Corpus, Dialogue
from kdecs.errors import CorpusError


class CorpusConfig(Config):
    """The corpus files of the three splits, and which part of the training split is used."""

    train: InputPath
    valid: InputPath
    test: InputPath | None = None
    train_share: float = Field(default=1.0, gt=0, le=1, description="share of the training dialogues")
    train_share_seed: int = Field(default=0, ge=0)
    drop_cross_split: bool = Field(
        default=False,
        description="leave out training dialogues whose text stands in another split named here",
    )
    emotions: Literal["as-is", "coarse"] = Field(
        default="as-is",
        description="coarse: fine labels mapped to RECCON's, so that both tasks run from one corpus",
    )
    emotion_table: InputPath | None = Field(
        default=None, description="JSON {label: coarse label} laid over the built-in table"
    )

    @model_validator(mode="after")
    def _table_needs_coarse(self) -> "CorpusConfig":
        if self.emotion_table is not None and self.emotions != "coarse":
            raise ValueError("emotion_table needs emotions: coarse")
        return self


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A dialogue of the first file whose text also is a dialogue of another file."""

    file: str
    dialogue: str
    other_file: str
    other_dialogue: str

    def __str__(self) -> str:
        other = f"{self.other_dialogue} in {self.other_file}"
        return f"{self.file}, dialogue {self.dialogue}: the same text as {other}"


def text_digest(dialogue: Dialogue) -> bytes:
    """16 bytes of what makes two dialogues one: the texts in order, white space apart, no speakers or labels."""
    text = "\n".join(" ".join(utterance.text.split()) for utterance in dialogue.utterances)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def find_duplicates(corpus: Corpus, others: Iterable[Corpus]) -> list[Duplicate]:
    """The dialogues of a corpus that stand in another one too, each with its first namesake."""
    elsewhere: dict[bytes, tuple[str, str]] = {}
    for other in others:
        for dialogue in other.dialogues:
            elsewhere.setdefault(text_digest(dialogue), (str(other.path), dialogue.id))
    return [
        Duplicate(str(corpus.path), dialogue.id, *elsewhere[text_digest(dialogue)])
        for dialogue in corpus.dialogues
        if text_digest(dialogue) in elsewhere
    ]


class DuplicateFinder:
    """Finds texts in several files while these are streamed: 16 bytes and an id are kept of each dialogue."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[str, str]] = {}
        self.duplicates: list[Duplicate] = []

    def add(self, file: str, dialogue: Dialogue) -> None:
        """Note a dialogue; one whose text stands in an earlier file becomes a duplicate of that one."""
        first = self._seen.setdefault(text_digest(dialogue), (file, dialogue.id))
        if first[0] != file:
            self.duplicates.append(Duplicate(file, dialogue.id, *first))


def drop_cross_split(train: Corpus, others: Iterable[Corpus]) -> tuple[Corpus, list[Duplicate]]:
    """The training corpus without the dialogues that stand in another split, and what was dropped."""
    duplicates = find_duplicates(train, others)
    dropped = {duplicate.dialogue for duplicate in duplicates}
    kept = tuple(dialogue for dialogue in train.dialogues if dialogue.id not in dropped)
    return replace(train, dialogues=kept), duplicates


def read_training_corpus(path: Path | str, others: Sequence[Path | str]) -> Corpus:
    """`read_corpus` of the training file without the dialogues whose text stands in the other files.

    What is dropped is logged and added to the corpus' warnings. Raises CorpusError as `read_corpus` does.
    """
    train, duplicates = drop_cross_split(read_corpus(path), [read_corpus(other) for other in others])
    if duplicates:
        logger.warning("%s: %d dialogues dropped, their text stands in another split", path, len(duplicates))
    return replace(train, warnings=train.warnings + tuple(f"{d}; dropped" for d in duplicates))


def emotion_table(config: CorpusConfig) -> dict[str, str] | None:
    """What emotions are taken through: None as they are, else fine -> coarse with the config's own entries."""
    if config.emotions == "as-is":
        return None
    return read_table(config.emotion_table) if config.emotion_table else dict(FINE_TO_COARSE)


def read_split(config: CorpusConfig, path: Path) -> Corpus:
    """A labelled corpus file with its emotions as the config wants them. Raises CorpusError as `read_corpus`."""
    table = emotion_table(config)
    corpus = read_corpus(path)
    return corpus if table is None else map_corpus(corpus, table)


def training_dialogues(config: CorpusConfig) -> list[Dialogue]:
    """The training split without what `drop_cross_split` drops, then the seeded share of what is left.

    Raises CorpusError for a file that is missing or breaks the schema.
    """
    if config.drop_cross_split:
        others = [path for path in (config.valid, config.test) if path is not None]
        corpus = read_training_corpus(config.train, others)
        table = emotion_table(config)
        corpus = corpus if table is None else map_corpus(corpus, table)
    else:
        corpus = read_split(config, config.train)
    return training_subset(corpus.dialogues, config.train_share, config.train_share_seed)


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
