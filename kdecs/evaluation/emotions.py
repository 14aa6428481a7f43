"""Emotion decisions: accuracy, F1 of each label, macro F1, confusion matrix. One decision an utterance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdecs.corpus.schema import Corpus
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.evaluation.rows import NO_TABLE, decide_emotions


@dataclass(frozen=True)
class EmotionReport:
    """Scores over the utterances that have a predicted emotion.

    `labels`: every label in gold or predicted, by falling gold count, then name. `confusion` (L, L) int64:
    gold label in the row, predicted in the column. F1s in percent.
    """

    labels: tuple[str, ...]
    confusion: NDArray[np.int64]
    accuracy: float
    macro_f1: float
    f1: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON: accuracy, macro_f1, f1 and count by label, confusion as {gold: {predicted: count}}."""
        counts = self.confusion.tolist()
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "f1": self.f1,
            "count": {label: sum(row) for label, row in zip(self.labels, counts, strict=True)},
            "confusion": {
                label: dict(zip(self.labels, row, strict=True))
                for label, row in zip(self.labels, counts, strict=True)
            },
        }


def emotion_report(
    corpus: Corpus, predictions: Mapping[PairKey, Prediction], emotion_table: Mapping[str, str] = NO_TABLE
) -> EmotionReport:
    """Compare predicted emotions, taken through a table of labels, with those of the corpus.

    Macro F1 is the mean over the labels that occur, in gold or predicted; 0/0 counts as 0.
    Raises PredictionError where a target has two predicted emotions.
    """
    decided = {key: emotion_table.get(label, label) for key, label in decide_emotions(predictions).items()}
    found = [
        (utterance.emotion, decided[dialogue.id, utterance.turn])
        for dialogue in corpus.dialogues
        for utterance in dialogue.utterances
        if utterance.emotion is not None and (dialogue.id, utterance.turn) in decided
    ]
    gold_counts = {label: sum(gold == label for gold, _ in found) for pair in found for label in pair}
    labels = tuple(sorted(gold_counts, key=lambda label: (-gold_counts[label], label)))
    index = {label: position for position, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for gold, predicted in found:
        confusion[index[gold], index[predicted]] += 1
    right = confusion.diagonal()
    totals = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = {label: float(100 * 2 * right[n] / totals[n]) for n, label in enumerate(labels)}
    accuracy = float(100 * right.sum() / len(found)) if found else 0.0
    return EmotionReport(labels, confusion, accuracy, sum(f1.values()) / len(f1) if f1 else 0.0, f1)
