"""A target's emotion is decided at (i, i), whatever other pairs are scored with it."""

import numpy as np
import pytest

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.student.decision import DecisionRule, PairScores, choose_decision, pair_emotions, target_emotions


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
        assert set(pair_emotions(scores, pairs, emotions, offset)) == {"anger"}
    assert choose_decision(scores, pairs, emotions, ["Hi"] * len(pairs), DecisionRule())[1] == 0
