"""A trained student as a predictor: who feels what, and why, for whole dialogues.

student = Student.from_pretrained("runs/student-tiny")
predictions = student.predict(dialogues)
for dialogue, found in student.stream(dialogues):  # found: predictions, scores, characters of the spans
    ...
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdecs.artifact import read_verified_manifest
from kdecs.corpus.encoding import ENCODERS
from kdecs.corpus.pairs import Pair, Universe, pairs_of
from kdecs.corpus.schema import Corpus, Dialogue
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.models import refusing
from kdecs.student.batches import batches_of_tokens, encoded_batch, encoded_targets
from kdecs.student.decision import decide, pair_emotions, score_pairs, span_characters
from kdecs.student.model import StudentModel
from kdecs.student.predict.streaming import (
    DEFAULT_BATCH_TOKENS,
    PairPrediction,
    stream,
    warn_of_long_dialogues,
)
from kdecs.student.product import StudentCard, load_student

logger = logging.getLogger(__name__)

_PAIRS_AT_ONCE = 2048  # encoded and scored together, which bounds the memory of one long dialogue


class Student:
    """A trained student, ready to predict. Thread-safe: requests may overlap, and each needs its own memory."""

    def __init__(
        self, model: StudentModel, tokenizer: Any, card: StudentCard, *, device: torch.device, precision: str
    ) -> None:
        self.model = model.to(device).eval()
        self.card = card
        self.device = device
        self.precision = precision
        with refusing(f"tokenizer {tokenizer.name_or_path}: cannot be used"):
            self.encoder = ENCODERS[card.layout](tokenizer, card.max_prompt_tokens, card.prompt)
        self._pad_id: int = tokenizer.pad_token_id or 0

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", precision: str = "float32"
    ) -> "Student":
        """Load a student directory (safetensors and JSON only).

        Raises ArtifactError if the directory is missing, unfinished, damaged or of another kind, ModelError if its
        weights or tokenizer cannot be loaded.
        """
        directory = Path(directory).expanduser().absolute()
        # Every byte, once per process: a damaged weight would still predict.
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

        `max_distance` bounds i - j; `on_batch` is called with the number of pairs just predicted. Warns
        (`warnings.warn`) of dialogues of more than 100 utterances.
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

        Dialogues are read a group at a time, so memory does not grow with their number. `on_warning` gets a line for
        dialogues of more than 100 utterances.
        """
        watched = warn_of_long_dialogues(dialogues, max_distance, on_warning, bound="max_distance")
        return stream(self, watched, max_distance=max_distance, batch_tokens=batch_tokens, on_batch=on_batch)

    def predict_pairs(
        self,
        corpus: Corpus,
        *,
        universe: Universe = "fold1+neutral",
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> dict[PairKey, Prediction]:
        """Predictions for the pairs of a universe, by (dialogue id, target, candidate), as `evaluate` takes them."""
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

        The emotion of a target is decided at its pair (i, i), or over its pairs if (i, i) is not among them.
        """
        found: list[PairPrediction] = []
        for chunk in _chunks_by_target(pairs, _PAIRS_AT_ONCE):
            found += self._detail_chunk(chunk, batch_tokens, on_batch)
        return found

    def _detail_chunk(
        self, pairs: list[Pair], batch_tokens: int, on_batch: Callable[[int], object] | None
    ) -> list[PairPrediction]:
        # A tokenizer that somebody sent may fail at a text, and a panic of its Rust code is no Exception.
        with refusing(f"pair {pairs[0].id} or one shortly after it: the tokenizer fails"):
            encoded = list(self.encoder.encode(pairs))
        lengths = np.array([len(pair.token_ids) for pair in encoded])
        batches = (
            (rows, encoded_batch([encoded[row] for row in rows], self._pad_id))
            for rows in batches_of_tokens(
                lengths, np.arange(len(encoded)), batch_tokens, encoded_targets(encoded)
            )
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
                "%d of %d prompts exceed %d tokens even without history: the ends of their utterances were cut",
                num_cut,
                len(encoded),
                self.card.max_prompt_tokens,
            )
        ranges: list[tuple[int, int] | None] = [None] * len(pairs)
        if scores.span_P2 is not None:
            ranges = [
                span_characters(np.asarray(pair.candidate_offsets, dtype=np.int64), span)
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


def _chunks_by_target(pairs: Sequence[Pair], size: int) -> Iterable[list[Pair]]:
    """Chunks of about `size` pairs that do not split a target, whose pairs follow one another."""
    chunk: list[Pair] = []
    for pair in pairs:
        if len(chunk) >= size:
            # A target's emotion is decided over its pairs, which must not be torn apart.
            last = chunk[-1]
            if last.dialogue is not pair.dialogue or last.target != pair.target:
                yield chunk
                chunk = []
        chunk.append(pair)
    if chunk:
        yield chunk
