"""Scores over parts of the rows: by distance of the cause, emotion of the target, length of the candidate."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kdecs.evaluation.metrics import STRICT_KEYS, Scores, metrics_of
from kdecs.evaluation.rows import COLUMN, Row

FAR = 5
LENGTH_BOUNDS = (5, 10, 20)

Breakdown = dict[str, dict[str, Any]]


def breakdowns(scores: Scores) -> dict[str, Breakdown]:
    """{"distance", "emotion", "utterance_length"} → group → num_positive, num_negative and the row scores.

    distance: target minus candidate in turns. emotion: the target's gold emotion. utterance_length: words of
    the candidate, in which a span is sought. A group's scores are those of its rows alone, in percent.
    """
    return {
        "distance": _by(scores, _distance),
        "emotion": _by(scores, lambda row: str(row.gold_emotion)),
        "utterance_length": _by(scores, _length),
    }


def _by(scores: Scores, group_of: Callable[[Row], str]) -> Breakdown:
    groups = np.array([group_of(row) for row in scores.scored.rows], dtype=str)
    found: Breakdown = {}
    for group in sorted(set(groups.tolist()), key=lambda name: (_first_number(name), name)):
        sums = scores.scored.contributions[groups == group].sum(axis=0)
        values = metrics_of(sums)
        found[group] = {
            "num_positive": int(sums[COLUMN["positives"]]),
            "num_negative": int(sums[COLUMN["negatives"]]),
            **{key: float(values[key]) for key in STRICT_KEYS},
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
