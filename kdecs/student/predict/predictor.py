"""The predictor: who feels what, and why, for whole dialogues.

student = Student.from_pretrained("runs/demo/student")
predictions = student.predict(dialogues)
for dialogue, found in student.stream(dialogues):  # found: predictions, scores, characters of the spans
    ...
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kdecs.artifact import read_verified_manifest
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import Pair, Universe, candidate_pairs, pairs_of
from kdecs.corpus.schema import Corpus, Dialogue
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.student.batches import batches_of_tokens, encoded_batch
from kdecs.student.decision import decide, pair_emotions, score_pairs, span_characters
from kdecs.student.model import StudentModel
from kdecs.student.product import StudentCard, load_student

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


logger = logging.getLogger(__name__)

_PAIRS_AT_ONCE = 2048


class Student:
    """A trained student, ready to predict. Thread-safe: requests may overlap, each takes memory of its own."""

    def __init__(
        self, model: StudentModel, tokenizer: Any, card: StudentCard, *, device: torch.device, precision: str
    ) -> None:
        self.model = model.to(device).eval()
        self.card = card
        self.device = device
        self.precision = precision
        self.encoder = PairEncoder(tokenizer, card.max_prompt_tokens, card.prompt)
        self._pad_id: int = tokenizer.pad_token_id or 0

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", precision: str = "float32"
    ) -> "Student":
        """Load a student directory (safetensors and JSON only).

        Raises ArtifactError for a directory that is missing, unfinished, damaged or of another kind, ModelError
        where its weights or tokenizer cannot be loaded.
        """
        directory = Path(directory).expanduser().absolute()
        read_verified_manifest(directory, "student")
        model, tokenizer, card = load_student(directory)
        return cls(model, tokenizer, card, device=torch.device(device), precision=precision)

    def predict(
        self,
        dialogues: Iterable[Dialogue],
        *,
        max_distance: int | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[Prediction]:
        """Predictions for every pair j <= i of the dialogues, labelled or not, in order.

        `max_distance` bounds i - j; `on_batch` is called with the number of pairs done. Warns (`warnings.warn`) of
        dialogues of more than 100 utterances.
        """
        found = self.stream(
            dialogues, max_distance=max_distance, batch_tokens=batch_tokens, on_batch=on_batch
        )
        return [item.prediction for _, items in found for item in items]

    def stream(
        self,
        dialogues: Iterable[Dialogue],
        *,
        max_distance: int | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
        on_warning: Callable[[str], object] = warnings.warn,
    ) -> Iterator[tuple[Dialogue, list[PairPrediction]]]:
        """Each dialogue with its predictions, their scores and the characters of their spans, as they are ready.

        Dialogues are taken a group at a time: memory does not grow with their number. `on_warning` gets a line for
        dialogues of more than 100 utterances.
        """
        watched = LongDialogues(max_distance, on_warning, bound="max_distance").watched(dialogues)
        return stream(self, watched, max_distance=max_distance, batch_tokens=batch_tokens, on_batch=on_batch)

    def predict_pairs(
        self,
        corpus: Corpus,
        *,
        universe: Universe = "fold1+neutral",
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> dict[PairKey, Prediction]:
        """Predictions for the pairs of a universe, by (dialogue id, target, candidate): what `evaluate` takes."""
        pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue, universe)]
        found = self.detail(pairs, batch_tokens=batch_tokens, on_batch=on_batch)
        return {item.prediction.key: item.prediction for item in found}

    def detail(
        self,
        pairs: Sequence[Pair],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[PairPrediction]:
        """Predictions with scores and character ranges, in the order of the pairs.

        The emotion of a target is decided at its pair (i, i), or over its pairs where that is not given.
        Prompts are encoded a few thousand at a time, and no target is split.
        """
        found: list[PairPrediction] = []
        for chunk in _whole_targets(pairs, _PAIRS_AT_ONCE):
            found += self._detail_chunk(chunk, batch_tokens, on_batch)
        return found

    def _detail_chunk(
        self, pairs: list[Pair], batch_tokens: int, on_batch: Callable[[int], object] | None
    ) -> list[PairPrediction]:
        encoded = list(self.encoder.encode(pairs))
        lengths = np.array([len(pair.token_ids) for pair in encoded])
        batches = (
            (rows, encoded_batch([encoded[row] for row in rows], self._pad_id))
            for rows in batches_of_tokens(lengths, np.arange(len(encoded)), batch_tokens)
        )
        scores = score_pairs(
            self.model,
            batches,
            len(encoded),
            device=self.device,
            precision=self.precision,
            on_batch=on_batch,
        )
        num_cut = sum(pair.num_truncated > 0 for pair in encoded)
        if num_cut:
            logger.warning(
                "%d of %d prompts exceed %d tokens without any history: ends of utterances were cut",
                num_cut,
                len(encoded),
                self.card.max_prompt_tokens,
            )
        ranges: list[tuple[int, int] | None] = [None] * len(pairs)
        if scores.span_P2 is not None:
            ranges = [
                span_characters(_offsets(pair.candidate_offsets), span)
                for pair, span in zip(encoded, scores.span_P2, strict=True)
            ]
        texts = [
            "" if place is None else pair.dialogue.utterances[pair.candidate - 1].text[slice(*place)]
            for pair, place in zip(pairs, ranges, strict=True)
        ]
        emotions = pair_emotions(scores, pairs, self.card.emotions, self.card.neutral_offset)
        decided = decide(pairs, scores, emotions, texts, self.card.threshold)
        return [
            PairPrediction(prediction, float(score), place if prediction.is_cause else None)
            for prediction, score, place in zip(decided, scores.cause_P, ranges, strict=True)
        ]


def _whole_targets(pairs: Sequence[Pair], size: int) -> Iterable[list[Pair]]:
    """Chunks of about `size` pairs that split no target (pairs of a target stand together)."""
    chunk: list[Pair] = []
    for pair in pairs:
        if len(chunk) >= size:
            last = chunk[-1]
            if last.dialogue is not pair.dialogue or last.target != pair.target:
                yield chunk
                chunk = []
        chunk.append(pair)
    if chunk:
        yield chunk


def _offsets(offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    return np.asarray(offsets, dtype=np.int64)
