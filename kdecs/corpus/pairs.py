"""Pairs (target, candidate): which ones there are, their ids and hashes, and the rows they count as.

A pair's id is "dialogue/target/candidate"; its hash covers the texts and speakers of u_1 … u_target and no
emotion, so that labels of a coarse teacher are found again for a fine student.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kdecs.corpus.schema import NEUTRAL, Dialogue, Utterance
from kdecs.errors import ConfigError

Universe = Literal["fold1", "fold1+neutral", "all"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One target with one candidate; `spans` holds the gold spans in the candidate, one a positive row."""

    dialogue: Dialogue
    target: int
    candidate: int
    is_cause: bool
    spans: tuple[str, ...]

    @property
    def id(self) -> str:
        """ "dialogue/target/candidate"."""
        return f"{self.dialogue.id}/{self.target}/{self.candidate}"

    @property
    def hash(self) -> str:
        """32 hex characters over the target's context (`Dialogue.context_hashes`)."""
        return self.dialogue.context_hashes[self.target - 1]

    @property
    def emotion(self) -> str | None:
        """The target's gold emotion."""
        return self.dialogue.utterances[self.target - 1].emotion

    @property
    def row_ids(self) -> tuple[str, ...]:
        """RECCON's row ids of this pair: one a gold span, or the one of a negative row."""
        head = f"{self.dialogue.part}_{self.dialogue.id}_utt_{self.target}"
        if not self.is_cause:
            return (f"{head}_impossible_cause_utt_{self.candidate}",)
        causes = causes_of(self.dialogue.utterances[self.target - 1])
        return tuple(
            f"{head}_true_cause_utt_{turn}_span_{k}" for k, turn, _ in causes if turn == self.candidate
        )


def causes_of(target: Utterance) -> list[tuple[int, int, str]]:
    """(k, turn, span) of the causes inside the dialogue and not in the future, in evidence order.

    k counts over all causes inside the dialogue, those in the future included: the `span_k` of row ids.
    """
    inside = [(e.turn, e.span) for e in target.evidence or () if e.turn is not None and e.span is not None]
    return [(k, turn, span) for k, (turn, span) in enumerate(inside) if turn <= target.turn]


def pairs_of(dialogue: Dialogue, universe: Universe = "fold1") -> list[Pair]:
    """The pairs of a labelled dialogue, by target, then candidate.

    fold1: targets that have the evidence key, every candidate up to the target. fold1+neutral: these and
    (i, i) of neutral targets. all: every target. Causes outside the dialogue or in the future make no pair.
    """
    pairs: list[Pair] = []
    for target in dialogue.utterances:
        if universe == "all" or target.evidence is not None:
            pairs.extend(_pairs_of_target(dialogue, target))
        elif universe == "fold1+neutral" and target.emotion == NEUTRAL:
            pairs.append(Pair(dialogue, target.turn, target.turn, False, ()))
    return pairs


def candidate_pairs(dialogue: Dialogue, *, max_distance: int | None = None) -> list[Pair]:
    """Every (i, j), j ≤ i, of a dialogue without labels, at most `max_distance` turns apart (None: any)."""
    return [
        Pair(dialogue, i, j, False, ())
        for i in range(1, len(dialogue.utterances) + 1)
        for j in range(1 if max_distance is None else max(1, i - max_distance), i + 1)
    ]


def count_rows(pairs: Iterable[Pair]) -> tuple[int, int]:
    """(positive, negative) rows: a positive one for each gold span, a negative one for each pair without."""
    positive = negative = 0
    for pair in pairs:
        if pair.is_cause:
            positive += len(pair.spans)
        else:
            negative += 1
    return positive, negative


def training_subset(ids: Sequence[str], share: float, seed: int) -> list[int]:
    """Positions of a share of the dialogue ids, ascending and at least one, chosen by the hash of seed and id.

    Nested: with one seed a smaller share is a subset of a larger one, whatever the order of the file.
    Raises ConfigError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share: found {share}, expected a number above 0 and up to 1")
    keep = math.ceil(share * len(ids) - 1e-9)
    ranks = [hashlib.blake2b(f"{seed}\0{id}".encode()).digest() for id in ids]
    return sorted(sorted(range(len(ids)), key=ranks.__getitem__)[:keep])


def _pairs_of_target(dialogue: Dialogue, target: Utterance) -> list[Pair]:
    spans: dict[int, list[str]] = {}
    for _, turn, span in causes_of(target):
        spans.setdefault(turn, []).append(span)
    return [
        Pair(dialogue, target.turn, j, j in spans, tuple(spans.get(j, ()))) for j in range(1, target.turn + 1)
    ]


EXPORT_UNIVERSE: Universe = "fold1+neutral"
"""What is exported: the pairs that students train on and predict for scoring, of every split."""
