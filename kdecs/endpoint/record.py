"""The record of a model's answers: JSON lines that a run appends to, resumes from, and can be replayed from.

    {"call": "9f86d081…", "source": "https://api.openai.com/v1", "text": "{\\"emotion\\": …}", "prompt_tokens": 412,
     "answer_tokens": 31, …}

`call` is the sha256 of everything that the answer depends on, and `source` says who answered: an endpoint's URL, or the
checksum of a fine-tuned model. The counts of tokens are null where the server does not give them. Users of a record add
keys that say what was asked about. Lines are appended and synced as the answers come, under a lock on the file, so that
several ranks share one record. A kill can only leave a last line without its end, which does not count. Failures are
never recorded.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from kdecs.artifact import file_lock
from kdecs.errors import PredictionError


class RecordedCall(BaseModel):
    """One line of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    call: str
    source: str
    text: str
    prompt_tokens: NonNegativeInt | None = None
    answer_tokens: NonNegativeInt | None = None


_Row = TypeVar("_Row", bound=RecordedCall)


class Asked(Protocol):
    """A question; its text names it in messages."""

    @property
    def call(self) -> str:
        """The hash of the call that asks it."""


def call_hash(call: Any) -> str:
    """The sha256 that stands for a call, from its canonical JSON."""
    return hashlib.sha256(json.dumps(call, sort_keys=True).encode()).hexdigest()


class CallRecord(Generic[_Row]):
    """The answers of a file. Threads of a process may share it, and processes may share the file."""

    def __init__(self, path: Path, row: type[_Row]) -> None:
        self.path = path
        self._row = row
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], _Row] = {}
        self._by_call: dict[str, set[str]] = {}
        self.read()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep other runs from asking the same questions at the same time. Raises PredictionError if one does."""
        with file_lock(self.path.with_name(f".{self.path.name}.lock"), blocking=False) as is_ours:
            if not is_ours:
                raise PredictionError(
                    f"{self.path}: another run records its answers here, and both would pay for the same calls; wait "
                    "until it ends"
                )
            self.read()
            yield

    def read(self) -> None:
        """Take up what the file holds now. Raises PredictionError, one line, for a line that is no answer."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last line end is unfinished
            try:
                self._keep(self._row.model_validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"]) or "the line"
                raise PredictionError(
                    f"{self.path}, line {number}: {field}: {first['msg']}, expected a recorded answer; remove the line "
                    "to have its question asked again, or name another file"
                ) from None

    def find(self, question: Asked, source: str | None) -> _Row | None:
        """The answer of a source to a question; None if there is none.

        Without a source it is the answer of whoever was asked. Raises PredictionError if two sources were.
        """
        if source is None:
            sources = self._by_call.get(question.call, set())
            if len(sources) > 1:
                raise PredictionError(
                    f"{self.path}: holds answers of {' and of '.join(sorted(sources))} to the same question "
                    f"({question}); name one of them with --base-url"
                )
            source = next(iter(sources), "")
        return self._answers.get((source, question.call))

    def pending(self, questions: Sequence[Asked], source: str) -> list[int]:
        """The positions of the questions that a source has not answered yet."""
        return [n for n, question in enumerate(questions) if self.find(question, source) is None]

    def answers(self) -> list[_Row]:
        """All answers, in the order in which they came."""
        with self._lock:
            return list(self._answers.values())

    def add(self, answers: Iterable[_Row]) -> None:
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

    def _keep(self, answer: _Row) -> None:
        self._answers[answer.source, answer.call] = answer
        self._by_call.setdefault(answer.call, set()).add(answer.source)


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
