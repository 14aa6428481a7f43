"""A target's emotion is decided at (i, i), whatever other pairs are scored with it."""

import numpy as np

from kdecs.student.inference import target_emotions


def test_other_pairs_do_not_decide() -> None:
    log_p_PE = np.log(
        np.array([[0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]], dtype=np.float32)
    )
    target_of_P = np.array([0, 0, 0, 1, 1])
    is_own_P = np.array([True, False, False, False, False])
    # Target 0 by its own pair alone; target 1 has none, so by the mean of both: sqrt(.3*.6) < sqrt(.7*.4).
    assert target_emotions(log_p_PE, target_of_P, is_own_P, ("neutral", "anger")) == ["neutral", "anger"]
