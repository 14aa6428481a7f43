"""One corpus of the labels of several annotators, by the paper's rules, with where each label comes from.

Emotion: the label that more than half of the voters give. Where people labelled a turn they vote, elsewhere the models.

Causes of an emotional turn: decided by the voters who find it emotional and decided its causes. A turn is a cause if
more than half of them name it, and its span is found in the order of the annotators:

1. The first two spans are the candidates. If their intersection is at least half of the shorter one, in characters, the
   span is their union.
2. Otherwise the next annotator decides between the two: for the one candidate that goes with the annotator's own span
   by the same rule. If none of the others decides, the turn's causes stay open.

Source: Chen et al. 2024, "Corpus Construction"; which two annotators come first is not said there.

The sidecar has one JSON object per turn: what was decided, and every vote with its annotator, the model if it is one,
the time, and the sha256 of the call that gave it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdecs.annotate.agreement import decided_causes, majority
from kdecs.annotate.labels import Annotation, TurnKey
from kdecs.corpus.checking import EVIDENCE_KEY, OUTSIDE, SPAN_KEY
from kdecs.corpus.schema import NEUTRAL, Dialogue, Evidence
from kdecs.evaluation.rows import squad_f1


@dataclass(frozen=True)
class Conflict:
    """What the voters leave open: the emotion or the causes of a turn, and why."""

    dialogue_id: str
    turn: int
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.dialogue_id}/{self.turn}: {self.what}: {self.why}"


@dataclass
class Decision:
    """What was decided about a turn. The emotion and the causes are None where they are open."""

    emotion: str | None = None
    causes: dict[int, str] | None = None
    voters: list[Annotation] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)


def merge(annotations: Sequence[Annotation], dialogues: Mapping[str, Dialogue]) -> dict[TurnKey, Decision]:
    """The decision about every turn; annotators have their say in the order given."""
    return {
        (dialogue.id, utterance.turn): _decide((dialogue.id, utterance.turn), annotations, dialogue)
        for dialogue in dialogues.values()
        for utterance in dialogue.utterances
    }


def _decide(key: TurnKey, annotations: Sequence[Annotation], dialogue: Dialogue) -> Decision:
    def conflict(what: str, why: str) -> None:
        decision.conflicts.append(Conflict(*key, what, why))

    knowing = [each for each in annotations if key in each.labels and each.labels[key].emotion is not None]
    people = [each for each in knowing if each.kind == "person"]
    decision = Decision(voters=people or knowing)
    votes = {each.name: each.labels[key].emotion for each in decision.voters}
    if not votes:
        conflict("emotion", "nobody labelled it")
        return decision
    decision.emotion = majority(list(votes.values()))
    if decision.emotion is None:
        conflict("emotion", ", ".join(f"{name} {label}" for name, label in votes.items()))
        return decision
    if decision.emotion == NEUTRAL:
        return decision
    named = {
        each.name: causes
        for each in decision.voters
        if (causes := decided_causes(each.labels[key])) is not None
    }
    if not named:
        conflict("causes", "nobody decided them")
        return decision
    decided: dict[int, str] = {}
    for turn in sorted({turn for causes in named.values() for turn in causes}):
        spans = {name: causes[turn] for name, causes in named.items() if turn in causes}
        if 2 * len(spans) < len(named):
            continue
        if 2 * len(spans) == len(named):
            conflict("causes", f"turn {turn} is a cause to {', '.join(spans)} of {', '.join(named)}")
            continue
        span = decide_span(dialogue.utterances[turn - 1].text, list(spans.values()))
        if span is None:
            shown = ", ".join(
                f"{name} {json.dumps(text, ensure_ascii=False)}" for name, text in spans.items()
            )
            conflict("causes", f"spans in turn {turn}: {shown}")
        else:
            decided[turn] = span
    if not decision.conflicts:
        decision.causes = decided
    return decision


def decide_span(text: str, spans: Sequence[str]) -> str | None:
    """The span that the annotators' spans in a turn amount to, in their order; None if they leave it open."""
    first, *others = spans
    if not others:
        return first
    second, *deciders = others
    if (union := union_of(text, first, second)) is not None:
        return union
    for decider in deciders:
        chosen = [each for each in (first, second) if union_of(text, each, decider) is not None]
        if len(chosen) == 1:
            return chosen[0]
    return None


def union_of(text: str, first: str, second: str) -> str | None:
    """The union of two spans of a text if their intersection is at least half of the shorter one, else None.

    Of a span that occurs several times, the place counts that shares most with the other one.
    """
    best: tuple[int, int, int] | None = None
    for start in _places(text, first):
        for other in _places(text, second):
            end, other_end = start + len(first), other + len(second)
            shared = min(end, other_end) - max(start, other)
            if best is None or shared > best[0]:
                best = shared, min(start, other), max(end, other_end)
    if best is None or 2 * best[0] < min(len(first), len(second)):
        return None
    return text[best[1] : best[2]]


def _places(text: str, span: str) -> Iterator[int]:
    start = text.find(span)
    while start >= 0:
        yield start
        start = text.find(span, start + 1)


def merged_dialogues(
    decisions: Mapping[TurnKey, Decision], dialogues: Mapping[str, Dialogue]
) -> Iterator[tuple[Dialogue, list[dict[str, Any]]]]:
    """The labelled dialogues, each with its utterances in RECCON's schema, as DialogueWriter takes them.

    A dialogue with an open emotion is left out, since a corpus has an emotion for every utterance. Open causes leave
    out the keys of causes, so that nothing is scored or learnt about them. A cause that the dialogue does not say is
    RECCON's "b".
    """
    for dialogue in dialogues.values():
        decided = [decisions[dialogue.id, utterance.turn] for utterance in dialogue.utterances]
        if any(decision.emotion is None for decision in decided):
            continue
        raw = []
        for utterance, decision in zip(dialogue.utterances, decided, strict=True):
            values: dict[str, Any] = {
                "turn": utterance.turn,
                "speaker": utterance.speaker,
                "utterance": utterance.text,
                "emotion": decision.emotion,
            }
            if decision.causes is not None:
                values[EVIDENCE_KEY] = list(decision.causes) or [OUTSIDE]
                values[SPAN_KEY] = list(decision.causes.values()) or [OUTSIDE]
            raw.append(values)
        labelled = tuple(
            replace(utterance, emotion=decision.emotion, evidence=_evidence(decision.causes))
            for utterance, decision in zip(dialogue.utterances, decided, strict=True)
        )
        yield replace(dialogue, utterances=labelled), raw


def _evidence(causes: Mapping[int, str] | None) -> tuple[Evidence, ...] | None:
    if causes is None:
        return None
    return tuple(Evidence(turn, span) for turn, span in causes.items()) or (Evidence(None, None),)


def provenance(decisions: Mapping[TurnKey, Decision]) -> Iterator[dict[str, Any]]:
    """A line of the sidecar for each turn."""
    for (dialogue_id, turn), decision in decisions.items():
        votes = []
        for voter in decision.voters:
            label = voter.labels[dialogue_id, turn]
            votes.append(
                {
                    "annotator": voter.name,
                    "kind": voter.kind,
                    "model": voter.model,
                    "emotion": label.emotion,
                    "causes": _causes_of(decided_causes(label)),
                    "at": label.at,
                    "emotion_call": label.emotion_call,
                    "causes_call": label.causes_call,
                }
            )
        yield {
            "dialogue_id": dialogue_id,
            "turn": turn,
            "emotion": decision.emotion,
            "causes": _causes_of(decision.causes),
            "open": [conflict.what for conflict in decision.conflicts],
            "votes": votes,
        }


def _causes_of(causes: Mapping[int, str] | None) -> list[dict[str, Any]] | None:
    return None if causes is None else [{"turn": turn, "span": span} for turn, span in causes.items()]


def accuracies(
    annotations: Sequence[Annotation], decisions: Mapping[TurnKey, Decision]
) -> list[dict[str, Any]]:
    """How often each annotator has the merged emotion, cause turns and spans. A voter shares in the decision."""
    rows = []
    for each in annotations:
        num_turns = num_right = num_votes = num_named = num_both = num_exact = 0
        overlap = 0.0
        for key, decision in decisions.items():
            label = each.labels.get(key)
            if label is None or label.emotion is None or decision.emotion is None:
                continue
            num_turns += 1
            num_votes += any(voter is each for voter in decision.voters)
            num_right += label.emotion == decision.emotion
            causes = decided_causes(label)
            if causes is None or decision.causes is None:
                continue
            num_named += len(causes) + len(decision.causes)
            for turn in causes.keys() & decision.causes.keys():
                num_both += 1
                num_exact += causes[turn] == decision.causes[turn]
                overlap += squad_f1(decision.causes[turn], causes[turn])
        rows.append(
            {
                "annotator": each.name,
                "kind": each.kind,
                "turns": num_turns,
                "voted": num_votes,
                "emotion_accuracy": num_right / num_turns if num_turns else None,
                "cause_turn_f1": 2 * num_both / num_named if num_named else None,
                "spans": num_both,
                "exact": num_exact / num_both if num_both else None,
                "token_f1": overlap / num_both if num_both else None,
            }
        )
    return rows
