"""Encoders over target trees: the prompts of a target share a trunk, and each candidate adds a branch.

A token sees the trunk and its own branch, and the positions of every branch go on from the trunk's end. So a branch
does not notice the others: its states are those of trunk and branch alone. Students and masked teachers share this.
(Decoder-only teachers share every common prefix: kdecs.teacher.tree.)

All trees of a batch are one sequence without padding, so that everything but attention costs its real tokens. Attention
runs over pieces: a trunk against itself, a branch against its trunk and itself. Pieces of similar length form a group,
which is one batched product whose mask hides padding alone. A mask over the whole sequence would compute every pair of
its tokens instead, and FlexAttention would compile its kernel for each new length.

Legend: N tokens of a batch, R trunks, B branches, P pieces of a group, L tokens of its longest, K keys, D head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdecs.errors import ModelError
from kdecs.models import first_line, first_position

Ints = npt.NDArray[np.integer[Any]]
ATTENTION = "kdecs_target_tree"
# A group pads its pieces to the longest. More groups would pad less and make more, smaller products.
_LIKENESS = 0.7
_FEWEST_PIECES = 4


class Group(NamedTuple):
    """Pieces of similar length: their tokens (queries), the tokens that they see (keys), and which keys are real."""

    query_PL: Tensor
    key_PK: Tensor
    mask_PK: Tensor


class Tree(NamedTuple):
    """The trees of a batch over its N tokens; all int64 but the masks.

    `position_N` is the position of each token in its own prompt, `slot_N` its place among the queries of all groups.
    """

    position_N: Tensor
    slot_N: Tensor
    groups: tuple[Group, ...]

    def to(self, device: torch.device) -> "Tree":
        """The same trees on a device."""
        return Tree(
            self.position_N.to(device, non_blocking=True),
            self.slot_N.to(device, non_blocking=True),
            tuple(Group(*(part.to(device, non_blocking=True) for part in group)) for group in self.groups),
        )


def plant(
    trunks: Sequence[Sequence[int] | Ints], branches: Sequence[Sequence[int] | Ints], trunk_of_B: Ints
) -> tuple[Ints, Ints, Ints, Tree]:
    """The trees of R trunks and B branches, of which each belongs to a trunk.

    Returns the token ids (N,), trunks first, the first token of each trunk (R,) and of each branch (B,), and the tree.
    """
    pieces = [*trunks, *branches]
    lengths = np.array([len(piece) for piece in pieces])
    starts = np.cumsum(lengths) - lengths
    num_trunks = len(trunks)
    trunk_of = np.concatenate((np.arange(num_trunks), trunk_of_B))  # of a trunk: itself
    is_branch = np.arange(len(pieces)) >= num_trunks
    groups, slots = [], np.empty(int(lengths.sum()), dtype=np.int64)
    num_slots = 0
    for some in _similar(lengths):
        query_PL, is_query_PL = _grid(starts[some], lengths[some])
        slots[query_PL[is_query_PL]] = num_slots + np.flatnonzero(is_query_PL)
        num_slots += query_PL.size
        groups.append(_group(query_PL, starts, lengths, trunk_of[some], np.where(is_branch[some], some, -1)))
    # The positions of a branch go on from the end of its trunk: its own start is taken off, the trunk's length is put
    # on.
    tree = Tree(
        position_N=torch.from_numpy(
            np.arange(lengths.sum()) - np.repeat(starts - is_branch * lengths[trunk_of], lengths)
        ),
        slot_N=torch.from_numpy(slots),
        groups=tuple(groups),
    )
    return np.concatenate(pieces).astype(np.int64), starts[:num_trunks], starts[num_trunks:], tree


def _similar(lengths: Ints) -> list[Ints]:
    """The pieces in groups whose shortest has at least `_LIKENESS` of the longest one's tokens, if they are many."""
    # The longest first, so that the first piece of a group is the one to which the others are padded.
    order = np.argsort(-lengths, kind="stable")
    groups: list[Ints] = []
    begin = 0
    for end in range(1, len(order) + 1):
        is_last = end == len(order)
        differs = not is_last and lengths[order[end]] < _LIKENESS * lengths[order[begin]]
        if is_last or (differs and end - begin >= _FEWEST_PIECES):
            groups.append(order[begin:end])
            begin = end
    return groups


def _group(query_PL: Ints, starts: Ints, lengths: Ints, trunk_P: Ints, branch_P: Ints) -> Group:
    """Keys: the tokens of the trunk, then those of the branch (none for a piece that is a trunk)."""
    num_trunk_P = lengths[trunk_P]
    num_keys_P = num_trunk_P + np.where(branch_P >= 0, lengths[branch_P], 0)
    places = np.arange(int(num_keys_P.max()))
    in_trunk = places < num_trunk_P[:, None]
    mask_PK = places < num_keys_P[:, None]
    in_branch_PK = starts[branch_P][:, None] + places - num_trunk_P[:, None]
    # A padded key points to token 0, which the mask hides.
    key_PK = np.where(in_trunk, starts[trunk_P][:, None] + places, np.where(mask_PK, in_branch_PK, 0))
    return Group(*(torch.from_numpy(part) for part in (query_PL, key_PK, mask_PK)))


def _grid(starts: Ints, lengths: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The tokens of pieces, padded with the first one, and which of them are real."""
    places = np.arange(int(lengths.max()))
    mask = places < lengths[:, None]
    return starts[:, None] + np.where(mask, places, 0), mask


def tree_inputs(encoder: Any, tree: Tree) -> dict[str, Any]:
    """What a Transformers encoder is given, besides the token ids (1, N), to read them as trees.

    Raises ModelError for an architecture that takes no attention function.
    """
    # An encoder over padded prompts still computes what `sdpa` computes, so it can stay set.
    if encoder.config._attn_implementation != ATTENTION:
        if not getattr(encoder, "_supports_attention_backend", False):
            raise ModelError(f"{type(encoder).__name__} takes no attention function from outside")
        AttentionInterface.register(ATTENTION, attend)
        # Without this, Transformers would make no mask at all for padded prompts.
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        encoder.set_attn_implementation(ATTENTION)
    return {"position_ids": tree.position_N[None] + first_position(encoder), "target_tree": tree}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    target_tree: Tree | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function for Transformers: along the trees if the forward was given some, otherwise as `sdpa`.

    query, key and value (1, heads, N, D) -> (1, N, heads, D). Raises ValueError for an architecture whose scores are
    more than a scaled product.
    """
    if target_tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if options.get("position_bias") is not None:
        raise ValueError(f"attention along trees has no position_bias, which {type(module).__name__} needs")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def pieces(states: Tensor, index: Tensor) -> Tensor:
        """(P, heads, L, D)."""
        taken = states[0].transpose(0, 1).index_select(0, index.reshape(-1))
        return taken.view(*index.shape, *taken.shape[1:]).transpose(1, 2)

    found = []
    for group in target_tree.groups:
        seen = group.mask_PK[:, None]
        if sliding_window is not None:  # ModernBERT counts the token itself
            at = target_tree.position_N
            apart_PLK = at[group.query_PL][:, :, None] - at[group.key_PK][:, None]
            seen = seen & (apart_PLK.abs() < sliding_window)
        keys, values = pieces(key, group.key_PK), pieces(value, group.key_PK)
        output = _sum(pieces(query, group.query_PL), keys, values, seen, scale, dropout)
        found.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).index_select(0, target_tree.slot_N)[None], None


def _sum(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, dropout: float) -> Tensor:
    """Softmax attention (P, heads, L, D); `seen` (P, 1 or L, K) hides padding, and keys outside a window.

    Every query sees a real key: padded queries repeat a token of their own piece.
    """
    if query.device.type != "cpu" or not (query.requires_grad and torch.is_grad_enabled()):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen[:, None], dropout_p=dropout, scale=scale
        )
    # Plain products: on a CPU their backward is faster than the fused kernel's, which dropout excludes anyway.
    hidden = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, float("-inf"))[:, None]
    weights = torch.softmax(torch.matmul(query * scale, key.transpose(2, 3)) + hidden, dim=-1)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value)


@torch.no_grad()
def check_trees(encoder: Any, name: str) -> None:
    """Compare a small tree with trunk and branch in plain sequences. Raises ModelError, one line, if they differ.

    Some encoders ignore the positions that they are given (MPNet's relative ones), or take no attention function.
    """
    # Ids from 5 on: RoBERTa counts no position for its padding token, whose id lies below.
    trunk, first, second = np.split(
        np.random.default_rng(0).integers(5, encoder.config.vocab_size, 21), (9, 14)
    )
    token_ids, _, starts, tree = plant([trunk], [first, second], np.zeros(2, dtype=np.int64))
    was_training = encoder.training
    encoder.eval()
    try:
        ids_1N = torch.from_numpy(token_ids)[None].to(encoder.device)
        inputs = tree_inputs(encoder, tree.to(encoder.device))
        found = encoder(input_ids=ids_1N, **inputs)[0][0, starts[1] :]
        # Trunk and branch alone have plain positions; only the trunk does not see the branch.
        alone = torch.from_numpy(np.concatenate((trunk, second)))[None].to(encoder.device)
        mask = torch.ones(1, 1, alone.size(1), alone.size(1), dtype=torch.bool, device=encoder.device)
        mask[..., : len(trunk), len(trunk) :] = False
        # Encoders with layers of several kinds (ModernBERT) take a mask for each kind.
        kinds = getattr(encoder.config, "layer_types", None)
        plain = encoder(input_ids=alone, attention_mask=dict.fromkeys(kinds, mask) if kinds else mask)[0]
    except ModelError as error:
        raise ModelError(f"{name}: {error}, so it cannot read trees; set model.layout=pair") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot read trees ({first_line(error)}); set model.layout=pair") from None
    finally:
        encoder.train(was_training)
    expected = plain[0, len(trunk) :]
    # Relative, since weights may be in half precision.
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    if (found - expected).abs().max() > tolerance * expected.abs().max():
        raise ModelError(
            f"{name}: reads a tree otherwise than its prompts one by one, since it ignores the positions that it is "
            "given; set model.layout=pair"
        )
