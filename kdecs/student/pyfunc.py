"""The student as a served model: MLflow loads this module by name (`loader_module`), it needs no mlflow itself.

A request holds dialogues, one a row: a column `dialogue` of JSON texts, or the dialogues themselves, each
`{"id": …, "utterances": [{"turn": …, "speaker": …, "utterance": …}, …]}`. `id` and `turn` may be left out.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdecs.corpus.schema import Dialogue
from kdecs.corpus.validation import Checker
from kdecs.errors import CorpusError
from kdecs.student.prediction import Student

INPUT_COLUMN = "dialogue"


class ServedStudent:
    """What MLflow calls: `predict(model_input)`."""

    def __init__(self, student: Student) -> None:
        self._student = student

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One JSON text a dialogue: a list of predictions (dialogue_id, target, candidate, emotion, …).

        `model_input` is a pandas DataFrame with the column `dialogue`, or a list of JSON texts or dicts.
        `params` may hold `max_distance`. Raises CorpusError for a dialogue that breaks the schema.
        """
        max_distance = (params or {}).get("max_distance")
        answers = []
        for number, row in enumerate(_rows(model_input)):
            dialogue = parse_dialogue(row, f"row {number}")
            predictions = self._student.predict([dialogue], max_distance=max_distance)
            answers.append(json.dumps([asdict(p) for p in predictions], ensure_ascii=False))
        return answers


def parse_dialogue(row: Any, place: str) -> Dialogue:
    """A dialogue from a JSON text or its object. Raises CorpusError, one line, naming the row."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise CorpusError(f"{place}: not JSON ({error}), expected one dialogue") from None
    if not isinstance(row, dict) or not isinstance(row.get("utterances"), list):
        raise CorpusError(f"{place}: expected an object with a list `utterances`")
    utterances = [
        {"turn": turn, **utterance} if isinstance(utterance, dict) else utterance
        for turn, utterance in enumerate(row["utterances"], start=1)
    ]
    checker = Checker(place, labelled=False)
    dialogue = checker.dialogue(row.get("id", place), utterances, "dailydialog")
    if checker.faults or dialogue is None:
        raise CorpusError(str(checker.faults[0]) if checker.faults else f"{place}: no dialogue")
    return dialogue


def _load_pyfunc(path: str) -> ServedStudent:
    """MLflow's entry: the student in a directory."""
    return ServedStudent(Student.from_pretrained(Path(path)))


def _rows(model_input: Any) -> Iterable[Any]:
    if hasattr(model_input, "columns"):
        if INPUT_COLUMN not in model_input.columns:
            found = ", ".join(map(str, model_input.columns)) or "none"
            raise CorpusError(f"request: found the columns {found}, expected a column `{INPUT_COLUMN}`")
        return list(model_input[INPUT_COLUMN])
    return [model_input] if isinstance(model_input, str | dict) else list(model_input)
