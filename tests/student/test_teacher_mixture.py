"""Several teachers mixed to one soft label, against scipy and values worked by hand."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from kdecs.student.data import mixed_teachers, top_log_probabilities


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


def test_top_logits_get_their_norm_from_the_answer_words_and_the_rest():
    """From what an export keeps of the whole vocabulary, in float32; certain teachers stay finite."""
    generator = np.random.default_rng(3)
    logits_BV = generator.normal(size=(50, 40)) * 4
    logits_BV[:10, 3] += 60  # an answer word that takes all of the mass
    answers = [3, 7, 11, 20, 39]
    log_p_BV = log_softmax(logits_BV, axis=1)
    rest = [token for token in range(40) if token not in answers]
    order_BV = np.argsort(-logits_BV, axis=1)
    for num_top in (1, 6, 40):
        top_ids_BK = order_BV[:, :num_top]
        found = top_log_probabilities(
            logits_BV[:, answers].astype(np.float32),
            np.logaddexp.reduce(log_p_BV[:, rest], axis=1).astype(np.float32),
            np.take_along_axis(logits_BV, top_ids_BK, axis=1).astype(np.float32),
        )
        assert np.isfinite(found).all() and found.dtype == np.float32
        expected = np.exp(np.take_along_axis(log_p_BV, top_ids_BK, axis=1))
        np.testing.assert_allclose(np.exp(found[:, :-1]), expected, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)


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
