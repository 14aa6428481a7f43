"""The question that a generative language model is asked about a target, and the fixed form of its answer.

An answer is one line of JSON: the target's emotion, and the turns that cause it, each with the words that say so.

    {"emotion": "happiness", "causes": [{"turn": 2, "span": "we won"}, {"turn": 3, "span": "I scored"}]}

A fine-tuned LLaMA and a model behind an endpoint get the same question and are read by the same parser. It is strict:
it looks for a span inside the named turn alone, because a sentence may occur in a dialogue twice, and it repairs
nothing. What it cannot use is counted by kind (`FAULTS`), and a pair without a usable cause counts as no cause.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdecs.corpus.pairs import causes_of
from kdecs.corpus.schema import ADDITIONAL_EMOTIONS, COARSE_EMOTIONS, FINE_EMOTIONS, NEUTRAL, Dialogue
from kdecs.endpoint.answers import Cause, json_object, known_label, one_line, read_cause, turn_line
from kdecs.evaluation.predictions import Prediction

ANSWER_VERSION = 1
"""Version of the question's wording and the answer's form: part of a training's config hash."""

FAULTS: dict[str, str] = {
    "not in the form": "no JSON object with exactly the keys emotion and causes",
    "unknown emotion": "an emotion that is not one of the labels asked for",
    "malformed cause": "a cause that is not an object with a whole number turn and a text span",
    "no such turn": "a turn that the dialogue does not have",
    "later turn": "a turn after the target",
    "repeated turn": "a turn that the answer has named before; the first one counts",
    "empty span": "a cause without words",
    "span not in the turn": "words that the named turn does not contain",
}
"""What may be wrong with an answer, by kind."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The emotion of a target (None: the model named no known one) and its causes."""

    emotion: str | None
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What is usable of an answer, and the kinds of the faults in the rest."""

    answer: Answer
    faults: tuple[str, ...] = ()


def labels_of(dialogues: Iterable[Dialogue]) -> tuple[str, ...]:
    """The emotions that occur in a corpus, in the order of the schema: the labels that a question offers."""
    found = {utterance.emotion for dialogue in dialogues for utterance in dialogue.utterances}
    known = dict.fromkeys((*COARSE_EMOTIONS, *ADDITIONAL_EMOTIONS, *FINE_EMOTIONS))
    others = sorted(label for label in found if label is not None and label not in known)
    return tuple(label for label in known if label in found) + tuple(others)


def instruction(labels: Sequence[str]) -> str:
    """What every question begins with: the task, the labels and the form of the answer."""
    return (
        "Read a dialogue, one numbered turn per line, up to a target turn. Say which emotion the speaker of the target "
        "turn feels in it, and which turns cause that emotion. The target turn itself may be a cause.\n"
        f"Emotions: {', '.join(labels)}.\n"
        "For each cause give the number of the turn and the words of that turn that explain the emotion, copied "
        f"exactly. A {NEUTRAL} turn has no causes.\n"
        'Answer with one line of JSON and nothing else, in this form: {"emotion": "…", "causes": [{"turn": 1, '
        '"span": "…"}]}\n'
    )


def turns_text(dialogue: Dialogue, target: int, *, first: int = 1) -> str:
    """The turns from `first` to the target, one per line."""
    shown = dialogue.utterances[first - 1 : target]
    return "\n".join(["Dialogue:", *map(turn_line, shown), ""])


def question_text(dialogue: Dialogue, target: int) -> str:
    """What follows the turns. It ends with a line break, so that no tokenizer joins it to the answer."""
    # Behind the turns, not before them: the questions about all targets of a dialogue begin alike, and a model reads
    # what they share once.
    return f"Target: turn {target}, {one_line(dialogue.utterances[target - 1].speaker)}\nAnswer:\n"


def prompt(dialogue: Dialogue, target: int, labels: Sequence[str], *, first: int = 1) -> str:
    """The whole question about a target, which shows the turns from `first` on."""
    return (
        f"{instruction(labels)}\n{turns_text(dialogue, target, first=first)}{question_text(dialogue, target)}"
    )


def few_shot_prompt(
    dialogue: Dialogue, target: int, labels: Sequence[str], example: tuple[Dialogue, int]
) -> str:
    """The whole question about a target, with one worked example before it."""
    shown, of = example
    worked = f"{turns_text(shown, of)}{question_text(shown, of)}{render(gold_answer(shown, of))}"
    asked = f"{turns_text(dialogue, target)}{question_text(dialogue, target)}"
    return f"{instruction(labels)}\nAn example:\n\n{worked}\n\nNow answer this one:\n\n{asked}"


def gold_answer(dialogue: Dialogue, target: int, *, first: int = 1) -> Answer:
    """The annotated emotion and causes of a target, by turn; of turns before `first`, which are not shown, none.

    Of several spans in one turn the longest is given, as in a student's training.
    """
    utterance = dialogue.utterances[target - 1]
    longest: dict[int, str] = {}
    for _, turn, span in causes_of(utterance):
        if turn >= first and len(span) > len(longest.get(turn, "")):
            longest[turn] = span
    return Answer(utterance.emotion, tuple(Cause(turn, longest[turn]) for turn in sorted(longest)))


def render(answer: Answer) -> str:
    """An answer in the fixed form, on one line."""
    causes = [{"turn": cause.turn, "span": cause.span} for cause in answer.causes]
    return json.dumps({"emotion": answer.emotion, "causes": causes}, ensure_ascii=False)


def parse(text: str, dialogue: Dialogue, target: int, labels: Sequence[str]) -> ParsedAnswer:
    """Read a model's answer about a target.

    White space around the answer and a Markdown fence, which chat models like to add, do not count as faults, nor do
    capitals in an emotion. A span may differ from the turn in white space alone, because questions show a turn on one
    line; it becomes the turn's own characters.
    """
    value = json_object(text, {"emotion", "causes"})
    if value is None or not isinstance(value["causes"], list):
        return ParsedAnswer(Answer(None), ("not in the form",))
    faults: list[str] = []
    emotion = known_label(value["emotion"], labels)
    if emotion is None:
        faults.append("unknown emotion")
    causes: dict[int, Cause] = {}
    for item in value["causes"]:
        found = read_cause(item, dialogue, target)
        if isinstance(found, str):
            faults.append(found)
        elif found.turn in causes:
            faults.append("repeated turn")
        else:
            causes[found.turn] = found
    return ParsedAnswer(Answer(emotion, tuple(causes.values())), tuple(faults))


def predictions_of(answer: Answer, dialogue: Dialogue, target: int) -> list[Prediction]:
    """The predictions for all pairs of a target, by candidate."""
    spans = {cause.turn: cause.span for cause in answer.causes}
    return [
        Prediction(dialogue.id, target, turn, answer.emotion, turn in spans, spans.get(turn, ""))
        for turn in range(1, target + 1)
    ]
