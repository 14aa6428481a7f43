"""Render a dialogue with its predictions for people: who feels what, and why, with the cause spans marked."""

from collections.abc import Sequence

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.student.predict.streaming import PairPrediction

MAX_SHOWN = 14  # utterances of an example: about a screen with their causes
MARKS = ("⟦", "⟧")
"""Marks around a cause span on a console without colours."""
_MAX_SPEAKER = 16
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
    # Not by `hash`, which differs from process to process.
    return _COLOURS.get(emotion, _OTHER_COLOURS[sum(map(ord, emotion)) % len(_OTHER_COLOURS)])


def render_dialogue(
    dialogue: Dialogue,
    predictions: Sequence[PairPrediction],
    *,
    limit: int | None = MAX_SHOWN,
    marks: bool = False,
) -> Group:
    """A table for a rich console: turn, speaker, emotion and utterance, with its causes below; long lines wrap.

    Cause spans are underlined in the colour of the emotion that they cause, and with `marks` put between ⟦ and ⟧.
    At most `limit` utterances are shown.
    """
    shown = dialogue.utterances[:limit]
    emotions = {p.prediction.target: p.prediction.emotion or "" for p in predictions}
    causes = [p for p in predictions if p.prediction.is_cause]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column(max_width=_MAX_SPEAKER, overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for utterance in shown:
        emotion = emotions.get(utterance.turn, "")
        text = Group(
            _marked(dialogue, utterance.turn, causes, emotions, marks=marks),
            *(
                Padding(_because(dialogue, cause), (0, 0, 0, 2))
                for cause in causes
                if cause.prediction.target == utterance.turn
            ),
        )
        table.add_row(
            str(utterance.turn),
            Text(printable(utterance.speaker), style="bold"),
            Text(emotion, style=emotion_colour(emotion)),
            text,
        )
    lines: list[Text | Table] = [Text(f"dialogue {printable(dialogue.id)}", style="bold"), table]
    if hidden := len(dialogue.utterances) - len(shown):
        lines.append(Text(f"… {hidden} more utterance{'s' if hidden > 1 else ''}", style="dim"))
    return Group(*lines)


def printable(text: str) -> str:
    """The text, of the same length, with a blank for each control character that would act on the terminal.

    The length matters: spans are places in the text.
    """
    return "".join(character if character.isprintable() else " " for character in text)


def _marked(
    dialogue: Dialogue,
    turn: int,
    causes: Sequence[PairPrediction],
    emotions: dict[int, str],
    *,
    marks: bool,
) -> Text:
    text = Text(printable(dialogue.utterances[turn - 1].text))
    ranges = []
    for cause in causes:
        if cause.prediction.candidate == turn and cause.span_range is not None:
            colour = emotion_colour(emotions[cause.prediction.target])
            text.stylize(f"bold underline {colour}", *cause.span_range)
            ranges.append(cause.span_range)
    return _bracketed(text, ranges) if marks else text


def _bracketed(text: Text, ranges: Sequence[tuple[int, int]]) -> Text:
    """The text with brackets around each range; ranges of several targets may nest or overlap."""
    places = sorted(set(ranges))
    # At the same place, closing brackets come before opening ones.
    inserts = sorted([(end, 0) for _, end in places] + [(start, 1) for start, _ in places])
    # `divide` keeps the styles, which inserted characters in a plain string would shift.
    pieces = text.divide([place for place, _ in inserts])
    marked = Text()
    for piece, (_, is_start) in zip(pieces[:-1], inserts, strict=True):
        marked.append_text(piece)
        marked.append(MARKS[0] if is_start else MARKS[1])
    return marked.append_text(pieces[-1])


def _because(dialogue: Dialogue, cause: PairPrediction) -> Text:
    prediction = cause.prediction
    source = dialogue.utterances[prediction.candidate - 1]
    is_own = prediction.candidate == prediction.target
    line = Text(
        "because of this" if is_own else f"because of {source.turn}, {printable(source.speaker)}", style="dim"
    )
    if not prediction.span:
        return line
    if prediction.span.strip() == source.text.strip():
        return line.append(": all of it")
    span = f"“{printable(prediction.span)}”"
    return line.append(": ").append(span, style=f"not dim italic {emotion_colour(prediction.emotion or '')}")
