"""The score above which a pair is a cause, chosen for macro F1 on validation.

Cross-entropy on pairs of which a quarter are causes leaves most scores below one half; the threshold that
macro F1 wants is lower, and it differs with the model.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

DEFAULT_THRESHOLD = 0.5
Level = Literal["span", "utterance", "both"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairGains:
    """What predicting a pair as a cause is worth, P pairs (protocol reccon).

    `score_P` in [0, 1], -inf for a pair that can never be predicted (its target is neutral).
    `positive_rows_P`: gold spans of the pair, 0 for a negative pair. `f_sum_P`: sum of the rows' F with the
    predicted span, each 0 to 1. Level span: Pos F1 is the mean of F over positive rows; utterance: the F1 of the
    causal class, for which F is not looked at; both: the mean of the two.
    """

    score_P: Floats
    positive_rows_P: Floats
    f_sum_P: Floats
    level: Level = "span"


def choose_threshold(gains: PairGains) -> tuple[float, float]:
    """(threshold, macro F1 in percent); a pair is predicted as a cause where score >= threshold.

    Pairs of equal score stay together; the threshold lies midway between two scores. Of equally good ones the
    nearest to 0.5 is taken. A threshold under which nothing would be a cause is never chosen; where there is no
    positive row or no pair that can be predicted, it is 0.5.
    """
    usable = np.isfinite(gains.score_P)
    num_positive = gains.positive_rows_P.sum()
    if not usable.any() or num_positive == 0:
        return DEFAULT_THRESHOLD, _macro_f1(gains, gains.score_P >= DEFAULT_THRESHOLD)
    order = np.flatnonzero(usable)[np.argsort(-gains.score_P[usable], kind="stable")]
    score = gains.score_P[order]
    is_negative = gains.positive_rows_P[order] == 0
    ends = np.flatnonzero(np.append(score[1:] < score[:-1], True))  # last pair of each group of equal scores
    f_sum = np.cumsum(gains.f_sum_P[order])[ends]
    lost_negatives = np.cumsum(is_negative)[ends]
    found_rows = np.cumsum(gains.positive_rows_P[order])[ends]
    num_negative = float((gains.positive_rows_P == 0).sum())
    macro = _macro_of_counts(f_sum, num_positive, num_negative, lost_negatives, found_rows, gains.level)
    below = np.append(score[ends[:-1] + 1], 0.0)
    thresholds = (score[ends] + below) / 2
    best = np.flatnonzero(macro >= macro.max() - 1e-9)
    chosen = best[np.argmin(np.abs(thresholds[best] - DEFAULT_THRESHOLD))]
    return float(thresholds[chosen]), float(macro[chosen])


def _macro_f1(gains: PairGains, predicted_P: npt.NDArray[np.bool_]) -> float:
    is_negative = gains.positive_rows_P == 0
    return float(
        _macro_of_counts(
            np.array([gains.f_sum_P[predicted_P].sum()]),
            gains.positive_rows_P.sum(),
            float(is_negative.sum()),
            np.array([(is_negative & predicted_P).sum()]),
            np.array([gains.positive_rows_P[predicted_P].sum()]),
            gains.level,
        )[0]
    )


def _macro_of_counts(
    f_sum: Floats,
    num_positive: float,
    num_negative: float,
    lost_negatives: Floats,
    found_rows: Floats,
    level: Level,
) -> Floats:
    """Macro F1 (percent) from the sum of F, the negatives predicted as causes, the positive rows predicted."""
    right = num_negative - lost_negatives
    # F1 = 2 right / (negatives + predicted negatives): the same as from precision and recall; 0/0 is 0.
    total = num_negative + right + (num_positive - found_rows)
    negative_f1 = np.divide(2 * right, total, out=np.zeros_like(right, dtype=np.float64), where=total > 0)
    by_span = f_sum / num_positive if num_positive else np.zeros_like(negative_f1)
    total = num_positive + found_rows + lost_negatives
    by_utterance = np.divide(
        2 * found_rows, total, out=np.zeros_like(total, dtype=np.float64), where=total > 0
    )
    positive_f1 = {"span": by_span, "utterance": by_utterance, "both": (by_span + by_utterance) / 2}[level]
    return 50 * (positive_f1 + negative_f1)
