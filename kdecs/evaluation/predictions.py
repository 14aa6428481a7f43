"""Prediction files: JSON lines, one object per pair.

    {"dialogue_id": "tr_1", "target": 3, "candidate": 2, "emotion": "happiness",
     "is_cause": true, "span": "…"}

`emotion` is that of the target, or null if the system predicts no emotion. `span` is "" for no span; a system that
decides for whole utterances writes `is_cause` true with the span "". Other keys are free. Pairs outside the scored
universe count for the emotion accuracy only.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdecs.artifact import atomic_path
from kdecs.corpus.checking import NotJson, RepeatedKeys, decode_json, is_unicode, iter_lines, shorten
from kdecs.corpus.schema import EMOTION_VARIANTS, KNOWN_EMOTIONS, NO_TABLE, Corpus
from kdecs.errors import PredictionError

PairKey = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A system's decision about one pair; `emotion` is the target's (None: not predicted), `span` is "" for none."""

    dialogue_id: str
    target: int
    candidate: int
    emotion: str | None
    is_cause: bool
    span: str

    @property
    def key(self) -> PairKey:
        """(dialogue id, target, candidate)."""
        return self.dialogue_id, self.target, self.candidate


_KEYS = tuple(Prediction.__dataclass_fields__)


def read_predictions(
    path: Path | str, corpus: Corpus, emotion_table: Mapping[str, str] = NO_TABLE
) -> dict[PairKey, Prediction]:
    """Read a file's predictions by (dialogue id, target, candidate); label variants are replaced.

    The labels of `emotion_table` are known, too: `evaluate` maps them with it.

    Raises PredictionError, one line, at the first fault: the file is unreadable or not JSON lines, a key is missing
    or has the wrong type, a dialogue, turn or emotion is unknown, a pair occurs twice, a target has two emotions, or
    `is_cause` is false with a span.
    """
    path = Path(path)
    num_turns = {dialogue.id: len(dialogue.utterances) for dialogue in corpus.dialogues}
    predictions: dict[PairKey, Prediction] = {}
    emotions: dict[tuple[str, int], str] = {}
    for place, line in _lines(path):
        prediction = _parse(line, place, emotion_table)
        _check_place(prediction, num_turns, place, corpus)
        if prediction.key in predictions:
            raise PredictionError(
                f"{place}: the pair {_name(prediction)} occurs a second time, expected it once"
            )
        _check_emotion(prediction, emotions, place, emotion_table)
        predictions[prediction.key] = prediction
    return predictions


def read_emotions(
    path: Path | str, emotion_table: Mapping[str, str] = NO_TABLE
) -> dict[tuple[str, int], str]:
    """The emotion of each target of a prediction file, by (dialogue id, turn). Raises PredictionError, as above.

    No corpus is needed: the file may be of dialogues without labels. The labels of `emotion_table` are known, too.
    """
    path = Path(path)
    emotions: dict[tuple[str, int], str] = {}
    for place, line in _lines(path):
        _check_emotion(_parse(line, place, emotion_table), emotions, place, emotion_table)
    if not emotions:
        raise PredictionError(
            f"{path}: holds no emotion, expected the predictions of a system that predicts emotions"
        )
    return emotions


def write_predictions(path: Path | str, predictions: Iterable[Prediction]) -> int:
    """Write predictions as JSON lines, all or nothing; returns their number."""
    count = 0
    with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
            count += 1
    return count


def by_pair(predictions: Iterable[Prediction]) -> dict[PairKey, Prediction]:
    """Predictions by pair, as `evaluate` takes them. Raises PredictionError for a pair that occurs twice."""
    found: dict[PairKey, Prediction] = {}
    for prediction in predictions:
        if prediction.key in found:
            raise PredictionError(f"the pair {_name(prediction)} occurs a second time, expected it once")
        found[prediction.key] = prediction
    return found


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    if "\0" in str(path):
        raise PredictionError("found a path with a NUL character, expected a prediction file")
    try:
        for number, line in iter_lines(path):
            yield f"{path}, line {number}", line
    except OSError as error:
        raise PredictionError(f"{path}: {error.strerror or error}, expected a prediction file") from None


def _parse(line: bytes, place: str, emotion_table: Mapping[str, str]) -> Prediction:
    try:
        decoded = decode_json(line)
    except NotJson as error:
        raise PredictionError(
            f"{place}: found {error.found}, expected {error.expected}, one object per line"
        ) from None
    value = decoded.value
    if not isinstance(value, dict):
        raise PredictionError(f"{place}: found {shorten(value)}, expected an object with {', '.join(_KEYS)}")
    if isinstance(value, RepeatedKeys):
        raise PredictionError(f"{place}: found the key {value.repeated()[0]!r} more than once, expected once")
    for key in _KEYS:
        if key not in value:
            raise PredictionError(f"{place}: the key {key!r} is missing, expected {', '.join(_KEYS)}")
    _check_types(value, place)
    emotion = value["emotion"]
    prediction = Prediction(
        value["dialogue_id"],
        value["target"],
        value["candidate"],
        # The caller's table comes first: it may map a spelling that is a variant elsewhere.
        emotion if emotion is None or emotion in emotion_table else EMOTION_VARIANTS.get(emotion, emotion),
        value["is_cause"],
        value["span"],
    )
    if not prediction.is_cause and prediction.span.strip():
        raise PredictionError(
            f"{place}: the pair {_name(prediction)} has is_cause false and the span "
            f'{shorten(prediction.span)}, expected the span "" or is_cause true'
        )
    return prediction


def _check_types(value: Mapping[str, Any], place: str) -> None:
    for key in ("target", "candidate"):
        # Not isinstance: true is an int to Python.
        if type(value[key]) is not int:
            raise PredictionError(
                f"{place}: {key} is {shorten(value[key])}, expected a turn: an integer from 1"
            )
    if type(value["is_cause"]) is not bool:
        raise PredictionError(f"{place}: is_cause is {shorten(value['is_cause'])}, expected true or false")
    for key in ("dialogue_id", "span", "emotion"):
        text = value[key]
        if key == "emotion" and text is None:
            continue
        if not isinstance(text, str) or not is_unicode(text):
            raise PredictionError(f"{place}: {key} is {shorten(text)}, expected a string")


def _check_place(prediction: Prediction, num_turns: Mapping[str, int], place: str, corpus: Corpus) -> None:
    turns = num_turns.get(prediction.dialogue_id)
    if turns is None:
        raise PredictionError(
            f"{place}: the dialogue {shorten(prediction.dialogue_id)} is not in {corpus.path}; "
            "score the file against the corpus that it was predicted for"
        )
    for name, turn in (("target", prediction.target), ("candidate", prediction.candidate)):
        if not 1 <= turn <= turns:
            raise PredictionError(
                f"{place}: {name} is {turn}, expected a turn from 1 to {turns} "
                f"(dialogue {prediction.dialogue_id} has {turns})"
            )


def _check_emotion(
    prediction: Prediction,
    emotions: dict[tuple[str, int], str],
    place: str,
    emotion_table: Mapping[str, str],
) -> None:
    emotion = prediction.emotion
    if emotion is None:
        return
    if emotion not in KNOWN_EMOTIONS and emotion not in emotion_table:
        known = ", ".join(sorted(KNOWN_EMOTIONS))
        raise PredictionError(f"{place}: the emotion {shorten(emotion)} is unknown, expected one of {known}")
    first = emotions.setdefault((prediction.dialogue_id, prediction.target), emotion)
    if first != emotion:
        raise PredictionError(
            f"{place}: the target {prediction.dialogue_id}/{prediction.target} has the emotion {emotion!r} "
            f"here and {first!r} in an earlier line, expected one per target"
        )


def _name(prediction: Prediction) -> str:
    return f"{shorten(prediction.dialogue_id)[1:-1]}/{prediction.target}/{prediction.candidate}"
