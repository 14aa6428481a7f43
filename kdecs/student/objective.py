"""One step's loss from logits, gold and config, and the optimizer with its schedule."""

import hashlib

import torch
from torch import Tensor

from kdecs.config import Optimization
from kdecs.student.batches import Targets
from kdecs.student.config import Distillation
from kdecs.student.losses import (
    LossParts,
    batch_mean,
    classifier_loss,
    connective_loss,
    dynamic_distillation_loss,
    emotion_loss,
    span_loss,
    total_loss,
)
from kdecs.student.model import StudentModel, StudentOutput


def loss_parts(
    output: StudentOutput, targets: Targets, distillation: Distillation, *, count: int, world_size: int
) -> LossParts:
    """The batch means of Eq. 10-12 and of the hard loss on causes, for this rank's share of `count` pairs.

    Which parts there are follows from the outputs and the targets: the mode's.
    """

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
        soft_B = dynamic_distillation_loss(
            targets.teacher_BA, output.connective_BA, distillation.temperature, distillation.dynamic
        )
        soft = mean(soft_B, targets.teacher_weights_B)
    if output.classifier_B2 is not None:
        cause = mean(classifier_loss(output.classifier_B2, targets.is_cause_B), gold_B)
    elif output.connective_BA is not None and (soft is None or distillation.hard_weight > 0):
        cause = mean(connective_loss(output.connective_BA, targets.is_cause_B), gold_B)
    return LossParts(emotion, span, soft, cause)


def step_loss(parts: LossParts, distillation: Distillation) -> Tensor:
    """The loss of a step (Eq. 13) under a config."""
    return total_loss(
        parts,
        alpha=distillation.alpha,
        temperature=distillation.temperature,
        cause_weight=1.0 if parts.distillation is None else distillation.hard_weight,
    )


def adamw(
    model: StudentModel, optimization: Optimization, *, head_rate_factor: float = 1.0
) -> torch.optim.AdamW:
    """AdamW; biases, layer norms and priors are not decayed. Groups carry `rate_factor`: 1, or that of the heads."""
    in_heads = {id(p) for head in model.heads.values() for p in head.parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in in_heads, parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": optimization.weight_decay if is_decayed else 0.0,
                "rate_factor": head_rate_factor if is_head else 1.0,
            }
            for (is_head, is_decayed), parameters in groups.items()
        ],
        lr=optimization.learning_rate,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout on a rank: a resume needs no random states, and no two ranks share a mask."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
