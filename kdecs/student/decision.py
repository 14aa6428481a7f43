"""From a student's logits to decisions: which emotion a target has, which pairs are causes, which span.

The story: `score_pairs` turns batches of logits into scores (`PairScores`); `pair_emotions` and `decide` turn scores
into predictions, given a threshold of causes and an offset of neutral; `choose_decision` finds the two that serve a
labelled corpus best, after `fit_calibration` if scores are to be calibrated; `validate` does all of it on the
validation split, once per epoch. All of it but that fit is NumPy, so that it
decides the same whether PyTorch or ONNX Runtime computed the logits.

Legend: B pairs of a batch, P pairs, E emotions, A connective answer words, M tokens of u_j's copy, S = M + 1 span
places (0 = no span).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.pairs import Ints, Pair, pairs_of
from kdecs.corpus.schema import NEUTRAL, Corpus
from kdecs.evaluation.by_distance import DistanceCalibration, fit_by_distance, log_odds_of
from kdecs.evaluation.counts import f1
from kdecs.evaluation.metrics import Scores, evaluate
from kdecs.evaluation.predictions import Prediction
from kdecs.evaluation.rows import token_f1
from kdecs.student.config import Outputs

if TYPE_CHECKING:  # pyarrow: prediction does without
    from kdecs.corpus.cache import CorpusCache

# For models without a chosen threshold only. A quarter of the pairs are causes, so cross-entropy leaves most scores
# below one half, and the threshold that macro F1 wants lies lower; how much lower differs with the model.
DEFAULT_THRESHOLD = 0.5
Level = Literal["span", "utterance", "both"]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
_OFFSETS = 64  # of neutral that are tried at most: each costs a choice of the threshold


class Logits(NamedTuple):
    """What a student says of a batch: raw logits, None for what its mode does not predict.

    Span logits are -inf beyond a pair's own tokens.
    """

    emotion_BE: Singles | None
    connective_BA: Singles | None
    start_BS: Singles | None
    end_BS: Singles | None
    classifier_B2: Singles | None = None


@dataclass(frozen=True)
class Validation:
    """The decision that was chosen on the validation split, its predictions and their scores (fold1, reccon)."""

    scores: Scores
    threshold: float
    neutral_offset: float
    calibration: DistanceCalibration | None
    predictions: list[Prediction]


@dataclass(frozen=True)
class DecisionRule:
    """How a decision is made: the level of macro F1, and how neutral and causes are decided (`neutral_decision`,
    `least_emotion_accuracy`, `cause_decision` and `cause_calibration` in configs).
    """

    level: Level = "span"
    neutral: Literal["argmax", "balanced", "macro_f1"] = "argmax"
    cause: Literal["threshold", "argmax"] = "threshold"
    least_accuracy: float = 0.0
    calibration: Literal["none", "distance"] = "none"

    @property
    def weighs_causes(self) -> bool:
        """Whether a target that seems to be its own cause is less likely neutral (`pair_emotions`)."""
        return self.neutral == "balanced" or self.least_accuracy > 0


def validate(
    batches: Iterable[tuple[Ints, Logits]],
    cache: "CorpusCache",
    corpus: Corpus,
    emotions: tuple[str, ...],
    outputs: Outputs,
    rule: DecisionRule = DecisionRule(),
    candidates_after: int = 0,
) -> Validation:
    """Score the validation pairs (fold1+neutral), choose the decision on them, and evaluate with it.

    `cache` is that of `corpus`: its rows are the pairs of fold1+neutral, `candidates_after` turns ahead. `batches` are
    some of its rows each, with their logits.
    """
    scores = score_pairs(batches, len(cache), outputs, len(emotions))
    pairs = [
        pair
        for dialogue in corpus.dialogues
        for pair in pairs_of(dialogue, "fold1+neutral", candidates_after)
    ]
    spans = [""] * len(pairs)
    if scores.span_P2 is not None:
        spans = [
            span_text(
                pair.dialogue.utterances[pair.candidate - 1].text, cache.offsets_at(row), scores.span_P2[row]
            )
            for row, pair in enumerate(pairs)
        ]
    calibration = None
    if rule.calibration == "distance":
        calibration = fit_calibration(scores, pairs)
        scores = with_calibration(scores, pairs, calibration)
    threshold, offset = choose_decision(scores, pairs, emotions, spans, rule)
    # The scores flatter a little, since they are of the split that these numbers were chosen on; test has its own.
    emotion_of_pair = pair_emotions(scores, pairs, emotions, offset, weighs_causes=rule.weighs_causes)
    decided = decide(pairs, scores, emotion_of_pair, spans, None if rule.cause == "argmax" else threshold)
    found = evaluate(corpus, {p.key: p for p in decided}, universe="fold1", candidates_after=candidates_after)
    return Validation(found, threshold, offset, calibration, decided)


@dataclass(frozen=True)
class PairScores:
    """A student's scores for P pairs: emotion log-probabilities, cause scores in [0, 1], best spans.

    `span_P2` holds the first and last token of the best span, 1-based within u_j's copy. `emotion_PE` is None for
    a student that is given the emotions, `span_P2` for one that finds no spans (task ecpe). `is_likeliest_P` says of
    each pair whether to be a cause is the likeliest outcome (`likeliest_causes`).
    """

    emotion_PE: npt.NDArray[np.float32] | None
    cause_P: npt.NDArray[np.float32]
    span_P2: npt.NDArray[np.int64] | None
    is_likeliest_P: npt.NDArray[np.bool_] | None = None


def score_pairs(
    batches: Iterable[tuple[Ints, Logits]],
    num_pairs: int,
    outputs: Outputs,
    num_emotions: int,
    *,
    on_batch: Callable[[int], object] | None = None,
) -> PairScores:
    """The scores of pairs 0 … num_pairs - 1. Each of `batches` is the indices of its pairs, and their logits."""
    emotion_PE = np.zeros((num_pairs, num_emotions), np.float32) if outputs.emotions else None
    cause_P = np.zeros(num_pairs, dtype=np.float32)
    span_P2 = np.zeros((num_pairs, 2), dtype=np.int64) if outputs.spans else None
    is_likeliest_P = np.zeros(num_pairs, dtype=bool)
    for places, logits in batches:
        # `places` are indices into the arrays: batches come by length, the results stay in the pairs' order.
        if emotion_PE is not None and logits.emotion_BE is not None:
            emotion_PE[places] = log_softmax(logits.emotion_BE)
        cause_P[places] = cause_scores(logits)
        best_B2 = None
        if span_P2 is not None and logits.start_BS is not None and logits.end_BS is not None:
            best_B2 = span_P2[places] = best_spans(logits.start_BS, logits.end_BS)
        is_likeliest_P[places] = likeliest_causes(logits, best_B2)
        if on_batch:
            on_batch(len(places))
    return PairScores(emotion_PE, cause_P, span_P2, is_likeliest_P)


def fit_calibration(scores: PairScores, pairs: list[Pair]) -> DistanceCalibration:
    """The calibration of cause scores on the pairs of a labelled corpus that fold1 scores."""
    rows = _scored(pairs)
    distance_P, gold_P = distances(pairs), np.array([pair.is_cause for pair in pairs])
    return fit_by_distance(log_odds_of(scores.cause_P[rows]), distance_P[rows], gold_P[rows])


def with_calibration(
    scores: PairScores, pairs: list[Pair], calibration: DistanceCalibration | None
) -> PairScores:
    """The same scores with calibrated causes, or as they are without a calibration."""
    if calibration is None:
        return scores
    return replace(scores, cause_P=calibration.scores(scores.cause_P, distances(pairs)))


def distances(pairs: list[Pair]) -> Ints:
    """Target minus candidate of each pair."""
    return np.array([pair.target - pair.candidate for pair in pairs], dtype=np.int64)


def _scored(pairs: list[Pair]) -> list[int]:
    # Pairs (i, i) of neutral targets serve emotion accuracy alone.
    return [
        row
        for row, pair in enumerate(pairs)
        if pair.dialogue.utterances[pair.target - 1].evidence is not None
    ]


def cause_scores(logits: Logits) -> Singles:
    """The mean of p(cause) and 1 - p(no span), or the one of them that the mode has. Shape (B,).

    p(cause) is the summed probability of the causal words at mask_cau, or the classifier's; p(no span) is the
    geometric mean over start and end.
    """
    scores = []
    if logits.connective_BA is not None:
        words_BA = np.exp(log_softmax(logits.connective_BA))
        scores.append(words_BA[:, :NUM_CAUSAL].sum(axis=-1))
    if logits.classifier_B2 is not None:
        scores.append(np.exp(log_softmax(logits.classifier_B2))[:, 1])
    if logits.start_BS is not None and logits.end_BS is not None:
        no_start_B, no_end_B = log_softmax(logits.start_BS)[:, 0], log_softmax(logits.end_BS)[:, 0]
        # 1 - exp(x) by expm1, which keeps its digits where p(no span) is close to 1.
        scores.append(-np.expm1((no_start_B + no_end_B) / 2))
    found: Singles = np.stack(scores).mean(axis=0)
    return found


def likeliest_causes(logits: Logits, best_B2: npt.NDArray[np.int64] | None) -> npt.NDArray[np.bool_]:
    """Whether every output of the mode finds a cause by its largest logit, without a threshold. Shape (B,).

    The largest connective is a causal word; the classifier's larger class is "cause"; and the best span (`best_spans`)
    has a larger sum of its start and end than place 0, which stands for no span. Equal logits find none.
    """
    found = []
    if logits.connective_BA is not None:
        found.append(
            logits.connective_BA[:, :NUM_CAUSAL].max(axis=-1)
            > logits.connective_BA[:, NUM_CAUSAL:].max(axis=-1)
        )
    if logits.classifier_B2 is not None:
        found.append(logits.classifier_B2[:, 1] > logits.classifier_B2[:, 0])
    if best_B2 is not None and logits.start_BS is not None and logits.end_BS is not None:
        row_B = np.arange(len(best_B2))
        best_B = logits.start_BS[row_B, best_B2[:, 0]] + logits.end_BS[row_B, best_B2[:, 1]]
        found.append(best_B > logits.start_BS[:, 0] + logits.end_BS[:, 0])
    is_cause_B: npt.NDArray[np.bool_] = np.logical_and.reduce(found)
    return is_cause_B


def best_spans(start_BS: Singles, end_BS: Singles) -> npt.NDArray[np.int64]:
    """The likeliest first and last token with first <= last, 1-based: (B, 2)."""
    # "No span" (place 0) does not take part: whether there is a cause is decided by its score.
    start_BM, flipped_BM = start_BS[:, 1:], end_BS[:, :0:-1]
    # The best end at or right of each start, by a running maximum from the right: O(M) memory instead of M × M.
    best_BM = np.maximum.accumulate(flipped_BM, axis=1)
    places_M = np.arange(flipped_BM.shape[1])
    from_right_BM = np.maximum.accumulate(np.where(flipped_BM == best_BM, places_M, 0), axis=1)
    first_B1 = (start_BM + best_BM[:, ::-1]).argmax(axis=1)[:, None]
    last_B1 = np.take_along_axis(places_M[-1] - from_right_BM[:, ::-1], first_B1, axis=1)
    return np.concatenate((first_B1, last_B1), axis=1) + 1


def log_softmax(logits: Singles) -> Singles:
    """Over the last axis; -inf stays -inf."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Singles = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def target_index(pairs: list[Pair]) -> Ints:
    """The number of each pair's target, counted over the pairs in order of first appearance: (P,).

    Dialogues of two requests may share an id, so targets are told apart by the dialogue object.
    """
    numbers: dict[tuple[int, int], int] = {}
    return np.array(
        [numbers.setdefault((id(p.dialogue), p.target), len(numbers)) for p in pairs], dtype=np.int64
    )


def target_emotions(
    emotion_PE: npt.NDArray[np.float32],
    target_of_P: Ints,
    is_own_P: npt.NDArray[np.bool_],
    emotions: Sequence[str],
    neutral_offset: float = 0.0,
) -> list[str]:
    """The emotion of each target 0 … max(target_of_P): argmax of the log-probabilities at its own pair (i, i).

    `neutral_offset` is added to neutral's log-probability first. If (i, i) is not among the pairs, their mean over
    the target's pairs decides. The mean is not used in general, because the other pairs of a target tell whether it is
    neutral: in training and in fold1+neutral only emotional targets have pairs with j < i, and a student learns to
    take the hint.
    """
    num_targets = int(target_of_P.max()) + 1
    has_own = np.zeros(num_targets, dtype=bool)
    has_own[target_of_P[is_own_P]] = True
    counts_P = is_own_P | ~has_own[target_of_P]
    # `add.at`, since a plain += would count each target once.
    sums = np.zeros((num_targets, len(emotions)), dtype=np.float64)
    np.add.at(sums, target_of_P[counts_P], emotion_PE[counts_P])
    # The mean matters only for the offset, which is on the scale of one pair; an argmax needs no division.
    if NEUTRAL in emotions:
        sums /= np.bincount(target_of_P[counts_P], minlength=num_targets)[:, None]
        sums[:, list(emotions).index(NEUTRAL)] += neutral_offset
    return [emotions[index] for index in sums.argmax(axis=1)]


def pair_emotions(
    scores: PairScores,
    pairs: list[Pair],
    emotions: tuple[str, ...],
    neutral_offset: float = 0.0,
    *,
    weighs_causes: bool = False,
) -> list[str | None]:
    """The emotion decided for each pair's target; the gold one if the student is given the emotions.

    With `weighs_causes`, the log-odds of the cause score of (i, i) are first subtracted from neutral's log-probability,
    because a target that causes its own emotion is not neutral.
    """
    emotion_PE = _with_causes(scores, emotions) if weighs_causes else scores.emotion_PE
    if emotion_PE is None:
        return [pair.emotion for pair in pairs]
    target_of_P = target_index(pairs)
    is_own_P = np.array([pair.candidate == pair.target for pair in pairs], dtype=bool)
    by_target = target_emotions(emotion_PE, target_of_P, is_own_P, emotions, neutral_offset)
    return [by_target[target] for target in target_of_P]


def _with_causes(scores: PairScores, emotions: tuple[str, ...]) -> npt.NDArray[np.float32] | None:
    if scores.emotion_PE is None or NEUTRAL not in emotions:
        return scores.emotion_PE
    found = scores.emotion_PE.copy()
    found[:, emotions.index(NEUTRAL)] -= log_odds_of(scores.cause_P)
    return found


def decide(
    pairs: list[Pair],
    scores: PairScores,
    emotion_of_pair: Sequence[str | None],
    spans: list[str],
    threshold: float | None,
) -> list[Prediction]:
    """Predictions: a pair is a cause if its score reaches the threshold and its target is not neutral.

    Without a threshold it is one if that is the likeliest outcome (`likeliest_causes`).
    """
    predictions = []
    for row, (pair, emotion, span) in enumerate(zip(pairs, emotion_of_pair, spans, strict=True)):
        # In float64, as the threshold was chosen: between two neighbouring float32 scores it would be rounded to one.
        if threshold is None:
            assert scores.is_likeliest_P is not None
            is_cause = bool(scores.is_likeliest_P[row])
        else:
            is_cause = float(scores.cause_P[row]) >= threshold
        is_cause = is_cause and emotion != NEUTRAL
        predictions.append(
            Prediction(
                pair.dialogue.id, pair.target, pair.candidate, emotion, is_cause, span if is_cause else ""
            )
        )
    return predictions


def span_text(text: str, offsets_M2: Ints, span: Sequence[int]) -> str:
    """The exact substring of u_j's text from a span's first to its last token (1-based)."""
    start, end = span_characters(offsets_M2, span)
    return text[start:end]


def span_characters(offsets_M2: Ints, span: Sequence[int]) -> tuple[int, int]:
    """The characters [start, end) in u_j's text of a span of tokens (1-based, both included)."""
    return int(offsets_M2[span[0] - 1][0]), int(offsets_M2[span[1] - 1][1])


def choose_decision(
    scores: PairScores, pairs: list[Pair], emotions: tuple[str, ...], spans: list[str], rule: DecisionRule
) -> tuple[float, float]:
    """The threshold of causes and the offset of neutral that serve a labelled corpus best under a rule.

    Under `argmax` the offset is 0. Otherwise the offsets that change a target's emotion are tried (at most _OFFSETS,
    spread evenly over the targets), each with its best threshold; of equally good offsets the nearest to 0 wins. One
    whose emotion accuracy is below the rule's least is taken only if none reaches it, and then the most accurate one.
    Where causes are decided by argmax there is no threshold to choose, and DEFAULT_THRESHOLD stands for it.
    """
    decides_by_argmax = rule.cause == "argmax"
    cause_P = scores.cause_P
    if decides_by_argmax:
        assert scores.is_likeliest_P is not None
        cause_P = scores.is_likeliest_P.astype(np.float32)  # on the two sides of the threshold
    best = (-np.inf, -np.inf, 0.0, 0.0, 0.0)
    own = [row for row, pair in enumerate(pairs) if pair.candidate == pair.target]
    # Only what fold1 scores counts for the threshold.
    scored = _scored(pairs)
    for offset in _offsets(scores, pairs, emotions, rule):
        emotion_of_pair = pair_emotions(scores, pairs, emotions, offset, weighs_causes=rule.weighs_causes)
        gains = pair_gains(
            cause_P[scored],
            [emotion_of_pair[row] for row in scored],
            [pairs[row].spans for row in scored],
            [spans[row] for row in scored],
            level=rule.level,
        )
        if decides_by_argmax:
            threshold, macro_f1 = DEFAULT_THRESHOLD, _macro_f1(gains, gains.score_P >= DEFAULT_THRESHOLD)
        else:
            threshold, macro_f1 = choose_threshold(gains)
        right = [float(emotion_of_pair[row] == pairs[row].emotion) for row in own]
        accuracy = 100 * float(np.mean(right or [0.0]))
        worth = (macro_f1 + accuracy) / 2 if rule.neutral == "balanced" else macro_f1
        # Tuples compare from the left, which settles equal worth by the offset nearest to 0.
        best = max(best, (min(accuracy, rule.least_accuracy), worth, -abs(offset), threshold, offset))
    return best[3], best[4]


def _offsets(
    scores: PairScores, pairs: list[Pair], emotions: tuple[str, ...], rule: DecisionRule
) -> list[float]:
    """The offsets of neutral that decide differently: 0, one below all margins, and those midway between two margins.

    A target's margin is how far its likeliest other emotion is above neutral; an offset above it makes the target
    neutral.
    """
    if rule.neutral == "argmax" or scores.emotion_PE is None or NEUTRAL not in emotions or len(emotions) < 2:
        return [0.0]
    emotion_PE = _with_causes(scores, emotions) if rule.weighs_causes else scores.emotion_PE
    assert emotion_PE is not None
    own_PE = emotion_PE[[pair.candidate == pair.target for pair in pairs]].astype(np.float64)
    neutral = emotions.index(NEUTRAL)
    margins = np.unique(np.delete(own_PE, neutral, axis=1).max(axis=1) - own_PE[:, neutral])
    never = margins[:1] - 1  # below the smallest margin, so that no target is neutral
    offsets = np.concatenate((never, (margins[1:] + margins[:-1]) / 2))
    if len(offsets):
        offsets = offsets[np.unique(np.linspace(0, len(offsets) - 1, _OFFSETS).astype(int))]
    return [0.0, *offsets.tolist()]


@dataclass(frozen=True)
class PairGains:
    """What predicting each of P pairs as a cause would be worth (protocol reccon).

    `score_P` is in [0, 1], or -inf for a pair that can never be predicted because its target is neutral.
    `positive_rows_P` is the number of gold spans of the pair (0 for a negative pair), `f_sum_P` the sum over them of
    F with the predicted span, each in [0, 1]. `level` says what Pos F1 is: the mean of F over the gold spans (span),
    the F1 of the causal class (utterance), or the mean of the two (both).
    """

    score_P: Floats
    positive_rows_P: Floats
    f_sum_P: Floats
    level: Level = "span"


def pair_gains(
    cause_P: npt.NDArray[np.float32],
    emotion_of_pair: Sequence[str | None],
    gold_spans: Sequence[Sequence[str]],
    predicted_spans: Sequence[str],
    level: Level = "span",
) -> PairGains:
    """What predicting each pair as a cause would be worth (protocol reccon), for the choice of the threshold."""
    # A neutral target can have no cause: -inf keeps its pairs below every threshold.
    score_P = cause_P.astype(np.float64)
    score_P[np.array([emotion == NEUTRAL for emotion in emotion_of_pair], dtype=bool)] = -np.inf
    f_sum = [
        sum(token_f1(gold, predicted.strip()) for gold in spans)
        for spans, predicted in zip(gold_spans, predicted_spans, strict=True)
    ]
    num_spans = [len(spans) for spans in gold_spans]
    return PairGains(score_P, np.array(num_spans, dtype=np.float64), np.array(f_sum, dtype=np.float64), level)


def choose_threshold(gains: PairGains) -> tuple[float, float]:
    """The threshold with the best macro F1, and that F1 in percent; a pair is a cause if score >= threshold.

    The threshold lies midway between two scores, so pairs of equal score stay together. Of equally good thresholds
    the nearest to 0.5 wins. One under which nothing is a cause is never chosen. Without a gold span, or without a pair
    that can be predicted, the threshold is 0.5.
    """
    usable = np.isfinite(gains.score_P)
    num_positive = gains.positive_rows_P.sum()
    if not usable.any() or num_positive == 0:
        return DEFAULT_THRESHOLD, _macro_f1(gains, gains.score_P >= DEFAULT_THRESHOLD)
    # One pass over the pairs by falling score: after each group of equal scores the running sums are the counts that a
    # threshold below that group would give.
    order = np.flatnonzero(usable)[np.argsort(-gains.score_P[usable], kind="stable")]
    score = gains.score_P[order]
    is_negative = gains.positive_rows_P[order] == 0
    ends = np.flatnonzero(np.append(score[1:] < score[:-1], True))  # last pair of each group of equal scores
    f_sum = np.cumsum(gains.f_sum_P[order])[ends]
    lost_negatives = np.cumsum(is_negative)[ends]
    found_rows = np.cumsum(gains.positive_rows_P[order])[ends]
    num_negative = float((gains.positive_rows_P == 0).sum())
    macro = _macro_of_counts(f_sum, num_positive, num_negative, lost_negatives, found_rows, gains.level)
    below = np.append(score[ends[:-1] + 1], 0.0)  # the next lower score; below the last one there is 0
    thresholds = (score[ends] + below) / 2
    best = np.flatnonzero(macro >= macro.max() - 1e-9)  # equal but for rounding
    chosen = best[np.argmin(np.abs(thresholds[best] - DEFAULT_THRESHOLD))]
    return float(thresholds[chosen]), float(macro[chosen])


def _macro_f1(gains: PairGains, predicted_P: npt.NDArray[np.bool_]) -> float:
    is_negative = gains.positive_rows_P == 0
    return float(
        _macro_of_counts(
            np.array([gains.f_sum_P[predicted_P].sum()]),
            gains.positive_rows_P.sum(),
            float(is_negative.sum()),
            np.array([(is_negative & predicted_P).sum()]),
            np.array([gains.positive_rows_P[predicted_P].sum()]),
            gains.level,
        )[0]
    )


def _macro_of_counts(
    f_sum: Floats,
    num_positive: float,
    num_negative: float,
    lost_negatives: Floats,
    found_rows: Floats,
    level: Level,
) -> Floats:
    """Macro F1 (percent) from the sum of F, the negatives predicted as causes, the positive rows predicted."""
    # The negative class has one row per pair, the positive class one per gold span: a missed pair with two spans counts
    # as two rows predicted as negative (protocol reccon).
    right = num_negative - lost_negatives
    negative_f1 = f1(right, num_negative, right + (num_positive - found_rows))
    by_span = f_sum / num_positive if num_positive else np.zeros_like(negative_f1)
    by_utterance = f1(found_rows, num_positive, found_rows + lost_negatives)
    positive_f1 = {"span": by_span, "utterance": by_utterance, "both": (by_span + by_utterance) / 2}[level]
    return 50 * (positive_f1 + negative_f1)
