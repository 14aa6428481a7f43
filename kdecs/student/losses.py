"""The student's losses (Eq. 10-13): pure functions, in float32, one value a pair; `batch_mean` reduces them.

Legend: B pairs, E emotions, A answer words of the connective, S span places (index 0 = no span, then u_j's tokens).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdecs.corpus.answer_words import NUM_CAUSAL

UNKNOWN = -1


def emotion_loss(logits_BE: Tensor, labels_B: Tensor) -> Tensor:
    """Eq. 10, L_emo a pair: -log softmax(logits)[label]; 0 where the label is -1. Shape (B,)."""
    return functional.cross_entropy(logits_BE.float(), labels_B, ignore_index=UNKNOWN, reduction="none")


def span_loss(start_BS: Tensor, end_BS: Tensor, start_B: Tensor, end_B: Tensor) -> Tensor:
    """Eq. 11, L_span a pair: the sum of the cross-entropies of start and end; 0 where a place is -1. Shape (B,).

    The logits are -inf at places beyond a pair's own tokens.
    """
    start = functional.cross_entropy(start_BS.float(), start_B, ignore_index=UNKNOWN, reduction="none")
    end = functional.cross_entropy(end_BS.float(), end_B, ignore_index=UNKNOWN, reduction="none")
    return start + end


def connective_loss(logits_BA: Tensor, is_cause_B: Tensor) -> Tensor:
    """Hard cross-entropy on mask_cau a pair. Shape (B,).

    Causal pair: minus log of the summed probability of the causal words; other pair: minus log p("other").
    """
    log_p_BA = functional.log_softmax(logits_BA.float(), dim=-1)
    causal_B = torch.logsumexp(log_p_BA[:, :NUM_CAUSAL], dim=-1)
    other_B = torch.logsumexp(log_p_BA[:, NUM_CAUSAL:], dim=-1)
    return -torch.where(is_cause_B.bool(), causal_B, other_B)


def distillation_loss(teacher_BA: Tensor, student_BA: Tensor, temperature: float) -> Tensor:
    """Eq. 12, L_KD a pair: Σ_a q_t log(q_t / q_s), q = softmax(logits / τ) over the answer words. Shape (B,).

    Logits are raw (τ = 1). The factor τ² is not in here: it belongs to the sum (`total_loss`).
    """
    log_t_BA = functional.log_softmax(teacher_BA.float() / temperature, dim=-1)
    log_s_BA = functional.log_softmax(student_BA.float() / temperature, dim=-1)
    return functional.kl_div(log_s_BA, log_t_BA, reduction="none", log_target=True).sum(dim=-1)


def batch_mean(values_B: Tensor, weights_B: Tensor, count: float, world_size: int = 1) -> Tensor:
    """Σ weight·value · world size / count.

    With `count` the number of pairs of the global batch, the mean over ranks (which gradients take) is the batch
    mean, whatever the number of ranks. Weight 0 marks a row that only pads a rank's share.
    """
    return (values_B * weights_B).sum() * (world_size / count)


@dataclass(frozen=True)
class LossParts:
    """Batch means of the parts; the one that a mode does not use is None."""

    emotion: Tensor
    span: Tensor
    distillation: Tensor | None = None
    connective: Tensor | None = None


def total_loss(parts: LossParts, *, alpha: float, temperature: float) -> Tensor:
    """Eq. 13: L = α (L_emo + L_span) + (1 - α) τ² L_KD; without L_KD (w/o KD): the hard loss of mask_cau, weight 1."""
    loss = alpha * (parts.emotion + parts.span)
    if parts.distillation is not None:
        loss = loss + (1 - alpha) * temperature**2 * parts.distillation
    if parts.connective is not None:
        loss = loss + parts.connective
    return loss
