"""The rows of a corpus, and what each row contributes to the scores.

RECCON scores rows: one per gold span of a pair, and one per pair that is no cause. Every score is a function of sums
over rows (for emotion accuracy, over utterances), so that breakdowns and resampling only choose what to sum.

Shapes: R rows, D dialogues, K = len(COLUMNS) contributions. All float64.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdecs.corpus.pairs import Universe, causes_of, pairs_of
from kdecs.corpus.schema import NEUTRAL, NO_TABLE, Corpus, Dialogue
from kdecs.errors import PredictionError
from kdecs.evaluation.predictions import PairKey, Prediction
from kdecs.evaluation.released import NEGATIVE_GOLD, last_similar_is_empty

Match = Literal["correct", "similar", "incorrect"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def match(gold: str, predicted: str) -> Match:
    """ "correct" if equal after stripping, "similar" if one contains the other, else "incorrect".

    The empty string is contained in every string, so a positive row without a predicted span is "similar".
    """
    gold, predicted = gold.strip(), predicted.strip()
    if gold == predicted:
        return "correct"
    if predicted in gold or gold in predicted:
        return "similar"
    return "incorrect"


def squad_tokens(text: str) -> list[str]:
    """Lower-case, without ASCII punctuation and the articles a, an, the, split at white space."""
    # In the order of SQuAD's script: "a." is an article only once its full stop is gone.
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def squad_f1(gold: str, predicted: str) -> float:
    """F1 of the two bags of tokens, 0 to 1; both empty 1, one empty 0 (SQuAD 2.0, Rajpurkar et al. 2018)."""
    gold_tokens, predicted_tokens = squad_tokens(gold), squad_tokens(predicted)
    if not gold_tokens or not predicted_tokens:
        return float(gold_tokens == predicted_tokens)
    common = sum((Counter(gold_tokens) & Counter(predicted_tokens)).values())
    return 2 * common / (len(gold_tokens) + len(predicted_tokens))


Protocol = Literal["reccon", "reccon-released", "squad"]
ScoredUniverse = Literal["fold1", "all", "gold-emotions"]
"""Which pairs are scored. gold-emotions: those of "all" with the gold emotions given, so that no pair of a neutral
target is predicted as a cause. As in the published figures of this universe, utterance-level scores count each pair
once there, and not once per gold span."""

COLUMNS = (
    "positives",
    "negatives",
    "exact",  # positive rows whose prediction is the gold span
    "token_f1",  # sum of F over positive rows
    "right_negatives",  # negative rows predicted "" (reccon-released: or a part of its text for no answer)
    "empty_positives",  # positive rows that count as predicted "" in the precision of Neg F1
    "utterance_tp",
    "utterance_fp",
    "utterance_fn",
    "utterance_tn",
    "strict_exact",
    "strict_token_f1",
    "strict_utterance_tp",
    "emotions_right",
    "emotions_decided",
)
COLUMN = {name: position for position, name in enumerate(COLUMNS)}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a pair with one gold span, or with None for a negative row."""

    dialogue_index: int
    dialogue: Dialogue
    target: int
    candidate: int
    gold: str | None

    @property
    def key(self) -> PairKey:
        """(dialogue id, target, candidate) of the row's pair."""
        return self.dialogue.id, self.target, self.candidate

    @property
    def gold_emotion(self) -> str | None:
        """The target's emotion in the corpus."""
        return self.dialogue.utterances[self.target - 1].emotion


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows in corpus order with their contributions (R, K), and the number of pairs without a prediction."""

    rows: list[Row]
    contributions: NDArray[np.float64]
    num_missing: int
    num_neutral: int  # pairs predicted as causes whose target is predicted neutral: they count as negative
    is_order_guessed: bool = (
        False  # reccon-released: Neg F1 depends on an order of dialogues that is not known
    )


def rows_of(corpus: Corpus, universe: ScoredUniverse, candidates_after: int = 0) -> list[Row]:
    """Rows in corpus order: by dialogue and target, then positives in evidence order, negatives by candidate."""
    pairs: Universe = "all" if universe == "gold-emotions" else universe
    rows: list[Row] = []
    for index, dialogue in enumerate(corpus.dialogues):
        for target, group in groupby(
            pairs_of(dialogue, pairs, candidates_after), key=lambda pair: pair.target
        ):
            # RECCON's order, on which the protocol reccon-released depends.
            causes = causes_of(dialogue.utterances[target - 1], candidates_after)
            rows += [Row(index, dialogue, target, turn, span) for _, turn, span in causes]
            rows += [Row(index, dialogue, target, p.candidate, None) for p in group if not p.is_cause]
    return rows


def without_repeated_pairs(scored: ScoredRows) -> ScoredRows:
    """The same rows, of which only the first of each pair counts at utterance level, as ECPE counts pairs."""
    contributions = scored.contributions.copy()
    seen: set[PairKey] = set()
    columns = [n for name, n in COLUMN.items() if "utterance" in name]
    for number, row in enumerate(scored.rows):
        if row.key in seen:
            contributions[number, columns] = 0
        seen.add(row.key)
    return replace(scored, contributions=contributions)


def decide_emotions(predictions: Mapping[PairKey, Prediction]) -> dict[tuple[str, int], str]:
    """The predicted emotion of each (dialogue id, target) that has one. Raises PredictionError if one has two."""
    emotions: dict[tuple[str, int], str] = {}
    for prediction in predictions.values():
        if prediction.emotion is None:
            continue
        first = emotions.setdefault((prediction.dialogue_id, prediction.target), prediction.emotion)
        if first != prediction.emotion:
            raise PredictionError(
                f"target {prediction.dialogue_id}/{prediction.target}: found two predicted emotions, {first!r} and "
                f"{prediction.emotion!r}, expected one"
            )
    return emotions


def score_rows(
    rows: list[Row],
    predictions: Mapping[PairKey, Prediction],
    protocol: Protocol,
    emotion_table: Mapping[str, str] = NO_TABLE,
    released_order: Sequence[str] | None = None,
) -> ScoredRows:
    """Compare every row with its prediction; a pair without one is predicted "no cause".

    Predicted emotions are mapped by `emotion_table` before they are compared with the rows', which are mapped already.
    A target is predicted neutral, and thus has no cause, if the system's own label says so. `released_order` holds the
    dialogue ids in the order of RECCON's rows (protocol reccon-released); None stands for what is known of it.
    Raises PredictionError if it lacks a dialogue with a positive row.
    """
    emotions = decide_emotions(predictions)
    # Lists while they are filled, since single assignments to an array cost ten times as much.
    contributions = [[0.0] * len(COLUMNS) for _ in rows]
    # Sets of pairs, since a pair with two gold spans has two rows.
    missing: set[PairKey] = set()
    neutral: set[PairKey] = set()
    incorrect: list[int] = []
    last_similar: dict[str, bool] = {}  # by dialogue: whether its last similar row is predicted ""
    is_released = protocol == "reccon-released"
    if is_released and released_order is not None:
        _check_released_order(rows, released_order)
    for number, row in enumerate(rows):
        prediction = predictions.get(row.key)
        emotion = emotions.get((row.dialogue.id, row.target))
        if prediction is None:
            missing.add(row.key)
        is_cause = prediction is not None and prediction.is_cause
        # RECCON annotates no cause of a neutral utterance.
        if is_cause and emotion == NEUTRAL:
            neutral.add(row.key)
            is_cause = False
        span = prediction.span.strip() if prediction is not None and is_cause else ""
        if row.gold is None:
            # That script compares texts here as well, and counts a text that equals its own as neither.
            outcome = match(NEGATIVE_GOLD, span) if is_released else "incorrect" if span else "similar"
            _add_negative(contributions[number], is_cause, outcome)
            continue
        outcome = match(row.gold, span)
        # A missing span is contained in every gold span, so such rows are "similar", too.
        if outcome == "similar":
            last_similar[row.dialogue.id] = span == ""
        elif outcome == "incorrect":
            incorrect.append(number)
        emotion_is_right = emotion is not None and emotion_table.get(emotion, emotion) == row.gold_emotion
        _add_positive(
            contributions[number],
            is_cause,
            span,
            outcome == "correct",
            token_f1(row.gold, span, protocol),
            emotion_is_right,
        )
    # The released script reads a variable of its previous loop here, so the last "similar" row decides for them all.
    is_order_guessed = False
    if is_released and incorrect:
        is_empty, is_order_guessed = last_similar_is_empty(last_similar, released_order)
        for number in incorrect if is_empty else ():
            contributions[number][COLUMN["empty_positives"]] = 1
    table = np.array(contributions, dtype=np.float64).reshape(len(rows), len(COLUMNS))
    return ScoredRows(rows, table, len(missing), len(neutral), is_order_guessed)


def _check_released_order(rows: Sequence[Row], order: Sequence[str]) -> None:
    known = set(order)
    for row in rows:
        if row.gold is not None and row.dialogue.id not in known:
            raise PredictionError(
                f"dialogue {row.dialogue.id}: the released rows have none of its rows, expected the row file of the "
                "split that is scored"
            )


def sums_by_dialogue(
    corpus: Corpus,
    scored: ScoredRows,
    predictions: Mapping[PairKey, Prediction],
    emotion_table: Mapping[str, str] = NO_TABLE,
) -> NDArray[np.float64]:
    """The contributions of rows and emotion decisions of utterances, summed by dialogue: (D, K)."""
    sums = np.zeros((len(corpus.dialogues), len(COLUMNS)))
    # Not `sums[index] += …`, which would add only one row per dialogue.
    np.add.at(sums, [row.dialogue_index for row in scored.rows], scored.contributions)
    emotions = decide_emotions(predictions)
    right, decided = COLUMN["emotions_right"], COLUMN["emotions_decided"]
    for index, dialogue in enumerate(corpus.dialogues):
        for utterance in dialogue.utterances:
            emotion = emotions.get((dialogue.id, utterance.turn))
            if emotion is not None and utterance.emotion is not None:
                sums[index, decided] += 1
                sums[index, right] += emotion_table.get(emotion, emotion) == utterance.emotion
    return sums


def token_f1(gold: str, span: str, protocol: Protocol = "reccon") -> float:
    """F of a positive row, 0 to 1; `span` is stripped, and empty if no cause is predicted."""
    if protocol == "squad":
        return squad_f1(gold, span)
    outcome = match(gold, span)
    if outcome == "correct":
        return 1.0
    return squad_f1(gold, span) if outcome == "similar" and span else 0.0


def _add_negative(row: list[float], is_cause: bool, outcome: Match) -> None:
    row[COLUMN["negatives"]] = outcome != "correct"
    row[COLUMN["right_negatives"]] = outcome == "similar"
    row[COLUMN["utterance_fp" if is_cause else "utterance_tn"]] = 1


def _add_positive(
    row: list[float],
    is_cause: bool,
    span: str,
    is_exact: bool,
    token_f1: float,
    emotion_is_right: bool,
) -> None:
    row[COLUMN["positives"]] = 1
    row[COLUMN["exact"]] = is_exact
    row[COLUMN["token_f1"]] = token_f1
    # A positive row predicted empty lowers the precision of the negatives.
    row[COLUMN["empty_positives"]] = span == ""
    row[COLUMN["utterance_tp" if is_cause else "utterance_fn"]] = 1
    if emotion_is_right:
        row[COLUMN["strict_exact"]] = is_exact
        row[COLUMN["strict_token_f1"]] = token_f1
        row[COLUMN["strict_utterance_tp"]] = is_cause
