"""Validation of a teacher in training: loss and utterance-level scores over the pairs of the validation split."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from kdecs.errors import TrainingError
from kdecs.evaluation.metrics import utterance_scores
from kdecs.runtime import Runtime, gather_objects
from kdecs.teacher.batches import MicroBatch, fixed_batches
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.data import PromptSet
from kdecs.teacher.families import EncodedPrompt
from kdecs.teacher.objective import connective_loss, is_causal


@torch.no_grad()
def validate(
    engine: Any, valid: PromptSet, config: TeacherConfig, *, padded: bool, runtime: Runtime
) -> dict[str, float]:
    """valid_loss, valid_positive_f1, valid_negative_f1, valid_macro_f1; every pair counts once. Collective.

    Raises TrainingError on every rank where the loss is not finite.
    """
    engine.eval()
    budget = config.batches.micro_batch_tokens
    batches = fixed_batches(valid.units, micro_batch_tokens=budget, padded=padded)
    rounds = -(-len(batches) // runtime.world_size)
    predicted: dict[int, bool] = {}
    loss_sum = 0.0
    for number in range(rounds):
        position = number * runtime.world_size + runtime.rank
        micro = batches[position] if position < len(batches) else MicroBatch(())
        prompts, is_cause_P = prompts_and_gold(valid, micro, runtime)
        logits_PA = engine(prompts)
        if micro.pairs:
            loss_sum += float(connective_loss(logits_PA, is_cause_P))
            predicted |= dict(zip(micro.pairs, is_causal(logits_PA).tolist(), strict=True))
    merged: dict[int, bool] = {}
    total = 0.0
    for part, part_loss in gather_objects((predicted, loss_sum), runtime):
        merged |= part
        total += part_loss
    if not math.isfinite(total):
        raise TrainingError(
            f"validation loss {total}: training stopped before anything was saved; lower optimization.learning_rate"
        )
    labels = [pair.is_cause for pair in valid.pairs]
    scores = utterance_scores(labels, [merged[n] for n in range(len(labels))])
    return {
        "valid_loss": total / len(labels),
        "valid_positive_f1": scores.positive_f1,
        "valid_negative_f1": scores.negative_f1,
        "valid_macro_f1": scores.macro_f1,
    }


def majority_macro_f1(valid: PromptSet) -> float:
    """Macro F1 of giving every pair the more frequent label."""
    labels: Sequence[bool] = [pair.is_cause for pair in valid.pairs]
    return utterance_scores(labels, [sum(labels) * 2 > len(labels)] * len(labels)).macro_f1


def prompts_and_gold(
    data: PromptSet, micro: MicroBatch, runtime: Runtime
) -> tuple[list[EncodedPrompt], torch.Tensor]:
    """Prompts and gold of a micro-batch; an empty one computes the shortest prompt, for the collectives."""
    indices = micro.pairs or (data.shortest,)
    is_cause_P = torch.tensor([data.pairs[n].is_cause for n in indices], device=runtime.device)
    return [data.prompts[n] for n in indices], is_cause_P
