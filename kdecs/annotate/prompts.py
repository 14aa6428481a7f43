"""The two questions about a dialogue, the form of their answers, and what may be wrong with an answer.

The first question asks for the emotion of every turn, in the paper's own words (Chen et al. 2024, "Corpus
Construction"). The second shows those emotions and asks for the causes of each emotional turn:

    {"emotions": [{"turn": 1, "emotion": "worry"}, …]}
    {"targets": [{"target": 1, "causes": [{"turn": 1, "span": "the last bus"}]}, …]}

An answer is read strictly. A label counts only if it can be used as it stands; a target whose causes have one fault has
no causes at all, because the rest would pass for all of them. What is missing is asked again or left open.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from kdecs.corpus.checking import shorten
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.endpoint.answers import Cause, json_object, known_label, read_cause, turn_line

Step = Literal["emotions", "causes"]
FAULTS: dict[str, str] = {
    "not in the form": "no JSON object of the form that was asked for",
    "malformed entry": "an entry without exactly the keys that were asked for, or of other types",
    "unknown label": "an emotion that is not one of the labels",
    "no such turn": "a turn that the dialogue does not have",
    "turn twice": "a turn that has several entries; none of them counts",
    "missing turn": "a turn without an entry",
    "not asked": "the causes of a turn that was not asked about",
    "malformed cause": "a cause that is not an object with a whole number turn and a text span",
    "later turn": "a cause after the last turn that may be one",
    "repeated turn": "a turn that is named as a cause twice",
    "empty span": "a cause without words",
    "span not in the turn": "words that the named turn does not contain",
}
"""What may be wrong with an answer, by kind."""
_MOST_NAMED = 20  # faults that a repeated question names
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Reading(Generic[_Found]):
    """What is usable of an answer, by turn, and its faults: (kind, what a repeated question says about it)."""

    found: dict[int, _Found]
    faults: tuple[tuple[str, str], ...]

    @property
    def kinds(self) -> Counter[str]:
        """How many faults of each kind there are."""
        return Counter(kind for kind, _ in self.faults)


def emotions_prompt(dialogue: Dialogue, labels: Sequence[str]) -> str:
    """The question about the emotion of every turn."""
    return (
        "Identify the emotion in each turn of the following dialogue. The emotion labels can only be selected from the "
        f"following: {', '.join(labels)}.\n"
        f"Answer with JSON and nothing else, in this form, with each turn from 1 to {len(dialogue.utterances)} exactly "
        'once: {"emotions": [{"turn": 1, "emotion": "…"}]}\n'
        "The dialogue is as follows:\n" + "".join(f"{turn_line(u)}\n" for u in dialogue.utterances)
    )


def causes_prompt(dialogue: Dialogue, emotions: Mapping[int, str], after: int) -> str:
    """The question about the causes of the emotional turns; a turn without a known emotion is shown without one."""
    shown = "".join(
        f"{turn_line(u, f' ({emotions[u.turn]})' if u.turn in emotions else '')}\n"
        for u in dialogue.utterances
    )
    reach = f"at most {after} after it" if after else "the turn itself included"
    return (
        "In the following dialogue each turn is shown with the emotion of its speaker. For each of the turns "
        f"{', '.join(map(str, emotional(emotions)))} find the causes of its emotion: every turn (an earlier one, "
        f"{reach}) that explains the emotion, with the words of that turn that do so, copied exactly. If the dialogue "
        "does not say the cause, give an empty list.\n"
        "Answer with JSON and nothing else, in this form, with each of these turns exactly once as a target: "
        '{"targets": [{"target": 1, "causes": [{"turn": 1, "span": "…"}]}]}\n'
        f"The dialogue is as follows:\n{shown}"
    )


def emotional(emotions: Mapping[int, str]) -> list[int]:
    """The turns whose causes are asked for."""
    return [turn for turn in sorted(emotions) if emotions[turn] != NEUTRAL]


def repeated_question(faults: Sequence[tuple[str, str]]) -> str:
    """The message that names each fault of an answer and asks for the whole answer again."""
    named = [f"- {text}" for _, text in faults[:_MOST_NAMED]]
    if len(faults) > _MOST_NAMED:
        named.append(f"- and {len(faults) - _MOST_NAMED} more")
    return "\n".join(
        [
            "This answer cannot be used:",
            *named,
            "Give the whole answer again in the form that was asked for, without these faults and with nothing else.",
        ]
    )


def answer_schema(step: Step, dialogue: Dialogue, labels: Sequence[str]) -> dict[str, Any]:
    """The key `response_format` of a request, which makes servers that know it keep to the form."""
    turn = {"type": "integer", "enum": [u.turn for u in dialogue.utterances]}
    if step == "emotions":
        emotion = {"type": "string", "enum": list(labels)}
        schema = _object(emotions=_list_of(_object(turn=turn, emotion=emotion)))
    else:
        causes = _list_of(_object(turn=turn, span={"type": "string"}))
        schema = _object(targets=_list_of(_object(target=turn, causes=causes)))
    return {"type": "json_schema", "json_schema": {"name": step, "strict": True, "schema": schema}}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def read_emotions(text: str, dialogue: Dialogue, labels: Sequence[str]) -> Reading[str]:
    """The emotions of an answer by turn."""
    turns = [u.turn for u in dialogue.utterances]
    entries, faults = _entries(text, "emotions", {"turn", "emotion"}, turns, turns)
    found: dict[int, str] = {}
    for turn, entry in entries.items():
        if (label := known_label(entry["emotion"], labels)) is None:
            faults.append(
                (
                    "unknown label",
                    f"turn {turn}: {shorten(entry['emotion'])} is not one of {', '.join(labels)}",
                )
            )
        else:
            found[turn] = label
    return Reading(found, tuple(faults))


def read_causes(
    text: str, dialogue: Dialogue, targets: Sequence[int], after: int
) -> Reading[tuple[Cause, ...]]:
    """The causes of an answer by target."""
    turns = [u.turn for u in dialogue.utterances]
    entries, faults = _entries(text, "targets", {"target", "causes"}, turns, targets)
    found: dict[int, tuple[Cause, ...]] = {}
    for target, entry in entries.items():
        if not isinstance(entry["causes"], list):
            faults.append(("malformed entry", f"target {target}: causes must be a list"))
            continue
        causes: dict[int, Cause] = {}
        wrong = []
        for item in entry["causes"]:
            cause = read_cause(item, dialogue, target + after)
            if isinstance(cause, str):
                wrong.append((cause, f"target {target}, cause {_shown(item)}: {FAULTS[cause]}"))
            elif cause.turn in causes:
                wrong.append(("repeated turn", f"target {target}: turn {cause.turn} is named twice"))
            else:
                causes[cause.turn] = cause
        faults += wrong
        if not wrong:
            found[target] = tuple(causes[turn] for turn in sorted(causes))
    return Reading(found, tuple(faults))


def _entries(
    text: str, name: str, keys: set[str], turns: Sequence[int], wanted: Sequence[int]
) -> tuple[dict[int, dict[str, Any]], list[tuple[str, str]]]:
    """The entries of an answer's one list, by the turn that each is about, and what is wrong with the others."""
    value = json_object(text, {name})
    if value is None or not isinstance(value[name], list):
        return {}, [
            ("not in the form", f'the answer is no JSON object with the one key "{name}" and its list')
        ]
    about = "turn" if "turn" in keys else "target"
    faults: list[tuple[str, str]] = []
    entries: dict[int, dict[str, Any]] = {}
    counts: Counter[int] = Counter()
    for entry in value[name]:
        # Not isinstance: true is an int to Python.
        if not isinstance(entry, dict) or entry.keys() != keys or type(entry[about]) is not int:
            faults.append(
                ("malformed entry", f"the entry {_shown(entry)} has not exactly the keys asked for")
            )
        elif entry[about] not in turns:
            faults.append(("no such turn", f"there is no turn {shorten(entry[about])}"))
        elif entry[about] not in wanted:
            faults.append(("not asked", f"turn {entry[about]} was not asked about"))
        else:
            counts[entry[about]] += 1
            entries[entry[about]] = entry
    faults += [("turn twice", f"turn {turn} has {n} entries") for turn, n in counts.items() if n > 1]
    faults += [("missing turn", f"turn {turn} is missing") for turn in wanted if turn not in counts]
    return {turn: entry for turn, entry in entries.items() if counts[turn] == 1}, faults


def _shown(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False, default=str)[:120]
