"""Calibration by distance: the fit against a planted preference, and that nothing nearby fits better."""

import numpy as np
import pytest
from scipy.special import expit

from kdecs.evaluation.by_distance import (
    NUM_SHIFTS,
    DistanceCalibration,
    fit_by_distance,
    log_loss,
    log_odds_of,
)


def fitted(z_n, distance_n, gold_n):
    """The scale, and the shifts as an array."""
    found = fit_by_distance(z_n, distance_n, gold_n)
    return found.scale, np.array(found.shifts)


def test_the_fit_undoes_a_planted_preference():
    draw = np.random.default_rng(0)
    distance_n = draw.integers(0, 9, 160_000)
    true_n = draw.normal(0, 2, len(distance_n))
    gold_n = draw.random(len(true_n)) < expit(true_n)
    preference = np.array([1.0, -1.5, 0.5, 0, 0.3, -0.2, 0.8, -0.6])
    z_n = (true_n - preference[distance_n.clip(max=7)]) / 0.8
    scale, shift_D = fitted(z_n, distance_n, gold_n)
    assert scale == pytest.approx(0.8, abs=0.03)
    np.testing.assert_allclose(shift_D[1:], preference, atol=0.12)
    assert shift_D[0] == 0, "no candidate came later"
    new_n = scale * z_n + shift_D[distance_n.clip(-1, 7) + 1]
    assert log_loss(new_n, gold_n) < log_loss(z_n, gold_n) - 0.05

    # Nothing nearby has a smaller loss: the ridge penalty is half the squared distance from (1, 0).
    def loss(scale, shift_D):
        return (
            log_loss(scale * z_n + shift_D[distance_n.clip(-1, 7) + 1], gold_n) * len(z_n)
            + ((scale - 1) ** 2 + (shift_D**2).sum()) / 2
        )

    best = loss(scale, shift_D)
    for _ in range(20):
        step = draw.normal(0, 0.02, 1 + NUM_SHIFTS)
        assert loss(scale + step[0], shift_D + step[1:]) > best


def test_labels_that_are_right_stay_as_they_are():
    draw = np.random.default_rng(1)
    z_n, distance_n = draw.normal(0, 2, 200_000), draw.integers(-2, 9, 200_000)
    scale, shift_D = fitted(z_n, distance_n, draw.random(len(z_n)) < expit(z_n))
    assert scale == pytest.approx(1, abs=0.03) and np.abs(shift_D).max() < 0.12
    # Few pairs move little.
    scale, shift_D = fitted(z_n[:2], distance_n[:2], np.ones(2, dtype=bool))
    assert abs(scale - 1) < 2 and np.abs(shift_D).max() < 1


def test_scores_are_moved_as_log_odds():
    calibration = DistanceCalibration(scale=0.5, shifts=(9.0, 1.0, -2.0, *[0.0] * 5, 3.0))
    score_n = np.array([0.5, 0.5, 0.9, 0.9, 0.5, 0.0, 1.0], dtype=np.float32)
    distance_n = np.array([0, 1, 2, -3, 50, 2, 2])
    least = np.log(1e-6 / (1 - 1e-6)) / 2
    expected = expit(np.array([1, -2, np.log(9) / 2, np.log(9) / 2 + 9, 3, least, -least]))
    found = calibration.scores(score_n, distance_n)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.isfinite(log_odds_of(score_n)).all()
