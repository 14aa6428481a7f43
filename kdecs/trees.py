"""Encoders over target trees: the prompts of a target in one sequence, a trunk and a branch for each candidate.

Legend: B prompts, R sequences, T tokens.

A token sees the trunk and its own branch, and the positions of every branch go on from the trunk's end. So a branch
does not notice the others: its states are those of trunk and branch alone. Students and masked teachers share this.
(Decoder-only teachers share every common prefix: kdecs.teacher.tree.)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdecs.errors import ModelError
from kdecs.models import first_line

Ints = npt.NDArray[np.integer[Any]]
PADDING, TRUNK = -1, 0  # in `Tree.branches_RT`; branches count from 1
# A longer tree is split over sequences: its dense mask grows with the square of its length, and one that is much
# longer than the others of a batch makes padding of them all. Few targets of RECCON reach it.
MAX_TREE_TOKENS = 1024


class Tree(NamedTuple):
    """The branch of each token (PADDING, TRUNK, 1, 2, …) and its position in its own prompt, int64."""

    branches_RT: Tensor
    positions_RT: Tensor

    def visible(self) -> Tensor:
        """Which tokens (last axis) a token sees: (R, T, T), bool."""
        # Padding sees the trunk, since a softmax over nothing is not a number.
        keys = self.branches_RT[:, None, :]
        return (keys == TRUNK) | ((keys == self.branches_RT[:, :, None]) & (keys != PADDING))


def plant(
    branches: Sequence[Ints], trunks: Sequence[Sequence[int] | Ints], keys: Sequence[Any]
) -> tuple[list[list[Any]], Ints, Ints]:
    """Sequences of a trunk and branches: the parts of each, and each branch's sequence (B,) and first token in it (B,).

    Branches of one key have the same trunk and share a sequence, up to MAX_TREE_TOKENS; more take further ones.
    """
    sequences: list[list[Any]] = []
    lengths: list[int] = []
    open_sequence: dict[Any, int] = {}
    rows_B, starts_B = np.empty(len(branches), dtype=np.int64), np.empty(len(branches), dtype=np.int64)
    for index, (branch, trunk, key) in enumerate(zip(branches, trunks, keys, strict=True)):
        row = open_sequence.get(key)
        if row is None or lengths[row] + len(branch) > MAX_TREE_TOKENS:
            row = open_sequence[key] = len(sequences)
            sequences.append([trunk])
            lengths.append(len(trunk))
        rows_B[index], starts_B[index] = row, lengths[row]
        sequences[row].append(branch)
        lengths[row] += len(branch)
    return sequences, rows_B, starts_B


def tree_of(sequences: Sequence[Sequence[Any]], width: int) -> Tree:
    """The tree of planted sequences, padded to a width."""
    branches_RT = np.full((len(sequences), width), PADDING, dtype=np.int64)
    positions_RT = np.zeros((len(sequences), width), dtype=np.int64)
    for row, (trunk, *branches) in enumerate(sequences):
        lengths = [len(trunk), *map(len, branches)]
        end = sum(lengths)
        branches_RT[row, :end] = np.repeat(np.arange(len(lengths)), lengths)
        starts = np.cumsum([0, *lengths[:-1]])
        firsts = [0, *[len(trunk)] * len(branches)]
        positions_RT[row, :end] = np.arange(end) - np.repeat(starts - firsts, lengths)
    return Tree(torch.from_numpy(branches_RT), torch.from_numpy(positions_RT))


def tree_inputs(encoder: Any, tree: Tree) -> dict[str, Any]:
    """What a Transformers encoder is given, besides the token ids, to read sequences as trees."""
    visible_R1TT = tree.visible().unsqueeze(1)
    mask: Any = visible_R1TT
    if "sliding_attention" in (getattr(encoder.config, "layer_types", None) or ()):
        # ModernBERT's windows, by the positions in the prompt instead of the places in the sequence.
        apart_RTT = (tree.positions_RT[:, None, :] - tree.positions_RT[:, :, None]).abs()
        near_R1TT = visible_R1TT & (apart_RTT <= encoder.config.sliding_window).unsqueeze(1)
        mask = {"full_attention": visible_R1TT, "sliding_attention": near_R1TT}
    return {"attention_mask": mask, "position_ids": tree.positions_RT + first_position(encoder)}


def first_position(encoder: Any) -> int:
    """The row of the position table for the first token: RoBERTa and its kin count from padding_idx + 1."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


@torch.no_grad()
def check_trees(encoder: Any, name: str) -> None:
    """Compare a small tree with trunk and branch at their plain places. Raises ModelError, one line, if they differ.

    Some encoders ignore the positions that they are given (MPNet's relative ones), or take no mask of this shape.
    """
    trunk, first, second = np.split(
        np.random.default_rng(0).integers(5, encoder.config.vocab_size, 21), (9, 14)
    )
    sequences, _, starts = plant([first, second], [trunk, trunk], [0, 0])
    tree = tree_of(sequences, len(trunk) + len(first) + len(second))
    was_training = encoder.training
    encoder.eval()
    try:
        together = _states(encoder, np.concatenate(sequences[0]), tree)[starts[1] :]
        # A sequence with a single branch has plain positions; only the trunk does not see the branch.
        alone = [trunk, second]
        single = tree_of([alone], len(trunk) + len(second))
        mask = tree_inputs(encoder, single)["attention_mask"]
        ids = torch.from_numpy(np.concatenate(alone))[None].to(encoder.device)
        plain = encoder(input_ids=ids, attention_mask=_on(mask, encoder.device))[0][0, len(trunk) :]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot read trees ({first_line(error)}); set model.layout=pair") from None
    finally:
        encoder.train(was_training)
    # Relative, since weights may be in half precision.
    tolerance = 1e-4 if plain.dtype == torch.float32 else 5e-2
    if (together - plain).abs().max() > tolerance * plain.abs().max():
        raise ModelError(
            f"{name}: reads a tree otherwise than its prompts one by one, since it ignores the positions that it is "
            "given; set model.layout=pair"
        )


def _states(encoder: Any, token_ids: Ints, tree: Tree) -> Tensor:
    ids = torch.from_numpy(token_ids)[None].to(encoder.device)
    inputs = tree_inputs(encoder, Tree(*(tensor.to(encoder.device) for tensor in tree)))
    return encoder(input_ids=ids, **inputs)[0][0]


def _on(mask: Any, device: torch.device) -> Any:
    if isinstance(mask, dict):
        return {kind: tensor.to(device) for kind, tensor in mask.items()}
    return mask.to(device)
