"""Scoring cached pairs of a labelled corpus: decisions, the threshold's choice, the scores of an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.schema import NEUTRAL, Corpus, Utterance
from kdecs.evaluation.metrics import Scores, evaluate
from kdecs.evaluation.predictions import Prediction
from kdecs.student.batches import Ints, batches_of_tokens, cached_batch
from kdecs.student.inference import PairScores, pair_gains, score_pairs, span_text, target_emotions
from kdecs.student.model import StudentModel
from kdecs.student.threshold import Level, choose_threshold

if TYPE_CHECKING:  # pyarrow: prediction does without
    from kdecs.corpus.cache import CorpusCache

_OFFSETS = 64


@dataclass(frozen=True)
class Validation:
    """Scores on a corpus (fold1, protocol reccon) with the decision that was chosen on it and what it decides."""

    scores: Scores
    threshold: float
    neutral_offset: float
    predictions: list[Prediction]


@dataclass(frozen=True)
class DecisionRule:
    """How a decision is chosen: the level of macro F1 that counts, and what neutral's offset is chosen for."""

    level: Level = "span"
    neutral: Literal["argmax", "balanced", "macro_f1"] = "argmax"


def validate(
    model: StudentModel,
    cache: "CorpusCache",
    corpus: Corpus,
    emotions: tuple[str, ...],
    *,
    device: torch.device,
    batch_tokens: int,
    pad_id: int,
    rule: DecisionRule = DecisionRule(),
) -> Validation:
    """Score the pairs of fold1+neutral, choose the decision, and evaluate with it.

    In float32, whatever the training's precision: that is what a student predicts in, and a threshold chosen in
    another precision is another threshold. `cache` is the corpus' own: its rows are
    `pairs_of(dialogue, "fold1+neutral")` over the dialogues.
    """
    rows = np.arange(len(cache))
    batches = (
        (chunk, cached_batch(cache, chunk, pad_id))
        for chunk in batches_of_tokens(cache.num_tokens, rows, batch_tokens)
    )
    scores = score_pairs(model, batches, len(cache), device=device, precision="float32")
    pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue, "fold1+neutral")]
    spans = [""] * len(pairs)
    if scores.span_P2 is not None:
        spans = [
            span_text(_candidate_text(pair), cache.offsets_at(row), scores.span_P2[row])
            for row, pair in enumerate(pairs)
        ]
    threshold, offset = choose_decision(scores, pairs, emotions, spans, rule)
    decided = decide(pairs, scores, pair_emotions(scores, pairs, emotions, offset), spans, threshold)
    found = evaluate(corpus, {p.key: p for p in decided}, universe="fold1")
    return Validation(found, threshold, offset, decided)


def choose_decision(
    scores: PairScores, pairs: list[Pair], emotions: tuple[str, ...], spans: list[str], rule: DecisionRule
) -> tuple[float, float]:
    """(threshold of causes, offset of neutral) that serve a labelled corpus best.

    Under `argmax` the offset is 0. Otherwise each offset that changes a target's emotion is tried (at most
    _OFFSETS of them, evenly over the targets) with the best threshold under it; of equally good ones the one
    nearest to 0 is taken.
    """
    best = (-np.inf, 0.0, 0.0, 0.0)
    for offset in _offsets(scores, pairs, emotions, rule):
        emotion_of_pair = pair_emotions(scores, pairs, emotions, offset)
        # Only what fold1 scores counts for the threshold: (i, i) of neutral targets serve emotion accuracy alone.
        scored = [row for row, pair in enumerate(pairs) if _target(pair).evidence is not None]
        gains = pair_gains(
            scores.cause_P[scored],
            [emotion_of_pair[row] for row in scored],
            [pairs[row].spans for row in scored],
            [spans[row] for row in scored],
        )
        threshold, macro_f1 = choose_threshold(replace(gains, level=rule.level))
        worth = macro_f1
        if rule.neutral == "balanced":
            own = [row for row, pair in enumerate(pairs) if pair.candidate == pair.target]
            right = [emotion_of_pair[row] == pairs[row].emotion for row in own]
            worth = (macro_f1 + 100 * float(np.mean(right))) / 2
        best = max(best, (worth, -abs(offset), threshold, offset))
    return best[2], best[3]


def _offsets(
    scores: PairScores, pairs: list[Pair], emotions: tuple[str, ...], rule: DecisionRule
) -> list[float]:
    """The offsets of neutral that are worth a trial: 0; under which no target is neutral; midway between two margins.

    A target is neutral under an offset above its margin, the distance of its likeliest other emotion from neutral.
    """
    if rule.neutral == "argmax" or scores.emotion_PE is None or NEUTRAL not in emotions or len(emotions) < 2:
        return [0.0]
    own_PE = scores.emotion_PE[[pair.candidate == pair.target for pair in pairs]].astype(np.float64)
    neutral = emotions.index(NEUTRAL)
    margins = np.unique(np.delete(own_PE, neutral, axis=1).max(axis=1) - own_PE[:, neutral])
    never = margins[:1] - 1
    offsets = np.concatenate((never, (margins[1:] + margins[:-1]) / 2))
    if len(offsets):
        offsets = offsets[np.unique(np.linspace(0, len(offsets) - 1, _OFFSETS).astype(int))]
    return [0.0, *offsets.tolist()]


def target_index(pairs: list[Pair]) -> Ints:
    """The number of each pair's target, counted over the pairs in order of first appearance: (P,).

    Two dialogues may have one id (those of two requests, say): targets are told apart by the dialogue itself.
    """
    numbers: dict[tuple[int, int], int] = {}
    return np.array(
        [numbers.setdefault((id(p.dialogue), p.target), len(numbers)) for p in pairs], dtype=np.int64
    )


def pair_emotions(
    scores: PairScores, pairs: list[Pair], emotions: tuple[str, ...], neutral_offset: float = 0.0
) -> list[str | None]:
    """The emotion decided for each pair's target; its own where the student is given the emotions."""
    if scores.emotion_PE is None:
        return [pair.emotion for pair in pairs]
    target_of_P = target_index(pairs)
    is_own_P = np.array([pair.candidate == pair.target for pair in pairs], dtype=bool)
    by_target = target_emotions(scores.emotion_PE, target_of_P, is_own_P, emotions, neutral_offset)
    return [by_target[target] for target in target_of_P]


def decide(
    pairs: list[Pair],
    scores: PairScores,
    emotion_of_pair: Sequence[str | None],
    spans: list[str],
    threshold: float,
) -> list[Prediction]:
    """Predictions: a cause where the score reaches the threshold and the target is not neutral.

    Compared in float64, as the threshold was chosen: one between two neighbours in float32 would be rounded to one.
    """
    predictions = []
    for row, (pair, emotion, span) in enumerate(zip(pairs, emotion_of_pair, spans, strict=True)):
        is_cause = float(scores.cause_P[row]) >= threshold and emotion != NEUTRAL
        predictions.append(
            Prediction(
                pair.dialogue.id, pair.target, pair.candidate, emotion, is_cause, span if is_cause else ""
            )
        )
    return predictions


def _target(pair: Pair) -> Utterance:
    return pair.dialogue.utterances[pair.target - 1]


def _candidate_text(pair: Pair) -> str:
    return pair.dialogue.utterances[pair.candidate - 1].text
