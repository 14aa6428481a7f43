"""Predictions for dialogues that come one after another: memory for a group of them, never for all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kdecs.corpus.pairs import Pair, candidate_pairs
from kdecs.corpus.schema import Dialogue
from kdecs.evaluation.predictions import Prediction

DEFAULT_BATCH_TOKENS = 8192
PAIRS_A_GROUP = 1024
"""Enough to fill batches of like length."""
_MANY_UTTERANCES = 100
_MOST_WARNINGS = 3


@dataclass(frozen=True, slots=True)
class PairPrediction:
    """A prediction with what stands behind it: the cause score in [0, 1] and the span's characters in u_j's text.

    `span_range` is [start, end), None where there is no cause or no span of it in u_j.
    """

    prediction: Prediction
    score: float
    span_range: tuple[int, int] | None


def offsets_of(item: PairPrediction) -> dict[str, Any]:
    """What may stand beside a prediction's own keys in a file: span_start, span_end (null without), score."""
    start, end = item.span_range or (None, None)
    return {"span_start": start, "span_end": end, "score": round(item.score, 6)}


class Predictor(Protocol):
    """What predicts pairs: a student, or the MRC baseline."""

    def detail(
        self,
        pairs: Sequence[Pair],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[PairPrediction]:
        """Predictions with scores and character ranges, in the order of the pairs."""
        ...


def num_candidates(num_utterances: int, max_distance: int | None) -> int:
    """How many pairs j <= i a dialogue has, at most `max_distance` turns apart."""
    if max_distance is None or max_distance >= num_utterances:
        max_distance = num_utterances - 1
    # Each of the last n - d targets has d + 1 candidates, the d before them 1 … d.
    return (num_utterances - max_distance) * (max_distance + 1) + max_distance * (max_distance + 1) // 2


class LongDialogues:
    """Warns of dialogues of more than 100 utterances, since their pairs grow as n²: the first few, then their number.

    `bound` is what the caller names its maximum distance; `warn` gets each line.
    """

    def __init__(self, max_distance: int | None, warn: Callable[[str], object], *, bound: str) -> None:
        self._max_distance, self._warn, self._bound = max_distance, warn, bound
        self._count = 0

    def look_at(self, dialogue: Dialogue, place: str = "") -> None:
        """Warn of a dialogue if it is long and not many were; `place` stands before it."""
        num_utterances = len(dialogue.utterances)
        if num_utterances <= _MANY_UTTERANCES:
            return
        self._count += 1
        if self._count > _MOST_WARNINGS:
            return
        every = num_candidates(num_utterances, None)
        consequence = f"all {every} pairs are predicted, {self._bound} bounds them"
        if self._max_distance is not None:
            kept = num_candidates(num_utterances, self._max_distance)
            consequence = f"{self._bound} {self._max_distance} leaves {kept} of its {every} pairs"
        self._warn(f"{place}dialogue {dialogue.id} has {num_utterances} utterances: {consequence}")

    def sum_up(self, place: str = "") -> None:
        """Warn of how many there were, where not each was named."""
        if self._count > _MOST_WARNINGS:
            self._warn(f"{place}{self._count} dialogues in all have more than {_MANY_UTTERANCES} utterances")

    def watched(self, dialogues: Iterable[Dialogue], place: str = "") -> Iterator[Dialogue]:
        """The same dialogues, looked at one by one as they are taken."""
        for dialogue in dialogues:
            self.look_at(dialogue, place)
            yield dialogue
        self.sum_up(place)


def stream(
    predictor: Predictor,
    dialogues: Iterable[Dialogue],
    *,
    max_distance: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    on_batch: Callable[[int], object] | None = None,
) -> Iterator[tuple[Dialogue, list[PairPrediction]]]:
    """Each dialogue with its predictions for every pair j <= i, in order.

    `max_distance` bounds i - j; `on_batch` is called with the number of pairs done. Dialogues are read a group of
    about a thousand pairs ahead.
    """
    group: list[tuple[Dialogue, list[Pair]]] = []
    num_pairs = 0
    for dialogue in dialogues:
        pairs = candidate_pairs(dialogue, max_distance=max_distance)
        group.append((dialogue, pairs))
        num_pairs += len(pairs)
        if num_pairs >= PAIRS_A_GROUP:
            yield from _predicted(predictor, group, batch_tokens, on_batch)
            group, num_pairs = [], 0
    yield from _predicted(predictor, group, batch_tokens, on_batch)


def _predicted(
    predictor: Predictor,
    group: list[tuple[Dialogue, list[Pair]]],
    batch_tokens: int,
    on_batch: Callable[[int], object] | None,
) -> Iterator[tuple[Dialogue, list[PairPrediction]]]:
    together = [pair for _, pairs in group for pair in pairs]
    found = iter(predictor.detail(together, batch_tokens=batch_tokens, on_batch=on_batch))
    for dialogue, pairs in group:
        yield dialogue, [next(found) for _ in pairs]
