"""The learning rate as a pure function of the step: a resume needs no scheduler state."""

import math

from kdecs.config import Optimization


def learning_rate_at(step: int, total_steps: int, optimization: Optimization) -> float:
    """Linear warm-up over the first share of the steps, then linear decay that would reach 0 after the last."""
    warmup = math.ceil(total_steps * optimization.warmup_share)
    if step < warmup:
        return optimization.learning_rate * (step + 1) / warmup
    return optimization.learning_rate * (total_steps - step) / max(1, total_steps - warmup)
