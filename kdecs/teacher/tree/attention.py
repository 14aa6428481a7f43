"""Attention over a prefix tree's walk: token q attends token k iff k <= q < ends[k].

Three ways to compute the same sum, chosen by `TreeAttention`:

flex    FlexAttention with a block mask made from `ends`: the compiled kernel skips empty blocks (CUDA)
blocks  queries in blocks of 64, each against only its own ancestors, as one batched product (CPU, or any device)
mask    scaled dot products over a boolean (N, N) mask (for decoders that take no other attention function)

A block of queries [a, b) needs few keys: an ancestor k < a of any q in it has a in its subtree too, so the keys are
the path to a and the block itself, at most depth + 64 of N. On RECCON a walk has about eight times as many tokens as a
token has ancestors: the mask computes all of them, the other two ways do not.

Shapes: N packed tokens, B blocks, Q queries of a block, K keys of a block, G key-value heads, R query heads per
key-value head, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdecs.errors import ModelError
from kdecs.teacher.config import TreeAttention
from kdecs.teacher.tree.prefix_tree import PackedTree, ancestor_mask

TREE_ATTENTION = "kdecs_tree"
# Smaller blocks gather fewer keys that only their neighbours need, larger ones make fewer and larger products.
QUERY_BLOCK = 64
# FlexAttention's own block size.
FLEX_BLOCK = 128


@dataclass(frozen=True)
class TreeBlocks:
    """The keys that a blocked walk gathers (B·K,), and which of them each query sees (B, 1, Q, K)."""

    keys: Tensor
    is_seen_B1QK: Tensor


def use_tree_attention(network: Any) -> bool:
    """Make a Transformers model use `attend`; False if its architecture does not take an attention function.

    Without a tree (over padded prompts) the model still computes what `sdpa` computes.
    """
    if not getattr(network, "_supports_attention_backend", False):
        return False
    AttentionInterface.register(TREE_ATTENTION, attend)
    # Without this, Transformers would make no mask at all for padded prompts.
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    network.set_attn_implementation(TREE_ATTENTION)
    return bool(network.config._attn_implementation == TREE_ATTENTION)


def resolve(wanted: TreeAttention, network: Any, device: torch.device) -> Literal["flex", "blocks", "mask"]:
    """Which attention a forward over a tree uses: as wanted, or by device; `mask` if the model takes no other.

    Raises ModelError for training with `flex` on a CPU, where torch has no backward for it.
    """
    if network.config._attn_implementation != TREE_ATTENTION:
        return "mask"
    if wanted == "auto":
        return "flex" if device.type == "cuda" else "blocks"
    if wanted == "flex" and device.type == "cpu" and torch.is_grad_enabled():
        raise ModelError("FlexAttention has no backward on CPU; set batches.tree_attention=blocks")
    return wanted


def mask_arguments(
    tree: PackedTree, kind: Literal["flex", "blocks", "mask"], device: torch.device
) -> dict[str, Any]:
    """The arguments that make a decoder's forward attend along the tree, besides tokens and positions."""
    ends_N = torch.from_numpy(tree.ends_N).to(device)
    if kind == "mask":
        return {"attention_mask": ancestor_mask(ends_N)}
    if kind == "flex":
        return {"attention_mask": block_mask(tree.ends_N, device)}
    # Transformers passes a mask of four dimensions to the attention function unchanged.
    return {"attention_mask": ends_N[None, None, None], "tree_blocks": tree_blocks(tree.ends_N, device)}


def tree_blocks(ends_N: np.ndarray, device: torch.device, *, block: int = QUERY_BLOCK) -> TreeBlocks:
    """The keys of each block of queries, padded to the longest, and the mask between them."""
    size = len(ends_N)
    starts = range(0, size, block)
    keys = [
        np.concatenate([np.flatnonzero(ends_N[:start] > start), np.arange(start, min(start + block, size))])
        for start in starts
    ]
    keys_BK = np.zeros((len(keys), max(len(k) for k in keys)), dtype=np.int64)
    ends_BK = np.zeros_like(keys_BK)  # a padded key has an empty subtree, so no query sees it
    for row, of_block in enumerate(keys):
        keys_BK[row, : len(of_block)] = of_block
        ends_BK[row, : len(of_block)] = ends_N[of_block]
    queries_BQ = np.arange(len(keys) * block).reshape(-1, block)
    is_seen_BQK = (keys_BK[:, None] <= queries_BQ[..., None]) & (queries_BQ[..., None] < ends_BK[:, None])
    # The rows that fill the last block are never read, but a row that sees nothing would be NaN.
    is_seen_BQK[queries_BQ >= size] = True
    return TreeBlocks(
        torch.from_numpy(keys_BK.reshape(-1)).to(device), torch.from_numpy(is_seen_BQK[:, None]).to(device)
    )


def block_mask(ends_N: np.ndarray, device: torch.device) -> BlockMask:
    """FlexAttention's block mask, built without ever holding N·N entries.

    A block pair (i, j), j < i, is empty where every subtree of j ends before i begins, and full (no mask needed)
    where every subtree of j holds all of i.
    """
    size = len(ends_N)
    num_blocks = -(-size // FLEX_BLOCK)
    padded = num_blocks * FLEX_BLOCK - size
    starts = np.arange(num_blocks) * FLEX_BLOCK
    stops = np.minimum(starts + FLEX_BLOCK, size)
    # Padding must not count: its subtrees end at 0 for the latest end and at N for the earliest.
    latest = np.pad(ends_N, (0, padded)).reshape(num_blocks, FLEX_BLOCK).max(1)
    earliest = np.pad(ends_N, (0, padded), constant_values=size).reshape(num_blocks, FLEX_BLOCK).min(1)
    is_before = starts[None, :] < starts[:, None]
    is_full = is_before & (earliest[None, :] >= stops[:, None])
    is_partial = (is_before & (latest[None, :] > starts[:, None]) & ~is_full) | np.eye(num_blocks, dtype=bool)
    ends = torch.from_numpy(ends_N).to(device)

    def is_ancestor(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return (key <= query) & (query < ends[key])

    return BlockMask.from_kv_blocks(
        *_block_lists(is_partial, device),
        *_block_lists(is_full, device),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=is_ancestor,
        seq_lengths=(size, size),
    )


def _block_lists(is_wanted: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of key blocks of each query block (1, 1, blocks), and their indices, wanted ones first."""
    counts = torch.from_numpy(is_wanted.sum(1).astype(np.int32)).to(device)
    order = np.argsort(~is_wanted, axis=1, kind="stable").astype(np.int32)
    return counts[None, None], torch.from_numpy(order).to(device)[None, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree_blocks: TreeBlocks | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function for Transformers: along the tree if the forward was given one, otherwise as `sdpa`.

    query (1, G·R, N, D), key and value (1, G, N, D) -> (1, N, G·R, D). Raises ValueError for an architecture whose
    scores are more than a scaled product (such a model is then trained on pairs).
    """
    is_flex = isinstance(attention_mask, BlockMask)
    if not is_flex and tree_blocks is None:
        # Integers are the `ends` of `mask_arguments`: this model has dropped `tree_blocks` on the way here.
        if attention_mask is not None and not (
            attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
        ):
            raise ValueError(f"{type(module).__name__} does not pass the tree on to its attention")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if unknown := [n for n in ("softcap", "s_aux", "position_bias") if options.get(n) is not None]:
        raise ValueError(f"tree attention has no {unknown[0]}, which {type(module).__name__} needs")
    if dropout:
        raise ValueError("tree attention has no dropout: shared tokens would share it")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_flex:
        return _flex(query, key, value, attention_mask, scale), None
    assert tree_blocks is not None
    return _blocked(query, key, value, tree_blocks, scale), None


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    shares_heads = query.shape[1] != key.shape[1]
    function = _compiled_flex() if query.device.type == "cuda" else flex_attention
    output = function(query, key, value, block_mask=mask, scale=scale, enable_gqa=shares_heads)
    return output.transpose(1, 2).contiguous()


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _blocked(query: Tensor, key: Tensor, value: Tensor, blocks: TreeBlocks, scale: float) -> Tensor:
    num_blocks, _, block, num_keys = blocks.is_seen_B1QK.shape
    _, heads, size, width = query.shape
    groups = key.shape[1]
    # Filled up to whole blocks; the last line cuts the added rows off.
    filled = nn.functional.pad(query[0].transpose(0, 1), (0, 0, 0, 0, 0, num_blocks * block - size))
    query_BGRQD = filled.view(num_blocks, block, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
    key_BGKD, value_BGKD = (
        tensor[0]
        .transpose(0, 1)
        .index_select(0, blocks.keys)
        .view(num_blocks, num_keys, groups, width)
        .transpose(1, 2)
        for tensor in (key, value)
    )
    sum_over = _sum_with_gradient if query.requires_grad and torch.is_grad_enabled() else _sum_without
    output_BGRQD = sum_over(query_BGRQD, key_BGKD, value_BGKD, blocks.is_seen_B1QK, scale)
    return output_BGRQD.permute(0, 3, 1, 2, 4).reshape(num_blocks * block, heads, width)[None, :size]


def _sum_with_gradient(
    query_BGRQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, is_seen_B1QK: Tensor, scale: float
) -> Tensor:
    """Plain batched products: on a CPU their backward is three times as fast as the fused kernel's."""
    num_blocks, groups, repeats, block, width = query_BGRQD.shape
    rows = query_BGRQD.reshape(num_blocks, groups, repeats * block, width)
    scores = torch.matmul(rows * scale, key_BGKD.transpose(2, 3)).view(num_blocks, groups, repeats, block, -1)
    hidden = torch.zeros_like(is_seen_B1QK, dtype=rows.dtype).masked_fill_(~is_seen_B1QK, float("-inf"))
    weights = torch.softmax(scores + hidden[:, None], dim=-1).view(num_blocks, groups, repeats * block, -1)
    return torch.matmul(weights, value_BGKD).view(num_blocks, groups, repeats, block, width)


def _sum_without(
    query_BGRQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, is_seen_B1QK: Tensor, scale: float
) -> Tensor:
    """The fused kernel, which keeps scores in float32 whatever the dtype."""
    num_blocks, groups, repeats, block, width = query_BGRQD.shape
    heads = groups * repeats
    key, value = (
        tensor[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(num_blocks, heads, -1, width)
        for tensor in (key_BGKD, value_BGKD)
    )
    output = nn.functional.scaled_dot_product_attention(
        query_BGRQD.reshape(num_blocks, heads, block, width), key, value, attn_mask=is_seen_B1QK, scale=scale
    )
    return output.view(num_blocks, groups, repeats, block, width)
