"""What tables and durations look like on a terminal."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from kdecs.tables import duration, figures_table, terminal


@pytest.mark.parametrize(("seconds", "text"), [(12, "12s"), (100, "1m40s"), (7500, "2h05m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_heading_breaks_between_words_and_figures_stand_right() -> None:
    table = figures_table("Scores", "score (%)", "positive rows", "F1")
    table.add_row("utterance macro F1", "1,234", "58.78")
    output = io.StringIO()
    Console(file=output, width=40).print(table)
    lines = [line for line in output.getvalue().splitlines() if line.strip()]
    title, first, second, _, row = lines
    assert title.strip() == "Scores"
    assert (first.split(), second.split()) == (["positive"], ["score", "(%)", "rows", "F1"])
    assert row.split() == ["utterance", "macro", "F1", "1,234", "58.78"]
    assert second.rstrip().endswith("F1") and len(second.rstrip()) == len(row.rstrip())


def test_a_name_with_brackets_and_colons_is_shown_as_it_is() -> None:
    name, output = "[/bold] [red]x :smile:", io.StringIO()
    table = figures_table(name, "file with a long heading")
    table.add_row(name)
    terminal(file=output, width=80).print(table, name)
    assert output.getvalue().count(name) == 3


def test_text_from_a_file_does_not_steer_the_terminal() -> None:
    name, output = "a\x1b[2J\x9b1mb\u202ec", io.StringIO()
    table = figures_table(name, "file")
    table.add_row(Text(name, style="red"))
    terminal(file=output, width=60, force_terminal=True, color_system="standard", highlight=False).print(
        table, f"{name}\n{name}"
    )
    shown = output.getvalue()
    assert shown.count("a[2J1mbc") == 4
    assert "\x1b[31m" in shown and "\x1b[2J" not in shown and "\x9b" not in shown and "\u202e" not in shown
