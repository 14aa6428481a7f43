"""F1 and the counts behind it, against precision and recall worked plainly."""

import numpy as np
import pytest

from kdecs.evaluation.counts import PairCounts, f1


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    generator = np.random.default_rng(0)
    right = generator.integers(0, 20, size=200)
    num_gold, num_predicted = right + generator.integers(1, 20, size=(2, 200))
    precision, recall = right / num_predicted, right / num_gold
    expected = np.where(right > 0, 2 * precision * recall / np.maximum(precision + recall, 1e-9), 0)
    np.testing.assert_allclose(f1(right, num_gold, num_predicted), expected, atol=1e-12)
    assert f1(0, 0, 0) == 0


def test_counts_of_pairs_and_their_scores():
    counts = PairCounts.of([True, True, False, False, False], [True, False, True, False, False])
    assert counts == PairCounts(true_positive=1, false_positive=1, false_negative=1, true_negative=2)
    scores = counts.scores()
    assert (scores["positive_f1"], scores["negative_f1"]) == (50, pytest.approx(100 * 4 / 6))
    assert scores["macro_f1"] == (scores["positive_f1"] + scores["negative_f1"]) / 2
    assert set(PairCounts().scores().values()) == {0.0}
    with pytest.raises(ValueError, match="2 labels and 1"):
        PairCounts.of([True, False], [True])


def test_counts_add_up():
    generator = np.random.default_rng(1)
    gold, decided = generator.random((2, 50)) > 0.5
    parts = PairCounts.of(gold[:20], decided[:20]) + PairCounts.of(gold[20:], decided[20:])
    assert parts == PairCounts.of(gold, decided)
    assert parts.num_pairs == 50
