"""Dialogues whose text stands in more than one split: found, reported, dropped from training on request."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import Corpus, Dialogue

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
