"""The recorded answers about the targets of a corpus, and the predictions that they amount to.

A line of the record (`kdecs.endpoint.record`) also names its target: `"dialogue_id": "tr_1", "target": 3`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveInt

from kdecs.baselines.generative.answers import FAULTS, parse, predictions_of
from kdecs.corpus.schema import Dialogue
from kdecs.endpoint.record import CallRecord, RecordedCall
from kdecs.evaluation.predictions import Prediction


class RecordedAnswer(RecordedCall):
    """One line of a record."""

    dialogue_id: str
    target: PositiveInt


@dataclass(frozen=True)
class Question:
    """A target that a model is asked about: its place in the corpus, and the hash of the call."""

    dialogue_id: str
    target: int
    call: str

    def __str__(self) -> str:
        return f"{self.dialogue_id}/{self.target}"


class AnswerRecord(CallRecord[RecordedAnswer]):
    """The answers about the targets of a corpus."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, RecordedAnswer)


@dataclass(frozen=True)
class Outcome:
    """Predictions for every pair of the answered targets, and what was wrong with the answers."""

    predictions: list[Prediction]
    faults: Counter[str]
    num_answers: int
    num_missing: int
    prompt_tokens: int
    answer_tokens: int

    def __str__(self) -> str:
        faults = ", ".join(f"{self.faults[kind]} × {kind}" for kind in FAULTS if self.faults[kind])
        missing = (
            f"; {self.num_missing:,} targets have no answer and no prediction" if self.num_missing else ""
        )
        return f"{self.num_answers:,} answers; faults: {faults or 'none'}{missing}"


def read_answers(
    targets: Sequence[tuple[Dialogue, int]],
    questions: Sequence[Question],
    labels: Sequence[str],
    record: AnswerRecord,
    source: str | None,
) -> Outcome:
    """The predictions that recorded answers amount to. `source` as for `AnswerRecord.find`."""
    predictions: list[Prediction] = []
    faults: Counter[str] = Counter()
    found = [record.find(question, source) for question in questions]
    for (dialogue, target), answer in zip(targets, found, strict=True):
        if answer is not None:
            parsed = parse(answer.text, dialogue, target, labels)
            faults.update(parsed.faults)
            predictions += predictions_of(parsed.answer, dialogue, target)
    answers = [answer for answer in found if answer is not None]
    return Outcome(
        predictions,
        faults,
        len(answers),
        len(found) - len(answers),
        sum(answer.prompt_tokens or 0 for answer in answers),
        sum(answer.answer_tokens or 0 for answer in answers),
    )
