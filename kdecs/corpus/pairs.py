"""Pairs of a target utterance and a candidate cause: which a universe has, their ids and rows, and who shares a batch.

A pair's id is "dialogue/target/candidate". Its hash covers the texts and speakers of u_1 … u_target, and on to a later
candidate, but no emotion, so that a student with fine emotions finds the labels of a teacher with coarse ones. A batch
holds prompts of similar length, and in the layout tree all pairs of a target together.

Legend: P rows of a cache, or pairs. No torch.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kdecs.corpus.schema import NEUTRAL, Dialogue, Utterance
from kdecs.errors import ConfigError

if TYPE_CHECKING:  # prediction runs without pyarrow
    from kdecs.corpus.cache import CorpusCache
    from kdecs.corpus.encoding import EncodedPair

Ints = npt.NDArray[np.integer[Any]]

_PAD_MULTIPLE = 8  # tensor cores want multiples of 8
Universe = Literal["fold1", "fold1+neutral", "emotional+neutral", "all"]
EXPORT_UNIVERSE: Universe = "fold1+neutral"
"""The pairs that an export labels in every split: students train on them, and are scored on them."""
UNANNOTATED_UNIVERSE: Universe = "emotional+neutral"
"""The pairs that an export labels where nobody has annotated causes: those of EXPORT_UNIVERSE, had somebody done so."""


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
        """32 hex characters over the target's context (`Dialogue.context_hashes`), or over a later candidate's."""
        return self.dialogue.context_hashes[max(self.target, self.candidate) - 1]

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
        causes = causes_of(self.dialogue.utterances[self.target - 1], max(0, self.candidate - self.target))
        return tuple(
            f"{head}_true_cause_utt_{turn}_span_{k}" for k, turn, _ in causes if turn == self.candidate
        )


def causes_of(target: Utterance, after: int = 0) -> list[tuple[int, int, str]]:
    """(k, turn, span) of the causes inside the dialogue, at most `after` turns past the target, in evidence order.

    k is the `span_k` of row ids, so it counts all causes inside the dialogue, including those in the future.
    """
    inside = [(e.turn, e.span) for e in target.evidence or () if e.turn is not None and e.span is not None]
    return [(k, turn, span) for k, (turn, span) in enumerate(inside) if turn <= target.turn + after]


def pairs_of(dialogue: Dialogue, universe: Universe = "fold1", after: int = 0) -> list[Pair]:
    """The pairs of a labelled dialogue, by target, then candidate.

    fold1: every candidate up to the target, for targets that have the evidence key. fold1+neutral: also (i, i) of
    neutral targets. emotional+neutral: the same, and every candidate for emotional targets without the key. all: every
    target. Candidates may follow the target by `after` turns. A cause outside the dialogue
    or farther in the future makes no pair.
    """
    pairs: list[Pair] = []
    for target in dialogue.utterances:
        is_neutral = target.emotion == NEUTRAL
        has_all = universe == "all" or (universe == "emotional+neutral" and not is_neutral)
        if has_all or target.evidence is not None:
            pairs.extend(_pairs_of_target(dialogue, target, after))
        elif universe != "fold1" and is_neutral:
            # One pair is enough to learn and score its emotion. It has no cause, so fold 1 knows none of its pairs.
            pairs.append(Pair(dialogue, target.turn, target.turn, False, ()))
    return pairs


def candidate_pairs(dialogue: Dialogue, *, max_distance: int | None = None, after: int = 0) -> list[Pair]:
    """Every (i, j) of an unlabelled dialogue, j up to `after` turns past i and `max_distance` before it (None: any)."""
    return [
        Pair(dialogue, i, j, False, ())
        for i in range(1, len(dialogue.utterances) + 1)
        for j in range(
            1 if max_distance is None else max(1, i - max_distance), _last_candidate(dialogue, i, after) + 1
        )
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
    return sorted(random_order(ids, seed)[:keep])


def random_order(ids: Sequence[str], seed: int) -> list[int]:
    """Positions of the dialogue ids in a random order, which a hash of seed and id decides."""
    # By hash, so that neither the order of the file nor added dialogues reshuffle what comes first.
    ranks = [hashlib.blake2b(f"{seed}\0{id}".encode()).digest() for id in ids]
    return sorted(range(len(ids)), key=ranks.__getitem__)


def _last_candidate(dialogue: Dialogue, target: int, after: int) -> int:
    return min(len(dialogue.utterances), target + after)


def _pairs_of_target(dialogue: Dialogue, target: Utterance, after: int) -> list[Pair]:
    spans: dict[int, list[str]] = {}
    for _, turn, span in causes_of(target, after):
        spans.setdefault(turn, []).append(span)
    return [
        Pair(dialogue, target.turn, j, j in spans, tuple(spans.get(j, ())))
        for j in range(1, _last_candidate(dialogue, target.turn, after) + 1)
    ]


def batches_of_tokens(
    num_tokens_P: Ints,
    rows: Ints,
    max_tokens: int,
    targets: "PairTargets | None" = None,
) -> list[Ints]:
    """The rows, sorted by length, in batches of at most `max_tokens` padded tokens; a longer prompt stands alone.

    With `targets` (layout tree) the rows of a target stay together, lengths are those of trees, and none is padded.
    """
    groups, lengths = groups_of(rows, num_tokens_P, targets)
    if targets is not None:
        return _batches_of_trees(groups, lengths, max_tokens)
    ordered = np.argsort(lengths, kind="stable")
    batches: list[Ints] = []
    start = 0
    for end in range(1, len(ordered) + 1):
        # In ascending order the next prompt would set the padded length of the whole batch.
        is_last = end == len(ordered)
        if is_last or (end - start + 1) * padded_length(int(lengths[ordered[end]])) > max_tokens:
            batches.append(np.concatenate([groups[index] for index in ordered[start:end]]))
            start = end
    return batches


def _batches_of_trees(groups: list[Ints], lengths: Ints, max_tokens: int) -> list[Ints]:
    """Trees of similar length, in batches of at most `max_tokens` tokens; a larger tree stands alone."""
    order = np.argsort(lengths, kind="stable")
    batches: list[list[Ints]] = []
    held = 0
    for index in order:
        if not batches or held + lengths[index] > max_tokens:
            batches.append([])
            held = 0
        batches[-1].append(groups[index])
        held += int(lengths[index])
    return [np.concatenate(batch) for batch in batches]


class PairTargets(NamedTuple):
    """The target of each pair (P,), as any number that its pairs share, and the length of its trunk (P,)."""

    number_P: Ints
    num_trunk_tokens_P: Ints


def groups_of(rows: Ints, num_tokens_P: Ints, targets: PairTargets | None) -> tuple[list[Ints], Ints]:
    """The rows in groups that must stay together, and the tokens of each: single rows, or the pairs of a target.

    Groups come in the order of their first rows, and the rows of a group in the order given.
    """
    if targets is None:
        return list(rows[:, None]), num_tokens_P[rows]
    _, first, group_of_row = np.unique(targets.number_P[rows], return_index=True, return_inverse=True)
    # `unique` numbers the groups by value; the order of first appearance is that of `first`.
    rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    order = np.argsort(rank[group_of_row], kind="stable")
    sizes = np.bincount(rank[group_of_row], minlength=len(first))
    groups = np.split(rows[order], np.cumsum(sizes)[:-1])
    branches = np.add.reduceat(num_tokens_P[rows[order]], np.cumsum([0, *sizes[:-1]])) if len(rows) else sizes
    return groups, branches + targets.num_trunk_tokens_P[[int(group[0]) for group in groups]]


def cache_targets(cache: "CorpusCache") -> PairTargets | None:
    """The targets of a cache in the layout tree; None for the layout pair."""
    return PairTargets(cache.trunk_row, cache.num_trunk_tokens) if cache.layout == "tree" else None


def encoded_targets(encoded: Sequence["EncodedPair"]) -> PairTargets | None:
    """The targets of encoded pairs in the layout tree, which share their trunks; None for the layout pair."""
    if not encoded or not encoded[0].trunk_ids:
        return None
    numbers: dict[int, int] = {}
    return PairTargets(
        # By identity: two dialogues of a request may have the same id, and two targets trunks that are equal.
        np.array([numbers.setdefault(id(pair.trunk_ids), len(numbers)) for pair in encoded]),
        np.array([len(pair.trunk_ids) for pair in encoded]),
    )


def padded(prompts: Sequence[Sequence[int] | Ints], pad_id: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Prompts padded on the right to the longest, rounded up (`padded_length`), and which of the tokens are theirs."""
    lengths_R = np.array([len(prompt) for prompt in prompts])
    width = padded_length(int(lengths_R.max()))
    token_ids_RT: Ints = np.full((len(prompts), width), pad_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        token_ids_RT[row, : len(prompt)] = prompt
    return token_ids_RT, np.arange(width) < lengths_R[:, None]


def padded_length(length: int) -> int:
    """The length of a batch whose longest prompt has so many tokens."""
    return -(-length // _PAD_MULTIPLE) * _PAD_MULTIPLE
