"""What several teachers say of a pair, mixed to one soft label: pure numpy.

Legend: B pairs, K teachers, A answer words (causal first).
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdecs.corpus.answer_words import NUM_CAUSAL

Floats = npt.NDArray[np.floating[Any]]
Weighting = Literal["uniform", "correct", "confidence"]


def mixed_teachers(
    logits_BKA: Floats,
    weights_K: Floats,
    is_cause_B: npt.NDArray[np.bool_],
    is_known_B: npt.NDArray[np.bool_],
    weighting: Weighting = "uniform",
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(logits (B, A), weight of L_KD (B,)) of a pair's mixture of teachers.

    c_k: what teacher k counts for a pair by the gold: 1 (uniform); 1 where p_k(gold) >= 1/2, else 0 (correct);
    p_k(gold) (confidence), with p_k at τ = 1 and p(gold) the sum over the causal words of a causal pair, p("other")
    of another. Pairs whose gold is not known have c_k = 1. With w_k the weights over their sum:

        q_t = Σ_k w_k c_k p_k / Σ_k w_k c_k,  logits log q_t;  weight Σ_k w_k c_k

    Where no teacher counts, the weight is 0 and the mixture that of the weights alone.
    """
    log_p_BKA = _log_softmax(logits_BKA.astype(np.float64))
    counts_BK = np.ones(logits_BKA.shape[:2])
    if weighting != "uniform":
        causal_BK = np.exp(log_p_BKA[:, :, :NUM_CAUSAL]).sum(axis=-1)
        gold_BK = np.where(is_cause_B[:, None], causal_BK, 1 - causal_BK)
        counted_BK = (gold_BK >= 0.5).astype(np.float64) if weighting == "correct" else gold_BK
        counts_BK = np.where(is_known_B[:, None], counted_BK, 1.0)
    share_BK = counts_BK * (weights_K / weights_K.sum())
    weight_B = share_BK.sum(axis=1)
    mix_BK = np.where(weight_B[:, None] > 0, share_BK, weights_K / weights_K.sum())
    mix_BK /= mix_BK.sum(axis=1, keepdims=True)
    if logits_BKA.shape[1] == 1:  # nothing to mix: the raw logits, bit for bit
        return logits_BKA[:, 0].astype(np.float32), weight_B.astype(np.float32)
    with np.errstate(divide="ignore"):  # the log of a teacher that does not count
        log_q_BA = np.logaddexp.reduce(log_p_BKA + np.log(mix_BK)[:, :, None], axis=1)
    return log_q_BA.astype(np.float32), weight_B.astype(np.float32)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
