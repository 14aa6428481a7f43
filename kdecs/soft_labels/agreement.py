"""How far a teacher's soft labels agree with the gold causes of a split.

Shapes: n pairs, A answer words (the causal ones first).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.schema import Dialogue
from kdecs.errors import LabelError
from kdecs.evaluation.metrics import utterance_scores

SCORES = ("positive_f1", "negative_f1", "macro_f1")
"""The scores of an agreement, in percent."""


def require_cause_words(directory: Path, answer_words: Sequence[str]) -> None:
    """Raise LabelError where the answer words do not say cause or no cause: the causal ones, then the other."""
    expected = NUM_CAUSAL + 1
    if len(set(answer_words)) != expected or len(answer_words) != expected:
        raise LabelError(
            f"{directory}: labels over {len(answer_words)} answer words, expected {expected} different ones, "
            f"such as {', '.join(CONNECTIVES)}: they cannot be compared with gold"
        )


def is_causal(logits_nA: np.ndarray) -> np.ndarray:
    """Boolean (n,): whether the causal words together are more probable than `other`."""
    causal_n = np.logaddexp.reduce(logits_nA[:, :NUM_CAUSAL].astype(np.float32), axis=1)
    return causal_n > logits_nA[:, NUM_CAUSAL]


def agreement_with_gold(
    dialogues: Sequence[Dialogue], logits_by_id: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Utterance-level scores (percent) over the fold1 pairs, each once: the figure that selects teachers."""
    pairs = [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1")]
    if not pairs:
        return {}
    predicted = is_causal(np.stack([logits_by_id[pair.id] for pair in pairs]))
    scores = utterance_scores([pair.is_cause for pair in pairs], predicted.tolist())
    return {
        "positive_f1": float(scores.positive_f1),
        "negative_f1": float(scores.negative_f1),
        "macro_f1": float(scores.macro_f1),
    }
