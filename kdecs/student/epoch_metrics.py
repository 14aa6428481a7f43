"""The figures of an epoch: sums of the losses over its pairs, and its line in `metrics.jsonl`."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdecs.artifact import read_manifest
from kdecs.runtime import Runtime
from kdecs.student.config import StudentConfig
from kdecs.student.losses import LossParts
from kdecs.student.validation import Validation

_EMOTION_KEY = "emotion_accuracy"
_PARTS = ("emotion", "span", "distillation", "cause")


def no_sums(device: torch.device) -> Tensor:
    """Zeros for the sums over pairs of: the loss, and each of its parts."""
    return torch.zeros(1 + len(_PARTS), dtype=torch.float64, device=device)


def step_sums(loss: Tensor, parts: LossParts, num_pairs: float) -> Tensor:
    """A step's share of the sums: batch means times the number of pairs; a part that there is not counts 0."""
    values = [getattr(parts, name) for name in _PARTS]
    zero = loss.new_zeros(())
    return torch.stack([loss, *(zero if value is None else value for value in values)]).double() * num_pairs


def summed_over_ranks(sums: Tensor, runtime: Runtime) -> Tensor:
    """The sums of all ranks. Collective."""
    if runtime.world_size == 1:
        return sums
    total = sums.clone()
    dist.all_reduce(total)
    return total


def epoch_metrics(
    config: StudentConfig,
    validation: Validation,
    sums: Tensor,
    *,
    epoch: int,
    step: int,
    seconds: float,
    num_pairs: int,
) -> dict[str, float]:
    """One epoch's line: means of the losses over its pairs, speed, and the scores on validation (percent).

    A student that is given the emotions has no score of theirs: it would only copy them.
    """
    predicts_emotions = config.model.given_emotions == "none"
    loss, *parts = (sums / num_pairs).tolist()
    names = _loss_names(config)
    return {
        "epoch": epoch,
        "step": step,
        "time": time.time(),
        "train_loss": loss,
        **{names[part]: value for part, value in zip(_PARTS, parts, strict=True) if part in names},
        "train_pairs_per_s": num_pairs / max(seconds, 1e-9),
        "threshold": validation.threshold,
        "neutral_offset": validation.neutral_offset,
        **{
            key: value
            for key, value in validation.scores.values.items()
            if predicts_emotions or not (key == _EMOTION_KEY or key.startswith("strict_"))
        },
    }


def epoch_line(metrics: dict[str, float], criterion: str) -> str:
    """What the terminal shows of an epoch."""
    return (
        f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, valid {scores_line(metrics, criterion)}, "
        f"{metrics['train_pairs_per_s']:.0f} pairs/s"
    )


def scores_line(metrics: dict[str, float], criterion: str) -> str:
    """The scores that an epoch is chosen by, and what stands beside: of spans, or of utterances (task ecpe)."""
    level = criterion.removesuffix("macro_f1")
    line = (
        f"{level.replace('_', ' ')}macro F1 {metrics[criterion]:.2f} "
        f"(Pos {metrics[level + 'positive_f1']:.2f}, Neg {metrics[level + 'negative_f1']:.2f})"
    )
    if not level:
        line += f", EM {metrics['exact_match']:.2f}"
    if _EMOTION_KEY in metrics:
        line += f", emotion accuracy {metrics[_EMOTION_KEY]:.2f}"
    return line


def _loss_names(config: StudentConfig) -> dict[str, str]:
    """Part -> name in the metrics, for the parts that the mode uses."""
    distillation = config.distillation
    cause = {"cls": "classifier", "span_only": ""}.get(distillation.mode, "connective")
    if distillation.mode == "kd" and distillation.hard_weight == 0:
        cause = ""
    used = {
        "emotion": "emotion" if config.model.given_emotions == "none" else "",
        "span": "span" if config.task == "ecspe" else "",
        "distillation": "distillation" if distillation.mode == "kd" else "",
        "cause": cause,
    }
    return {part: f"train_{name}_loss" for part, name in used.items() if name}


def teacher_lineage(config: StudentConfig) -> dict[str, Any] | None:
    """What the soft labels say of where they come from; None without distillation.

    Of several teachers the first stands as one alone would, all of them in `teachers`, with their weights.
    """
    used = config.distillation.used_teachers
    if not used:
        return None
    lineages = []
    for teacher in used:
        manifest = read_manifest(teacher.labels, "soft-labels")
        lineages.append(
            {"inputs": manifest.inputs, "soft_labels_hash": manifest.config_hash, "details": manifest.details}
        )
    if len(used) == 1:
        return lineages[0]
    weighed = [{**lineage, "weight": teacher.weight} for lineage, teacher in zip(lineages, used, strict=True)]
    return {**lineages[0], "teachers": weighed}
