"""Prediction with the MRC baseline: one question per pair whose target is not neutral.

The question names the target's emotion, which must be given: by the input, and then `emotion` is null in the
predictions, or by another system's predictions, and then it is theirs (a pipeline).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdecs.artifact import read_verified_manifest
from kdecs.baselines.mrc.model import MrcCard, answer_logits, answers, load_product, question_batch
from kdecs.baselines.mrc.questions import EncodedQuestion, QuestionEncoder, answer_text
from kdecs.corpus.pairs import Pair, batches_of_tokens, candidate_pairs, pairs_of
from kdecs.corpus.schema import NEUTRAL, Corpus, Dialogue
from kdecs.errors import DialogueError
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.process import refusing
from kdecs.runtime import autocast
from kdecs.student.predict.streaming import DEFAULT_BATCH_TOKENS, PairPrediction

_PAIRS_AT_ONCE = 2048

Emotions = Mapping[tuple[str, int], str]
"""(dialogue id, turn) -> emotion."""


class MrcBaseline:
    """A trained MRC baseline, ready to predict."""

    def __init__(
        self,
        reader: Any,
        tokenizer: Any,
        card: MrcCard,
        *,
        device: torch.device,
        emotions: Emotions | None = None,
    ) -> None:
        self.emotions = emotions
        self.reader = reader.to(device).eval()
        self.card = card
        self.device = device
        self.encoder = QuestionEncoder(
            tokenizer, card.max_tokens, only_candidate=card.answer_within == "candidate"
        )
        self._pad_id: int = tokenizer.pad_token_id or 0

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", emotions: Emotions | None = None
    ) -> "MrcBaseline":
        """Load a directory of kind mrc (safetensors and JSON only).

        `emotions` are those of another system, which the questions then name instead of the input's.

        Raises ArtifactError if the directory is missing, unfinished, damaged or of another kind, ModelError if its
        weights or tokenizer cannot be loaded.
        """
        directory = Path(directory).expanduser().absolute()
        read_verified_manifest(directory, "mrc")
        reader, tokenizer, card = load_product(directory)
        return cls(reader, tokenizer, card, device=torch.device(device), emotions=emotions)

    def predict(self, dialogues: Iterable[Dialogue], *, max_distance: int | None = None) -> list[Prediction]:
        """Predictions for every pair j <= i of dialogues whose utterances have emotions, in order."""
        pairs = [pair for d in dialogues for pair in candidate_pairs(d, max_distance=max_distance)]
        return [found.prediction for found in self.detail(pairs)]

    def predict_pairs(self, corpus: Corpus) -> dict[PairKey, Prediction]:
        """Predictions for fold1, as `evaluate` takes them."""
        pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue, "fold1")]
        return {found.prediction.key: found.prediction for found in self.detail(pairs)}

    def detail(
        self,
        pairs: Sequence[Pair],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[PairPrediction]:
        """Predictions with scores and character ranges, in the order of the pairs.

        A neutral target has no cause, so nothing is asked about it. Raises DialogueError if a target has no emotion.
        """
        if self.emotions is not None:
            pairs = self._with_given_emotions(pairs)
        found: list[PairPrediction] = []
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            chunk = pairs[start : start + _PAIRS_AT_ONCE]
            asked = [row for row, pair in enumerate(chunk) if pair.emotion != NEUTRAL]
            # A tokenizer that somebody sent may fail at a text, and a panic of its Rust code is no Exception.
            with refusing(f"pair {chunk[0].id} or one shortly after it: the tokenizer fails"):
                encoded = list(self.encoder.encode([chunk[row] for row in asked]))
            if on_batch:
                on_batch(len(chunk) - len(asked))  # these are done; `answer_questions` reports the others
            answered = answer_questions(
                self.reader,
                encoded,
                self._pad_id,
                device=self.device,
                batch_tokens=batch_tokens,
                on_batch=on_batch,
            )
            decided: list[PairPrediction | None] = [None] * len(chunk)
            for row, question, score, span in zip(asked, encoded, *answered, strict=True):
                decided[row] = decide(chunk[row], question, float(score), span, self.card.threshold)
            found += [
                item or PairPrediction(_no_cause(pair), 0.0, None)
                for item, pair in zip(decided, chunk, strict=True)
            ]
        if self.emotions is None:
            return found
        return [
            replace(item, prediction=replace(item.prediction, emotion=pair.emotion))
            for item, pair in zip(found, pairs, strict=True)
        ]

    def _with_given_emotions(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The same pairs of dialogues whose targets have the other system's emotions. Raises DialogueError."""
        assert self.emotions is not None
        changed: dict[int, Dialogue] = {}
        for pair in pairs:
            if (pair.dialogue.id, pair.target) not in self.emotions:
                raise DialogueError(
                    f"dialogue {pair.dialogue.id}, turn {pair.target}: the file of emotions has none for it; predict "
                    "the emotions of the same dialogues first"
                )
            if id(pair.dialogue) not in changed:
                dialogue = pair.dialogue
                changed[id(dialogue)] = replace(
                    dialogue,
                    utterances=tuple(
                        replace(u, emotion=self.emotions.get((dialogue.id, u.turn)))
                        for u in dialogue.utterances
                    ),
                )
        return [replace(pair, dialogue=changed[id(pair.dialogue)]) for pair in pairs]


def answer_questions(
    reader: Any,
    encoded: Sequence[EncodedQuestion],
    pad_id: int,
    *,
    device: torch.device,
    batch_tokens: int,
    on_batch: Callable[[int], object] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Scores (P,) and the first and last tokens (P, 2) of the best answers, in the order of the questions."""
    score_P = np.zeros(len(encoded), dtype=np.float32)
    span_P2 = np.zeros((len(encoded), 2), dtype=np.int64)
    lengths = np.array([len(question.token_ids) for question in encoded], dtype=np.int64)
    was_training = reader.training
    reader.eval()
    # In float32, whatever the training's precision: the threshold is chosen on these scores.
    with torch.inference_mode(), autocast(device, "float32"):
        for rows in batches_of_tokens(lengths, np.arange(len(encoded)), batch_tokens):
            batch = question_batch([encoded[row] for row in rows], pad_id).to(device)
            score_B, span_B2 = answers(*answer_logits(reader, batch))
            score_P[rows], span_P2[rows] = score_B.cpu().numpy(), span_B2.cpu().numpy()
            if on_batch:
                on_batch(len(rows))
    reader.train(was_training)
    return score_P, span_P2


def decide(
    pair: Pair, question: EncodedQuestion, score: float, span: Sequence[int], threshold: float
) -> PairPrediction:
    """The prediction for a pair: a cause, with its answer, if the score reaches the threshold."""
    answer, place = answer_text(question, int(span[0]), int(span[1]))
    if score < threshold:
        return PairPrediction(_no_cause(pair), score, None)
    prediction = Prediction(pair.dialogue.id, pair.target, pair.candidate, None, True, answer)
    return PairPrediction(prediction, score, place)


def _no_cause(pair: Pair) -> Prediction:
    return Prediction(pair.dialogue.id, pair.target, pair.candidate, None, False, "")
