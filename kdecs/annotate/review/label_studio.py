"""Label Studio: the tasks and the labelling configuration that it takes, and its JSON export with what people decided.

A task is a dialogue. A region of its `Paragraphs` marks an emotion, anywhere in the turn that has it, or the words of a
cause. Every cause says which turns' emotions it explains (`effect`), and an emotion may say that the dialogue names no
cause of it (`no_cause`): without either, its causes are open.

    {"data": {"dialogue_id": "tr_1",
              "dialogue": [{"name": "1 A", "text": "I missed the last bus ."}, …],
              "turns": [{"value": "1"}, …]},
     "predictions": [{"model_version": "gpt-4o-mini", "result": [
         {"id": "emotion-1", "from_name": "emotion", "to_name": "dialogue", "type": "paragraphlabels",
          "value": {"start": "0", "end": "0", "startOffset": 0, "endOffset": 23, "paragraphlabels": ["worry"]}}, …]}]}

Turns count from 0 in a region, and offsets are in UTF-16 code units, as in the browser.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from kdecs.annotate.labels import (
    Annotation,
    Decisions,
    ReviewedTurn,
    TurnLabel,
    checked_turn,
)
from kdecs.annotate.project import Project
from kdecs.corpus.checking import shorten
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.errors import ConfigError, PredictionError

EMOTION, CAUSE, EFFECT, NO_CAUSE = "emotion", "cause", "effect", "no_cause"
_UTF16 = "utf-16-le"
# Dark enough to be read as text on white: Label Studio fills regions with a lighter shade. Red is for causes.
_COLOURS = (
    "#0958d9", "#389e0d", "#d46b08", "#531dab", "#08979c", "#c41d7f", "#7c6a00", "#1d39c4", "#5b8c00", "#ad4e00",
    "#9254de", "#006d75", "#595959", "#eb2f96", "#3f6600", "#874d00",
)  # fmt: skip
# Label Studio asks the last two questions about the region that is selected, and it takes no annotation in which a
# cause has no effect. They stay in sight below a long dialogue.
_CONFIGURATION = """\
<View>
  <Header value="$dialogue_id" size="5"/>
  <Header value="Emotion of a turn" size="6"/>
  <ParagraphLabels name="emotion" toName="dialogue">
{emotions}
  </ParagraphLabels>
  <Header value="Words that caused it" size="6"/>
  <ParagraphLabels name="cause" toName="dialogue">
    <Label value="cause" background="#f5222d"/>
  </ParagraphLabels>
  <Paragraphs name="dialogue" value="$dialogue" layout="dialogue" nameKey="name" textKey="text" showLabels="true"/>
  <View style="position: sticky; bottom: 0; background: var(--color-neutral-background, white)">
    <View visibleWhen="region-selected" whenTagName="cause">
      <Header value="These words caused the emotion of turn" size="6"/>
      <Choices name="effect" toName="dialogue" value="$turns" choice="multiple" layout="inline" perRegion="true"
               visibleWhen="region-selected" whenTagName="cause" required="true"
               requiredMessage="Choose for each cause the turns whose emotion it caused."/>
    </View>
    <View visibleWhen="region-selected" whenTagName="emotion">
      <Header value="Does the dialogue say why?" size="6"/>
      <Choices name="no_cause" toName="dialogue" choice="multiple" perRegion="true"
               visibleWhen="region-selected" whenTagName="emotion">
        <Choice value="no cause"/>
      </Choices>
    </View>
  </View>
</View>
"""


def labelling_configuration(labels: Sequence[str]) -> str:
    """The XML of a project's labelling interface."""
    emotions = (
        f'    <Label value={quoteattr(label)} background="{_COLOURS[number % len(_COLOURS)]}"/>'
        for number, label in enumerate(labels)
    )
    return _CONFIGURATION.format(emotions="\n".join(emotions))


def label_studio_tasks(
    project: Project, dialogues: Sequence[Dialogue], suggestions: Sequence[Annotation]
) -> list[dict[str, Any]]:
    """The tasks, in order. Each annotation in `suggestions` becomes the prediction of a model of its name.

    People start from the first one: Label Studio takes the last model of an import for the project's.
    Raises ConfigError if there is nothing to review.
    """
    if not dialogues:
        raise ConfigError(f"{project.root}: no dialogue is left to review")
    tasks = []
    for dialogue in dialogues:
        predictions = [
            {"model_version": annotation.name, "result": result}
            for annotation in reversed(suggestions)
            if (result := _regions(dialogue, annotation))
        ]
        data = {
            "dialogue_id": dialogue.id,
            "dialogue": [{"name": f"{u.turn} {u.speaker}", "text": u.text} for u in dialogue.utterances],
            "turns": [{"value": str(u.turn)} for u in dialogue.utterances],
        }
        tasks.append({"data": data, "predictions": predictions} if predictions else {"data": data})
    return tasks


def _regions(dialogue: Dialogue, annotation: Annotation) -> list[dict[str, Any]]:
    """The labels of a dialogue as a result of Label Studio. Words that cause several emotions are one region."""
    results = []
    effects: dict[tuple[int, str], list[int]] = {}

    def add(name: str, control: str, kind: str, turn: int, span: str, chosen: list[str]) -> None:
        text = dialogue.utterances[turn - 1].text
        begin = text.index(span)
        value = {
            "start": str(turn - 1),
            "end": str(turn - 1),
            "startOffset": _utf16_units(text[:begin]),
            "endOffset": _utf16_units(text[: begin + len(span)]),
            "text": span,
            kind: chosen,
        }
        results.append(
            {"id": name, "from_name": control, "to_name": "dialogue", "type": kind, "value": value}
        )

    for utterance in dialogue.utterances:
        label = annotation.labels.get((dialogue.id, utterance.turn), TurnLabel(None, None))
        if label.emotion is None:
            continue
        name = f"emotion-{utterance.turn}"
        add(name, EMOTION, "paragraphlabels", utterance.turn, utterance.text, [label.emotion])
        if label.causes == () and label.emotion != NEUTRAL:
            add(name, NO_CAUSE, "choices", utterance.turn, utterance.text, ["no cause"])
        for cause in label.causes or ():
            effects.setdefault((cause.turn, cause.span), []).append(utterance.turn)
    for number, ((turn, span), turns) in enumerate(effects.items(), start=1):
        name = f"cause-{number}"
        add(name, CAUSE, "paragraphlabels", turn, span, [CAUSE])
        add(name, EFFECT, "choices", turn, span, [str(effect) for effect in turns])
    return results


def _utf16_units(text: str) -> int:
    return len(text.encode(_UTF16)) // 2


class _Found(BaseModel):
    """A part of an export. Label Studio adds keys from version to version; these are the ones that count."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Value(_Found):
    start: int
    end: int
    startOffset: int
    endOffset: int
    text: str | None = None
    paragraphlabels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


class _Result(_Found):
    id: str
    from_name: str
    value: _Value


class _User(_Found):
    id: int
    email: str | None = None


class _Annotated(_Found):
    id: int
    completed_by: _User | int | None
    was_cancelled: bool = False
    updated_at: datetime
    result: tuple[dict[str, Any], ...]

    @field_validator("updated_at")
    @classmethod
    def _in_utc(cls, value: datetime) -> datetime:
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)


class _Utterance(_Found):
    text: str


class _Data(_Found):
    dialogue_id: str
    dialogue: tuple[_Utterance, ...]


class _Task(_Found):
    id: int
    data: _Data
    annotations: tuple[_Annotated, ...]


def is_export(value: Any, path: Path) -> bool:
    """True for the JSON of a Label Studio export. Raises PredictionError for its other files, which hold less."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    first = value[0].keys()
    if {"annotation_id", "annotator", "dialogue_id"} <= first:
        raise PredictionError(
            f"{path}: is Label Studio's JSON-MIN, which lacks regions; export the project as JSON"
        )
    if "data" in first and "annotations" not in first:
        raise PredictionError(
            f"{path}: holds tasks without annotations; in Label Studio, export the project as JSON"
        )
    return {"data", "annotations"} <= first


def decisions_of_export(
    value: Sequence[Any], path: Path, project: Project, annotator: str | None, names: Mapping[str, str]
) -> list[Decisions]:
    """What each annotator decided. Skipped annotations, and all but an annotator's newest of a dialogue, are left out.

    `names` gives annotators by Label Studio's number or e-mail address; `annotator` names the only one of the file.
    Where neither says who it is, the e-mail address does, up to its @. An emotional turn without causes has open ones,
    unless `no_cause` says that there are none. Raises PredictionError, one line, for what does not fit the project.
    """
    tasks = [_checked(_Task, item, f"{path}, entry {number}") for number, item in enumerate(value, start=1)]
    who = _annotators(
        [each.completed_by for task in tasks for each in task.annotations], path, annotator, names
    )
    newest: dict[str, dict[str, tuple[_Annotated, str]]] = {}
    older: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for task in tasks:
        place = f"{path}, task {task.id}"
        dialogue = project.dialogues.get(task.data.dialogue_id)
        if dialogue is None:
            raise PredictionError(
                f"{place}: the dialogue {shorten(task.data.dialogue_id)} is not in this project; import the file into "
                "the project whose dialogues Label Studio has"
            )
        if [u.text for u in task.data.dialogue] != [u.text for u in dialogue.utterances]:
            raise PredictionError(f"{place}: the dialogue {dialogue.id} has other texts than in this project")
        for found in task.annotations:
            name = who[_user_key(found.completed_by)]
            done = newest.setdefault(name, {})
            if found.was_cancelled:
                skipped[name] += 1
                continue
            other = done.get(dialogue.id)
            older[name] += other is not None
            if other is None or other[0].updated_at <= found.updated_at:
                done[dialogue.id] = found, place
    read = []
    faults = []
    for name, done in newest.items():
        lines: list[ReviewedTurn] = []
        for dialogue in project.dialogues.values():
            if dialogue.id in done:
                try:
                    lines += _turns(*done[dialogue.id], name, dialogue, project)
                except PredictionError as error:
                    faults.append(error)
        left_out = [(older[name], "older than another of the same dialogue"), (skipped[name], "skipped")]
        note = ", ".join(f"{number} {reason}" for number, reason in left_out if number)
        read.append(Decisions(name, lines, f" (annotations left out: {note})" if note else ""))
    if len(faults) > 1:
        raise PredictionError(f"{faults[0]}; further annotations with faults: {len(faults) - 1:,}")
    if faults:
        raise faults[0]
    return read


def _checked(kind: Any, item: Any, place: str) -> Any:
    try:
        return kind.model_validate(item)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "the entry"
        raise PredictionError(
            f"{place}: {field_name}: {first['msg']}, expected Label Studio's JSON export of the tasks that kdecs wrote"
        ) from None


def _user_key(user: _User | int | None) -> str:
    """What `--annotator` calls a user by: the number, since exports from the browser hold nothing else."""
    if user is None:
        return "deleted"
    return str(user.id if isinstance(user, _User) else user)


def _annotators(
    users: Sequence[_User | int | None], path: Path, annotator: str | None, names: Mapping[str, str]
) -> dict[str, str]:
    """The annotator's name by the key of each user."""
    counts = Counter(_user_key(user) for user in users)
    if not counts:
        raise PredictionError(
            f"{path}: holds no annotations; export the project when somebody has submitted some"
        )
    if annotator is not None and len(counts) == 1:
        return dict.fromkeys(counts, annotator)
    emails = {_user_key(user): user.email or "" for user in users if isinstance(user, _User)}
    named = {key: names.get(key) or names.get(emails.get(key, "")) for key in counts}
    found = {key: name or emails.get(key, "").partition("@")[0] for key, name in named.items()}
    unknown = [key for key, name in found.items() if not name]
    if annotator is not None or unknown:
        listed = ", ".join(f"{key} ({count:,} annotations)" for key, count in sorted(counts.items()))
        options = " ".join(f"--annotator {key}=NAME" for key in sorted(unknown or counts))
        raise PredictionError(
            f"{path}: holds the annotations of these users of Label Studio: {listed}; say who they are with {options}"
        )
    for key, name in found.items():
        if named[key] is None and list(found.values()).count(name) > 1:
            raise PredictionError(
                f"{path}: {emails[key]} and another user of Label Studio would both be {name}; say who each of them "
                f"is, with --annotator {emails[key]}=NAME"
            )
    return found


def _turns(
    annotation: _Annotated, task_place: str, name: str, dialogue: Dialogue, project: Project
) -> Iterator[ReviewedTurn]:
    """The decisions of an annotation about the turns of its dialogue, in order."""
    place = f"{task_place}, annotation {annotation.id} of {name}, dialogue {dialogue.id}"
    emotions: dict[int, str] = {}
    unexplained: set[int] = set()
    spans: dict[str, tuple[int, str]] = {}
    effects: dict[str, list[int]] = {}
    for number, item in enumerate(annotation.result, start=1):
        # Relations, which people may draw between regions, have no control and say nothing here.
        control = item.get("from_name")
        if control is None:
            continue
        if control not in (EMOTION, CAUSE, EFFECT, NO_CAUSE):
            raise PredictionError(
                f"{place}: a label of {shorten(control)}, expected one of {EMOTION}, {CAUSE}, {EFFECT} and {NO_CAUSE}; "
                "give the project in Label Studio the labelling configuration that kdecs wrote beside the tasks"
            )
        result = _checked(_Result, item, f"{place}, result {number}")
        turn, span = _marked(result.value, dialogue, f"{place}, result {number}")
        if control == EMOTION:
            for emotion in result.value.paragraphlabels:
                if emotions.setdefault(turn, emotion) != emotion:
                    raise PredictionError(
                        f"{place}: turn {turn} is {emotions[turn]} and {emotion}, expected one emotion for each turn"
                    )
        elif control == CAUSE:
            spans[result.id] = turn, span.strip()
        elif control == NO_CAUSE and result.value.choices:
            unexplained.add(turn)
        elif control == EFFECT:
            effects[result.id] = [
                int(c) if re.fullmatch("[0-9]{1,9}", c) else 0 for c in result.value.choices
            ]
    causes: dict[int, list[dict[str, Any]]] = {}
    for region, (turn, span) in spans.items():
        if not effects.get(region):
            raise PredictionError(
                f"{place}: the cause {shorten(span)} in turn {turn} belongs to no emotion; in Label Studio, choose the "
                "turns whose emotion it caused"
            )
        for effect in effects[region]:
            if effect not in emotions:
                raise PredictionError(
                    f"{place}: the cause {shorten(span)} in turn {turn} belongs to turn {effect}, which has no "
                    "emotion; mark one there, or choose another turn"
                )
            if effect in unexplained:
                raise PredictionError(
                    f"{place}: turn {effect} has causes and the choice that it has none, expected one of the two"
                )
            cause = {"turn": turn, "span": span}
            if cause not in causes.setdefault(effect, []):
                causes[effect].append(cause)
    config = project.config
    for turn, emotion in sorted(emotions.items()):
        named = sorted(causes.get(turn, []), key=lambda cause: cause["turn"])
        is_decided = named or emotion == NEUTRAL or turn in unexplained
        line = {
            "dialogue_id": dialogue.id,
            "turn": turn,
            "emotion": emotion,
            "causes": named if is_decided else None,
            "at": annotation.updated_at.replace(tzinfo=None).isoformat() + "Z",
        }
        yield checked_turn(line, place, project.dialogues, config.labels, config.causes_after)


def _marked(value: _Value, dialogue: Dialogue, place: str) -> tuple[int, str]:
    """The turn of a region and its words. Raises PredictionError for a region that is not within one turn."""
    turn = value.start + 1
    if value.end != value.start:
        raise PredictionError(
            f"{place}: a region from turn {turn} to turn {value.end + 1}, expected words of one turn; mark each turn's "
            "words by themselves"
        )
    if not 1 <= turn <= len(dialogue.utterances):
        raise PredictionError(f"{place}: turn {turn}, expected one from 1 to {len(dialogue.utterances)}")
    text = dialogue.utterances[turn - 1].text
    units = text.encode(_UTF16)
    begin, end = 2 * value.startOffset, 2 * value.endOffset
    if not 0 <= begin <= end <= len(units):
        raise PredictionError(
            f"{place}: the words from {value.startOffset} to {value.endOffset} of turn {turn}, expected them within "
            f"its {len(units) // 2} characters"
        )
    try:
        span = units[begin:end].decode(_UTF16)
    except UnicodeDecodeError:
        raise PredictionError(
            f"{place}: a region of turn {turn} cuts a character in two; offsets are in UTF-16 units"
        ) from None
    # A browser shows several spaces as one.
    if value.text is not None and value.text.split() != span.split():
        raise PredictionError(
            f"{place}: the offsets of a region in turn {turn} mark {shorten(span)} and its text is "
            f"{shorten(value.text)}, expected the same words; offsets are in UTF-16 units"
        )
    return turn, span
