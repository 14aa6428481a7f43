"""The record of a model's answers: JSON lines that a run appends to, resumes from, and can be replayed from.

    {"call": "9f86d081…", "source": "https://api.openai.com/v1", "dialogue_id": "tr_1", "target": 3,
     "text": "{\\"emotion\\": …}", "prompt_tokens": 412, "answer_tokens": 31}

`call` is the sha256 of everything that the answer depends on, and `source` says who answered: an endpoint's URL, or the
checksum of a fine-tuned model. The counts of tokens are null where nobody told them. Lines are appended and synced as
the answers come, under a lock on the file, so that several ranks share one record. A kill can only leave a last line
without its end, which does not count. Failures are never recorded.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from kdecs.artifact import file_lock
from kdecs.baselines.generative.answers import FAULTS, parse, predictions_of
from kdecs.corpus.schema import Dialogue
from kdecs.errors import PredictionError
from kdecs.evaluation.predictions import Prediction


class RecordedAnswer(BaseModel):
    """One line of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    call: str
    source: str
    dialogue_id: str
    target: PositiveInt
    text: str
    prompt_tokens: NonNegativeInt | None = None
    answer_tokens: NonNegativeInt | None = None


def call_hash(call: Any) -> str:
    """The sha256 that stands for a call, from its canonical JSON."""
    return hashlib.sha256(json.dumps(call, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """A target that a model is asked about: its place in the corpus, and the hash of the call."""

    dialogue_id: str
    target: int
    call: str


class AnswerRecord:
    """The answers of a file. Threads of a process may share it, and processes may share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], RecordedAnswer] = {}
        self._by_call: dict[str, set[str]] = {}
        self.read()

    def read(self) -> None:
        """Take up what the file holds now. Raises PredictionError, one line, for a line that is no answer."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last line end is unfinished
            try:
                self._keep(RecordedAnswer.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"]) or "the line"
                raise PredictionError(
                    f"{self.path}, line {number}: {field}: {first['msg']}, expected a recorded answer; remove the line "
                    "to have its question asked again, or name another file"
                ) from None

    def find(self, question: Question, source: str | None) -> RecordedAnswer | None:
        """The answer of a source to a question; None if there is none.

        Without a source it is the answer of whoever was asked. Raises PredictionError if two sources were.
        """
        if source is None:
            sources = self._by_call.get(question.call, set())
            if len(sources) > 1:
                raise PredictionError(
                    f"{self.path}: holds answers of {' and of '.join(sorted(sources))} to the same question "
                    f"({question.dialogue_id}/{question.target}); name one of them with --base-url"
                )
            source = next(iter(sources), "")
        return self._answers.get((source, question.call))

    def pending(self, questions: Sequence[Question], source: str) -> list[int]:
        """The positions of the questions that a source has not answered yet."""
        return [n for n, question in enumerate(questions) if self.find(question, source) is None]

    def add(self, answers: Iterable[RecordedAnswer]) -> None:
        """Append answers, durably."""
        answers = list(answers)
        data = "".join(answer.model_dump_json() + "\n" for answer in answers).encode()
        with self._lock, file_lock(self.path), self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            _cut_to_last_line(file, size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            for answer in answers:
                self._keep(answer)

    def _keep(self, answer: RecordedAnswer) -> None:
        self._answers[answer.source, answer.call] = answer
        self._by_call.setdefault(answer.call, set()).add(answer.source)


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


def _cut_to_last_line(file: Any, size: int) -> None:
    """Cut off what a killed writer left behind the last line end, and stand at the end."""
    place = size
    while place:
        start = max(0, place - 65_536)
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            place = start + found + 1
            break
        place = start
    if place != size:
        file.truncate(place)
    file.seek(place)
