"""The parts of a corpus: emotion labels, utterances, dialogues, and the faults of a file.

The modules of kdecs.corpus.formats describe the file formats; all of them are read into these dataclasses.

Source of the schema: RECCON (Poria et al. 2021). The fine labels are those of Table 3 of Chen et al. 2024.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

NEUTRAL = "neutral"
# Of a dialogue's id in a message: an id may have any length.
_NAME_CHARACTERS = 100

COARSE_EMOTIONS: tuple[str, ...] = (
    "happiness",
    "surprise",
    "anger",
    "sadness",
    "disgust",
    "fear",
    NEUTRAL,
)
# RECCON's annotation has these, too. They stay separate labels: mapping them silently would change the counts.
ADDITIONAL_EMOTIONS: tuple[str, ...] = ("excited", "frustrated")
FINE_EMOTIONS: tuple[str, ...] = (
    "sadness",
    "worry",
    "anger",
    "hope",
    "disgust",
    "happiness",
    "sympathy",
    "like",
    "gratitude",
    "acceptance",
    "disapproval",
    "curiosity",
    NEUTRAL,
    "surprise",
    "praise",
    "others",
)
KNOWN_EMOTIONS: frozenset[str] = frozenset(COARSE_EMOTIONS + ADDITIONAL_EMOTIONS + FINE_EMOTIONS)

# Spelling variants in RECCON's files (16 utterances in all): replaced and counted when a file is read.
EMOTION_VARIANTS: dict[str, str] = {
    "happy": "happiness",
    "happines": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "surprised": "surprise",
}

# The coarse label of each fine one. The grouping follows GoEmotions' map to Ekman's six (Demszky et al. 2020), except
# for sympathy, which answers bad news in these dialogues. "others" fits none of the six, so it is neutral.
# A user's table (reading.read_table) overrides entries.
FINE_TO_COARSE: dict[str, str] = {
    "sadness": "sadness",
    "worry": "fear",
    "anger": "anger",
    "hope": "happiness",
    "disgust": "disgust",
    "happiness": "happiness",
    "sympathy": "sadness",
    "like": "happiness",
    "gratitude": "happiness",
    "acceptance": "happiness",
    "disapproval": "anger",
    "curiosity": "surprise",
    NEUTRAL: NEUTRAL,
    "surprise": "surprise",
    "praise": "happiness",
    "others": NEUTRAL,
}

NO_TABLE: Mapping[str, str] = MappingProxyType({})

LabelSet = Literal["any", "coarse", "fine"]


def emotions_of(label_set: LabelSet) -> frozenset[str]:
    """The labels of a set: "coarse" are RECCON's, "fine" the 16 of FG-RECCON, "any" are all of them."""
    if label_set == "coarse":
        return frozenset(COARSE_EMOTIONS + ADDITIONAL_EMOTIONS)
    if label_set == "fine":
        return frozenset(FINE_EMOTIONS)
    return KNOWN_EMOTIONS


@dataclass(frozen=True, slots=True)
class Evidence:
    """One annotated cause: its turn and its span in that turn.

    Both are None for a cause outside the dialogue ("b" in the file). The span is "" if the format has no spans.
    """

    turn: int | None
    span: str | None


@dataclass(frozen=True, slots=True)
class Utterance:
    """One utterance; `evidence` is None if the file has no evidence key, `emotion` is None if it has no label."""

    turn: int
    speaker: str
    text: str
    emotion: str | None
    evidence: tuple[Evidence, ...] | None


@dataclass(frozen=True)
class Dialogue:
    """Utterances in order (`utterances[turn - 1]`); `part` is the first word of RECCON's row ids."""

    id: str
    utterances: tuple[Utterance, ...]
    part: str = "dailydialog"

    @cached_property
    def context_hashes(self) -> tuple[str, ...]:
        """For each turn i, 32 hex characters: blake2b (16 bytes) over speakers and texts of u_1 … u_i.

        Each string is preceded by its length in bytes (8 bytes, little-endian), so that no two contexts share a
        stream. Emotions and the dialogue's id are left out.
        """
        # One pass for all turns, and once per dialogue: each of its pairs is found by one of these.
        digest, hashes = hashlib.blake2b(digest_size=16), []
        for utterance in self.utterances:
            for text in (utterance.speaker, utterance.text):
                data = text.encode("utf-8")
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
            hashes.append(digest.copy().hexdigest())
        return tuple(hashes)


@dataclass(frozen=True)
class Corpus:
    """A file that passed the schema, with the label variants replaced (variant → count) and its warnings."""

    path: Path
    dialogues: tuple[Dialogue, ...]
    normalised: Counter[str]
    warnings: tuple[str, ...]


def map_emotion(emotion: str | None, table: Mapping[str, str] = FINE_TO_COARSE) -> str | None:
    """Look a label up in a table; labels that the table does not name (excited, fear, …) stay."""
    return None if emotion is None else table.get(emotion, emotion)


def map_dialogue(dialogue: Dialogue, table: Mapping[str, str] = FINE_TO_COARSE) -> Dialogue:
    """The dialogue with every emotion mapped by the table; texts, evidence and pair hashes stay."""
    utterances = tuple(replace(u, emotion=map_emotion(u.emotion, table)) for u in dialogue.utterances)
    return replace(dialogue, utterances=utterances)


def map_corpus(corpus: Corpus, table: Mapping[str, str] = FINE_TO_COARSE) -> Corpus:
    """The corpus with every emotion mapped by the table (fine to coarse by default)."""
    return replace(corpus, dialogues=tuple(map_dialogue(d, table) for d in corpus.dialogues))


@dataclass(frozen=True, slots=True)
class Fault:
    """One violation of the schema: its place, what was found, and what was expected.

    `dialogue`, `turn` and `field` are None if a fault concerns more than one of them. In a JSON line without a
    readable id, `dialogue` is "line N".
    """

    file: str
    dialogue: str | None
    turn: int | None
    field: str | None
    found: str
    expected: str

    def __str__(self) -> str:
        place = [_one_line(self.file)]
        if self.dialogue is not None:
            place.append(f"dialogue {_short_line(self.dialogue)}")
        if self.turn is not None:
            place.append(f"turn {self.turn}")
        if self.field is not None:
            place.append(f"field {_short_line(self.field)}")
        return f"{', '.join(place)}: found {self.found}, expected {self.expected}"


def _one_line(name: str) -> str:
    """A name unchanged if it prints on one line, otherwise escaped."""
    return name if name and name.isprintable() else repr(name)


def _short_line(name: str) -> str:
    """`_one_line` of a name that comes from a file and may have any length."""
    return _one_line(name if len(name) <= _NAME_CHARACTERS else name[:_NAME_CHARACTERS] + "…")
