"""Which pairs form a step, and their tensors. Same seed and epoch: same batches, on any number of ranks.

Legend: B prompts, T tokens, M tokens of u_j's copy, A answer words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdecs.corpus.encoding import EncodedPair
from kdecs.student.model import Batch, on_device

if TYPE_CHECKING:  # pyarrow: prediction does without
    from kdecs.corpus.cache import CorpusCache

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]
_MASK_COLUMNS = ("emotion_mask", "connective_mask", "start_mask", "end_mask")
_PAD_MULTIPLE = 8


class Targets(NamedTuple):
    """What a batch is trained towards, int64 (B,) unless said; -1: unknown, left out of that loss."""

    emotion_B: Tensor
    is_cause_B: Tensor
    start_B: Tensor
    end_B: Tensor
    weights_B: Tensor  # float32; 0 for a row that only pads a rank's share
    emotion_weights_B: Tensor  # float32, beside weights_B in the emotion loss
    gold_weights_B: Tensor  # float32, beside weights_B in the losses on gold; 0 outside the share
    teacher_BA: Tensor | None  # float32 raw logits
    teacher_weights_B: Tensor | None  # float32, beside weights_B in L_KD

    def to(self, device: torch.device) -> "Targets":
        """The same targets on a device; to a GPU without waiting for it."""
        return Targets(*(None if tensor is None else on_device(tensor, device) for tensor in self))


def batches_of_tokens(num_tokens_P: Ints, rows: Ints, max_tokens: int) -> list[Ints]:
    """Rows by length in batches of at most `max_tokens` padded tokens (a longer prompt stands alone)."""
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
    """The prompts of the rows, gathered from the mapped cache."""
    masks_B4 = np.stack([cache.column(name)[rows] for name in _MASK_COLUMNS], axis=1)
    return padded_batch(
        [cache.list_at("token_ids", int(row)) for row in rows],
        masks_B4,
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
    """Prompts padded on the right to the longest, rounded up to a multiple of 8 tokens."""
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


@dataclass(frozen=True)
class PairWeights:
    """What rows count in the losses, float32 (B,): at all, in L_emo, in every loss on gold, in L_KD."""

    rows_B: Floats
    emotion_B: Floats
    gold_B: Floats
    teacher_B: Floats | None


def gold_targets(
    cache: "CorpusCache", rows: Ints, weights: PairWeights, emotion_labels: Ints, teacher_BA: Floats | None
) -> Targets:
    """Targets of the rows; `emotion_labels` takes the cache's emotion index to the student's (-1: unknown to it)."""
    return Targets(
        emotion_B=torch.from_numpy(emotion_labels[cache.column("emotion")[rows]].astype(np.int64)),
        is_cause_B=torch.from_numpy(cache.column("is_cause")[rows].astype(np.int64)),
        start_B=torch.from_numpy(cache.column("span_start")[rows].astype(np.int64)),
        end_B=torch.from_numpy(cache.column("span_end")[rows].astype(np.int64)),
        weights_B=torch.from_numpy(weights.rows_B),
        emotion_weights_B=torch.from_numpy(weights.emotion_B),
        gold_weights_B=torch.from_numpy(weights.gold_B),
        teacher_BA=None if teacher_BA is None else torch.from_numpy(teacher_BA),
        teacher_weights_B=None if weights.teacher_B is None else torch.from_numpy(weights.teacher_B),
    )


def _padded(length: int) -> int:
    return -(-length // _PAD_MULTIPLE) * _PAD_MULTIPLE
