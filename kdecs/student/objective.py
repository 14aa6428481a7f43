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
    connective_loss,
    distillation_loss,
    emotion_loss,
    span_loss,
    total_loss,
)
from kdecs.student.model import StudentOutput


def loss_parts(
    output: StudentOutput, targets: Targets, distillation: Distillation, *, count: int, world_size: int
) -> LossParts:
    """The batch means of Eq. 10-12 (or the hard loss of mask_cau) for this rank's share of `count` pairs."""

    def mean(values_B: Tensor) -> Tensor:
        return batch_mean(values_B, targets.weights_B, count, world_size)

    emotion = mean(targets.emotion_weights_B * emotion_loss(output.emotion_BE, targets.emotion_B))
    span = mean(span_loss(output.start_BS, output.end_BS, targets.start_B, targets.end_B))
    if targets.teacher_BA is not None:
        soft_B = distillation_loss(targets.teacher_BA, output.connective_BA, distillation.temperature)
        return LossParts(emotion, span, distillation=mean(soft_B))
    return LossParts(
        emotion, span, connective=mean(connective_loss(output.connective_BA, targets.is_cause_B))
    )


def step_loss(parts: LossParts, distillation: Distillation) -> Tensor:
    """The loss of a step (Eq. 13) under a config."""
    return total_loss(parts, alpha=distillation.alpha, temperature=distillation.temperature)


def adamw(model: torch.nn.Module, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW; biases and layer norms are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optimization.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optimization.learning_rate)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout on a rank: a resume needs no random states, and no two ranks share a mask."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
