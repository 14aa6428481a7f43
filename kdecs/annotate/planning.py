"""What the calls of a run that are still to be made need: their number, tokens and price, before the first call.

The first question of each dialogue is known. The second depends on the answer to the first, and a question that is
asked again on a faulty answer. So the second one is estimated as if every turn were emotional and had one cause, its
own words, and repeated questions are not counted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdecs.annotate.project import Project, RunSettings
from kdecs.annotate.prompts import Step, causes_prompt
from kdecs.annotate.running import Call, LabelRecord, find_answer, label_dialogue
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.endpoint.client import Endpoint, estimate_tokens, price_of


@dataclass(frozen=True)
class StepPlan:
    """The calls of one kind: how many, how many of them depend on answers to come, their tokens and price."""

    run: str
    step: Step
    num_calls: int
    num_estimated: int
    prompt_tokens: int
    answer_tokens: int
    price: float | None

    def as_dict(self) -> dict[str, Any]:
        """The values of a row in `kdecs annotate plan --json`."""
        return dict(vars(self))


def plan_run(
    project: Project, name: str, settings: RunSettings, prices: tuple[float, float] | None
) -> list[StepPlan]:
    """The calls that a run still has to make, by question."""
    endpoint = Endpoint(
        "", settings.model, max_answer_tokens=settings.max_answer_tokens, options=settings.options
    )
    record = LabelRecord(project.run_folder(name) / "answers.jsonl")
    rows = {step: StepPlan(name, step, 0, 0, 0, 0, None) for step in ("emotions", "causes")}

    def add(step: Step, prompt: str, answer: str, *, is_estimated: bool) -> None:
        row = rows[step]
        tokens = min(estimate_tokens(answer), settings.max_answer_tokens)
        rows[step] = replace(
            row,
            num_calls=row.num_calls + 1,
            num_estimated=row.num_estimated + is_estimated,
            prompt_tokens=row.prompt_tokens + estimate_tokens(prompt),
            answer_tokens=row.answer_tokens + tokens,
        )

    longest = max(project.config.labels, key=len)
    for dialogue in project.dialogues.values():
        labelled = label_dialogue(
            project, settings, dialogue, lambda call: find_answer(record, call, endpoint)
        )
        emotions = {turn: label for turn, (label, _) in labelled.emotions.items()}
        all_emotional = {u.turn: _emotional(emotions.get(u.turn), longest) for u in dialogue.utterances}
        pending = labelled.pending
        if pending is None:
            continue
        if pending.step == "emotions":
            add("emotions", _said(pending), _emotions_answer(dialogue, longest), is_estimated=False)
            prompt = causes_prompt(dialogue, all_emotional, project.config.causes_after)
            add("causes", prompt, _causes_answer(dialogue, all_emotional), is_estimated=True)
        else:
            targets = {turn: emotions[turn] for turn in labelled.targets}
            add("causes", _said(pending), _causes_answer(dialogue, targets), is_estimated=False)
    return [
        replace(row, price=price_of(row.prompt_tokens, row.answer_tokens, prices)) for row in rows.values()
    ]


def _said(call: Call) -> str:
    return "".join((call.text, *call.more))


def _emotional(label: str | None, otherwise: str) -> str:
    return otherwise if label in (None, NEUTRAL) else str(label)


def _emotions_answer(dialogue: Dialogue, label: str) -> str:
    return json.dumps({"emotions": [{"turn": u.turn, "emotion": label} for u in dialogue.utterances]})


def _causes_answer(dialogue: Dialogue, emotions: Mapping[int, str]) -> str:
    targets = [
        {"target": turn, "causes": [{"turn": turn, "span": dialogue.utterances[turn - 1].text}]}
        for turn in emotions
    ]
    return json.dumps({"targets": targets}, ensure_ascii=False)
