"""The protocol semeval: scores and submission files of SemEval-2024 Task 3 (emotion-cause pairs in conversations).

A submission is the task's corpus file (kdecs.corpus.formats.semeval) with places of spans instead of their texts:

    Subtask_1_pred.json   ["3_surprise", "1_4_9"]: tokens 4 to 8 of utterance 1, counted from 0 and split at white space
    Subtask_2_pred.json   ["3_surprise", "1"]

A gold span loses white space and ASCII punctuation at both ends, then stands at the first run of tokens that equals
its own, or at (0, 0) if there is none. What is given twice counts once, on both sides, and neutral pairs count nowhere.

Every score is a function of sums by dialogue and emotion, so that intervals and comparisons only choose what to sum.
With ε = 1e-8, P = right / (predicted + ε), R = right / (gold + ε), F = 2PR / (P + R + ε); right, predicted and gold are

    strict         places that equal a gold place, predicted places, gold places
    proportional   tokens in common with the matched gold place, tokens of predicted places, tokens of the matched gold
                   places (once for each match) and of those that nothing matched. A predicted place is matched with
                   the gold place of its pair and emotion of which it holds the largest share; of equals the one with
                   more tokens in common, then the first
    pairs          as strict, over pairs without their places

Micro scores come from the sums over the emotions; weighted ones are means over the emotions, weighted by gold counts.

Shapes: D dialogues, E emotions (in the order of EMOTIONS), C = len(_COLUMNS). All float64.
"""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdecs.corpus.checking import NotJson, decode_json, shorten
from kdecs.corpus.formats.semeval import EMOTIONS, LABELS, PAIRS_KEY, conversation_id
from kdecs.corpus.schema import NEUTRAL, Corpus, Dialogue
from kdecs.errors import PredictionError
from kdecs.evaluation.predictions import PairKey, Prediction, read_predictions

SPAN_KEYS = tuple(
    f"{mean}{match}_{figure}"
    for match in ("strict", "proportional")
    for mean in ("weighted_", "")
    for figure in ("precision", "recall", "f1")
)
PAIR_KEYS = (
    *("precision_pair", "recall_pair", "f1_pair"),
    *("weighted_precision", "weighted_recall", "weighted_f1"),
)
KEYS = (*SPAN_KEYS, *PAIR_KEYS)
"""The scores of both subtasks; a side without spans has those of PAIR_KEYS alone."""

_COLUMNS = (
    *("strict_right", "strict_predicted", "strict_gold"),
    *("tokens_right", "tokens_predicted", "tokens_gold"),
    *("pairs_right", "pairs_predicted", "pairs_gold"),
)
_EPSILON = 1e-8
_MAX_DIGITS = 9
_SIDE = 'expected a pair such as ["3_surprise", "1_4_9"], or ["3_surprise", "1"] for Subtask 2'


class Place(NamedTuple):
    """A cause: target, candidate, the tokens [start, end) of its span, and the task's label of the target."""

    target: int
    candidate: int
    start: int
    end: int
    emotion: str


@dataclass(frozen=True)
class Submission:
    """A system's places by dialogue id, each once, in their order; places without spans are (0, 0)."""

    places: Mapping[str, Sequence[Place]]
    has_spans: bool
    num_neutral: int = 0
    """Predicted causes of targets that are predicted neutral: the task does not score them."""
    num_other: int = 0
    """Conversations of the file that the corpus does not have."""


@dataclass(frozen=True)
class SemevalScores:
    """The scores of a submission, as shares of 1 (KEYS; None for spans if a side has none), and of the rules."""

    values: dict[str, float | None]
    num_gold: int
    num_predicted: int
    submission: Submission
    baselines: dict[str, dict[str, float]]
    by_emotion: dict[str, dict[str, float]]
    sums_by_dialogue: NDArray[np.float64] = field(repr=False)
    rule_sums: NDArray[np.float64] = field(repr=False)
    """The sums of the rule NEAR_RULE."""

    @property
    def known(self) -> dict[str, float]:
        """The scores that both sides allow."""
        return {key: value for key, value in self.values.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """The unrounded values of `kdecs evaluate --protocol semeval --json`."""
        return {
            **self.values,
            "protocol": "semeval",
            "num_gold": self.num_gold,
            "num_predicted": self.num_predicted,
            "num_neutral": self.submission.num_neutral,
            "num_other_conversations": self.submission.num_other,
            "baselines": self.baselines,
        }


def clean_span(text: str) -> str:
    """A span without white space and ASCII punctuation at both ends."""
    while (shorter := text.strip().strip(string.punctuation)) != text:
        text = shorter
    return text


def place_of(span: str, utterance: str) -> tuple[int, int]:
    """Tokens [start, end) of the first run that equals the cleaned span's tokens; (0, 0) if there is none."""
    wanted, tokens = clean_span(span).split(), utterance.split()
    for start in range(len(tokens) - len(wanted) + 1):
        if tokens[start : start + len(wanted)] == wanted:
            return start, start + len(wanted)
    return 0, 0


def gold_places(corpus: Corpus) -> Submission:
    """The causes of a corpus. Labels become the task's (LABELS)."""
    places: dict[str, Sequence[Place]] = {}
    has_spans = True
    for dialogue in corpus.dialogues:
        found = []
        for target in dialogue.utterances:
            label = LABELS.get(target.emotion or NEUTRAL, NEUTRAL)
            for cause in target.evidence or () if label != NEUTRAL else ():
                if cause.turn is None:
                    continue
                has_spans = has_spans and cause.span != ""
                start, end = place_of(cause.span or "", dialogue.utterances[cause.turn - 1].text)
                found.append(Place(target.turn, cause.turn, start, end, label))
        places[dialogue.id] = list(dict.fromkeys(found))
    return Submission(places, has_spans)


def read_submission(path: Path, corpus: Corpus, emotion_table: Mapping[str, str]) -> Submission:
    """A submission file of either subtask, or kdecs' prediction lines. Raises PredictionError, one line."""
    if is_submission(path):
        return _parsed(path, corpus)
    predictions = read_predictions(path, corpus, emotion_table)
    labels = {label: emotion_table.get(label, label) for p in predictions.values() if (label := p.emotion)}
    return places_of(corpus.dialogues, predictions, labels)


def is_submission(path: Path) -> bool:
    """Whether a file is a list of JSON objects, and not JSON lines."""
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").split()
    except OSError:  # whoever reads it says so
        return False
    return b"".join(head[:2])[:2] in (b"[{", b"[]")


def places_of(
    dialogues: Sequence[Dialogue],
    predictions: Mapping[PairKey, Prediction],
    labels: Mapping[str, str] | None = None,
) -> Submission:
    """The predicted causes as places, by dialogue. `labels` maps predicted emotions before they become the task's.

    A cause without a span is its whole utterance. Raises PredictionError for a cause whose target has no emotion.
    """
    by_dialogue: dict[str, list[Prediction]] = {dialogue.id: [] for dialogue in dialogues}
    texts = {(d.id, u.turn): u.text for d in dialogues for u in d.utterances}
    num_neutral = 0
    places: dict[str, Sequence[Place]] = {}
    for prediction in predictions.values():
        by_dialogue[prediction.dialogue_id].append(prediction)
    for identifier, found in by_dialogue.items():
        kept: list[Place] = []
        for p in found:
            if not p.is_cause:
                continue
            if p.emotion is None:
                raise PredictionError(
                    f"pair {p.dialogue_id}/{p.target}/{p.candidate}: found a cause without an emotion of its target, "
                    "expected one: the protocol semeval scores emotions with their causes"
                )
            label = LABELS.get((labels or {}).get(p.emotion, p.emotion), NEUTRAL)
            if label == NEUTRAL:
                num_neutral += 1
                continue
            start, end = _predicted_place(p.span, texts[p.dialogue_id, p.candidate])
            kept.append(Place(p.target, p.candidate, start, end, label))
        places[identifier] = list(dict.fromkeys(kept))
    return Submission(places, True, num_neutral)


def _predicted_place(span: str, utterance: str) -> tuple[int, int]:
    """As `place_of`, but a span with an edge inside a token has the tokens that it touches; "" is the utterance."""
    span = span.strip() or utterance.strip()
    place, at = place_of(span, utterance), utterance.find(span)
    if place != (0, 0) or at < 0:
        return place
    tokens = [match.span() for match in re.finditer(r"\S+", utterance)]
    touched = [n for n, (start, end) in enumerate(tokens) if start < at + len(span) and end > at]
    return touched[0], touched[-1] + 1


def _parsed(path: Path, corpus: Corpus) -> Submission:
    """The places of a submission file. Raises PredictionError at the first fault."""
    try:
        decoded = decode_json(path.read_bytes())
    except OSError as error:
        raise PredictionError(f"{path}: {error.strerror or error}, expected a submission file") from None
    except NotJson as error:
        raise PredictionError(f"{path}: found {error.found}, expected {error.expected}") from None
    wanted = {dialogue.id for dialogue in corpus.dialogues}
    places: dict[str, Sequence[Place]] = {}
    spans: set[bool] = set()
    num_other = 0
    for number, conversation in enumerate(decoded.value, start=1):
        where = f"{path}, conversation {number} of the list"
        if not isinstance(conversation, dict):
            raise PredictionError(f"{where}: found {shorten(conversation)}, expected an object")
        identifier = conversation.get("conversation_ID")
        if type(identifier) is not int and not isinstance(identifier, str):
            found = shorten(identifier) if "conversation_ID" in conversation else "no such key"
            raise PredictionError(f"{where}, field conversation_ID: found {found}, expected an integer")
        name = str(identifier)
        where = f"{path}, conversation {shorten(name)[1:-1]}"
        if name in places:
            raise PredictionError(f"{where}: found it a second time, expected each conversation once")
        if name not in wanted:
            num_other += 1  # the task's own test data have some that nobody scores
            continue
        pairs = conversation.get(PAIRS_KEY)
        if not isinstance(pairs, list):
            found = shorten(pairs) if PAIRS_KEY in conversation else "no such key"
            raise PredictionError(f"{where}, field {PAIRS_KEY}: found {found}, expected a list of pairs")
        parsed = [_pair(pair, f"{where}, field {PAIRS_KEY}") for pair in pairs]
        spans |= {has_span for _, has_span in parsed}
        if len(spans) > 1:
            raise PredictionError(f"{where}, field {PAIRS_KEY}: found pairs with and without spans, {_SIDE}")
        places[name] = list(dict.fromkeys(place for place, _ in parsed))
    if missing := [dialogue.id for dialogue in corpus.dialogues if dialogue.id not in places]:
        raise PredictionError(
            f"{path}: found no conversation {missing[0]} ({len(missing)} are missing), expected all "
            f"{len(wanted)} of {corpus.path}; a conversation without causes has an empty list of pairs"
        )
    num_neutral = sum(place.emotion == NEUTRAL for found in places.values() for place in found)
    scored = {name: [p for p in found if p.emotion != NEUTRAL] for name, found in places.items()}
    # Without any pair both subtasks look the same.
    return Submission(scored, spans != {False}, num_neutral, num_other)


def _pair(pair: Any, where: str) -> tuple[Place, bool]:
    """The place of a pair, and whether it has a span; a span that is not in its utterance is scored as it stands."""
    sides = pair if isinstance(pair, list) and len(pair) == 2 else []
    if not sides or not all(isinstance(side, str) for side in sides):
        raise PredictionError(f"{where}: found {shorten(pair)}, {_SIDE}")
    left, right = sides[0].split("_"), sides[1].split("_")
    numbers = [_number(text) for text in (left[0], *right)]
    if len(left) != 2 or len(right) not in (1, 3) or None in numbers:
        raise PredictionError(
            f"{where}: found {shorten(sides)} with {shorten(sides[0])} and {shorten(sides[1])}, {_SIDE}"
        )
    if left[1] not in (*EMOTIONS, NEUTRAL):
        known = ", ".join((*EMOTIONS, NEUTRAL))
        raise PredictionError(f"{where}: found the emotion {shorten(left[1])}, expected one of {known}")
    target, candidate, *span = (number or 0 for number in numbers)
    start, end = span or (0, 0)
    return Place(target, candidate, start, end, left[1]), bool(span)


def _number(text: str) -> int | None:
    digits = text.strip()
    is_number = digits.removeprefix("-").isdecimal() and digits.isascii() and len(digits) <= _MAX_DIGITS
    return int(digits) if is_number else None


def score_submission(corpus: Corpus, submission: Submission) -> SemevalScores:
    """Score a submission against the causes of a corpus, next to rules that know the gold emotions."""
    gold = gold_places(corpus)
    has_spans = gold.has_spans and submission.has_spans
    sums = _sums_by_dialogue(corpus, submission, gold)
    total = sums.sum(axis=0)
    scores = metrics_of(total)
    of_rules = _sums_of_rules(corpus, gold)
    counted = "strict" if has_spans else "pairs"
    table = total.reshape(len(EMOTIONS), len(_COLUMNS))
    num_gold, num_predicted = (
        table[:, _COLUMNS.index(f"{counted}_{side}")] for side in ("gold", "predicted")
    )
    return SemevalScores(
        values={key: float(scores[key]) if has_spans or key in PAIR_KEYS else None for key in KEYS},
        num_gold=int(num_gold.sum()),
        num_predicted=int(num_predicted.sum()),
        submission=submission,
        baselines={
            name: {
                key: float(value)
                for key, value in metrics_of(found.sum(axis=0)).items()
                if gold.has_spans or key in PAIR_KEYS
            }
            for name, found in of_rules.items()
        },
        by_emotion={
            emotion: {"num_gold": int(num_gold[n]), "num_predicted": int(num_predicted[n])}
            | _of_emotion(table, n, has_spans)
            for n, emotion in enumerate(EMOTIONS)
        },
        sums_by_dialogue=sums,
        rule_sums=of_rules[NEAR_RULE],
    )


def _of_emotion(table: NDArray[np.float64], number: int, has_spans: bool) -> dict[str, float]:
    """The micro scores of one emotion alone."""
    alone = np.zeros_like(table)
    alone[number] = table[number]
    keys = [key for key in KEYS if not key.startswith("weighted_") and (has_spans or key in PAIR_KEYS)]
    scores = metrics_of(alone.ravel())
    return {key: float(scores[key]) for key in keys}


# Whole utterances, as a system without spans has them. Emotions are the bottleneck of the task, so rules that are given
# them say how much of a system's score its causes can be.
NEAR_RULE = "j >= i-1, gold emotions"
RULES = {
    "j = i, gold emotions": lambda target, candidate: candidate == target,
    NEAR_RULE: lambda target, candidate: target - 1 <= candidate <= target,
}


def _sums_of_rules(corpus: Corpus, gold: Submission) -> dict[str, NDArray[np.float64]]:
    """The sums by dialogue of each rule."""
    found = {}
    for name, rule in RULES.items():
        places: dict[str, Sequence[Place]] = {}
        for dialogue in corpus.dialogues:
            wholes = [_predicted_place("", u.text) for u in dialogue.utterances]
            places[dialogue.id] = [
                Place(target.turn, j, *wholes[j - 1], label)
                for target in dialogue.utterances
                if (label := LABELS.get(target.emotion or NEUTRAL, NEUTRAL)) != NEUTRAL
                for j in range(1, target.turn + 1)
                if rule(target.turn, j)
            ]
        found[name] = _sums_by_dialogue(corpus, Submission(places, True), gold)
    return found


def metrics_of(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Every score (by KEYS, shares of 1) of contributions summed to (…, E * C); each has the shape (…)."""
    table = sums.reshape(*sums.shape[:-1], len(EMOTIONS), len(_COLUMNS))
    column = {name: table[..., n] for n, name in enumerate(_COLUMNS)}
    found: dict[str, NDArray[np.float64]] = {}
    for name, counts, weights in (
        ("strict", "strict", "strict_gold"),
        ("proportional", "tokens", "strict_gold"),
        ("pair", "pairs", "pairs_gold"),
    ):
        right, predicted, gold = (column[f"{counts}_{side}"] for side in ("right", "predicted", "gold"))
        micro = _precision_recall_f1(*(figure.sum(axis=-1) for figure in (right, predicted, gold)))
        of_emotions = _precision_recall_f1(right, predicted, gold)
        weight = column[weights]
        # Without gold pairs there is nothing to weigh by, and every score is 0.
        weight = weight / np.maximum(weight.sum(axis=-1, keepdims=True), 1)
        for figure, one, each in zip(("precision", "recall", "f1"), micro, of_emotions, strict=True):
            weighted = (each * weight).sum(axis=-1)
            if name == "pair":
                found |= {f"{figure}_pair": one, f"weighted_{figure}": weighted}
            else:
                found |= {f"{name}_{figure}": one, f"weighted_{name}_{figure}": weighted}
    return {key: found[key] for key in KEYS}


def _precision_recall_f1(
    right: NDArray[np.float64], predicted: NDArray[np.float64], gold: NDArray[np.float64]
) -> tuple[NDArray[np.float64], ...]:
    precision, recall = right / (predicted + _EPSILON), right / (gold + _EPSILON)
    return precision, recall, 2 * precision * recall / (precision + recall + _EPSILON)


def _sums_by_dialogue(corpus: Corpus, submission: Submission, gold: Submission) -> NDArray[np.float64]:
    """The contributions of each dialogue: (D, E * C)."""
    sums = np.zeros((len(corpus.dialogues), len(EMOTIONS), len(_COLUMNS)))
    for number, dialogue in enumerate(corpus.dialogues):
        _add_dialogue(sums[number], submission.places.get(dialogue.id, ()), gold.places[dialogue.id])
    return sums.reshape(len(sums), len(EMOTIONS) * len(_COLUMNS))


def _add_dialogue(sums: NDArray[np.float64], predicted: Sequence[Place], gold: Sequence[Place]) -> None:
    index = {emotion: n for n, emotion in enumerate(EMOTIONS)}
    column = {name: n for n, name in enumerate(_COLUMNS)}

    def add(name: str, place: Place, amount: int = 1) -> None:
        sums[index[place.emotion], column[name]] += amount

    gold_set = set(gold)
    for places, side in ((predicted, "predicted"), (gold, "gold")):
        for place in places:
            add(f"strict_{side}", place)
        for place in {place._replace(start=0, end=0) for place in places}:
            add(f"pairs_{side}", place)
    pairs = {place._replace(start=0, end=0) for place in gold}
    for place in {place._replace(start=0, end=0) for place in predicted} & pairs:
        add("pairs_right", place)
    matched: set[Place] = set()
    for place in predicted:
        if place in gold_set:
            add("strict_right", place)
        add("tokens_predicted", place, place.end - place.start)
        best = _best_match(place, gold)
        if best is not None:
            matched.add(best)
            add("tokens_right", place, _num_common(place, best))
            add("tokens_gold", place, best.end - best.start)
    for place in gold:
        if place not in matched:
            add("tokens_gold", place, place.end - place.start)


def _num_common(a: Place, b: Place) -> int:
    return min(a.end, b.end) - max(a.start, b.start)


def _best_match(place: Place, gold: Sequence[Place]) -> Place | None:
    """The gold place of the same pair and emotion of which a predicted one holds the largest share, or None."""
    key = (place.target, place.candidate, place.emotion)
    overlapping = [
        other
        for other in gold
        if (other.target, other.candidate, other.emotion) == key and _num_common(place, other) > 0
    ]
    # `max` keeps the first of equals, as the task's scorer does.
    return max(
        overlapping,
        key=lambda other: (_num_common(place, other) / (other.end - other.start), _num_common(place, other)),
        default=None,
    )


Subtask = Literal[1, 2]
SUBMISSION_NAMES: Mapping[Subtask, str] = {1: "Subtask_1_pred.json", 2: "Subtask_2_pred.json"}
"""The names that the task's scorer expects."""


def conversation_of(
    dialogue: Dialogue, predictions: Iterable[Prediction], subtask: Subtask
) -> dict[str, Any]:
    """A dialogue as a submission has it, with the predicted emotions and causes.

    Raises PredictionError for a cause whose target has no emotion.
    """
    by_pair = {prediction.key: prediction for prediction in predictions}
    places = places_of([dialogue], by_pair).places[dialogue.id]
    emotions = {p.target: LABELS.get(p.emotion, NEUTRAL) for p in by_pair.values() if p.emotion is not None}
    said = [
        {"utterance_ID": u.turn, "text": u.text, "speaker": u.speaker}
        | ({"emotion": emotions[u.turn]} if u.turn in emotions else {})
        for u in dialogue.utterances
    ]
    pairs = [
        (f"{p.target}_{p.emotion}", f"{p.candidate}_{p.start}_{p.end}" if subtask == 1 else str(p.candidate))
        for p in places
    ]
    return {
        "conversation_ID": conversation_id(dialogue),
        "conversation": said,
        PAIRS_KEY: [list(pair) for pair in dict.fromkeys(pairs)],
    }
