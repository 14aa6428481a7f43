"""The student as a served model. MLflow loads this module by its name (`loader_module`); no mlflow is needed here.

A request has one dialogue per row: a DataFrame with a column `dialogue` of JSON texts, or a list of JSON texts or
objects, each `{"id": …, "utterances": [{"turn": …, "speaker": …, "utterance": …}, …]}`. `id` and `turn` are optional.
The answer has one JSON text per dialogue, with predictions as in `kdecs predict --offsets`.

A request is bounded in dialogues, pairs and characters (kdecs.student.predict.requests). The work for it stops,
between two batches, once the server has given it up or its client has left (which `kdecs.tracking.serving` notices;
MLflow's own server does not).
"""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdecs.errors import CorpusError, KdecsError
from kdecs.process import served_request_timeout_s
from kdecs.student.predict.predictor import Student
from kdecs.student.predict.requests import bounded_dialogues, request_ended
from kdecs.student.predict.streaming import offsets_of

logger = logging.getLogger(__name__)

INPUT_COLUMN = "dialogue"


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
            bounded_dialogues(_rows(model_input), max_distance),
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


def _rows(model_input: Any) -> list[Any]:
    if hasattr(model_input, "columns"):
        if INPUT_COLUMN not in model_input.columns:
            found = ", ".join(map(str, model_input.columns)) or "none"
            raise CorpusError(f"request: found the columns {found}, expected a column `{INPUT_COLUMN}`")
        return list(model_input[INPUT_COLUMN])
    return [model_input] if isinstance(model_input, str | dict) else list(model_input)
