"""Several teachers mixed to one soft label, against scipy and values worked by hand."""

import numpy as np
import pytest
from scipy.special import softmax

from kdecs.student.data import mixed_teachers


def logits_of(*probabilities: list[float]) -> np.ndarray:
    """One pair's teachers (1, K, A) from their probabilities."""
    return np.log(np.array(probabilities))[None]


KNOWN = np.array([True])
CAUSE = np.array([True])


def test_one_uniform_teacher_is_handed_on_bit_for_bit():
    logits = np.random.default_rng(0).normal(size=(7, 1, 5)).astype(np.float32)
    found, weight = mixed_teachers(logits, np.array([3.0]), np.zeros(7, bool), np.ones(7, bool))
    assert np.array_equal(found, logits[:, 0])
    assert (weight == 1).all()


def test_uniform_teachers_mix_their_distributions_by_weight():
    generator = np.random.default_rng(1)
    logits, weights = generator.normal(size=(6, 3, 5)) * 4, np.array([1.0, 2.0, 5.0])
    found, weight = mixed_teachers(logits, weights, np.zeros(6, bool), np.ones(6, bool))
    expected = np.einsum("k,bka->ba", weights / 8, softmax(logits, axis=2))
    np.testing.assert_allclose(softmax(found, axis=1), expected, rtol=1e-5)
    assert weight == pytest.approx(1.0)


def test_correct_takes_only_teachers_that_are_right():
    right, wrong = [0.2, 0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1, 0.6]
    found, weight = mixed_teachers(logits_of(right, wrong), np.array([1.0, 3.0]), CAUSE, KNOWN, "correct")
    np.testing.assert_allclose(softmax(found, axis=1)[0], right, rtol=1e-6)
    assert weight == pytest.approx([0.25])
    found, weight = mixed_teachers(logits_of(right, wrong), np.array([1.0, 3.0]), ~CAUSE, KNOWN, "correct")
    np.testing.assert_allclose(softmax(found, axis=1)[0], wrong, rtol=1e-6)
    assert weight == pytest.approx([0.75])


def test_confidence_weighs_by_the_probability_of_the_gold_by_hand():
    """p(cause) = 0.8 and 0.4 with equal weights: shares 2/3 and 1/3, weight 0.6."""
    first, second = [0.2, 0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1, 0.6]
    found, weight = mixed_teachers(logits_of(first, second), np.ones(2), CAUSE, KNOWN, "confidence")
    expected = np.array(first) * 2 / 3 + np.array(second) / 3
    np.testing.assert_allclose(softmax(found, axis=1)[0], expected, rtol=1e-6)
    assert weight == pytest.approx([0.6])


def test_where_all_are_wrong_the_pair_counts_nothing_and_stays_finite():
    wrong = [0.1, 0.1, 0.1, 0.1, 0.6]
    found, weight = mixed_teachers(logits_of(wrong, wrong), np.ones(2), CAUSE, KNOWN, "correct")
    assert weight == pytest.approx([0.0])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("weighting", ["correct", "confidence"])
def test_a_pair_without_gold_is_not_weighed_by_it(weighting):
    wrong = [0.1, 0.1, 0.1, 0.1, 0.6]
    found, weight = mixed_teachers(logits_of(wrong, wrong), np.ones(2), CAUSE, ~KNOWN, weighting)
    np.testing.assert_allclose(softmax(found, axis=1)[0], wrong, rtol=1e-6)
    assert weight == pytest.approx([1.0])
