"""The teacher's objective: cross-entropy on the connective (Eq. 4) over the answer words.

Shapes: P prompts, A answer words (the causal ones first).
"""

import torch
from torch import Tensor

from kdecs.corpus.answer_words import NUM_CAUSAL


def connective_loss(logits_PA: Tensor, is_cause_P: Tensor) -> Tensor:
    """Sum over prompts of -log p(gold), softmax over the answer words alone, in float32.

    A causal pair's gold is any causal word: p is their summed probability; a non-causal pair's is `other`.
    """
    log_p_PA = torch.log_softmax(logits_PA.float(), dim=-1)
    log_causal_P = torch.logsumexp(log_p_PA[:, :NUM_CAUSAL], dim=-1)
    return -torch.where(is_cause_P, log_causal_P, log_p_PA[:, NUM_CAUSAL]).sum()


def is_causal(logits_PA: Tensor) -> Tensor:
    """Boolean (P,): whether the causal words together are more probable than `other`."""
    log_causal_P = torch.logsumexp(logits_PA[:, :NUM_CAUSAL].float(), dim=-1)
    return log_causal_P > logits_PA[:, NUM_CAUSAL].float()
