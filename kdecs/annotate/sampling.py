"""Which dialogues are worth a person's time, the most instructive first, and who should look at each.

Every turn gets a number from 0 to 1 for each reason asked for; a dialogue's score is the mean over its turns of the
mean over the reasons. `kdecs annotate sample` takes reasons, `kdecs annotate next` a strategy, which stands for some of
them. A list is JSON lines:

    {"rank": 1, "dialogue_id": "tr_1", "score": 0.41, "annotators": ["ann", "ben"],
     "turns": [{"turn": 3, "score": 0.8, "reasons": {"disagreement": 1.0, "rare": 0.6}}]}
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from kdecs.annotate.agreement import decided_causes
from kdecs.annotate.labels import Annotation, TurnKey, TurnLabel
from kdecs.annotate.project import Project
from kdecs.corpus.checking import NotJson, decode_json, iter_lines, shorten
from kdecs.corpus.pairs import random_order
from kdecs.corpus.schema import NEUTRAL, Corpus, Dialogue
from kdecs.endpoint.answers import Cause
from kdecs.errors import PredictionError
from kdecs.evaluation.predictions import read_predictions

Reason = Literal["disagreement", "causes", "open", "rare", "rule", "confidence"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""disagreement: the share of annotators and prediction files that do not have the turn's most frequent emotion.
causes: 1 minus the mean F1 of their cause turns, two by two.
open: 1 if somebody's emotion or causes are open, or if nobody has labelled the turn.
rare: 1 minus the frequency of the turn's label, against that of the most frequent label of the project.
rule: the share of those that differ from the rule that the turn itself and the turn before it are the causes.
confidence: how close a prediction's score is to one half (`kdecs predict --offsets` writes scores).
"""

Strategy = Literal["random", "disagreement", "uncertainty"]
STRATEGIES: dict[Strategy, tuple[Reason, ...]] = {
    "random": (),
    "disagreement": ("disagreement", "causes", "rule"),
    "uncertainty": ("confidence",),
}
"""The reasons by which a strategy chooses the dialogues to label next. Between equal ones chance decides."""


@dataclass(frozen=True)
class Scored:
    """A dialogue with its score and the reasons of its turns."""

    dialogue: Dialogue
    score: float
    turns: list[tuple[int, float, dict[Reason, float]]]


def annotation_of_predictions(
    path: Path, dialogues: Mapping[str, Dialogue], labels: Sequence[str]
) -> tuple[Annotation, dict[TurnKey, float]]:
    """A system's predictions as an annotator's labels, and how unsure it is of each turn's causes, in [0, 1]."""
    corpus = Corpus(path, tuple(dialogues.values()), Counter(), ())
    found: dict[TurnKey, tuple[str | None, list[Cause]]] = {}
    predictions = read_predictions(path, corpus, dict.fromkeys(labels, NEUTRAL))
    for prediction in predictions.values():
        _, causes = found.setdefault((prediction.dialogue_id, prediction.target), (prediction.emotion, []))
        if prediction.is_cause and prediction.emotion != NEUTRAL:
            causes.append(Cause(prediction.candidate, prediction.span))
    unsure: dict[TurnKey, float] = {}
    for number, line in iter_lines(path):
        value = decode_json(line).value
        if "score" not in value:
            continue
        score = value["score"]
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            raise PredictionError(f"{path}, line {number}: score, expected a number from 0 to 1")
        key = value["dialogue_id"], value["target"]
        unsure[key] = max(unsure.get(key, 0.0), 1 - abs(2 * score - 1))
    turns = {key: TurnLabel(emotion, tuple(causes)) for key, (emotion, causes) in found.items()}
    return Annotation(path.stem, "model", turns), unsure


def ranked(
    annotations: Sequence[Annotation],
    dialogues: Mapping[str, Dialogue],
    reasons: Sequence[Reason],
    unsure: Mapping[TurnKey, float],
) -> list[Scored]:
    """The dialogues by falling score; equal ones stay in the project's order."""
    counts = Counter(label for each in annotations for label in each.emotions().values())
    most = max(counts.values(), default=1)
    scored = []
    for dialogue in dialogues.values():
        turns = []
        for utterance in dialogue.utterances:
            key = dialogue.id, utterance.turn
            labels = [each.labels[key] for each in annotations if key in each.labels]
            emotions = Counter(label.emotion for label in labels if label.emotion is not None)
            # A system that predicts causes alone cannot say that a turn is neutral, and so has none to name.
            is_neutral = set(emotions) == {NEUTRAL}
            named = [
                causes
                for label in labels
                if not (is_neutral and label.emotion is None) and (causes := _cause_turns(label)) is not None
            ]
            top, num_top = emotions.most_common(1)[0] if emotions else (None, 0)
            rule = {turn for turn in (utterance.turn - 1, utterance.turn) if turn >= 1}
            values: dict[Reason, float] = {
                "disagreement": 1 - num_top / emotions.total() if emotions else 0.0,
                "causes": _mean([1 - _f1(a, b) for a, b in combinations(named, 2)]),
                "open": float(not labels or any(label.causes is None for label in labels)),
                "rare": 1 - counts[top] / most if top is not None else 0.0,
                "rule": _mean([float(causes != rule) for causes in named]),
                "confidence": unsure.get(key, 0.0),
            }
            chosen = {reason: values[reason] for reason in reasons}
            turns.append((utterance.turn, _mean(list(chosen.values())), chosen))
        scored.append(Scored(dialogue, _mean([score for _, score, _ in turns]), turns))
    return sorted(scored, key=lambda each: -each.score)


def ranked_by(
    strategy: Strategy,
    annotations: Sequence[Annotation],
    dialogues: Mapping[str, Dialogue],
    unsure: Mapping[TurnKey, float],
    seed: int,
) -> list[Scored]:
    """The dialogues in the order in which a strategy would have them labelled."""
    names = list(dialogues)
    shuffled = {names[place]: dialogues[names[place]] for place in random_order(names, seed)}
    return ranked(annotations, shuffled, STRATEGIES[strategy], unsure)


def work_list(
    scored: Sequence[Scored], reviewers: Mapping[str, set[str]], *, number: int | None, each: int | None
) -> Iterator[dict[str, Any]]:
    """The lines of a list. `reviewers` are the annotators with the dialogues that each has reviewed already.

    A dialogue goes to `each` annotators, in turn, so that they get equally many; without a number to all of them.
    Dialogues that enough annotators have reviewed are left out.
    """
    wanted = len(reviewers) if each is None else min(each, len(reviewers))
    num_given = Counter(dict.fromkeys(reviewers, 0))
    rank = 0
    for item in scored:
        name = item.dialogue.id
        free = [annotator for annotator, done in reviewers.items() if name not in done]
        num_left = wanted - (len(reviewers) - len(free))
        if reviewers and num_left <= 0:
            continue
        chosen = sorted(free, key=lambda annotator: num_given[annotator])[: max(num_left, 0)]
        num_given.update(chosen)
        rank += 1
        if number is not None and rank > number:
            return
        yield {
            "rank": rank,
            "dialogue_id": name,
            "score": round(item.score, 6),
            "annotators": [annotator for annotator in reviewers if annotator in chosen],
            "turns": [
                {
                    "turn": turn,
                    "score": round(score, 6),
                    "reasons": {reason: round(value, 6) for reason, value in reasons.items() if value},
                }
                for turn, score, reasons in item.turns
                if score
            ],
        }


def listed_dialogues(path: Path, project: Project, annotator: str | None) -> list[str]:
    """The dialogue ids of a list, in its order; those of one annotator if named.

    Raises PredictionError for a line that is no line of a list of this project.
    """
    names = []
    for number, line in iter_lines(path):
        try:
            value = decode_json(line).value
        except NotJson as error:
            raise PredictionError(
                f"{path}, line {number}: found {error.found}, expected {error.expected}"
            ) from None
        name = value.get("dialogue_id") if isinstance(value, dict) else None
        if name not in project.dialogues:
            raise PredictionError(
                f"{path}, line {number}: {shorten(name)} is no dialogue of this project, expected a line of kdecs "
                "annotate sample"
            )
        if annotator is None or annotator in value.get("annotators", [annotator]):
            names.append(name)
    return names


def _cause_turns(label: TurnLabel) -> set[int] | None:
    """The turns that a label names as causes, or None if it does not say."""
    if label.emotion is None and label.causes is not None:
        # A system that predicts causes alone; an annotator whose emotion is open has open causes.
        return {cause.turn for cause in label.causes}
    causes = decided_causes(label)
    return None if causes is None else set(causes)


def _f1(first: set[int], second: set[int]) -> float:
    # Two that both name nothing agree.
    return 2 * len(first & second) / (len(first) + len(second)) if first or second else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
