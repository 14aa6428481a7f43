"""Calibration of cause scores by the distance of a pair.

A model can understand what is said and still be biased towards some distances, for example towards a target's own
utterance and against the one before it. For log-odds z of "cause" and distance d (target minus candidate), a logistic
regression finds

    z' = a z + b_d

with a near 1 and b_d near 0 by a ridge penalty. There is a b for 0, 1, … 6, one from 7 on, and one for candidates after
their target. Platt (1999) fits one a and one b.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]

_FARTHEST = 7
NUM_SHIFTS = _FARTHEST + 2
_RIDGE = 1.0  # as strong as a pair or two: it decides only about distances that hardly occur
_LEAST = 1e-6  # log-odds of scores are bounded by those of this one


class DistanceCalibration(BaseModel):
    """The scale a and the shifts b: that of later candidates, then those of the distances 0, 1, … and 7 and beyond."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    scale: float
    shifts: tuple[float, ...] = Field(min_length=NUM_SHIFTS, max_length=NUM_SHIFTS)

    def log_odds(self, z_n: Floats, distance_n: Ints) -> Floats:
        """Calibrated log-odds of pairs (n,)."""
        return self.scale * z_n + np.array(self.shifts)[_places(distance_n)]

    def scores(self, score_n: npt.NDArray[np.float32], distance_n: Ints) -> npt.NDArray[np.float32]:
        """Calibrated scores, between 0 and 1, of scores between 0 and 1."""
        z_n = self.log_odds(log_odds_of(score_n), distance_n)
        found: npt.NDArray[np.float32] = (1 / (1 + np.exp(-z_n))).astype(np.float32)
        return found


def log_odds_of(score_n: npt.NDArray[np.float32]) -> Floats:
    """The log-odds of scores between 0 and 1, bounded where a score is 0 or 1."""
    p_n = score_n.astype(np.float64).clip(_LEAST, 1 - _LEAST)
    found: Floats = np.log(p_n / (1 - p_n))
    return found


def fit_by_distance(z_n: Floats, distance_n: Ints, gold_n: npt.NDArray[np.bool_]) -> DistanceCalibration:
    """The calibration with the least log loss and ridge penalty on pairs whose gold is known."""
    from scipy.optimize import minimize
    from scipy.special import expit

    place_n, is_cause_n = _places(distance_n), gold_n.astype(np.float64)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        scale, shift_D = parameters[0], parameters[1:]
        new_n = scale * z_n + shift_D[place_n]
        error_n = expit(new_n) - is_cause_n
        away = np.concatenate(([scale - 1], shift_D))
        gradient = np.concatenate(([error_n @ z_n], np.bincount(place_n, error_n, minlength=NUM_SHIFTS)))
        total = np.logaddexp(0, new_n).sum() - new_n @ is_cause_n + _RIDGE * (away @ away) / 2
        return float(total), gradient + _RIDGE * away

    start = np.concatenate(([1.0], np.zeros(NUM_SHIFTS)))
    found = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return DistanceCalibration(scale=float(found[0]), shifts=tuple(found[1:].tolist()))


def log_loss(z_n: Floats, gold_n: npt.NDArray[np.bool_]) -> float:
    """The mean log loss of log-odds, in nats."""
    return float(np.mean(np.logaddexp(0, z_n) - z_n * gold_n))


def _places(distance_n: Ints) -> Ints:
    return distance_n.clip(-1, _FARTHEST) + 1
