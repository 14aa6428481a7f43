"""The threshold against a search over every possible one."""

from dataclasses import replace

import numpy as np
import pytest

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.student.decision import (
    DEFAULT_THRESHOLD,
    PairGains,
    PairScores,
    choose_threshold,
    decide,
    pair_gains,
)


def macro(gains: PairGains, predicted: np.ndarray) -> float:
    """Macro F1 by precision and recall, as the scoring defines it, at the level that is asked for."""
    negative = gains.positive_rows_P == 0
    right = (negative & ~predicted).sum()
    empty_positives = gains.positive_rows_P[~predicted].sum()
    recall = right / negative.sum() if negative.any() else 0.0
    precision = right / (right + empty_positives) if right + empty_positives else 0.0
    negative_f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    positives = gains.positive_rows_P.sum()
    positive_f1 = gains.f_sum_P[predicted].sum() / positives if positives else 0.0
    found = gains.positive_rows_P[predicted].sum()
    said = found + (negative & predicted).sum()
    causal = 2 * found / (said + positives) if said + positives else 0.0
    positive_f1 = {"span": positive_f1, "utterance": causal, "both": (positive_f1 + causal) / 2}[gains.level]
    return 50 * (positive_f1 + negative_f1)


def random_gains(seed: int, num_pairs: int = 60) -> PairGains:
    generator = np.random.default_rng(seed)
    rows = generator.choice([0, 0, 0, 1, 2], size=num_pairs).astype(float)
    score = np.round(np.clip(generator.normal(0.3 + 0.2 * (rows > 0), 0.2), 0, 1), 1)  # many ties
    score[generator.random(num_pairs) < 0.1] = -np.inf
    return PairGains(score, rows, rows * generator.random(num_pairs))


@pytest.mark.parametrize("level", ["span", "utterance", "both"])
@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better(seed: int, level):
    gains = replace(random_gains(seed), level=level)
    threshold, found = choose_threshold(gains)
    scores = np.unique(gains.score_P[np.isfinite(gains.score_P)])
    best = max(macro(gains, gains.score_P >= score) for score in scores)
    assert found == pytest.approx(best)
    assert macro(gains, gains.score_P >= threshold) == pytest.approx(best)
    assert 0 <= threshold <= 1


def test_ties_in_macro_f1_take_the_threshold_nearest_to_one_half():
    # A negative of score 0.55 would not change with its row count of 0 … so both cuts around 0.5 are perfect.
    gains = PairGains(np.array([0.9, 0.1]), np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    assert choose_threshold(gains) == (pytest.approx(0.5), pytest.approx(100.0))


def test_something_is_always_a_cause_even_where_no_span_is_right():
    gains = PairGains(np.array([0.4, 0.3, 0.2]), np.array([1.0, 0.0, 0.0]), np.zeros(3))
    threshold, _ = choose_threshold(gains)
    assert (gains.score_P >= threshold).sum() >= 1


def test_a_threshold_between_two_neighbours_in_float32_parts_them():
    """Found in float64, midway; in float32 it would be rounded to the lower one, and both be causes."""
    dialogue = Dialogue("d", tuple(Utterance(turn, "A", "Hi", "anger", None) for turn in (1, 2)))
    pairs = pairs_of(dialogue, "all")[::2]
    low = next(
        score
        for score in np.linspace(0.3, 0.4, 9, dtype=np.float32)
        if np.float32((float(score) + float(np.nextafter(score, np.float32(1)))) / 2) == score
    )
    score_P = np.array([low, np.nextafter(low, np.float32(1))])
    gains = pair_gains(score_P, ["anger"] * 2, [(), ("Hi",)], ["Hi", "Hi"])
    threshold, _ = choose_threshold(gains)
    scores = PairScores(None, score_P, None)
    assert [p.is_cause for p in decide(pairs, scores, ["anger"] * 2, ["Hi", "Hi"], threshold)] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "gains",
    [
        PairGains(np.full(3, -np.inf), np.array([1.0, 0.0, 0.0]), np.zeros(3)),
        PairGains(np.array([0.2, 0.7]), np.zeros(2), np.zeros(2)),
        PairGains(np.zeros(0), np.zeros(0), np.zeros(0)),
    ],
    ids=["all targets neutral", "no positive row", "no pair"],
)
def test_degenerate_cases_fall_back_to_one_half(gains: PairGains):
    threshold, found = choose_threshold(gains)
    assert threshold == DEFAULT_THRESHOLD
    assert np.isfinite(found)


def test_equal_scores_stay_together():
    gains = PairGains(np.full(4, 0.3), np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0]))
    threshold, found = choose_threshold(gains)
    assert threshold <= 0.3
    assert found == pytest.approx(50.0)
