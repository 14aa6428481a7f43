"""How confident soft labels are, and how well that agrees with gold: sums over batches, so that memory does not grow.

Shapes: n pairs of a batch, A answer words (causal ones first), T temperatures, M bins.

p(cause) is the summed probability of the causal words, softmax over the answer words at τ. With M bins of equal width
over [0, 1], n_m pairs, mean p(cause) p_m and share of gold causes g_m in bin m (Naeini et al. 2015; Guo et al. 2017),

    ECE = Σ_m n_m / n · |p_m − g_m|
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL
from kdecs.errors import LabelError
from kdecs.evaluation.counts import PairCounts
from kdecs.soft_labels.format import UNKNOWN_REST_MASS
from kdecs.soft_labels.scoring import is_causal

SCORES = ("positive_f1", "negative_f1", "macro_f1")
"""The scores of an agreement, in percent."""
TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
NUM_BINS = 15  # as in Guo et al. (2017), so that values can be compared
_TINY = 1e-30  # in the place of a probability that underflows, so that the NLL stays finite (69 nats)


def require_cause_words(directory: Path, answer_words: Sequence[str]) -> None:
    """Raise LabelError unless the answer words are the causal ones followed by one for "no cause"."""
    expected = NUM_CAUSAL + 1
    if len(set(answer_words)) != expected or len(answer_words) != expected:
        raise LabelError(
            f"{directory}: labels over {len(answer_words)} answer words, expected {expected} different ones, "
            f"such as {', '.join(CONNECTIVES)}: which of them mean a cause is not known"
        )


def probabilities(logits_nA: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax over the answer words at τ, (n, A) float64."""
    scaled_nA = logits_nA.astype(np.float64) / temperature
    # The largest becomes 1, so that no logit overflows, however small τ is.
    powers_nA = np.exp(scaled_nA - scaled_nA.max(axis=1, keepdims=True))
    return powers_nA / powers_nA.sum(axis=1, keepdims=True)


def entropies(probabilities_nA: np.ndarray) -> np.ndarray:
    """Entropy of each row in nats, (n,)."""
    # 0 log 0 counts as 0, its limit.
    safe_nA = np.where(probabilities_nA > 0, probabilities_nA, 1.0)
    return -(probabilities_nA * np.log(safe_nA)).sum(axis=1)


class LabelSums:
    """Labels by themselves: decisions, answer words, mass of the rest, entropy by τ."""

    def __init__(self, answer_words: tuple[str, ...]) -> None:
        self.answer_words = answer_words
        self.num_pairs = 0
        self._num_causal = 0
        self._rest = 0.0
        self._num_known = 0  # pairs whose mass of the rest is known
        self._mass_A = np.zeros(len(answer_words))
        self._first_A = np.zeros(len(answer_words), dtype=np.int64)
        self._entropy_T = np.zeros(len(TEMPERATURES))

    def add(self, logits_nA: np.ndarray, log_rest_mass_n: np.ndarray) -> None:
        """Count a batch."""
        self.num_pairs += len(logits_nA)
        self._num_causal += int(is_causal(logits_nA).sum())
        # A combination of labels without it is a rounding error away from the constant.
        known_n = log_rest_mass_n[log_rest_mass_n > UNKNOWN_REST_MASS + 1].astype(np.float64)
        self._rest += float(np.exp(known_n).sum())
        self._num_known += len(known_n)
        self._mass_A += probabilities(logits_nA, 1.0).sum(axis=0)
        self._first_A += np.bincount(logits_nA.argmax(axis=1), minlength=len(self.answer_words))
        for index, temperature in enumerate(TEMPERATURES):
            self._entropy_T[index] += entropies(probabilities(logits_nA, temperature)).sum()

    def as_dict(self) -> dict[str, Any]:
        """Means over the pairs; shares in [0, 1], entropies in nats. `rest_mass` is None if it is not known."""
        n = max(1, self.num_pairs)
        words = zip(self.answer_words, self._mass_A, self._first_A, strict=True)
        return {
            "num_pairs": self.num_pairs,
            "share_causal": self._num_causal / n,
            "rest_mass": self._rest / self._num_known if self._num_known else None,
            "max_entropy": float(np.log(len(self.answer_words))),
            "entropy": {str(t): float(e / n) for t, e in zip(TEMPERATURES, self._entropy_T, strict=True)},
            "words": {
                word: {"probability": float(mass / n), "most_likely": float(first / n)}
                for word, mass, first in words
            },
        }


@dataclass
class Reliability:
    """Sums by bin of p(cause): pairs, p(cause), gold causes."""

    counts_M: np.ndarray
    probability_M: np.ndarray
    causes_M: np.ndarray

    @classmethod
    def empty(cls) -> "Reliability":
        """Sums of no pair."""
        return cls(np.zeros(NUM_BINS, dtype=np.int64), np.zeros(NUM_BINS), np.zeros(NUM_BINS, dtype=np.int64))

    def add(self, p_cause_n: np.ndarray, is_cause_n: np.ndarray) -> None:
        """Count a batch; p(cause) = 1 belongs to the last bin."""
        bin_n = np.minimum((p_cause_n * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        self.counts_M += np.bincount(bin_n, minlength=NUM_BINS)
        self.probability_M += np.bincount(bin_n, weights=p_cause_n, minlength=NUM_BINS)
        self.causes_M += np.bincount(bin_n[is_cause_n], minlength=NUM_BINS)

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]; the equation is at the top of the module."""
        # n_m / n · |p_m − g_m| with both means written as sums over n_m, which cancels.
        gaps_M = np.abs(self.probability_M - self.causes_M)
        return float(gaps_M.sum() / max(1, self.counts_M.sum()))

    def rows(self) -> list[dict[str, float]]:
        """The bins that hold pairs: bounds, pairs, mean p(cause), share of gold causes."""
        return [
            {
                "from": m / NUM_BINS,
                "to": (m + 1) / NUM_BINS,
                "pairs": int(self.counts_M[m]),
                "probability": float(self.probability_M[m] / self.counts_M[m]),
                "causes": float(self.causes_M[m] / self.counts_M[m]),
            }
            for m in range(NUM_BINS)
            if self.counts_M[m]
        ]


class GoldSums:
    """Labels compared with the gold causes: agreement, calibration by τ, answer words by gold."""

    def __init__(self, answer_words: tuple[str, ...]) -> None:
        self.answer_words = answer_words
        self._counts = PairCounts()
        self._reliability_T = [Reliability.empty() for _ in TEMPERATURES]
        self._nll_T = np.zeros(len(TEMPERATURES))
        self._brier_T = np.zeros(len(TEMPERATURES))
        self._mass_2A = np.zeros((2, len(answer_words)))
        self._first_2A = np.zeros((2, len(answer_words)), dtype=np.int64)

    def add(self, logits_nA: np.ndarray, is_cause_n: np.ndarray) -> None:
        """Count a batch; `is_cause_n` (n,) bool is gold."""
        self._counts += PairCounts.of(is_cause_n, is_causal(logits_nA))
        for index, temperature in enumerate(TEMPERATURES):
            p_nA = probabilities(logits_nA, temperature)
            p_cause_n = np.minimum(p_nA[:, :NUM_CAUSAL].sum(axis=1), 1.0)  # rounding may exceed 1
            # Of "other" itself: 1 - p(cause) would lose the digits of a small probability, which the NLL is made of.
            p_gold_n = np.where(is_cause_n, p_cause_n, p_nA[:, NUM_CAUSAL])
            self._reliability_T[index].add(p_cause_n, is_cause_n)
            self._nll_T[index] -= np.log(np.maximum(p_gold_n, _TINY)).sum()
            self._brier_T[index] += ((p_cause_n - is_cause_n) ** 2).sum()
        p_nA = probabilities(logits_nA, 1.0)
        first_n = logits_nA.argmax(axis=1)
        for gold in (0, 1):
            rows_n = is_cause_n == bool(gold)
            self._mass_2A[gold] += p_nA[rows_n].sum(axis=0)
            self._first_2A[gold] += np.bincount(first_n[rows_n], minlength=len(self.answer_words))

    @property
    def num_pairs(self) -> int:
        """Pairs counted."""
        return self._counts.num_pairs

    @property
    def reliability(self) -> Reliability:
        """The bins at τ = 1."""
        return self._reliability_T[TEMPERATURES.index(1.0)]

    def as_dict(self) -> dict[str, Any]:
        """F1 in percent, shares in [0, 1], NLL in nats per pair."""
        n = max(1, self.num_pairs)
        num_causes = self._counts.true_positive + self._counts.false_negative
        golds = np.maximum(1, [self.num_pairs - num_causes, num_causes])
        return {
            "num_pairs": self.num_pairs,
            "num_causes": num_causes,
            "agreement": self._counts.scores(),
            "calibration": {
                str(t): {
                    "ece": self._reliability_T[i].ece,
                    "nll": float(self._nll_T[i] / n),
                    "brier": float(self._brier_T[i] / n),
                }
                for i, t in enumerate(TEMPERATURES)
            },
            "reliability": self.reliability.rows(),
            "words": {
                word: {
                    "probability_causes": float(self._mass_2A[1, a] / golds[1]),
                    "probability_others": float(self._mass_2A[0, a] / golds[0]),
                    "most_likely": int(self._first_2A[:, a].sum()),
                    "most_likely_causes": int(self._first_2A[1, a]),
                }
                for a, word in enumerate(self.answer_words)
            },
        }
