"""Whole dialogues through any predictor, a group at a time. No torch: other predictors may do without.

A predictor scores pairs; `stream` makes the pairs of each dialogue, hands groups of them on, and gives the predictions
back dialogue by dialogue.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kdecs.corpus.pairs import Pair, candidate_pairs
from kdecs.corpus.schema import Dialogue
from kdecs.errors import DialogueError
from kdecs.evaluation.predictions import Prediction

DEFAULT_BATCH_TOKENS = 8192
PAIRS_PER_GROUP = 1024
"""Pairs that `stream` reads ahead: enough to fill batches with prompts of similar length."""
_MANY_UTTERANCES = 100
_MOST_WARNINGS = 3


@dataclass(frozen=True, slots=True)
class PairPrediction:
    """A prediction with the score of its cause, in [0, 1], and the place of its span.

    `span_range` are the characters [start, end) in u_j's text, or None if there is no cause or no span in u_j.
    """

    prediction: Prediction
    score: float
    span_range: tuple[int, int] | None


def offsets_of(item: PairPrediction) -> dict[str, Any]:
    """The optional keys of a prediction line: span_start and span_end (null without a span), and score."""
    start, end = item.span_range or (None, None)
    return {"span_start": start, "span_end": end, "score": round(item.score, 6)}


class Predictor(Protocol):
    """Anything that predicts pairs: a student, or a baseline."""

    def detail(
        self,
        pairs: Sequence[Pair],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[PairPrediction]:
        """Predictions with scores and character ranges, in the order of the pairs."""
        ...


def stream(
    predictor: Predictor,
    dialogues: Iterable[Dialogue],
    *,
    max_distance: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    on_batch: Callable[[int], object] | None = None,
    on_fault: Callable[[DialogueError], object] | None = None,
) -> Iterator[tuple[Dialogue, list[PairPrediction]]]:
    """Each dialogue with its predictions for every pair j <= i, or as far ahead as the predictor looks, in order.

    `max_distance` bounds i - j; `on_batch` is called with the number of pairs just predicted. Dialogues are read
    about a thousand pairs ahead. A dialogue that the predictor cannot read is passed over, and `on_fault` is called
    with the reason; without `on_fault` the DialogueError is raised.
    """
    group: list[tuple[Dialogue, list[Pair]]] = []
    num_pairs = 0
    for dialogue in dialogues:
        # MRC looks no turn ahead, and says nothing about it.
        after = getattr(predictor, "candidates_after", 0)
        pairs = candidate_pairs(dialogue, max_distance=max_distance, after=after)
        group.append((dialogue, pairs))
        num_pairs += len(pairs)
        if num_pairs >= PAIRS_PER_GROUP:
            yield from _predicted_group(predictor, group, batch_tokens, on_batch, on_fault)
            group, num_pairs = [], 0
    yield from _predicted_group(predictor, group, batch_tokens, on_batch, on_fault)


def _predicted_group(
    predictor: Predictor,
    group: list[tuple[Dialogue, list[Pair]]],
    batch_tokens: int,
    on_batch: Callable[[int], object] | None,
    on_fault: Callable[[DialogueError], object] | None,
) -> Iterator[tuple[Dialogue, list[PairPrediction]]]:
    together = [pair for _, pairs in group for pair in pairs]
    try:
        # The dialogues of a group go together, because batches of similar lengths need many prompts to choose from.
        found = iter(predictor.detail(together, batch_tokens=batch_tokens, on_batch=on_batch))
    except DialogueError as error:
        if on_fault is None:
            raise
        if len(group) == 1:
            on_fault(error)
            return
        for one in group:  # which of them it is, and whether it is the only one
            yield from _predicted_group(predictor, [one], batch_tokens, on_batch, on_fault)
        return
    for dialogue, pairs in group:
        yield dialogue, [next(found) for _ in pairs]


def num_candidates(num_utterances: int, max_distance: int | None) -> int:
    """How many pairs j <= i a dialogue has, at most `max_distance` turns apart."""
    if max_distance is None or max_distance >= num_utterances:
        max_distance = num_utterances - 1
    # Each of the last n - d targets has d + 1 candidates; the d targets before them have 1 … d.
    return (num_utterances - max_distance) * (max_distance + 1) + max_distance * (max_distance + 1) // 2


def warn_of_long_dialogues(
    dialogues: Iterable[Dialogue],
    max_distance: int | None,
    warn: Callable[[str], object],
    *,
    bound: str,
    place: str = "",
) -> Iterator[Dialogue]:
    """The same dialogues, with a warning for those of more than 100 utterances, whose number of pairs grows as n².

    The first few get a line each, and a last line gives their number. `bound` is the name of the option by which the
    caller's user limits the distance; each line begins with `place`.
    """
    num_long = 0
    for dialogue in dialogues:
        num_utterances = len(dialogue.utterances)
        num_long += num_utterances > _MANY_UTTERANCES
        if num_utterances > _MANY_UTTERANCES and num_long <= _MOST_WARNINGS:
            # Before the dialogue is handed on, since the wait that the line explains begins then.
            num_pairs = num_candidates(num_utterances, None)
            consequence = f"all {num_pairs} pairs are predicted; set {bound} to predict fewer"
            if max_distance is not None:
                kept = num_candidates(num_utterances, max_distance)
                consequence = f"{bound} {max_distance} leaves {kept} of its {num_pairs} pairs"
            warn(f"{place}dialogue {dialogue.id} has {num_utterances} utterances: {consequence}")
        yield dialogue
    if num_long > _MOST_WARNINGS:
        warn(f"{place}{num_long} dialogues in all have more than {_MANY_UTTERANCES} utterances")
