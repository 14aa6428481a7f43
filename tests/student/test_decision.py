"""The threshold against a search over every possible one."""

from dataclasses import replace

import numpy as np
import pytest

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.evaluation.by_distance import fit_by_distance, log_odds_of
from kdecs.student.config import Outputs
from kdecs.student.decision import (
    DEFAULT_THRESHOLD,
    DecisionRule,
    Logits,
    PairGains,
    PairScores,
    choose_decision,
    choose_threshold,
    decide,
    fit_calibration,
    pair_emotions,
    pair_gains,
    score_pairs,
    with_calibration,
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


@pytest.mark.parametrize("outputs", ["connective", "classifier", "span", "both"])
def test_argmax_takes_the_likeliest_of_all_outcomes(outputs: str):
    """Against a loop over every word and every legal span; ties and unlikely scores find no cause."""
    generator = np.random.default_rng(0)
    found, expected = [], []
    for _ in range(200):
        num_places = int(generator.integers(2, 6))
        # Whole numbers, so that many are equal.
        connective, classifier = generator.integers(-2, 3, 5), generator.integers(-1, 2, 2)
        start, end = generator.integers(-2, 3, (2, num_places))
        says = []
        if outputs in ("connective", "both"):
            says.append(max(connective[:4]) > connective[4])
        if outputs == "classifier":
            says.append(classifier[1] > classifier[0])
        if outputs in ("span", "both"):
            spans = [start[a] + end[b] for a in range(1, num_places) for b in range(a, num_places)]
            says.append(max(spans) > start[0] + end[0])
        expected.append(all(says))
        padding = np.full(2, -np.inf)  # a longer pair stands in the same batch
        logits = Logits(
            None,
            connective[None].astype(np.float32) if outputs in ("connective", "both") else None,
            np.concatenate((start, padding))[None].astype(np.float32)
            if outputs in ("span", "both")
            else None,
            np.concatenate((end, padding))[None].astype(np.float32) if outputs in ("span", "both") else None,
            classifier[None].astype(np.float32) if outputs == "classifier" else None,
        )
        scores = score_pairs(
            [(np.array([0]), logits)], 1, Outputs(emotions=False, spans=outputs in ("span", "both")), 0
        )
        assert scores.is_likeliest_P is not None
        found += scores.is_likeliest_P.tolist()
    assert found == expected and 20 < sum(found) < 180


def test_argmax_needs_no_threshold_and_still_chooses_when_a_target_is_neutral():
    utterances = tuple(Utterance(turn, "A", "Hi", "anger", (Evidence(turn, "Hi"),)) for turn in (1, 2))
    pairs = pairs_of(Dialogue("d", utterances), "fold1")
    is_cause_P = np.array([pair.is_cause for pair in pairs])
    log_p_PE = np.log(np.tile(np.array([[0.6, 0.4]], dtype=np.float32), (len(pairs), 1)))
    # Low scores: a threshold would find another decision.
    scores = PairScores(log_p_PE, is_cause_P * np.float32(0.1), None, is_cause_P)
    texts, emotions = ["Hi"] * len(pairs), ("neutral", "anger")
    threshold, offset = choose_decision(
        scores, pairs, emotions, texts, DecisionRule("span", "macro_f1", "argmax")
    )
    assert threshold == DEFAULT_THRESHOLD and offset < 0
    emotion_of_pair = pair_emotions(scores, pairs, emotions, offset)
    decided = decide(pairs, scores, emotion_of_pair, texts, None)
    assert [p.is_cause for p in decided] == is_cause_P.tolist()
    assert not any(p.is_cause for p in decide(pairs, scores, emotion_of_pair, texts, threshold))
    # A neutral target has no cause under either rule.
    assert not any(p.is_cause for p in decide(pairs, scores, ["neutral"] * len(pairs), texts, None))


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


def test_causes_are_calibrated_by_distance_on_the_pairs_that_are_scored():
    """Against the fit itself; scores of pairs that fold1 leaves out are moved, and decide nothing."""
    draw = np.random.default_rng(0)
    dialogue = read_corpus(bundled_sample("valid")).dialogues[0]
    pairs = pairs_of(dialogue, "fold1+neutral")
    scores = PairScores(None, draw.random(len(pairs)).astype(np.float32), None)
    kept = [row for row, pair in enumerate(pairs) if pair.emotion != "neutral"]
    assert 0 < len(kept) < len(pairs)
    gold, distance = (
        np.array([f(pair) for pair in pairs])
        for f in (lambda p: p.is_cause, lambda p: p.target - p.candidate)
    )
    expected = fit_by_distance(log_odds_of(scores.cause_P[kept]), distance[kept], gold[kept])
    found = fit_calibration(scores, pairs)
    assert found == expected
    moved = with_calibration(scores, pairs, found)
    np.testing.assert_array_equal(moved.cause_P, found.scores(scores.cause_P, distance))
    assert with_calibration(scores, pairs, None) is scores
