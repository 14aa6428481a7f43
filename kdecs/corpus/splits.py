"""The splits of a corpus as a config selects them, and the dialogues that two files share.

A training split may be larger than memory if it is JSON lines: labelling, cross-fitting and a student's training read
them on demand (`kdecs.corpus.reading.LineDialogues`). Validation and test splits are held in memory, since scoring
needs all their rows at once, and so are the encoded prompts of a teacher's and of the MRC baseline's training.

Measured on 300,000 dialogues of the bundled sample's kind (7.2 million pairs, 446 MiB): one checked pass over the JSON
lines takes 27 MiB and 27 s of one core. Held in memory, a million pairs take 0.13 GiB, and reading them from RECCON
JSON takes 0.34 GiB at its peak.
"""

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from kdecs.config import Config, InputFiles, InputPath, Seed, files_of, names_of
from kdecs.corpus.checking import EVIDENCE_KEY, MAX_UTTERANCES, SPAN_KEY
from kdecs.corpus.pairs import training_subset
from kdecs.corpus.reading import Dialogues, iter_dialogues, open_dialogues, read_corpus, read_table
from kdecs.corpus.schema import FINE_TO_COARSE, NO_TABLE, Corpus, Dialogue, map_corpus, map_dialogue
from kdecs.errors import CorpusError

logger = logging.getLogger(__name__)


class CorpusConfig(Config):
    """The corpus files of the three splits, and which part of the training split is used."""

    train: InputFiles = Field(description="the training file, or a list of several")
    valid: InputPath
    test: InputPath | None = None
    train_share: float = Field(default=1.0, gt=0, le=1, description="share of the training dialogues")
    train_share_seed: Seed = 0
    drop_cross_split: bool = Field(
        default=False,
        description="leave out training dialogues whose text is part of another split named here",
    )
    emotions: Literal["as-is", "coarse"] = Field(
        default="as-is",
        description="coarse: map fine labels to RECCON's, so that both tasks run from one corpus",
    )
    emotion_table: InputPath | None = Field(
        default=None, description="JSON {label: coarse label} that overrides the built-in table"
    )

    @model_validator(mode="after")
    def _table_needs_coarse(self) -> "CorpusConfig":
        if self.emotion_table is not None and self.emotions != "coarse":
            raise ValueError("emotion_table needs emotions: coarse")
        return self


class CandidatesConfig(Config):
    """Which utterances may be causes of a target, beside itself and all earlier ones."""

    after: int = Field(
        default=0, ge=0, le=MAX_UTTERANCES, description="how many turns past its target a cause may lie"
    )


@dataclass(frozen=True)
class GivenEmotions:
    """Emotions from a file, such as another system's predictions, for the utterances of a corpus that have none."""

    path: Path
    by_turn: Mapping[tuple[str, int], str]
    """Emotions by dialogue id and turn."""

    def fill(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with an emotion for every utterance. Raises CorpusError where neither it nor the file has one.

        Emotions of the dialogue's own stay.
        """
        filled = []
        for utterance in dialogue.utterances:
            emotion = utterance.emotion or self.by_turn.get((dialogue.id, utterance.turn))
            if emotion is None:
                raise CorpusError(
                    f"dialogue {dialogue.id}, turn {utterance.turn}: found no emotion in the corpus and none in "
                    f"{self.path}, expected one for each utterance; predict the emotions of this very corpus"
                )
            filled.append(replace(utterance, emotion=emotion))
        return replace(dialogue, utterances=tuple(filled))


class Split:
    """The dialogues of one split that are in use, with their emotions mapped; read on demand like the file's.

    `places` holds the position of each in the file, or in all training files together; None stands for all of them.
    `given` fills in the emotions that are missing, before `table` maps them.
    """

    def __init__(
        self,
        dialogues: Dialogues,
        *,
        places: Sequence[int] | None = None,
        table: Mapping[str, str] | None = None,
        given: GivenEmotions | None = None,
    ) -> None:
        self._dialogues = dialogues
        self._places = places
        self._table = table
        self._given = given

    @property
    def places(self) -> Sequence[int]:
        """Positions in the file, ascending."""
        return range(len(self._dialogues)) if self._places is None else self._places

    def __len__(self) -> int:
        return len(self._dialogues) if self._places is None else len(self._places)

    def __iter__(self) -> Iterator[Dialogue]:
        if self._places is None:
            yield from map(self._mapped, self._dialogues)
        else:
            yield from (self[position] for position in range(len(self._places)))

    def __getitem__(self, position: int, /) -> Dialogue:
        return self._mapped(self._dialogues[position if self._places is None else self._places[position]])

    def _mapped(self, dialogue: Dialogue) -> Dialogue:
        if self._given is not None:
            dialogue = self._given.fill(dialogue)
        return dialogue if self._table is None else map_dialogue(dialogue, self._table)


def open_splits(config: CorpusConfig, given: GivenEmotions | None = None) -> dict[str, Split]:
    """Every split of a config by name, the training split as `training_split` selects it. Raises CorpusError.

    With `given`, utterances may lack emotion and evidence: these are their emotions.
    """
    table = emotion_table(config)
    splits = {"train": training_split(config, given)}
    for name, path in (("valid", config.valid), ("test", config.test)):
        if path is not None:
            dialogues = open_dialogues(path, table or NO_TABLE, labelled=given is None)
            splits[name] = Split(dialogues, table=table, given=given)
    return splits


def training_split(config: CorpusConfig, given: GivenEmotions | None = None) -> Split:
    """The training dialogues without those that `drop_cross_split` removes, then a seeded share of the rest.

    `given` is as in `open_splits`. Raises CorpusError if a file is missing or breaks the schema, or if no dialogue is
    left.
    """
    table = emotion_table(config)
    known = table or NO_TABLE
    dialogues = open_dialogues(config.train, known, labelled=given is None)
    if not config.drop_cross_split and config.train_share == 1:
        return Split(dialogues, table=table, given=given)
    others = [path for path in (config.valid, config.test) if path is not None and config.drop_cross_split]
    # Digests, since the texts of a large split would fill the memory.
    elsewhere = {
        text_digest(dialogue)
        for path in others
        for dialogue in open_dialogues(path, known, labelled=given is None)
    }
    num_all, kept, ids = 0, array("q"), []
    for place, dialogue in enumerate(dialogues):
        num_all += 1
        if not elsewhere or text_digest(dialogue) not in elsewhere:
            kept.append(place)
            ids.append(dialogue.id)
    if len(kept) < num_all:
        logger.warning(
            "%s: dropped %d of %d dialogues, since their text is part of another split",
            names_of(config.train),
            num_all - len(kept),
            num_all,
        )
    if not kept:
        raise CorpusError(
            f"{names_of(config.train)}: the text of every dialogue is part of another split, so none is left to train "
            "on; set drop_cross_split: false, or name other files"
        )
    # Of what is left: a share of the whole file would shrink by whatever was dropped.
    chosen = training_subset(ids, config.train_share, config.train_share_seed)
    places = array("q", (kept[position] for position in chosen))
    return Split(dialogues, places=places, table=table, given=given)


def read_split(config: CorpusConfig, path: Path) -> Corpus:
    """Read a labelled corpus file into memory, its emotions mapped as the config wants. Raises CorpusError."""
    table = emotion_table(config)
    corpus = read_corpus(path, table=table or NO_TABLE)
    return corpus if table is None else map_corpus(corpus, table)


def emotion_table(config: CorpusConfig) -> dict[str, str] | None:
    """The table through which emotions are mapped, fine to coarse; None leaves them as they are."""
    if config.emotions == "as-is":
        return None
    return read_table(config.emotion_table) if config.emotion_table else dict(FINE_TO_COARSE)


def require_causes(path: Path | tuple[Path, ...], is_cause: Iterable[bool]) -> None:
    """Raise CorpusError if no pair of a training or validation file is a cause: every epoch would score 0."""
    if not any(is_cause):
        raise CorpusError(
            f"{names_of(path)}: no cause to learn from or to validate on in any of the pairs in use; "
            f'expected targets with the keys "{EVIDENCE_KEY}" and "{SPAN_KEY}"'
        )


def require_spans(corpus: Corpus) -> None:
    """Raise CorpusError if a validation file has causes without spans: scores of spans would mean nothing."""
    for dialogue in corpus.dialogues:
        for utterance in dialogue.utterances:
            if any(cause.span == "" for cause in utterance.evidence or ()):
                raise CorpusError(
                    f"{corpus.path}, dialogue {dialogue.id}, turn {utterance.turn}: found a cause without a span, "
                    "expected spans to learn; train a student with task: ecpe, or name "
                    "files that have spans"
                )


def warn_of_shared_texts(config: CorpusConfig) -> None:
    """Warn if validation dialogues are training dialogues, too, by their texts: scores on them promise too much.

    Reads the files once more, the training files dialogue by dialogue.
    """
    if config.drop_cross_split:  # `training_split` leaves them out
        return
    known = emotion_table(config) or NO_TABLE
    digests = [text_digest(dialogue) for dialogue in iter_dialogues(config.valid, table=known)]
    # Only the validation split's are held, since a training file may be larger than memory.
    wanted = set(digests)
    training = (dialogue for path in files_of(config.train) for dialogue in iter_dialogues(path, table=known))
    found = {digest for digest in map(text_digest, training) if digest in wanted}
    if num_shared := sum(digest in found for digest in digests):
        logger.warning(
            "%s: %d of %d validation dialogues have the text of a training dialogue of %s, so their scores promise "
            "too much; name another file, or set corpus.drop_cross_split=true",
            config.valid,
            num_shared,
            len(digests),
            names_of(config.train),
        )


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A dialogue whose text is also a dialogue of another file."""

    file: str
    dialogue: str
    other_file: str
    other_dialogue: str

    def __str__(self) -> str:
        other = f"{self.other_dialogue} in {self.other_file}"
        return f"{self.file}, dialogue {self.dialogue}: the same text as {other}"


def text_digest(dialogue: Dialogue) -> bytes:
    """16 bytes that identify the texts in their order; white space, speakers and labels do not count."""
    text = "\n".join(" ".join(utterance.text.split()) for utterance in dialogue.utterances)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def find_duplicates(corpus: Corpus, others: Iterable[Corpus]) -> list[Duplicate]:
    """The dialogues of a corpus whose text is also in another one, each with the first match."""
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
    """Finds texts that several files share while the files are streamed; keeps a digest and an id per dialogue."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[str, str]] = {}
        self.duplicates: list[Duplicate] = []

    def add(self, file: str, dialogue: Dialogue) -> None:
        """Note a dialogue; if an earlier file has its text, it becomes a duplicate of that one."""
        first = self._seen.setdefault(text_digest(dialogue), (file, dialogue.id))
        # Only a text that two files share leaks from one split into another.
        if first[0] != file:
            self.duplicates.append(Duplicate(file, dialogue.id, *first))


def drop_cross_split(train: Corpus, others: Iterable[Corpus]) -> tuple[Corpus, list[Duplicate]]:
    """The training corpus without the dialogues whose text is in another split, and what was dropped."""
    duplicates = find_duplicates(train, others)
    dropped = {duplicate.dialogue for duplicate in duplicates}
    kept = tuple(dialogue for dialogue in train.dialogues if dialogue.id not in dropped)
    return replace(train, dialogues=kept), duplicates
