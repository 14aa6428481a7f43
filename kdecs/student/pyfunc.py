"""The student as a served model. MLflow loads this module by its name (`loader_module`); no mlflow is needed here.

A request has one dialogue per row: a DataFrame with a column `dialogue` of JSON texts, or a list of JSON texts or
objects, each `{"id": …, "utterances": [{"turn": …, "speaker": …, "utterance": …}, …]}`. `id` and `turn` are optional.
The answer has one JSON text per dialogue, with predictions as in `kdecs predict --offsets`.

A request is bounded in dialogues, pairs and characters. The work for it stops, between two batches, once the server
has given it up or its client has left (which `kdecs.tracking.serving` notices; MLflow's own server does not).
"""

import json
import logging
import threading
import time
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdecs.corpus.reading import parse_dialogue
from kdecs.corpus.schema import Dialogue
from kdecs.errors import CorpusError, KdecsError
from kdecs.process import served_request_timeout_s
from kdecs.student.predict.predictor import Student
from kdecs.student.predict.streaming import num_candidates, offsets_of

logger = logging.getLogger(__name__)

INPUT_COLUMN = "dialogue"
# Of one request. RECCON's largest dialogue has 561 pairs, and two CPU cores predict about 15 pairs per second.
_MAX_DIALOGUES = 1_000
_MAX_PAIRS = 25_000
_MAX_CHARACTERS = 1_000_000  # of texts and speakers

request_ended: ContextVar[threading.Event | None] = ContextVar("request_ended", default=None)
"""Set by a server: the event tells that nobody waits for the answer of this request any more."""


class ServedStudent:
    """What MLflow calls: `predict(model_input, params)`."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One JSON text per dialogue: a list of predictions.

        `params` may hold `max_distance`, where a negative number means no bound. Raises CorpusError, and answers
        nothing, if a dialogue breaks the schema or the request is too large, and KdecsError once nobody waits for the
        answer any more.
        """
        # MLflow's parameters have a type and a default, so that "no bound" has to be a number.
        bound = (params or {}).get("max_distance")
        max_distance = None if bound is None or bound < 0 else int(bound)
        timeout_s, ended = served_request_timeout_s(), request_ended.get()
        began = time.monotonic()

        def stop_if_unwanted(num_pairs: int) -> None:
            del num_pairs
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise KdecsError(
                    f"request: not answered within {timeout_s:g} s, after which the server gives it up; send fewer "
                    "pairs at a time, set max_distance, or start the server with a longer timeout"
                )
            if ended is not None and ended.is_set():
                raise KdecsError("request: its client has left, so the rest is not predicted")

        found = self._student.stream(
            _bounded_dialogues(_rows(model_input), max_distance),
            max_distance=max_distance,
            on_batch=stop_if_unwanted,
            on_warning=logger.warning,
        )
        return [
            json.dumps([{**asdict(p.prediction), **offsets_of(p)} for p in items], ensure_ascii=False)
            for _, items in found
        ]


def _load_pyfunc(path: str) -> ServedStudent:
    """MLflow's entry: load the student in a directory."""
    return ServedStudent(Student.from_pretrained(Path(path)))


def _bounded_dialogues(rows: list[Any], max_distance: int | None) -> list[Dialogue]:
    """The dialogues of a request. Raises CorpusError if one breaks the schema, or if together they are too large."""
    if len(rows) > _MAX_DIALOGUES:
        raise CorpusError(
            f"request: found {len(rows):,} dialogues, expected at most {_MAX_DIALOGUES:,}; send the rest in others"
        )
    dialogues, num_pairs, num_characters = [], 0, 0
    for number, row in enumerate(rows):
        dialogue = parse_dialogue(row, f"row {number}")
        dialogues.append(dialogue)
        num_pairs += num_candidates(len(dialogue.utterances), max_distance)
        num_characters += sum(len(u.text) + len(u.speaker) for u in dialogue.utterances)
        if num_pairs > _MAX_PAIRS:
            raise CorpusError(
                f"request: found {num_pairs:,} pairs up to row {number}, expected at most "
                f"{_MAX_PAIRS:,}; send fewer dialogues at a time, or set max_distance"
            )
        if num_characters > _MAX_CHARACTERS:
            raise CorpusError(
                f"request: found {num_characters:,} characters up to row {number}, expected at "
                f"most {_MAX_CHARACTERS:,}; send fewer dialogues at a time, or shorter texts"
            )
    return dialogues


def _rows(model_input: Any) -> list[Any]:
    if hasattr(model_input, "columns"):
        if INPUT_COLUMN not in model_input.columns:
            found = ", ".join(map(str, model_input.columns)) or "none"
            raise CorpusError(f"request: found the columns {found}, expected a column `{INPUT_COLUMN}`")
        return list(model_input[INPUT_COLUMN])
    return [model_input] if isinstance(model_input, str | dict) else list(model_input)
