"""Every score of a prediction file: RECCON's protocols over rows, utterance-level F1, emotions, breakdowns.

`evaluate` compares predictions with a corpus and returns `Scores`. All scores are functions of sums over rows (see
`kdecs.evaluation.rows`), which `metrics_of` computes for one sum or for many at once, as the bootstrap needs it. Scores
are in percent. Rows and protocols are those of RECCON (Poria et al. 2021), utterance-level scores those of ECPE.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdecs.corpus.schema import NEUTRAL, NO_TABLE, Corpus, map_corpus
from kdecs.evaluation.baselines import (
    ALL_NEGATIVE,
    MAJORITY_EMOTION,
    RULES,
    SELF_AND_PREVIOUS,
    majority_emotion,
    rule_predictions,
    trivial_predictions,
)
from kdecs.evaluation.counts import f1, ratio
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.evaluation.rows import (
    COLUMN,
    Protocol,
    Row,
    ScoredRows,
    ScoredUniverse,
    decide_emotions,
    rows_of,
    score_rows,
    sums_by_dialogue,
    without_repeated_pairs,
)


@dataclass(frozen=True)
class EmotionReport:
    """Scores of emotions over the utterances that have a predicted one.

    `labels` holds every gold or predicted label, by falling count, then name. `confusion` is (L, L) int64 with gold
    labels in rows and predicted ones in columns. F1 and accuracy are in percent.
    """

    labels: tuple[str, ...]
    confusion: NDArray[np.int64]
    accuracy: float
    macro_f1: float
    f1: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values: accuracy, macro_f1, f1 and count by label, confusion as {gold: {predicted: count}}."""
        counts = self.confusion.tolist()
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "f1": self.f1,
            "count": {label: sum(row) for label, row in zip(self.labels, counts, strict=True)},
            "confusion": {
                label: dict(zip(self.labels, row, strict=True))
                for label, row in zip(self.labels, counts, strict=True)
            },
        }


def emotion_report(
    corpus: Corpus, predictions: Mapping[PairKey, Prediction], emotion_table: Mapping[str, str] = NO_TABLE
) -> EmotionReport:
    """Compare predicted emotions, mapped by a table of labels, with those of the corpus.

    Macro F1 is the mean over the labels that occur as gold or prediction; 0/0 counts as 0.
    Raises PredictionError if a target has two predicted emotions.
    """
    decided = {key: emotion_table.get(label, label) for key, label in decide_emotions(predictions).items()}
    found = [
        (utterance.emotion, decided[dialogue.id, utterance.turn])
        for dialogue in corpus.dialogues
        for utterance in dialogue.utterances
        if utterance.emotion is not None and (dialogue.id, utterance.turn) in decided
    ]
    # Over both sides, so that a label which is only predicted counts with F1 0 in the mean.
    gold_counts = {label: sum(gold == label for gold, _ in found) for pair in found for label in pair}
    labels = tuple(sorted(gold_counts, key=lambda label: (-gold_counts[label], label)))
    index = {label: position for position, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for gold, predicted in found:
        confusion[index[gold], index[predicted]] += 1
    right = confusion.diagonal()
    # Rows are gold, columns are predicted: the sums over them are what recall and precision divide by.
    scores = 100 * f1(right, confusion.sum(axis=1), confusion.sum(axis=0))
    accuracy = float(100 * right.sum() / len(found)) if found else 0.0
    macro_f1 = sum(scores.tolist()) / len(labels) if labels else 0.0
    return EmotionReport(
        labels, confusion, accuracy, macro_f1, dict(zip(labels, scores.tolist(), strict=True))
    )


UTTERANCE_KEYS = ("utterance_positive_f1", "utterance_negative_f1", "utterance_macro_f1")
STRICT_KEYS = ("exact_match", "positive_f1", "negative_f1", "macro_f1", *UTTERANCE_KEYS)
EMOTION_KEYS = ("emotion_accuracy", *(f"strict_{key}" for key in STRICT_KEYS))
"""The scores that a system without emotions does not have: absent in `Scores.values`, null in JSON."""
SPAN_KEYS = tuple(
    f"{prefix}{key}" for prefix in ("", "strict_") for key in STRICT_KEYS if key not in UTTERANCE_KEYS
)
"""The scores that compare spans: unknown for a corpus whose format has none."""
SCORE_KEYS = ("emotion_accuracy", *STRICT_KEYS, *(f"strict_{key}" for key in STRICT_KEYS))


@dataclass(frozen=True)
class Scores:
    """All scores (`values`, by SCORE_KEYS, in percent), what they were counted over, and those of the trivial rules.

    The scores of a system that predicts no emotion lack EMOTION_KEYS: they would be 0, which it did not earn.
    """

    values: dict[str, float]
    universe: ScoredUniverse
    protocol: Protocol
    num_positive: int
    num_negative: int
    missing: int
    num_utterances: int
    utterances_without_emotion: int
    baselines: dict[str, dict[str, float]]
    emotions: EmotionReport
    sums_by_dialogue: NDArray[np.float64] = field(repr=False)
    scored: ScoredRows = field(repr=False)
    rule_sums: Callable[[], NDArray[np.float64]] = field(repr=False)
    """The sums by dialogue of the rule j >= i-1 on the same rows. They take as long as a system's: ask once."""

    def __getitem__(self, key: str) -> float:
        return self.values[key]

    @property
    def known(self) -> dict[str, float]:
        """The values without those of spans if the corpus has causes whose span its format does not say."""
        has_spans = all(row.gold != "" for row in self.scored.rows)
        return {key: value for key, value in self.values.items() if has_spans or key not in SPAN_KEYS}

    @property
    def has_emotions(self) -> bool:
        """Whether any utterance of the corpus has a predicted emotion."""
        return self.utterances_without_emotion < self.num_utterances

    def as_dict(self) -> dict[str, Any]:
        """The unrounded values of `kdecs evaluate --json`; None for a score that the system does not have."""
        known = self.known
        return {
            **{key: known.get(key) for key in SCORE_KEYS},
            "universe": self.universe,
            "protocol": self.protocol,
            "num_positive": self.num_positive,
            "num_negative": self.num_negative,
            "missing": self.missing,
            "emotion_macro_f1": self.emotions.macro_f1 if self.has_emotions else None,
            "num_utterances": self.num_utterances,
            "utterances_without_emotion": self.utterances_without_emotion,
            "baselines": self.baselines,
        }


def evaluate(
    corpus: Corpus,
    predictions: Mapping[PairKey, Prediction],
    *,
    universe: ScoredUniverse = "fold1",
    protocol: Protocol = "reccon",
    emotion_table: Mapping[str, str] = NO_TABLE,
    released_order: Sequence[str] | None = None,
    candidates_after: int = 0,
) -> Scores:
    """Score predictions by pair against a labelled corpus, and the trivial rules with them.

    `emotion_table` (such as FINE_TO_COARSE) maps the emotions of both sides before they are compared; labels that it
    does not name stay. It changes no pair: a target is predicted neutral, and thus has no cause, if the system's own
    label says so. `released_order` (see `score_rows`) serves the protocol reccon-released alone. In the universe
    gold-emotions the gold emotions take the place of predicted ones, and there are no scores of emotions. Candidates up
    to `candidates_after` turns past their target are scored, too.
    Raises PredictionError if a target has two predicted emotions, or if that order lacks a dialogue.
    """
    neutral: frozenset[tuple[str, int]] = frozenset()
    if universe == "gold-emotions":
        gold = {(d.id, u.turn): u.emotion for d in corpus.dialogues for u in d.utterances}
        neutral = frozenset(key for key, emotion in gold.items() if emotion == NEUTRAL)
        predictions = {
            key: replace(p, emotion=NEUTRAL if key[:2] in neutral else None) for key, p in predictions.items()
        }
    # Only the gold side: predictions are mapped where they are compared, after neutral targets have lost their causes.
    corpus = map_corpus(corpus, emotion_table) if emotion_table else corpus
    rows = rows_of(corpus, universe, candidates_after)
    scored = score_rows(rows, predictions, protocol, emotion_table, released_order)
    if universe == "gold-emotions":
        scored = without_repeated_pairs(scored)
    sums = sums_by_dialogue(corpus, scored, predictions, emotion_table)
    total = sums.sum(axis=0)
    # Each pair once in that universe, otherwise a row per gold span.
    counted = list({row.key: row for row in rows}.values()) if universe == "gold-emotions" else rows
    num_utterances = sum(len(dialogue.utterances) for dialogue in corpus.dialogues)
    num_decided = int(total[COLUMN["emotions_decided"]])
    left_out = () if num_decided and universe != "gold-emotions" else EMOTION_KEYS

    return Scores(
        values={key: float(value) for key, value in metrics_of(total).items() if key not in left_out},
        universe=universe,
        protocol=protocol,
        num_positive=sum(row.gold is not None for row in counted),
        num_negative=sum(row.gold is None for row in rows),
        missing=scored.num_missing,
        num_utterances=num_utterances,
        utterances_without_emotion=num_utterances - (0 if universe == "gold-emotions" else num_decided),
        baselines=baseline_scores(corpus, counted, neutral),
        emotions=emotion_report(corpus, {} if universe == "gold-emotions" else predictions, emotion_table),
        sums_by_dialogue=sums,
        scored=scored,
        rule_sums=partial(_sums_of_rule, corpus, rows, universe, protocol, neutral, released_order),
    )


def _sums_of_rule(
    corpus: Corpus,
    rows: list[Row],
    universe: ScoredUniverse,
    protocol: Protocol,
    neutral: frozenset[tuple[str, int]],
    released_order: Sequence[str] | None,
) -> NDArray[np.float64]:
    rule = rule_predictions(rows, SELF_AND_PREVIOUS, neutral)
    scored = score_rows(rows, rule, protocol, NO_TABLE, released_order)
    return sums_by_dialogue(
        corpus, without_repeated_pairs(scored) if universe == "gold-emotions" else scored, rule
    )


def baseline_scores(
    corpus: Corpus, rows: Sequence[Row], neutral: frozenset[tuple[str, int]] = frozenset()
) -> dict[str, dict[str, float]]:
    """Utterance-level scores of each trivial rule on these rows, and the accuracy of the majority emotion.

    Targets given as `neutral` have no cause. The scores equal those of `evaluate` for `trivial_predictions`, but
    no span is compared, so that every evaluation can afford them.
    """
    is_positive = np.array([row.gold is not None for row in rows], dtype=bool)
    found = {}
    for name, rule in RULES.items():
        is_cause = np.array(
            [rule(row.target, row.candidate) and row.key[:2] not in neutral for row in rows], dtype=bool
        )
        right = np.array([(is_positive & is_cause).sum(), (~is_positive & ~is_cause).sum()])
        num_gold = np.array([is_positive.sum(), (~is_positive).sum()])
        scores = 100 * f1(right, num_gold, np.array([is_cause.sum(), (~is_cause).sum()]))
        values = (*scores.tolist(), float(scores.sum() / 2))
        found[name] = dict(zip(UTTERANCE_KEYS, values, strict=True))
    emotions = [u.emotion for d in corpus.dialogues for u in d.utterances if u.emotion is not None]
    majority = majority_emotion(corpus)
    share = sum(emotion == majority for emotion in emotions) / len(emotions) if emotions else 0.0
    found[MAJORITY_EMOTION] = {"emotion_accuracy": 100 * share, **found[ALL_NEGATIVE]}
    return found


def rule_scores(corpus: Corpus, candidates_after: int = 0) -> dict[str, dict[str, float]]:
    """Every score (fold1, protocol reccon, percent) of each trivial rule, whose span is its whole utterance.

    A rule about causes has no emotion accuracy, and the majority emotion has nothing else.
    """
    found = {}
    for name, predictions in trivial_predictions(corpus, "fold1").items():
        # A rule predicts no later cause, and a pair without a prediction is none.
        values = evaluate(corpus, predictions, candidates_after=candidates_after).values
        is_emotion = name == MAJORITY_EMOTION
        found[name] = {
            key: value for key, value in values.items() if (key == "emotion_accuracy") == is_emotion
        }
    return found


def metrics_of(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Every score (by SCORE_KEYS, in percent) of contributions summed to (…, K); each has the shape (…)."""

    def column(name: str) -> NDArray[np.float64]:
        return sums[..., COLUMN[name]]

    positives, negatives, right = column("positives"), column("negatives"), column("right_negatives")
    tp, fp = column("utterance_tp"), column("utterance_fp")
    fn, tn = column("utterance_fn"), column("utterance_tn")
    # Recall over the negative rows; precision over all rows that were predicted empty (Neg F1 of RECCON).
    negative_f1 = f1(right, negatives, right + column("empty_positives"))
    utterance_negative_f1 = f1(tn, tn + fp, tn + fn)
    scores = {"emotion_accuracy": ratio(column("emotions_right"), column("emotions_decided"))}
    for prefix, utterance_tp in (("", tp), ("strict_", column("strict_utterance_tp"))):
        # A mean over positive rows, not an F1 of decisions: Pos F1 is the mean token F1 of their spans.
        positive_f1 = ratio(column(f"{prefix}token_f1"), positives)
        # Strict scores lose right positives whose emotion is wrong; all denominators stay the same.
        utterance_positive_f1 = f1(utterance_tp, tp + fn, tp + fp)
        scores |= {
            f"{prefix}exact_match": ratio(column(f"{prefix}exact"), positives),
            f"{prefix}positive_f1": positive_f1,
            f"{prefix}negative_f1": negative_f1,
            f"{prefix}macro_f1": (positive_f1 + negative_f1) / 2,
            f"{prefix}utterance_positive_f1": utterance_positive_f1,
            f"{prefix}utterance_negative_f1": utterance_negative_f1,
            f"{prefix}utterance_macro_f1": (utterance_positive_f1 + utterance_negative_f1) / 2,
        }
    return {key: 100 * value for key, value in scores.items()}


# Farther causes are too few to be a group each.
FAR = 5
# Upper ends of the groups, in words.
LENGTH_BOUNDS = (5, 10, 20)

Breakdown = dict[str, dict[str, Any]]


def breakdowns(scores: Scores) -> dict[str, Breakdown]:
    """Scores over parts of the rows: {"distance", "emotion", "utterance_length"} → group → counts and row scores.

    distance is target minus candidate in turns; emotion is the target's gold emotion; utterance_length is the number
    of words of the candidate, in which the span is searched. A group's scores count its rows only, in percent.
    """
    return {
        "distance": _by(scores, _distance),
        "emotion": _by(scores, lambda row: str(row.gold_emotion)),
        "utterance_length": _by(scores, _length),
    }


def _by(scores: Scores, group_of: Callable[[Row], str]) -> Breakdown:
    groups = np.array([group_of(row) for row in scores.scored.rows], dtype=str)
    found: Breakdown = {}
    known = scores.known
    # By number first, so that "11-20 words" comes after "6-10 words".
    for group in sorted(set(groups.tolist()), key=lambda name: (_first_number(name), name)):
        sums = scores.scored.contributions[groups == group].sum(axis=0)
        values = metrics_of(sums)
        found[group] = {
            "num_positive": int(sums[COLUMN["positives"]]),
            "num_negative": int(sums[COLUMN["negatives"]]),
            **{key: float(values[key]) if key in known else None for key in STRICT_KEYS},
        }
    return found


def _distance(row: Row) -> str:
    distance = row.target - row.candidate
    return str(distance) if distance < FAR else f"{FAR}+"


def _length(row: Row) -> str:
    num_words = len(row.dialogue.utterances[row.candidate - 1].text.split())
    low = 1
    for bound in LENGTH_BOUNDS:
        if num_words <= bound:
            return f"{low}-{bound} words"
        low = bound + 1
    return f"{low}+ words"


def _first_number(name: str) -> int:
    digits = name.split("-")[0].split("+")[0]
    return int(digits) if digits.isdigit() else 0
