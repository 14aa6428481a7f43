"""Pairs of a target utterance and a candidate cause: which pairs a universe has, their ids and hashes, and their rows.

A pair's id is "dialogue/target/candidate". Its hash covers the texts and speakers of u_1 … u_target but no emotion, so
that a student with fine emotions finds the labels of a teacher with coarse ones.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kdecs.corpus.schema import NEUTRAL, Dialogue, Utterance
from kdecs.errors import ConfigError

Universe = Literal["fold1", "fold1+neutral", "all"]
EXPORT_UNIVERSE: Universe = "fold1+neutral"
"""The pairs that an export labels in every split: students train on them, and are scored on them."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One target with one candidate; `spans` holds the gold spans in the candidate, one per positive row."""

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
        """RECCON's row ids of this pair: one per gold span, or a single one if the pair is no cause."""
        head = f"{self.dialogue.part}_{self.dialogue.id}_utt_{self.target}"
        if not self.is_cause:
            return (f"{head}_impossible_cause_utt_{self.candidate}",)
        causes = causes_of(self.dialogue.utterances[self.target - 1])
        return tuple(
            f"{head}_true_cause_utt_{turn}_span_{k}" for k, turn, _ in causes if turn == self.candidate
        )


def causes_of(target: Utterance) -> list[tuple[int, int, str]]:
    """(k, turn, span) of the causes that lie inside the dialogue and not in the future, in evidence order.

    k is the `span_k` of row ids, so it counts all causes inside the dialogue, including those in the future.
    """
    inside = [(e.turn, e.span) for e in target.evidence or () if e.turn is not None and e.span is not None]
    return [(k, turn, span) for k, (turn, span) in enumerate(inside) if turn <= target.turn]


def pairs_of(dialogue: Dialogue, universe: Universe = "fold1") -> list[Pair]:
    """The pairs of a labelled dialogue, by target, then candidate.

    fold1: every candidate up to the target, for targets that have the evidence key. fold1+neutral: also (i, i) of
    neutral targets. all: every target. A cause outside the dialogue or in the future makes no pair.
    """
    pairs: list[Pair] = []
    for target in dialogue.utterances:
        if universe == "all" or target.evidence is not None:
            pairs.extend(_pairs_of_target(dialogue, target))
        elif universe == "fold1+neutral" and target.emotion == NEUTRAL:
            pairs.append(Pair(dialogue, target.turn, target.turn, False, ()))
    return pairs


def candidate_pairs(dialogue: Dialogue, *, max_distance: int | None = None) -> list[Pair]:
    """Every (i, j) with j ≤ i of an unlabelled dialogue, at most `max_distance` turns apart (None: any distance)."""
    return [
        Pair(dialogue, i, j, False, ())
        for i in range(1, len(dialogue.utterances) + 1)
        for j in range(1 if max_distance is None else max(1, i - max_distance), i + 1)
    ]


def count_rows(pairs: Iterable[Pair]) -> tuple[int, int]:
    """(positive, negative) rows: one positive row per gold span, one negative row per pair without a span."""
    positive = negative = 0
    for pair in pairs:
        if pair.is_cause:
            positive += len(pair.spans)
        else:
            negative += 1
    return positive, negative


def training_subset(ids: Sequence[str], share: float, seed: int) -> list[int]:
    """Positions of a share of the dialogue ids, ascending, at least one; the hash of seed and id decides.

    Nested: with one seed a smaller share is a subset of a larger one, whatever the order of the file.
    Raises ConfigError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share: found {share}, expected a number above 0 and up to 1")
    # 0.07 of 100 is 7.000000000000001 in floating point, which must not become 8.
    keep = math.ceil(share * len(ids) - 1e-9)
    # By hash, so that neither the order of the file nor added dialogues reshuffle the choice.
    ranks = [hashlib.blake2b(f"{seed}\0{id}".encode()).digest() for id in ids]
    return sorted(sorted(range(len(ids)), key=ranks.__getitem__)[:keep])


def _pairs_of_target(dialogue: Dialogue, target: Utterance) -> list[Pair]:
    spans: dict[int, list[str]] = {}
    for _, turn, span in causes_of(target):
        spans.setdefault(turn, []).append(span)
    return [
        Pair(dialogue, target.turn, j, j in spans, tuple(spans.get(j, ()))) for j in range(1, target.turn + 1)
    ]
