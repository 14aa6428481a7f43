"""F1, and the counts of yes-or-no decisions about pairs that it is computed from. Needs neither torch nor a corpus.

`f1` serves every score: of rows, utterances and emotions, and when a threshold is chosen. `PairCounts` adds up, so that
batches and shards can be counted separately; its field names are part of the records of soft-label shards.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field


def f1(right: Any, num_gold: Any, num_predicted: Any) -> npt.NDArray[np.float64]:
    """F1 in [0, 1], element-wise: 2 · right / (gold + predicted), the harmonic mean of precision and recall.

    `right` counts the items that are both gold and predicted. 0/0 counts as 0.
    """
    return ratio(2 * np.asarray(right, np.float64), np.asarray(num_gold, np.float64) + num_predicted)


def ratio(numerator: Any, denominator: Any) -> npt.NDArray[np.float64]:
    """Element-wise quotient with 0/0 = 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    # Over zeros, since numpy leaves what is there where the denominator is 0. `where` also keeps it from warning.
    found: npt.NDArray[np.float64] = np.divide(
        numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0
    )
    return found


class PairCounts(BaseModel):
    """Pairs by gold (a cause or not) and by decision."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    true_positive: int = Field(default=0, ge=0)
    false_positive: int = Field(default=0, ge=0)
    false_negative: int = Field(default=0, ge=0)
    true_negative: int = Field(default=0, ge=0)

    @classmethod
    def of(
        cls, gold: Sequence[bool] | npt.NDArray[np.bool_], decided: Sequence[bool] | npt.NDArray[np.bool_]
    ) -> "PairCounts":
        """Count decisions against gold. Raises ValueError for different lengths."""
        is_gold, is_decided = np.asarray(gold, dtype=bool), np.asarray(decided, dtype=bool)
        if is_gold.shape != is_decided.shape:
            raise ValueError(f"{is_gold.size} labels and {is_decided.size} predictions")
        return cls(
            true_positive=int((is_gold & is_decided).sum()),
            false_positive=int((~is_gold & is_decided).sum()),
            false_negative=int((is_gold & ~is_decided).sum()),
            true_negative=int((~is_gold & ~is_decided).sum()),
        )

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(
            **{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields}
        )

    @property
    def num_pairs(self) -> int:
        """All pairs that were counted."""
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative

    def scores(self) -> dict[str, float]:
        """positive_f1 (causes), negative_f1 (the other pairs) and macro_f1, their mean, in percent."""
        wrong = self.false_positive + self.false_negative
        # In whole numbers and rounded once: manifests and metrics must not depend on the order of the operations.
        positive, negative = (
            200 * right / (2 * right + wrong) if right else 0.0
            for right in (self.true_positive, self.true_negative)
        )
        return {"positive_f1": positive, "negative_f1": negative, "macro_f1": (positive + negative) / 2}
