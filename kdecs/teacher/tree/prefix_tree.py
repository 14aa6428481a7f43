"""The prefix tree: many prompts with common beginnings, packed into one sequence.

A set of token sequences is packed as the depth-first walk of its trie. Position ids are depths, and token q may
attend token k iff k is an ancestor of q (or q itself), i.e. k <= q < end[k], where end[k] is the end of k's
subtree. For a decoder with causal attention and explicit positions the hidden state at a prompt's last token is
that of the prompt alone, so one forward over the tree stands for one over every prompt.

Shapes: N packed tokens, P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PackedTree:
    """A depth-first walk: tokens_N, positions_N (depths), ends_N (exclusive), leaves_P (index of a prompt's end)."""

    tokens_N: np.ndarray
    positions_N: np.ndarray
    ends_N: np.ndarray
    leaves_P: np.ndarray

    @property
    def num_tokens(self) -> int:
        """N, the cost of a forward."""
        return len(self.tokens_N)

    def path(self, prompt: int) -> np.ndarray:
        """The indices in the walk of a prompt's tokens, from its first to its last: a leaf and its ancestors."""
        leaf = int(self.leaves_P[prompt])
        return np.flatnonzero(self.ends_N[: leaf + 1] > leaf)

    def padded_to(self, multiple: int) -> "PackedTree":
        """The same walk, padded with trees of a single token 0, which neither see nor are seen by anything else."""
        size = self.num_tokens
        fill = -size % multiple
        return PackedTree(
            tokens_N=np.pad(self.tokens_N, (0, fill)),
            positions_N=np.pad(self.positions_N, (0, fill)),
            ends_N=np.concatenate([self.ends_N, np.arange(size, size + fill) + 1]),
            leaves_P=self.leaves_P,
        )


def pack(prompts: Sequence[np.ndarray]) -> PackedTree:
    """Pack token sequences (each of at least one token) into one walk; leaves are in the order given.

    Sequences without a common first token become several trees in one walk, which the mask keeps apart.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without tokens has no place in a tree")
    # In lexicographic order each prompt shares its longest prefix with its predecessor, so one pass makes the trie.
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].tolist())
    leaves_P = np.zeros(len(prompts), dtype=np.int64)
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    path: list[int] = []  # indices in the walk of the previous prompt's tokens
    ends: list[int] = []
    previous = np.zeros(0, dtype=np.int64)
    for index in order:
        prompt = np.asarray(prompts[index], dtype=np.int64)
        shared = common_prefix_length(previous, prompt)
        size = len(ends)
        # The walk leaves these nodes, so their subtrees end here.
        for node in path[shared:]:
            ends[node] = size
        del path[shared:]
        tokens.append(prompt[shared:])
        positions.append(np.arange(shared, len(prompt)))
        path.extend(range(size, size + len(prompt) - shared))
        # Open until the walk leaves them.
        ends.extend([0] * (len(prompt) - shared))
        leaves_P[index] = path[-1]
        previous = prompt
    for node in path:
        ends[node] = len(ends)
    empty = np.zeros(0, dtype=np.int64)
    return PackedTree(
        tokens_N=np.concatenate(tokens) if tokens else empty,
        positions_N=np.concatenate(positions).astype(np.int64) if positions else empty,
        ends_N=np.asarray(ends, dtype=np.int64),
        leaves_P=leaves_P,
    )


def tree_size(prompts: Sequence[np.ndarray]) -> int:
    """Number of tokens of the packed walk, without building it."""
    # As in `pack`: only the tokens that differ from the predecessor are new.
    ordered = sorted(prompts, key=lambda prompt: prompt.tolist())
    size, previous = 0, np.zeros(0, dtype=np.int64)
    for prompt in ordered:
        size += len(prompt) - common_prefix_length(previous, prompt)
        previous = prompt
    return size


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two sequences share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def ancestor_mask(ends_N: torch.Tensor) -> torch.Tensor:
    """Boolean mask (1, 1, N, N), query by key: True where the key is the query or its ancestor."""
    index_N = torch.arange(len(ends_N), device=ends_N.device)
    is_before = index_N[None, :] <= index_N[:, None]
    in_subtree = index_N[:, None] < ends_N[None, :]
    return (is_before & in_subtree)[None, None]
