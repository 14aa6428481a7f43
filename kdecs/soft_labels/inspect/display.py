"""Prints what `describe` found as tables, and draws the reliability plot. Numbers are rounded; programs read JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from kdecs.errors import DependencyError
from kdecs.tables import figures_table, terminal

_BAR = 30  # characters
_MAX_WORD = 60
_INK, _ACCENT, _MUTED = "#1c2330", "#2457c5", "#9aa3b2"


def print_labels(found: Mapping[str, Any]) -> None:
    """Print everything that `describe` found as tables."""
    # Lines are not wrapped: a pipe takes them whole. Text from the directory is shown as `Text`, which interprets no
    # markup, and without control characters.
    console = terminal(soft_wrap=True, highlight=False)
    splits = ", ".join(f"{name} {item['num_pairs']:,}" for name, item in found["splits"].items())
    console.print(Text(f"{found['directory']}: {splits} pairs in {found['shards']} files"))
    lineage = found.get("lineage", {})
    if isinstance(lineage, Mapping):
        console.print(Text("lineage: " + (_line(lineage) or "not recorded")))
    for split, scores in found["agreement"].items():
        console.print(Text(f"{_printable(split)}, agreement with gold at export: {_scores(scores)}"))
    for name, item in found["splits"].items():
        _print_split(console, name, item)
    for path, gold in found["gold"].items():
        _print_gold(console, path, gold)
    if not found["gold"]:
        console.print(
            "The labelled corpus files are not where config.json says, or have changed: "
            "pass --corpus FILE for agreement with gold, calibration and the reliability plot"
        )


def write_reliability(gold: Mapping[str, Mapping[str, Any]], file: IO[bytes]) -> None:
    """Write the reliability plot as PNG: for each corpus file, gold causes against p(cause), and pairs per bin.

    Raises DependencyError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(
            'figures need matplotlib, which is not installed: pip install "kdecs[sweep]"'
        ) from None
    # Not by pyplot, which would look for a display and keep each figure until it is closed.
    figure = Figure(figsize=(4.6 * max(1, len(gold)), 5.2), layout="constrained")
    grid = figure.subplots(2, max(1, len(gold)), squeeze=False, height_ratios=(4, 1), sharex=True)
    for column, (name, item) in enumerate(gold.items()):
        bins = item["reliability"]
        centres = [(row["from"] + row["to"]) / 2 for row in bins]
        width = bins[0]["to"] - bins[0]["from"] if bins else 1
        top, bottom = grid[0][column], grid[1][column]
        top.plot([0, 1], [0, 1], color=_MUTED, linestyle="--", linewidth=1, label="calibrated")
        top.bar(centres, [row["causes"] for row in bins], width=width * 0.92, color=_ACCENT, alpha=0.35)
        top.plot([row["probability"] for row in bins], [row["causes"] for row in bins], "o-", color=_ACCENT)
        top.set(ylabel="share of gold causes", ylim=(0, 1), xlim=(0, 1))
        ece = item["calibration"]["1.0"]["ece"]
        top.set_title(f"{Path(name).name}: ECE {ece:.3f}, {item['num_pairs']:,} pairs", color=_INK, size=10)
        bottom.bar(centres, [row["pairs"] for row in bins], width=width * 0.92, color=_MUTED)
        # A confident teacher fills the outer bins, beside which the others would vanish on a linear axis.
        bottom.set(xlabel="p(cause) of the labels, τ = 1", ylabel="pairs", yscale="log")
    figure.savefig(file, format="png", dpi=160)


def _line(lineage: Mapping[str, Any]) -> str:
    return ", ".join(f"{_printable(key)} {_printable(_short(str(value)))}" for key, value in lineage.items())


def _printable(text: str) -> str:
    """Text without control characters: a directory from elsewhere must not control the terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _scores(scores: Mapping[str, float]) -> str:
    return (
        f"positive F1 {scores['positive_f1']:.2f}, negative F1 {scores['negative_f1']:.2f}, "
        f"macro F1 {scores['macro_f1']:.2f}"
    )


def _short(value: str) -> str:
    is_checksum = len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)
    return f"{value[:12]}…" if is_checksum or len(value) > _MAX_WORD else value


def _print_split(console: Console, name: str, item: Mapping[str, Any]) -> None:
    columns = ("mean probability", "most likely word of")
    table = figures_table(f"{name}: labels by themselves", "answer word", *columns)
    for word, values in item["words"].items():
        table.add_row(
            Text(_printable(word)), f"{values['probability']:.4f}", f"{100 * values['most_likely']:.2f}%"
        )
    console.print(table)
    entropy = ", ".join(f"τ {tau} {value:.3f}" for tau, value in item["entropy"].items())
    console.print(Text(f"entropy, nats (at most {item['max_entropy']:.3f}): {entropy}"))
    rest = "not known" if item["rest_mass"] is None else f"{100 * item['rest_mass']:.2f}%"
    console.print(
        Text(
            f"decided as causes: {100 * item['share_causal']:.2f}%; probability outside the answer words: {rest}"
        )
    )


def _print_gold(console: Console, path: str, gold: Mapping[str, Any]) -> None:
    missing = f", {gold['missing']:,} pairs without a label" if gold["missing"] else ""
    console.print()
    console.print(
        Text(
            f"{_printable(path)} ({gold['universe']}): {gold['num_pairs']:,} pairs, {gold['num_causes']:,} causes"
            f"{missing}; agreement with gold: {_scores(gold['agreement'])}"
        )
    )
    table = figures_table("Calibration of p(cause) by τ", "τ", "ECE", "NLL (nats)", "Brier")
    for tau, values in gold["calibration"].items():
        table.add_row(tau, *(f"{values[key]:.4f}" for key in ("ece", "nll", "brier")))
    console.print(table)
    _print_reliability(console, gold["reliability"])
    columns = ("p in causes", "p in others", "most likely of", "causes among these")
    table = figures_table("Answer words by gold", "answer word", *columns)
    for word, values in gold["words"].items():
        first = values["most_likely"]
        share = f"{100 * values['most_likely_causes'] / first:.2f}%" if first else "-"
        table.add_row(
            Text(_printable(word)),
            f"{values['probability_causes']:.4f}",
            f"{values['probability_others']:.4f}",
            f"{first:,}",
            share,
        )
    console.print(table)


def _print_reliability(console: Console, bins: Sequence[Mapping[str, Any]]) -> None:
    table = figures_table("Reliability at τ = 1", "p(cause)", "pairs", "mean p", "gold")
    table.add_column("█ gold causes, │ mean p(cause)", no_wrap=True)
    for row in bins:
        filled, mark = round(_BAR * row["causes"]), min(_BAR - 1, int(_BAR * row["probability"]))
        bar = "".join("│" if place == mark else "█" if place < filled else "·" for place in range(_BAR))
        table.add_row(
            f"{row['from']:.2f}-{row['to']:.2f}",
            f"{row['pairs']:,}",
            f"{row['probability']:.3f}",
            f"{row['causes']:.3f}",
            bar,
        )
    console.print(table)
