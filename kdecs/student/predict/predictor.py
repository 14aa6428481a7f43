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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kdecs.artifact import read_verified_manifest
from kdecs.corpus.encoding import ENCODERS, EncodedPair
from kdecs.corpus.pairs import Ints, Pair, Universe, pairs_of
from kdecs.corpus.schema import Corpus, Dialogue
from kdecs.errors import DependencyError
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.process import refusing
from kdecs.student.config import StudentCard
from kdecs.student.decision import (
    Logits,
    decide,
    pair_emotions,
    score_pairs,
    span_characters,
    with_calibration,
)
from kdecs.student.predict.streaming import (
    DEFAULT_BATCH_TOKENS,
    PairPrediction,
    stream,
    warn_of_long_dialogues,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_PAIRS_AT_ONCE = 2048  # encoded and scored together, which bounds the memory of one long dialogue


class Scorer(Protocol):
    """What computes a student's logits: PyTorch (`TorchScorer`) or ONNX Runtime (`OnnxScorer`)."""

    def batches(self, encoded: Sequence[EncodedPair], max_tokens: int) -> Iterable[tuple[Ints, Logits]]:
        """The logits of all pairs, a batch at a time, each with the indices of its pairs."""
        ...


class Student:
    """A trained student, ready to predict. Thread-safe: requests may overlap, and each needs its own memory."""

    def __init__(self, scorer: Scorer, tokenizer: Any, card: StudentCard) -> None:
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.card = card
        with refusing(f"tokenizer {tokenizer.name_or_path}: cannot be used"):
            self.encoder = ENCODERS[card.layout](tokenizer, card.max_prompt_tokens, card.prompt)

    @property
    def candidates_after(self) -> int:
        """How many turns past its target a candidate may lie."""
        return self.card.candidates_after

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: "torch.device | str" = "cpu", precision: str = "float32"
    ) -> "Student":
        """Load a student (safetensors and JSON only), or its export to ONNX, which needs no torch and no Transformers.

        `device` is auto, cpu, cuda or a device of torch; an export runs on the CPU alone, in its own precision.
        Raises ArtifactError if the directory is missing, unfinished, damaged or of another kind, ModelError if its
        weights or tokenizer cannot be loaded, DeviceError without such a device, and DependencyError if a package that
        it needs is missing.
        """
        directory = Path(directory).expanduser().absolute()
        # Every byte, once per process: a damaged weight would still predict.
        manifest = read_verified_manifest(directory, "student", "student-onnx")
        # Imported here, since each of the two runs where the packages of the other are not installed.
        if manifest.kind == "student-onnx":
            from kdecs.student.onnx.scoring import load_onnx_student

            return cls(*load_onnx_student(directory, device=str(device), precision=precision))
        try:
            from kdecs.student.model import load_scorer
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "transformers"):
                raise
            raise DependencyError(
                f"{directory}: a student needs PyTorch and Transformers, and {error.name} is not installed; install "
                "kdecs with its dependencies, or take the student's export (kdecs student export)"
            ) from None
        return cls(*load_scorer(directory, device=device, precision=precision))

    def predict(
        self,
        dialogues: Iterable[Dialogue],
        *,
        max_distance: int | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[Prediction]:
        """Predictions for every pair j <= i + `candidates_after` of the dialogues, labelled or not, in order.

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
        pairs = [
            pair
            for dialogue in corpus.dialogues
            for pair in pairs_of(dialogue, universe, self.candidates_after)
        ]
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
        scores = score_pairs(
            self.scorer.batches(encoded, batch_tokens),
            len(encoded),
            self.card.outputs,
            len(self.card.emotions),
            on_batch=on_batch,
        )
        scores = with_calibration(scores, pairs, self.card.cause_calibration)
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
        emotions = pair_emotions(
            scores,
            pairs,
            self.card.emotions,
            self.card.neutral_offset,
            weighs_causes=self.card.neutral_weighs_causes,
        )
        decided = decide(pairs, scores, emotions, texts, self.card.chosen_threshold)
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
