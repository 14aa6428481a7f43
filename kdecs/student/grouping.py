"""Which pairs share a batch: of similar length, and in the layout tree all pairs of a target together. No torch.

Legend: P rows of a cache, or pairs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdecs.corpus.encoding import EncodedPair

if TYPE_CHECKING:  # prediction runs without pyarrow
    from kdecs.corpus.cache import CorpusCache

Ints = npt.NDArray[np.integer[Any]]
_PAD_MULTIPLE = 8  # tensor cores want multiples of 8


def batches_of_tokens(
    num_tokens_P: Ints,
    rows: Ints,
    max_tokens: int,
    targets: "Targets | None" = None,
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


class Targets(NamedTuple):
    """The target of each pair (P,), as any number that its pairs share, and the length of its trunk (P,)."""

    number_P: Ints
    num_trunk_tokens_P: Ints


def groups_of(rows: Ints, num_tokens_P: Ints, targets: Targets | None) -> tuple[list[Ints], Ints]:
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


def cache_targets(cache: "CorpusCache") -> Targets | None:
    """The targets of a cache in the layout tree; None for the layout pair."""
    return Targets(cache.trunk_row, cache.num_trunk_tokens) if cache.layout == "tree" else None


def encoded_targets(encoded: Sequence[EncodedPair]) -> Targets | None:
    """The targets of encoded pairs in the layout tree, which share their trunks; None for the layout pair."""
    if not encoded or not encoded[0].trunk_ids:
        return None
    numbers: dict[int, int] = {}
    return Targets(
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
