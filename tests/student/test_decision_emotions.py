"""A target's emotion is decided at (i, i), whatever other pairs are scored with it."""

import numpy as np
import pytest

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.student.decision import (
    DecisionRule,
    PairScores,
    choose_decision,
    choose_threshold,
    pair_emotions,
    pair_gains,
    target_emotions,
)


def test_other_pairs_do_not_decide() -> None:
    log_p_PE = np.log(
        np.array([[0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]], dtype=np.float32)
    )
    target_of_P = np.array([0, 0, 0, 1, 1])
    is_own_P = np.array([True, False, False, False, False])
    # Target 0 by its own pair alone; target 1 has none, so by the mean of both: sqrt(.3*.6) < sqrt(.7*.4).
    assert target_emotions(log_p_PE, target_of_P, is_own_P, ("neutral", "anger")) == ["neutral", "anger"]


@pytest.mark.parametrize("num_targets", [1, 3])
def test_never_neutral_is_tried(num_targets: int) -> None:
    """Every target is a cause of itself, and neutral is likelier than its emotion: it has to go everywhere."""
    utterances = tuple(
        Utterance(turn, "A", "Hi", "anger", (Evidence(turn, "Hi"),)) for turn in range(1, num_targets + 1)
    )
    pairs = pairs_of(Dialogue("d", utterances), "fold1+neutral")
    anger_P = np.linspace(0.1, 0.4, len(pairs), dtype=np.float32)
    is_cause_P = np.array([pair.is_cause for pair in pairs], dtype=np.float32)
    scores = PairScores(np.log(np.stack((1 - anger_P, anger_P), axis=1)), is_cause_P, None)
    emotions = ("neutral", "anger")
    for neutral in ("macro_f1", "balanced"):
        rule = DecisionRule("utterance", neutral)
        _, offset = choose_decision(scores, pairs, emotions, ["Hi"] * len(pairs), rule)
        found = pair_emotions(scores, pairs, emotions, offset, weighs_causes=rule.weighs_causes)
        assert set(found) == {"anger"}
    assert choose_decision(scores, pairs, emotions, ["Hi"] * len(pairs), DecisionRule())[1] == 0


def test_neutral_weighs_causes() -> None:
    """Against a loop: neutral's log-probability loses the log-odds of the target's own cause score, then argmax."""
    draw = np.random.default_rng(0)
    turns = range(1, 21)
    utterances = tuple(Utterance(turn, "A", "Hi", "anger", (Evidence(turn, "Hi"),)) for turn in turns)
    pairs = pairs_of(Dialogue("d", utterances), "fold1+neutral")
    emotions = ("anger", "neutral", "fear")
    p_PE = draw.dirichlet(np.ones(3), len(pairs)).astype(np.float32)
    cause_P = draw.uniform(0, 1, len(pairs)).astype(np.float32)
    cause_P[:2] = 0, 1  # bounded
    scores = PairScores(np.log(p_PE), cause_P, None)
    expected = {}
    for row, pair in enumerate(pairs):
        if pair.candidate == pair.target:
            p = min(max(float(cause_P[row]), 1e-6), 1 - 1e-6)
            worth = dict(zip(emotions, np.log(p_PE[row].astype(float)), strict=True))
            worth["neutral"] += 0.3 - np.log(p / (1 - p))
            expected[pair.target] = max(worth, key=lambda name: worth[name])
    found = pair_emotions(scores, pairs, emotions, 0.3, weighs_causes=True)
    assert found == [expected[pair.target] for pair in pairs] != pair_emotions(scores, pairs, emotions, 0.3)
    # A student that knows no neutral has none to weigh.
    assert pair_emotions(scores, pairs, ("anger", "joy", "fear"), weighs_causes=True) == pair_emotions(
        scores, pairs, ("anger", "joy", "fear")
    )


def test_balanced_finds_emotions_by_their_causes() -> None:
    """Emotion scores alone cannot tell neutral targets; whether a target is its own cause does."""
    utterances = tuple(
        Utterance(turn, "A", "Hi", "anger", (Evidence(turn, "Hi"),))
        if turn % 2
        else Utterance(turn, "A", "Hi", "neutral", None)
        for turn in range(1, 9)
    )
    pairs = pairs_of(Dialogue("d", utterances), "fold1+neutral")
    is_cause_P = np.array([pair.is_cause for pair in pairs])
    scores = PairScores(
        np.log(np.full((len(pairs), 2), 0.5, dtype=np.float32)),
        np.where(is_cause_P, 0.9, 0.1).astype(np.float32),
        None,
    )
    emotions = ("neutral", "anger")
    right = {}
    for neutral in ("macro_f1", "balanced"):
        rule = DecisionRule("utterance", neutral)
        _, offset = choose_decision(scores, pairs, emotions, ["Hi"] * len(pairs), rule)
        found = pair_emotions(scores, pairs, emotions, offset, weighs_causes=rule.weighs_causes)
        right[neutral] = np.mean(
            [emotion == pair.emotion for emotion, pair in zip(found, pairs, strict=True)]
        )
    assert right["balanced"] == 1 > right["macro_f1"]


def test_the_least_accuracy_bounds_the_choice() -> None:
    """Against a loop over all offsets: the best macro F1 of those that are accurate enough, else the most accurate."""
    draw = np.random.default_rng(1)
    utterances = tuple(
        Utterance(turn, "A", "Hi", "anger", (Evidence(turn, "Hi"),))
        if draw.random() < 0.5
        else Utterance(turn, "A", "Hi", "neutral", None)
        for turn in range(1, 16)
    )
    pairs = pairs_of(Dialogue("d", utterances), "fold1+neutral")
    emotions, spans = ("neutral", "anger"), ["Hi"] * len(pairs)
    scores = PairScores(
        np.log(draw.dirichlet(np.ones(2), len(pairs)).astype(np.float32)),
        draw.uniform(0, 1, len(pairs)).astype(np.float32),
        None,
    )
    own = [row for row, pair in enumerate(pairs) if pair.candidate == pair.target]
    scored = [row for row, pair in enumerate(pairs) if pair.dialogue.utterances[pair.target - 1].evidence]

    def worth(offset: float) -> tuple[float, float]:
        found = pair_emotions(scores, pairs, emotions, offset, weighs_causes=True)
        accuracy = 100 * np.mean([found[row] == pairs[row].emotion for row in own])
        gains = pair_gains(
            scores.cause_P[scored], [found[row] for row in scored], [pairs[row].spans for row in scored],
            [spans[row] for row in scored], level="utterance",
        )  # fmt: skip
        return float(accuracy), choose_threshold(gains)[1]

    offsets = np.linspace(-20, 20, 4001)
    tried = [worth(float(offset)) for offset in offsets]
    most = max(accuracy for accuracy, _ in tried)
    chosen = set()
    for least in (0.1, 40.0, 55.0, most, 100.0):
        rule = DecisionRule("utterance", "macro_f1", least_accuracy=least)
        accuracy, macro_f1 = worth(choose_decision(scores, pairs, emotions, spans, rule)[1])
        bound = min(least, most)
        assert accuracy >= bound
        assert macro_f1 == max(f1 for accuracy, f1 in tried if accuracy >= bound)
        chosen.add((accuracy, macro_f1))
    assert len(chosen) > 2
