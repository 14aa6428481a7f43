"""From cached or freshly encoded pairs to the padded tensors of a batch. Needs no pyarrow, which prediction lacks.

Legend: B prompts, T tokens, M tokens of u_j's copy.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kdecs.corpus.encoding import EncodedPair
from kdecs.student.model import Batch

if TYPE_CHECKING:
    from kdecs.corpus.cache import CorpusCache

Ints = npt.NDArray[np.integer[Any]]
_MASK_COLUMNS = ("emotion_mask", "connective_mask", "start_mask", "end_mask")
_PAD_MULTIPLE = 8


def batches_of_tokens(num_tokens_P: Ints, rows: Ints, max_tokens: int) -> list[Ints]:
    """The rows, sorted by length, in batches of at most `max_tokens` padded tokens; a longer prompt stands alone."""
    ordered = rows[np.argsort(num_tokens_P[rows], kind="stable")]
    batches: list[Ints] = []
    start = 0
    for end in range(1, len(ordered) + 1):
        is_last = end == len(ordered)
        if is_last or (end - start + 1) * _padded(int(num_tokens_P[ordered[end]])) > max_tokens:
            batches.append(ordered[start:end])
            start = end
    return batches


def cached_batch(cache: "CorpusCache", rows: Ints, pad_id: int) -> Batch:
    """The prompts of some rows of a memory-mapped cache."""
    return padded_batch(
        [cache.list_at("token_ids", int(row)) for row in rows],
        np.stack([cache.column(name)[rows] for name in _MASK_COLUMNS], axis=1),
        cache.column("candidate_first")[rows],
        cache.num_candidate_tokens[rows],
        cache.column("target")[rows] - cache.column("candidate")[rows],
        pad_id,
    )


def encoded_batch(encoded: Sequence[EncodedPair], pad_id: int) -> Batch:
    """The prompts of freshly encoded pairs."""
    return padded_batch(
        [np.asarray(pair.token_ids) for pair in encoded],
        np.array([(p.emotion_mask, p.connective_mask, p.start_mask, p.end_mask) for p in encoded]),
        np.array([pair.candidate_first for pair in encoded]),
        np.array([len(pair.candidate_offsets) for pair in encoded]),
        np.array([pair.distance for pair in encoded]),
        pad_id,
    )


def padded_batch(
    prompts: Sequence[Ints], masks_B4: Ints, first_B: Ints, length_B: Ints, distance_B: Ints, pad_id: int
) -> Batch:
    """Prompts padded on the right to the longest, rounded up to a multiple of 8 tokens.

    `first_B` and `length_B` give the place of u_j's copy in each prompt, `distance_B` is i - j.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts])
    width = _padded(int(lengths_B.max()))
    token_ids_BT = np.full((len(prompts), width), pad_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        token_ids_BT[row, : len(prompt)] = prompt
    places_M = np.arange(int(length_B.max()))
    candidate_mask_BM = places_M < length_B[:, None]
    candidate_BM = np.where(candidate_mask_BM, first_B[:, None] + places_M, 0)
    return Batch(
        token_ids_BT=torch.from_numpy(token_ids_BT),
        attention_BT=torch.from_numpy((np.arange(width) < lengths_B[:, None]).astype(np.int64)),
        masks_B4=torch.from_numpy(masks_B4.astype(np.int64)),
        candidate_BM=torch.from_numpy(candidate_BM.astype(np.int64)),
        candidate_mask_BM=torch.from_numpy(candidate_mask_BM),
        distance_B=torch.from_numpy(distance_B.astype(np.int64)),
    )


def _padded(length: int) -> int:
    return -(-length // _PAD_MULTIPLE) * _PAD_MULTIPLE
