"""A dialogue with predictions for people: who feels what, and why, the cause spans marked in their utterances."""

from collections.abc import Sequence

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.student.prediction import PairPrediction

MAX_SHOWN = 14
_COLOURS = {
    "happiness": "green",
    "surprise": "yellow",
    "anger": "red",
    "sadness": "blue",
    "disgust": "magenta",
    "fear": "cyan",
}
_OTHER_COLOURS = (
    "bright_green",
    "bright_yellow",
    "bright_red",
    "bright_blue",
    "bright_magenta",
    "bright_cyan",
)


def emotion_colour(emotion: str) -> str:
    """A colour for an emotion, the same in every run."""
    if emotion == NEUTRAL:
        return "dim"
    return _COLOURS.get(emotion, _OTHER_COLOURS[sum(map(ord, emotion)) % len(_OTHER_COLOURS)])


def render_dialogue(dialogue: Dialogue, predictions: Sequence[PairPrediction]) -> Group:
    """Lines for a rich console: each utterance with its emotion, causes underlined where they stand."""
    emotions = {p.prediction.target: p.prediction.emotion or NEUTRAL for p in predictions}
    causes = [p for p in predictions if p.span_range is not None]
    lines: list[Text | Padding] = [Text(f"dialogue {dialogue.id}", style="bold")]
    width = max(len(emotion) for emotion in emotions.values()) if emotions else 0
    for utterance in dialogue.utterances[:MAX_SHOWN]:
        emotion = emotions.get(utterance.turn, NEUTRAL)
        line = Text(f"{utterance.turn:>3} ")
        line.append(f"{utterance.speaker}  ", style="bold")
        line.append(f"{emotion:<{width}}  ", style=emotion_colour(emotion))
        line.append(_marked(dialogue, utterance.turn, causes, emotions))
        lines.append(line)
        lines += [
            Padding(_because(dialogue, cause), (0, 0, 0, 6))
            for cause in causes
            if cause.prediction.target == utterance.turn
        ]
    hidden = len(dialogue.utterances) - MAX_SHOWN
    if hidden > 0:
        lines.append(Text(f"    … {hidden} more utterances", style="dim"))
    return Group(*lines)


def _marked(
    dialogue: Dialogue, turn: int, causes: Sequence[PairPrediction], emotions: dict[int, str]
) -> Text:
    text = Text(dialogue.utterances[turn - 1].text)
    for cause in causes:
        if cause.prediction.candidate == turn and cause.span_range is not None:
            colour = emotion_colour(emotions[cause.prediction.target])
            text.stylize(f"bold underline {colour}", *cause.span_range)
    return text


def _because(dialogue: Dialogue, cause: PairPrediction) -> Text:
    prediction = cause.prediction
    emotion = prediction.emotion or NEUTRAL
    feeler = dialogue.utterances[prediction.target - 1].speaker
    source = dialogue.utterances[prediction.candidate - 1]
    where = "here" if prediction.candidate == prediction.target else f"{source.turn} {source.speaker}"
    line = Text(f"{feeler} feels ")
    line.append(emotion, style=emotion_colour(emotion))
    line.append(f" because ({where}): ")
    line.append(f"“{prediction.span}”", style=f"italic {emotion_colour(emotion)}")
    return line
