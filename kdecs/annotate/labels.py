"""Labels of one annotator, a person or a run of a model: an emotion and the causes of every turn that it decided.

A line of `reviews/NAME.jsonl` is what a person decided about one turn:

    {"dialogue_id": "tr_1", "turn": 3, "emotion": "worry", "causes": [{"turn": 2, "span": "the last bus"}],
     "at": "2026-11-30T12:00:00Z"}

`causes` is null where the person has not decided them. The latest decision about a turn counts; the others stay, so
that agreement can be followed over time.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from kdecs.artifact import file_lock, write_text
from kdecs.corpus.checking import NotJson, decode_json, iter_lines, shorten
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.endpoint.answers import Cause
from kdecs.errors import PredictionError

TurnKey = tuple[str, int]
"""(dialogue id, turn)."""


@dataclass(frozen=True, slots=True)
class TurnLabel:
    """What an annotator decided about a turn: None is open. `at` and the calls say where it comes from."""

    emotion: str | None
    causes: tuple[Cause, ...] | None
    at: str | None = None
    emotion_call: str | None = None
    causes_call: str | None = None


@dataclass(frozen=True)
class Annotation:
    """The labels of one annotator by turn; `model` is the model's name if it is a run."""

    name: str
    kind: Literal["person", "model"]
    labels: Mapping[TurnKey, TurnLabel] = field(repr=False)
    model: str | None = None

    def emotions(self) -> dict[TurnKey, str]:
        """The emotions that are not open."""
        return {key: label.emotion for key, label in self.labels.items() if label.emotion is not None}


class ReviewedCause(BaseModel):
    """A cause in a review."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    turn: PositiveInt
    span: str


class ReviewedTurn(BaseModel):
    """A line of a person's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    dialogue_id: str
    turn: PositiveInt
    emotion: str
    causes: list[ReviewedCause] | None
    at: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")


@dataclass(frozen=True)
class Decisions:
    """What an annotator decided in an imported file; `note` says what of it does not count."""

    annotator: str
    lines: Sequence[ReviewedTurn] = field(repr=False)
    note: str = ""


def checked_turn(
    value: Any, place: str, dialogues: Mapping[str, Dialogue], labels: Iterable[str], after: int
) -> ReviewedTurn:
    """A person's decision about a turn of these dialogues. Raises PredictionError, one line, for anything else."""
    try:
        line = ReviewedTurn.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "the line"
        raise PredictionError(f"{place}: {field_name}: {first['msg']}, expected a reviewed turn") from None
    dialogue = dialogues.get(line.dialogue_id)
    if dialogue is None:
        raise PredictionError(
            f"{place}: the dialogue {shorten(line.dialogue_id)} is not in this project; import the review into the "
            "project that it was exported from"
        )
    if line.turn > len(dialogue.utterances):
        raise PredictionError(
            f"{place}: turn {line.turn}, expected one from 1 to {len(dialogue.utterances)} ({dialogue.id})"
        )
    where = f"{place}: {dialogue.id}/{line.turn}"
    if line.emotion not in labels:
        raise PredictionError(
            f"{where}: the emotion {shorten(line.emotion)}, expected one of {', '.join(labels)}"
        )
    if line.emotion == NEUTRAL and line.causes:
        raise PredictionError(
            f"{where}: is {NEUTRAL} and has causes; expected an empty list, or another emotion"
        )
    seen: set[int] = set()
    for cause in line.causes or []:
        if cause.turn > min(line.turn + after, len(dialogue.utterances)):
            raise PredictionError(
                f"{where}: a cause in turn {cause.turn}, expected one up to turn {line.turn + after}; causes_after in "
                "project.yaml allows later ones"
            )
        if not cause.span.strip() or cause.span not in dialogue.utterances[cause.turn - 1].text:
            raise PredictionError(
                f"{where}: the cause {shorten(cause.span)}, expected words of turn {cause.turn}, exactly as they stand"
            )
        if cause.turn in seen:
            raise PredictionError(f"{where}: two causes in turn {cause.turn}, expected one span in each turn")
        seen.add(cause.turn)
    return line


def read_reviews(
    path: Path, dialogues: Mapping[str, Dialogue], labels: Iterable[str], after: int
) -> list[ReviewedTurn]:
    """The lines of a person's file, in order. Raises PredictionError for a line that is none."""
    lines = []
    for number, line in iter_lines(path):
        place = f"{path}, line {number}"
        try:
            value = decode_json(line).value
        except NotJson as error:
            raise PredictionError(f"{place}: found {error.found}, expected {error.expected}") from None
        lines.append(checked_turn(value, place, dialogues, labels, after))
    return lines


def add_reviews(path: Path, lines: Iterable[ReviewedTurn]) -> int:
    """Append the lines that a person's file does not hold yet, and return their number."""
    with file_lock(path.with_name(f".{path.name}.lock")):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        there = set(text.splitlines())
        new = [
            line
            for line in dict.fromkeys(json.dumps(each.model_dump(), ensure_ascii=False) for each in lines)
            if line not in there
        ]
        if new:
            write_text(path, text + "".join(f"{line}\n" for line in new))
    return len(new)


def annotation_of_person(name: str, lines: Iterable[ReviewedTurn]) -> Annotation:
    """The labels of a person: the latest decision about each turn."""
    labels: dict[TurnKey, TurnLabel] = {}
    # By their times: a file that was saved earlier may be imported later.
    for line in sorted(lines, key=lambda line: line.at):
        causes = (
            None if line.causes is None else tuple(Cause(cause.turn, cause.span) for cause in line.causes)
        )
        labels[line.dialogue_id, line.turn] = TurnLabel(line.emotion, causes, line.at)
    return Annotation(name, "person", labels)
