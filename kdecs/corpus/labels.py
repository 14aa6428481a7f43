"""Emotion label sets, and the table that takes fine labels to coarse ones."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kdecs.corpus.checking import NotJson, decode_json, shorten
from kdecs.corpus.schema import (
    ADDITIONAL_EMOTIONS,
    COARSE_EMOTIONS,
    FINE_EMOTIONS,
    FINE_TO_COARSE,
    KNOWN_EMOTIONS,
    Corpus,
    Dialogue,
)
from kdecs.errors import CorpusError

LabelSet = Literal["any", "coarse", "fine"]


def emotions_of(label_set: LabelSet) -> frozenset[str]:
    """The labels that a set knows; "any" holds all, "coarse" RECCON's, "fine" the 16 of FG-RECCON."""
    if label_set == "coarse":
        return frozenset(COARSE_EMOTIONS + ADDITIONAL_EMOTIONS)
    if label_set == "fine":
        return frozenset(FINE_EMOTIONS)
    return KNOWN_EMOTIONS


def map_emotion(emotion: str | None, table: Mapping[str, str] = FINE_TO_COARSE) -> str | None:
    """A label through a table; labels that the table does not name (excited, fear, …) stay."""
    return None if emotion is None else table.get(emotion, emotion)


def map_dialogue(dialogue: Dialogue, table: Mapping[str, str] = FINE_TO_COARSE) -> Dialogue:
    """The dialogue with every emotion taken through the table; texts, evidence and pair hashes stay."""
    utterances = tuple(replace(u, emotion=map_emotion(u.emotion, table)) for u in dialogue.utterances)
    return replace(dialogue, utterances=utterances)


def map_corpus(corpus: Corpus, table: Mapping[str, str] = FINE_TO_COARSE) -> Corpus:
    """The corpus with every emotion taken through the table (fine → coarse by default)."""
    return replace(corpus, dialogues=tuple(map_dialogue(d, table) for d in corpus.dialogues))


def read_table(path: Path | str) -> dict[str, str]:
    """FINE_TO_COARSE with the entries of a JSON object {label: label} laid over it.

    Raises CorpusError, one line, for a file that is no such object or names an unknown label.
    """
    path = Path(path)
    try:
        decoded = decode_json(path.read_bytes())
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror or error}, expected a table of labels") from None
    except NotJson as error:
        raise CorpusError(f"{path}: found {error.found}, expected {error.expected}") from None
    if not isinstance(decoded.value, dict) or decoded.repeated:
        raise CorpusError(
            f"{path}: found {shorten(decoded.value)}, expected an object {{label: label}}, each once"
        )
    for label, coarse in decoded.value.items():
        for name in (label, coarse):
            if not isinstance(name, str) or name not in KNOWN_EMOTIONS:
                known = ", ".join(sorted(KNOWN_EMOTIONS))
                raise CorpusError(
                    f"{path}: the entry {shorten(label)}: found {shorten(name)}, expected one of {known}"
                )
    return {**FINE_TO_COARSE, **decoded.value}
