"""Eq. 10-13: the loss of one step from logits, targets and config.

Legend: B pairs, E emotions, A connective answer words, S span places. Each loss below gives a value per pair (B,);
`step_loss` takes their weighted means over the batch (`batch_mean`) and adds them up (`total_loss`). All in float32.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.student.config import Distillation
from kdecs.student.data import Targets
from kdecs.student.model import StudentOutput

UNKNOWN = -1  # a label that is not known: no loss for this pair


def emotion_loss(logits_BE: Tensor, labels_B: Tensor) -> Tensor:
    """Eq. 10, L_emo per pair: -log softmax(logits)[label]; 0 if the label is -1. Shape (B,)."""
    return functional.cross_entropy(logits_BE.float(), labels_B, ignore_index=UNKNOWN, reduction="none")


def span_loss(start_BS: Tensor, end_BS: Tensor, start_B: Tensor, end_B: Tensor) -> Tensor:
    """Eq. 11, L_span per pair: the sum of the cross-entropies of start and end; 0 if a place is -1. Shape (B,).

    The logits are -inf at places beyond a pair's own tokens.
    """
    # A gold span that truncation cut off has the place -1: it is neither "no span" nor a place that is left to find.
    start = functional.cross_entropy(start_BS.float(), start_B, ignore_index=UNKNOWN, reduction="none")
    end = functional.cross_entropy(end_BS.float(), end_B, ignore_index=UNKNOWN, reduction="none")
    return start + end


def connective_loss(logits_BA: Tensor, is_cause_B: Tensor) -> Tensor:
    """Cross-entropy of the gold label on mask_cau, per pair. Shape (B,).

    For a causal pair this is -log of the summed probability of the causal words, for another -log p("other").
    """
    # Any causal word is right: the sum of their probabilities counts, not one word's.
    log_p_BA = functional.log_softmax(logits_BA.float(), dim=-1)
    causal_B = torch.logsumexp(log_p_BA[:, :NUM_CAUSAL], dim=-1)
    other_B = torch.logsumexp(log_p_BA[:, NUM_CAUSAL:], dim=-1)
    return -torch.where(is_cause_B.bool(), causal_B, other_B)


def classifier_loss(logits_B2: Tensor, is_cause_B: Tensor) -> Tensor:
    """Cross-entropy of the binary classifier on the first token (Table 5, w/o connectives). Shape (B,)."""
    return functional.cross_entropy(logits_B2.float(), is_cause_B, reduction="none")


def distillation_loss(teacher_BA: Tensor, student_BA: Tensor, temperature: float | Tensor) -> Tensor:
    """Eq. 12, L_KD per pair: Σ_a q_t log(q_t / q_s), q = softmax(logits / τ) over the answer words. Shape (B,).

    Logits are raw (τ = 1); `temperature` is one number, or one per pair (B,). The factor τ² of Eq. 13 is not
    included: `total_loss` applies it.
    """
    tau = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    # As logarithms, because a teacher that is sure leaves probabilities that float32 could not tell from 0.
    log_t_BA = functional.log_softmax(teacher_BA.float() / tau, dim=-1)
    log_s_BA = functional.log_softmax(student_BA.float() / tau, dim=-1)
    # torch's `kl_div(input, target)` is KL(target ‖ input), so the student comes first. Its reduction `mean` would
    # divide by the answer words as well; here they are summed, and `batch_mean` divides by pairs alone.
    return functional.kl_div(log_s_BA, log_t_BA, reduction="none", log_target=True).sum(dim=-1)


def vocabulary_distillation_loss(
    top_log_p_BC: Tensor, top_ids_BK: Tensor, student_BV: Tensor, temperature: float
) -> Tensor:
    """Eq. 12 over the vocabulary, per pair: the teacher's K top tokens, and all other tokens as one class. Shape (B,).

    `top_log_p_BC` are the teacher's log-probabilities at τ = 1 (`TrainingData.batch`), `student_BV` raw logits. Both
    distributions over the C = K + 1 classes are softened by τ: softmax(log p / τ). With all tokens among the top ones
    this is Eq. 12 over the whole vocabulary.
    """
    log_s_BV = functional.log_softmax(student_BV.float(), dim=-1)
    log_s_BK = log_s_BV.gather(-1, top_ids_BK)
    if top_ids_BK.size(-1) == student_BV.size(-1):
        return distillation_loss(top_log_p_BC[:, :-1], log_s_BK, temperature)
    # Of the others, not 1 - Σ: that loses every digit if the top tokens take almost all of the mass.
    others_B = log_s_BV.scatter(-1, top_ids_BK, -torch.inf).logsumexp(dim=-1)
    return distillation_loss(top_log_p_BC, torch.cat((log_s_BK, others_B[:, None]), dim=-1), temperature)


def teacher_gap(teacher_BA: Tensor, student_BA: Tensor) -> Tensor:
    """How far the student is from its teacher: the total variation ½ Σ_a |q_t - q_s| at τ = 1, in [0, 1]. Shape (B,).

    No gradient flows through it: it steers the distillation and is not itself minimised.
    """
    q_t_BA = functional.softmax(teacher_BA.float(), dim=-1)
    q_s_BA = functional.softmax(student_BA.detach().float(), dim=-1)
    return (q_t_BA - q_s_BA).abs().sum(dim=-1) / 2


def dynamic_distillation_loss(
    teacher_BA: Tensor,
    student_BA: Tensor,
    temperature: float,
    dynamic: Literal["none", "temperature", "weight"],
) -> Tensor:
    """L_KD per pair, steered by the gap g between student and teacher (`teacher_gap`). Shape (B,).

    none: Eq. 12. temperature: Eq. 12 at τ' = τ (1 + g), which softens what the student is far from; the factor
    (τ'/τ)² turns the τ² of Eq. 13 into τ'². weight: (1 - g) times Eq. 12, so that what the student cannot follow yet
    counts less.
    """
    if dynamic == "none":
        return distillation_loss(teacher_BA, student_BA, temperature)
    gap_B = teacher_gap(teacher_BA, student_BA)
    if dynamic == "weight":
        return (1 - gap_B) * distillation_loss(teacher_BA, student_BA, temperature)
    return (1 + gap_B) ** 2 * distillation_loss(teacher_BA, student_BA, temperature * (1 + gap_B))


def batch_mean(values_B: Tensor, weights_B: Tensor, count: float, world_size: int = 1) -> Tensor:
    """Σ weight · value · world_size / count, where `count` is the number of pairs in the global batch.

    DistributedDataParallel averages gradients over ranks, so this makes the result the mean over the global batch on
    any number of ranks, even if their shares differ. Weight 0 marks a row that only pads a rank's share.
    """
    return (values_B * weights_B).sum() * (world_size / count)


@dataclass(frozen=True)
class LossParts:
    """Batch means of the parts of the loss; None for a part that the mode does not use.

    `cause` is the loss on gold causes: on mask_cau, or of the classifier on the first token.
    """

    emotion: Tensor | None = None
    span: Tensor | None = None
    distillation: Tensor | None = None
    cause: Tensor | None = None


def total_loss(parts: LossParts, *, alpha: float, temperature: float, cause_weight: float = 1.0) -> Tensor:
    """Eq. 13: L = α (L_emo + L_span) + (1 - α) τ² L_KD + cause_weight · L_cause, over the parts that the mode has.

    With distillation `cause_weight` is 0, as in the paper, or that of a mix with gold labels; without (Table 5) it
    is 1.
    """
    terms: list[Tensor] = [alpha * part for part in (parts.emotion, parts.span) if part is not None]
    if parts.distillation is not None:
        # τ² makes up for the gradients of softened logits, which shrink with 1/τ² (Hinton et al. 2015).
        terms.append((1 - alpha) * temperature**2 * parts.distillation)
    if parts.cause is not None:
        terms.append(cause_weight * parts.cause)
    return torch.stack(terms).sum()


def step_loss(
    output: StudentOutput, targets: Targets, distillation: Distillation, *, count: int, world_size: int
) -> tuple[Tensor, LossParts]:
    """Eq. 13 for this rank's share of a batch of `count` pairs, and its parts, which depend on the mode."""

    def mean(values_B: Tensor, more_B: Tensor) -> Tensor:
        return batch_mean(values_B, targets.weights_B * more_B, count, world_size)

    emotion = span = soft = cause = None
    gold_B = targets.gold_weights_B
    if output.emotion_BE is not None:
        emotion = mean(emotion_loss(output.emotion_BE, targets.emotion_B), gold_B * targets.emotion_weights_B)
    if output.start_BS is not None and output.end_BS is not None:
        span = mean(span_loss(output.start_BS, output.end_BS, targets.start_B, targets.end_B), gold_B)
    if targets.teacher_BA is not None:
        assert output.connective_BA is not None and targets.teacher_weights_B is not None  # mode kd has them
        if targets.top_ids_BK is not None and targets.top_log_p_BC is not None:
            assert output.vocabulary_BV is not None  # the task asks the model for it
            soft_B = vocabulary_distillation_loss(
                targets.top_log_p_BC, targets.top_ids_BK, output.vocabulary_BV, distillation.temperature
            )
        else:
            soft_B = dynamic_distillation_loss(
                targets.teacher_BA, output.connective_BA, distillation.temperature, distillation.dynamic
            )
        soft = mean(soft_B, targets.teacher_weights_B)
    if output.classifier_B2 is not None:
        cause = mean(classifier_loss(output.classifier_B2, targets.is_cause_B), gold_B)
    # With distillation Eq. 13 has no such term, and a weight of 0 would still cost its computation.
    elif output.connective_BA is not None and (soft is None or distillation.hard_weight > 0):
        cause = mean(connective_loss(output.connective_BA, targets.is_cause_B), gold_B)
    parts = LossParts(emotion, span, soft, cause)
    loss = total_loss(
        parts,
        alpha=distillation.alpha,
        temperature=distillation.temperature,
        cause_weight=1.0 if soft is None else distillation.hard_weight,
    )
    return loss, parts
