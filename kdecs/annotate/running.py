"""A model labels the dialogues of a project: two questions per dialogue, asked again after a faulty answer.

One function, `label_dialogue`, walks through the questions of a dialogue. To run is to walk and make the calls that are
not recorded; to plan is to walk and stop at the first of them; to read the labels is to walk over the record. So a run
that was stopped at any point repeats no call that was answered, and labels never disagree with the answers.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from kdecs.annotate.labels import (
    Annotation,
    TurnKey,
    TurnLabel,
    annotation_of_person,
    read_reviews,
)
from kdecs.annotate.project import Project, RunSettings
from kdecs.annotate.prompts import (
    FAULTS,
    Reading,
    Step,
    answer_schema,
    causes_prompt,
    emotional,
    emotions_prompt,
    read_causes,
    read_emotions,
    repeated_question,
)
from kdecs.artifact import file_lock, read_record, write_json
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.endpoint.client import (
    Ask,
    Endpoint,
    Failure,
    main_reason,
    price_of,
    work_through,
)
from kdecs.endpoint.record import CallRecord, RecordedCall, call_hash
from kdecs.errors import ConfigError, EndpointError
from kdecs.process import ProgressBar, StopSignal

# What servers answer that do not know a key of the request, or not this value of it.
_REFUSED_SCHEMA = (400, 415, 422, 501)
_MOST_SHOWN_ANSWER = 20_000  # characters of a faulty answer that a repeated question quotes


class LabelCall(RecordedCall):
    """One answer about a dialogue, and when it came (UTC)."""

    dialogue_id: str
    step: Step
    attempt: PositiveInt
    at: str


class LabelRecord(CallRecord[LabelCall]):
    """The answers of a run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, LabelCall)


@dataclass(frozen=True)
class Call:
    """A question about a dialogue: its text, and the schema of the answer if there is one to send.

    `more` is empty, or holds a faulty answer and the message that names its faults.
    """

    dialogue_id: str
    step: Step
    attempt: int
    text: str
    more: tuple[str, ...]
    schema: Mapping[str, Any] | None

    def bodies(self, endpoint: Endpoint) -> list[dict[str, Any]]:
        """The requests that ask it, the preferred one first: with the schema, if there is one, and without."""
        said = [
            {"role": role, "content": text}
            for role, text in zip(("assistant", "user"), self.more, strict=False)
        ]
        plain = endpoint.body(self.text, *said)
        with_schema = endpoint.body(self.text, *said, response_format=self.schema)
        return [plain] if with_schema == plain else [with_schema, plain]


@dataclass
class DialogueLabels:
    """What the answers about a dialogue amount to. `pending` is the first call that is not answered."""

    emotions: dict[int, tuple[str, LabelCall]] = field(default_factory=dict)
    targets: tuple[int, ...] = ()
    causes: dict[int, tuple[Any, LabelCall]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    pending: Call | None = None


def label_dialogue(
    project: Project, settings: RunSettings, dialogue: Dialogue, answered: Callable[[Call], LabelCall | None]
) -> DialogueLabels:
    """Walk through the questions of a dialogue as far as `answered` knows an answer.

    A label comes from the latest answer that has a usable one for its turn. What no answer settles stays open.
    """
    config, labelled = project.config, DialogueLabels()

    def ask(step: Step, text: str, read: Callable[[str], Reading[Any]], found: dict[int, Any]) -> None:
        schema = answer_schema(step, dialogue, config.labels) if settings.answers == "schema" else None
        more: tuple[str, ...] = ()
        asked = set()
        for attempt in range(1, settings.repeats + 2):
            call = Call(dialogue.id, step, attempt, text, more, schema)
            # The same faulty answer twice makes the same question twice, which has the same answer again.
            if more in asked:
                return
            asked.add(more)
            if (answer := answered(call)) is None:
                labelled.pending = call
                return
            reading = read(answer.text)
            labelled.faults += reading.kinds
            found.update({turn: (label, answer) for turn, label in reading.found.items()})
            if not reading.faults:
                return
            more = (
                answer.text[:_MOST_SHOWN_ANSWER] or "(no answer)",
                repeated_question(reading.faults),
            )

    ask(
        "emotions",
        emotions_prompt(dialogue, config.labels),
        lambda text: read_emotions(text, dialogue, config.labels),
        labelled.emotions,
    )
    emotions = {turn: label for turn, (label, _) in labelled.emotions.items()}
    labelled.targets = tuple(emotional(emotions))
    if labelled.pending is None and labelled.targets:
        ask(
            "causes",
            causes_prompt(dialogue, emotions, config.causes_after),
            lambda text: read_causes(text, dialogue, labelled.targets, config.causes_after),
            labelled.causes,
        )
    return labelled


@dataclass(frozen=True)
class Run:
    """A run of a model: its name, what it asks with, and its record."""

    project: Project
    name: str
    settings: RunSettings
    record: LabelRecord

    @classmethod
    def open(cls, project: Project, name: str) -> "Run":
        """A run that has begun. Raises ConfigError for a name that none has."""
        path = project.run_folder(name) / "run.json"
        if not path.is_file():
            known = ", ".join(project.run_names) or "none yet; start one with: kdecs annotate run"
            raise ConfigError(f"{name}: no such run in {project.root}; the runs are: {known}")
        settings = read_record(RunSettings, path, "start the run again under another name")
        return cls(project, name, settings, LabelRecord(path.with_name("answers.jsonl")))

    @classmethod
    def start(cls, project: Project, name: str, settings: RunSettings) -> "Run":
        """Begin a run or go on with it. Raises ConfigError if it was begun with settings of other answers."""
        path = project.run_folder(name) / "run.json"
        with file_lock(path.with_name(".run.json.lock")):
            begun = cls.open(project, name).settings if path.is_file() else settings
            for key in ("model", "max_answer_tokens", "answers", "options"):
                was, asked_for = getattr(begun, key), getattr(settings, key)
                if was != asked_for:
                    raise ConfigError(
                        f"{path.parent}: was begun with {key} {was!r}, and {asked_for!r} is asked for now; give a run "
                        "with other settings another name, with --run NAME"
                    )
            write_json(path, settings.model_dump())
        return cls.open(project, name)

    def endpoint(self, **connection: Any) -> Endpoint:
        """The server and model of the run. `connection` has the key, the limits and the time-outs."""
        settings = self.settings
        return Endpoint(
            settings.base_url or "",
            settings.model,
            max_answer_tokens=settings.max_answer_tokens,
            options=settings.options,
            **connection,
        )

    def labels(self) -> dict[str, DialogueLabels]:
        """What the recorded answers amount to, by dialogue."""
        endpoint = self.endpoint()
        return {
            dialogue.id: label_dialogue(
                self.project, self.settings, dialogue, lambda call: find_answer(self.record, call, endpoint)
            )
            for dialogue in self.project.dialogues.values()
        }


def find_answer(record: LabelRecord, call: Call, endpoint: Endpoint) -> LabelCall | None:
    """The recorded answer to a question, with or without the schema."""
    for body in call.bodies(endpoint):
        # Whoever gave it: a server may move to another address.
        if (answer := record.find(_Hashed(call_hash(body), call), None)) is not None:
            return answer
    return None


@dataclass(frozen=True)
class _Hashed:
    call: str
    of: Call

    def __str__(self) -> str:
        return f"the {self.of.step} of {self.of.dialogue_id}"


def run_model(
    run: Run, endpoint: Endpoint, stop: StopSignal, *, prices: tuple[float, float] | None
) -> dict[str, DialogueLabels]:
    """Label every dialogue and return all labels of the run.

    Each answer is recorded as it comes, a failure never. Raises EndpointError if calls failed, Stopped after a stop
    signal, PredictionError if another process works on the same run.
    """
    # Set once a server has refused the schema and answered without it.
    schema_is_refused = threading.Event()
    record, project = run.record, run.project
    used, lock = Usage(0, 0, 0), threading.Lock()

    def make_call(call: Call, ask: Ask) -> LabelCall | None:
        if (answer := find_answer(record, call, endpoint)) is not None:
            return answer
        preferred, *others = call.bodies(endpoint)
        body = others[0] if others and schema_is_refused.is_set() else preferred
        try:
            reply = ask(body)
        except Failure as failure:
            if failure.status not in _REFUSED_SCHEMA or not others or body is not preferred:
                raise
            body = others[0]
            reply = ask(body)
            if reply is not None:
                schema_is_refused.set()
        if reply is None:
            return None
        row = LabelCall(
            call=call_hash(body),
            source=endpoint.base_url,
            text=reply.text,
            prompt_tokens=reply.prompt_tokens,
            answer_tokens=reply.answer_tokens,
            dialogue_id=call.dialogue_id,
            step=call.step,
            attempt=call.attempt,
            at=now(),
        )
        record.add([row])
        nonlocal used
        with lock:
            used += Usage.of([row])
        return row

    def work(dialogue: Dialogue, ask: Ask) -> None:
        label_dialogue(project, run.settings, dialogue, lambda call: make_call(call, ask))

    with record.recording():
        used = Usage.of(record.answers())
        pending = [
            project.dialogues[name] for name, found in run.labels().items() if found.pending is not None
        ]
        num_all = len(project.dialogues)
        with ProgressBar(num_all, initial=num_all - len(pending), desc="label", unit="dialogue") as bar:

            def show(num_failed: int) -> None:
                cost = "unknown" if prices is None else f"${used.price(prices):.2f}"
                bar.update(failed=str(num_failed), cost=cost)

            failures = work_through(endpoint, pending, work, stop, on_done=show)
    labelled = run.labels()
    num_left = sum(found.pending is not None for found in labelled.values())
    kept = f"{num_all - num_left:,} of {num_all:,} dialogues are labelled in {record.path.parent}"
    stop.raise_if_requested(f"stopped: {kept}; run the same command again to label the others")
    if failures:
        reason = main_reason(failures)
        remedy = "put this right and " if reason.ends_all else ""
        raise EndpointError(
            f"{endpoint.base_url}: the calls about {len(failures)} dialogues failed ({reason}); {kept}; {remedy}run "
            "the same command again to label the others"
        )
    return labelled


def now() -> str:
    """This moment in UTC, as every file of a project writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Usage:
    """Calls that were answered, and their tokens by the server's count."""

    num_calls: int
    prompt_tokens: int
    answer_tokens: int

    @classmethod
    def of(cls, answers: Iterable[LabelCall]) -> "Usage":
        """The use of these answers."""
        answers = list(answers)
        return cls(
            len(answers),
            sum(answer.prompt_tokens or 0 for answer in answers),
            sum(answer.answer_tokens or 0 for answer in answers),
        )

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.num_calls + other.num_calls,
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
        )

    def price(self, prices: tuple[float, float] | None) -> float:
        """Dollars."""
        return price_of(self.prompt_tokens, self.answer_tokens, prices) or 0.0


def annotation_of_run(run: Run) -> Annotation:
    """The labels of a run: an open label is there with None, a turn that was not asked about yet is not."""
    labels: dict[TurnKey, TurnLabel] = {}
    for name, found in run.labels().items():
        dialogue = run.project.dialogues[name]
        is_asked = found.pending is None or found.pending.step == "causes"
        for utterance in dialogue.utterances if is_asked else ():
            turn = utterance.turn
            emotion, answer = found.emotions.get(turn, (None, None))
            causes, causes_answer = found.causes.get(turn, (None, None))
            if emotion == NEUTRAL:
                causes = ()
            labels[dialogue.id, turn] = TurnLabel(
                emotion,
                causes,
                answer.at if answer else None,
                answer.call if answer else None,
                causes_answer.call if causes_answer else None,
            )
    return Annotation(run.name, "model", labels, run.settings.model)


def read_annotations(project: Project, names: Sequence[str] = ()) -> list[Annotation]:
    """The labels of all annotators of a project, people first, or of those named.

    Raises ConfigError for a name that has no labels, or if nobody has any.
    """
    people, runs = project.reviewers, project.run_names
    if unknown := [name for name in names if name not in (*people, *runs)]:
        raise ConfigError(
            f"{unknown[0]}: has no labels in {project.root}; those who have: {', '.join((*people, *runs)) or 'nobody'}"
        )
    found = [
        annotation_of_person(
            name,
            read_reviews(
                project.review_file(name),
                project.dialogues,
                project.config.labels,
                project.config.causes_after,
            ),
        )
        for name in people
        if name in names or not names
    ]
    found += [annotation_of_run(Run.open(project, name)) for name in runs if name in names or not names]
    if not found:
        raise ConfigError(
            f"{project.root}: nobody has labelled anything yet; start with kdecs annotate run, or import a review"
        )
    return found


@dataclass(frozen=True)
class Summary:
    """What a run has reached, in counts."""

    name: str
    num_dialogues: int
    num_labelled: int
    num_turns: int
    num_open: int
    num_targets: int
    num_open_targets: int
    faults: Counter[str]
    usage: Usage

    @classmethod
    def of(cls, run: Run, labelled: Mapping[str, DialogueLabels]) -> "Summary":
        """The counts of a run's labels; open ones are those that no answer settled."""
        complete = [(name, found) for name, found in labelled.items() if found.pending is None]
        num_turns = sum(len(run.project.dialogues[name].utterances) for name, _ in complete)
        return cls(
            run.name,
            len(labelled),
            len(complete),
            num_turns,
            num_turns - sum(len(found.emotions) for _, found in complete),
            sum(len(found.targets) for _, found in complete),
            sum(len(found.targets) - len(found.causes.keys() & found.targets) for _, found in complete),
            sum((found.faults for found in labelled.values()), Counter[str]()),
            Usage.of(run.record.answers()),
        )

    def __str__(self) -> str:
        faults = ", ".join(f"{self.faults[kind]} × {kind}" for kind in FAULTS if self.faults[kind])
        return (
            f"{self.name}: {self.num_labelled:,} of {self.num_dialogues:,} dialogues; emotions of "
            f"{self.num_turns - self.num_open:,} turns, {self.num_open:,} open; causes of "
            f"{self.num_targets - self.num_open_targets:,} emotional turns, {self.num_open_targets:,} open; faults in "
            f"the answers: {faults or 'none'}; {self.usage.num_calls:,} calls, {self.usage.prompt_tokens:,} prompt "
            f"tokens and {self.usage.answer_tokens:,} answer tokens"
        )
