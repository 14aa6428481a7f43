"""The student as a served model. MLflow loads this module by its name (`loader_module`); no mlflow is needed here.

A request has one dialogue per row: a DataFrame with a column `dialogue` of JSON texts, or a list of JSON texts or
objects, each `{"id": …, "utterances": [{"turn": …, "speaker": …, "utterance": …}, …]}`. `id` and `turn` are optional.
The answer has one JSON text per dialogue, with predictions as in `kdecs predict --offsets`.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdecs.corpus.reading import parse_dialogue
from kdecs.errors import CorpusError
from kdecs.student.predict.predictor import Student
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
        nothing, if a dialogue breaks the schema.
        """
        # MLflow's parameters have a type and a default, so that "no bound" has to be a number.
        bound = (params or {}).get("max_distance")
        dialogues = [parse_dialogue(row, f"row {number}") for number, row in enumerate(_rows(model_input))]
        found = self._student.stream(
            dialogues,
            max_distance=None if bound is None or bound < 0 else int(bound),
            on_warning=logger.warning,
        )
        return [
            json.dumps([{**asdict(p.prediction), **offsets_of(p)} for p in items], ensure_ascii=False)
            for _, items in found
        ]


def _load_pyfunc(path: str) -> ServedStudent:
    """MLflow's entry: load the student in a directory."""
    return ServedStudent(Student.from_pretrained(Path(path)))


def _rows(model_input: Any) -> Iterable[Any]:
    if hasattr(model_input, "columns"):
        if INPUT_COLUMN not in model_input.columns:
            found = ", ".join(map(str, model_input.columns)) or "none"
            raise CorpusError(f"request: found the columns {found}, expected a column `{INPUT_COLUMN}`")
        return list(model_input[INPUT_COLUMN])
    return [model_input] if isinstance(model_input, str | dict) else list(model_input)
