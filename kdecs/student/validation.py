"""Scoring cached pairs of a labelled corpus: decisions, the threshold's choice, the scores of an epoch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.schema import NEUTRAL, Corpus
from kdecs.evaluation.metrics import Scores, evaluate
from kdecs.evaluation.predictions import Prediction
from kdecs.student.batches import Ints, batches_of_tokens, cached_batch
from kdecs.student.inference import PairScores, pair_gains, score_pairs, span_text, target_emotions
from kdecs.student.model import StudentModel
from kdecs.student.threshold import choose_threshold

if TYPE_CHECKING:  # pyarrow: prediction does without
    from kdecs.corpus.cache import CorpusCache


@dataclass(frozen=True)
class Validation:
    """Scores on a corpus (fold1, protocol reccon) with the threshold that was chosen on it."""

    scores: Scores
    threshold: float


def validate(
    model: StudentModel,
    cache: "CorpusCache",
    corpus: Corpus,
    emotions: tuple[str, ...],
    *,
    device: torch.device,
    precision: str,
    batch_tokens: int,
    pad_id: int,
) -> Validation:
    """Score the pairs of fold1+neutral, choose the threshold for macro F1, and evaluate with it.

    `cache` is the corpus' own: its rows are `pairs_of(dialogue, "fold1+neutral")` over the dialogues.
    """
    rows = np.arange(len(cache))
    batches = (
        (chunk, cached_batch(cache, chunk, pad_id))
        for chunk in batches_of_tokens(cache.num_tokens, rows, batch_tokens)
    )
    scores = score_pairs(model, batches, len(cache), device=device, precision=precision)
    pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue, "fold1+neutral")]
    emotion_of_pair = pair_emotions(scores, pairs, emotions)
    spans = [
        span_text(_candidate_text(pair), cache.offsets_at(row), scores.span_P2[row])
        for row, pair in enumerate(pairs)
    ]
    # Only what fold1 scores counts for the threshold: (i, i) of neutral targets serve emotion accuracy alone.
    scored = [
        row
        for row, pair in enumerate(pairs)
        if pair.dialogue.utterances[pair.target - 1].evidence is not None
    ]
    gains = pair_gains(
        scores.cause_P[scored],
        [emotion_of_pair[row] for row in scored],
        [pairs[row].spans for row in scored],
        [spans[row] for row in scored],
    )
    threshold, _ = choose_threshold(gains)
    decided = decide(pairs, scores, emotion_of_pair, spans, threshold)
    return Validation(evaluate(corpus, {p.key: p for p in decided}, universe="fold1"), threshold)


def target_index(pairs: list[Pair]) -> Ints:
    """The number of each pair's target, counted over the pairs in order of first appearance: (P,)."""
    numbers: dict[tuple[str, int], int] = {}
    return np.array(
        [numbers.setdefault((p.dialogue.id, p.target), len(numbers)) for p in pairs], dtype=np.int64
    )


def pair_emotions(scores: PairScores, pairs: list[Pair], emotions: tuple[str, ...]) -> list[str]:
    """The emotion decided for each pair's target."""
    target_of_P = target_index(pairs)
    is_own_P = np.array([pair.candidate == pair.target for pair in pairs], dtype=bool)
    by_target = target_emotions(scores.emotion_PE, target_of_P, is_own_P, emotions)
    return [by_target[target] for target in target_of_P]


def decide(
    pairs: list[Pair], scores: PairScores, emotion_of_pair: list[str], spans: list[str], threshold: float
) -> list[Prediction]:
    """Predictions: a cause where the score reaches the threshold and the target is not neutral."""
    predictions = []
    for row, (pair, emotion, span) in enumerate(zip(pairs, emotion_of_pair, spans, strict=True)):
        is_cause = bool(scores.cause_P[row] >= threshold) and emotion != NEUTRAL
        predictions.append(
            Prediction(
                pair.dialogue.id, pair.target, pair.candidate, emotion, is_cause, span if is_cause else ""
            )
        )
    return predictions


def _candidate_text(pair: Pair) -> str:
    return pair.dialogue.utterances[pair.candidate - 1].text
