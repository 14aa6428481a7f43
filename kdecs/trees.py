"""Encoders over target trees: the prompts of a target share a trunk, and each candidate adds a branch.

A token sees the trunk and its own branch, and the positions of every branch go on from the trunk's end. So a branch
does not notice the others: its states are those of trunk and branch alone. Students and masked teachers share this.
(Decoder-only teachers share every common prefix: kdecs.teacher.tree.)

All trees of a batch are one sequence without padding, target by target, so that everything but attention costs its real
tokens. Attention runs over pieces of that sequence: a trunk against itself, and some branches of a trunk against trunk
and themselves, where a mask hides each branch from the others. Pieces are slices: nothing is padded, and keys are
copied only to stand behind their trunk's. A mask over the whole sequence would compute every pair of its tokens
instead, and FlexAttention would compile its kernel for each new length.

Legend: N tokens of a batch, R trunks, B branches, L tokens of a piece, K keys that it sees, D head size.
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

from kdecs.errors import ModelError, first_line
from kdecs.models import first_position

Ints = npt.NDArray[np.integer[Any]]
ATTENTION = "kdecs_target_tree"
# Branches of a trunk are computed together up to this many tokens: more pieces make more, smaller products, fewer
# pieces compute more of what the mask hides.
_PIECE_TOKENS = 96


class Piece(NamedTuple):
    """A slice of the sequence: a trunk, or some branches and the number of the piece that is their trunk.

    `bias_LK` is 0 where a token of the branches sees a key and -inf where it does not; None for a trunk.
    """

    num_tokens: int
    trunk: int | None = None
    bias_LK: Tensor | None = None


class Tree(NamedTuple):
    """The trees of a batch over its N tokens; `position_N` (int64) is the position of each token in its own prompt."""

    position_N: Tensor
    pieces: tuple[Piece, ...]

    def to(self, device: torch.device) -> "Tree":
        """The same trees on a device."""
        return Tree(
            self.position_N.to(device, non_blocking=True),
            tuple(
                piece
                if piece.bias_LK is None
                else piece._replace(bias_LK=piece.bias_LK.to(device, non_blocking=True))
                for piece in self.pieces
            ),
        )


def plant(
    trunks: Sequence[Sequence[int] | Ints], branches: Sequence[Sequence[int] | Ints], trunk_of_B: Ints
) -> tuple[Ints, Ints, Ints, Tree]:
    """The trees of R trunks and B branches, of which each belongs to a trunk.

    Returns the token ids (N,), each trunk followed by its branches, the first token of each trunk (R,) and of each
    branch (B,), and the tree.
    """
    tokens: list[Ints] = []
    positions: list[Ints] = []
    pieces: list[Piece] = []
    trunk_starts_R = np.zeros(len(trunks), dtype=np.int64)
    branch_starts_B = np.zeros(len(branches), dtype=np.int64)
    end = 0
    for number, trunk in enumerate(trunks):
        trunk_starts_R[number] = end
        end += len(trunk)
        tokens.append(np.asarray(trunk))
        positions.append(np.arange(len(trunk)))
        trunk_piece = len(pieces)
        pieces.append(Piece(len(trunk)))
        lengths: list[int] = []
        for branch in np.flatnonzero(trunk_of_B == number).tolist():
            length = len(branches[branch])
            if lengths and sum(lengths) + length > _PIECE_TOKENS:
                pieces.append(_branches(lengths, len(trunk), trunk_piece))
                lengths = []
            lengths.append(length)
            branch_starts_B[branch] = end
            end += length
            tokens.append(np.asarray(branches[branch]))
            # Each branch goes on from the trunk's end, whatever stands between.
            positions.append(len(trunk) + np.arange(length))
        if lengths:
            pieces.append(_branches(lengths, len(trunk), trunk_piece))
    tree = Tree(torch.from_numpy(np.concatenate(positions)), tuple(pieces))
    return np.concatenate(tokens).astype(np.int64), trunk_starts_R, branch_starts_B, tree


def _branches(lengths: Sequence[int], num_trunk_tokens: int, trunk: int) -> Piece:
    """A piece of branches; each of their tokens sees the trunk and its own branch."""
    branch_L = np.repeat(np.arange(len(lengths)), lengths)
    bias_LL = np.where(branch_L[:, None] == branch_L, 0.0, -np.inf)
    bias_LK = np.pad(bias_LL, ((0, 0), (num_trunk_tokens, 0))).astype(np.float32)
    return Piece(len(branch_L), trunk, torch.from_numpy(bias_LK))


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
    # Plain products where there is a gradient on a CPU: their backward is faster there than the fused kernel's, which
    # dropout excludes anyway.
    is_plain = query.device.type == "cpu" and query.requires_grad and torch.is_grad_enabled()
    if is_plain and dropout:
        value = value / (1 - _sixteen_bits(dropout) / 2**16)
    attention = _plain_attention if is_plain else _fused_attention
    sizes = [piece.num_tokens for piece in target_tree.pieces]
    queries, keys, values = (states.squeeze(0).split(sizes, dim=1) for states in (query * scale, key, value))
    positions = target_tree.position_N.split(sizes)
    found = []
    for number, piece in enumerate(target_tree.pieces):
        key, value, at_K, bias_LK = keys[number], values[number], positions[number], piece.bias_LK
        if piece.trunk is not None:
            key = torch.cat((keys[piece.trunk], key), dim=1)
            value = torch.cat((values[piece.trunk], value), dim=1)
            at_K = torch.cat((positions[piece.trunk], at_K))
        if sliding_window is not None:  # ModernBERT counts the token itself
            is_far_LK = (positions[number][:, None] - at_K).abs() >= sliding_window
            near_LK = torch.zeros_like(is_far_LK, dtype=torch.float32) if bias_LK is None else bias_LK
            bias_LK = near_LK.masked_fill(is_far_LK, float("-inf"))
        bias_LK = None if bias_LK is None else bias_LK.to(query.dtype)
        found.append(attention(queries[number], key, value, bias_LK, dropout).transpose(0, 1))
    return torch.cat(found)[None], None


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, bias_LK: Tensor | None, dropout: float
) -> Tensor:
    """Softmax attention (heads, L, D) of scaled queries. Every query sees a key: itself."""
    return nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=bias_LK, dropout_p=dropout, scale=1.0
    )[0]


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, bias_LK: Tensor | None, dropout: float
) -> Tensor:
    """The same as products, for values that are divided by the share of weights that dropout keeps.

    PyTorch draws a random number for each weight, which is a third of attention in training. Here 16 random bits
    decide, so that dropout's probability is a multiple of 2^-16.
    """
    if bias_LK is None:
        scores = torch.bmm(query, key.transpose(1, 2))
    else:
        scores = torch.baddbmm(bias_LK, query, key.transpose(1, 2))
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        size = weights.numel()
        bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        is_kept = bits[:size].view(weights.shape) >= _sixteen_bits(dropout) - 2**15
        weights = weights * is_kept.to(weights.dtype)
    return torch.bmm(weights, value)


def _sixteen_bits(dropout: float) -> int:
    """Of 2^16 numbers those that stand for a dropped weight; at least one stays."""
    return min(round(dropout * 2**16), 2**16 - 1)


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
