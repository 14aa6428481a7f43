"""What tables and durations look like on a terminal."""

import io
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text
from support import ROOT

from kdecs.tables import duration, figures_table, markdown_table, terminal


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


def test_a_table_as_markdown() -> None:
    table = figures_table("Scores", "setting", "F1")
    table.add_row("a|b", "58.78")
    assert markdown_table(table) == "| setting | F1 |\n| --- | --- |\n| a\\|b | 58.78 |"


def test_a_page_takes_its_tables_from_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = runpy.run_path(str(ROOT / "docs" / "results.py"))["renewed"]
    (tmp_path / "runs" / "here").mkdir(parents=True)
    old, kept = "old\n", "kept\n"
    block = "<!-- kdecs sweep compare runs/{} --minus 'w/o KD' -->\n{}<!-- end -->"
    page = f"Before.\n\n{block.format('here', old)}\n\n{block.format('gone', kept)}\n"
    commands = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append((command[3:], options["cwd"]))
        return SimpleNamespace(returncode=0, stdout="| new |\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    text, absent = renewed(page, tmp_path)
    assert text == page.replace(old, "\n| new |\n\n") and absent == [
        "sweep compare runs/gone --minus 'w/o KD'"
    ]
    assert commands == [(["sweep", "compare", "runs/here", "--minus", "w/o KD", "--markdown"], tmp_path)]
    assert renewed(text, tmp_path)[0] == text
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr="no such setting\n"),
    )
    with pytest.raises(SystemExit, match=r"--minus 'w/o KD': no such setting$"):
        renewed(page, tmp_path)
