"""The figures of every report as PNG, with their data as CSV: leaderboard, α × τ maps, learning curves.

The functions draw without a display. Those that a sweep may have no data for return None. What all figures share
(style, saving, CSV) stands here too; study_figures has the figures of the paper's studies.
"""

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from kdecs.artifact import atomic_path, write_text
from kdecs.errors import printable
from kdecs.sweep.selection.record import SettingScore
from kdecs.sweep.space import ALPHA_KEY, TEMPERATURE_KEY

mpl.use("Agg")

_DPI = 160
_SHOWN_PER_INCH = 105  # CSS pixels; the widest figures have 8.6 inches
INK, MUTED, ACCENT, RULE = "#1c2330", "#9aa3b2", "#2457c5", "#c2571a"
COLOURS = ("#2457c5", "#c2571a", "#1c8a5a", "#8a3fb0", "#b8860b", "#0f7f95")
_MAX_LEADERBOARD = 25  # rows that stay readable on one screen
_MAX_LABEL = 48  # characters; longer names would leave no room for what is drawn
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    # A name that holds `$…$` is a name, not a formula, whatever the user's own matplotlibrc says.
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "text.usetex": False,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the page: the file, the file of its data, title (also its text for screen readers) and caption."""

    path: str
    data: str
    title: str
    caption: str


def figure_label(name: str) -> str:
    """A name as a figure shows it: one line, shortened in its middle if it is long. The figure's data has it whole."""
    name = printable(name)
    if len(name) > _MAX_LABEL:
        name = f"{name[: _MAX_LABEL // 2]}…{name[1 - _MAX_LABEL // 2 :]}"
    return (
        f" {name}" if name.startswith("_") else name
    )  # matplotlib leaves labels with a leading _ out of a legend


def leaderboard_figure(
    settings: Sequence[SettingScore],
    scores: Mapping[str, Sequence[float]],
    baselines: Mapping[str, Mapping[str, float]],
    metric: str,
    target: Path,
) -> Figure:
    """Mean and 95% interval of each setting, its seeds as points, trivial rules as dashed lines.

    `scores`: key of a setting -> macro F1 of each seed.
    """
    shown = list(settings[:_MAX_LEADERBOARD])
    rules = {name: v[metric] for name, v in baselines.items() if metric in v}
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 1.3 + 0.32 * len(shown)))
        for place, setting in enumerate(shown):
            if setting.interval:
                axes.plot(setting.interval, (place, place), color=ACCENT, lw=2, alpha=0.45, zorder=2)
            seeds = scores[setting.key]
            axes.plot(seeds, [place] * len(seeds), "o", ms=4, color=MUTED, zorder=3)
            axes.plot(setting.mean, place, "D", ms=6, color=ACCENT, zorder=4)
        low, high = _limits(shown, scores, rules)
        for name, value in rules.items():
            if low <= value <= high:
                axes.axvline(value, color=RULE, ls="--", lw=1, zorder=1)
                top = axes.get_xaxis_transform()
                axes.text(
                    value, 1.01, name, color=RULE, fontsize=8.5, ha="center", va="bottom", transform=top
                )
        axes.set_xlim(low, high)
        axes.set_ylim(len(shown) - 0.5, -0.6)
        axes.set_yticks(range(len(shown)), [figure_label(setting.label) for setting in shown])
        axes.set_xlabel("macro F1 on validation, percent")
        axes.grid(axis="x", color="#e6e9ef", zorder=0)
        save(figure, target)
    header = ["setting", "mean", "sd", "low", "high", "seeds"]
    rows = [[s.label, s.mean, s.sd, *(s.interval or (None, None)), *scores[s.key]] for s in settings]
    rows += [[name, value] for name, value in rules.items()]
    more = len(settings) - len(shown)
    return Figure(
        target.name,
        write_csv(target, header, rows),
        "Settings by macro F1 on validation",
        "Diamond: mean over seeds; line: 95% interval (Student's t); grey points: seeds; dashed: trivial rules."
        + (f" The {more} lower settings are in the table." if more else ""),
    )


def _limits(
    shown: Sequence[SettingScore], scores: Mapping[str, Sequence[float]], rules: Mapping[str, float]
) -> tuple[float, float]:
    """An axis that holds all seeds, and the rules that are not so far away that they would squeeze the rest."""
    seeds = [score for setting in shown for score in scores[setting.key]]
    spread = max(max(seeds) - min(seeds), 2.0)
    low, high = min(seeds) - 0.6 * spread, max(seeds) + 0.6 * spread
    near = [value for value in rules.values() if low - 4 * spread <= value <= high + 4 * spread]
    low = min([low, *(value - 0.6 * spread for value in near)])
    high = max([high, *(value + 0.6 * spread for value in near)])
    return max(0.0, low), min(100.0, high)


def alpha_temperature_figure(settings: Sequence[SettingScore], target: Path) -> Figure | None:
    """One map per teacher of mean macro F1 over α (rows) and τ (columns), or None if neither was tried."""
    tried = [s for s in settings if ALPHA_KEY in s.settings or TEMPERATURE_KEY in s.settings]
    if not tried:
        return None
    teachers = sorted({setting.teacher or "no teacher" for setting in tried})
    alphas = sorted({_value(setting, ALPHA_KEY) for setting in tried})
    temperatures = sorted({_value(setting, TEMPERATURE_KEY) for setting in tried})
    maps = {teacher: np.full((len(alphas), len(temperatures)), np.nan) for teacher in teachers}
    for setting in sorted(tried, key=lambda setting: setting.mean):  # of settings at one place the best shows
        row = alphas.index(_value(setting, ALPHA_KEY))
        column = temperatures.index(_value(setting, TEMPERATURE_KEY))
        maps[setting.teacher or "no teacher"][row, column] = setting.mean
    with mpl.rc_context(STYLE):
        width = max(2.4, 0.85 * len(temperatures) + 1.2)
        figure, all_axes = plt.subplots(
            1,
            len(teachers),
            figsize=(width * len(teachers) + 0.9, 0.62 * len(alphas) + 1.5),
            squeeze=False,
            sharey=True,
        )
        # One scale for all teachers, so that a colour means the same in every map.
        low, high = min(s.mean for s in tried), max(s.mean for s in tried)
        for axes, teacher in zip(all_axes[0], teachers, strict=True):
            image = axes.imshow(maps[teacher], cmap="viridis", vmin=low, vmax=high, aspect="auto")
            for (row, column), value in np.ndenumerate(maps[teacher]):
                if not np.isnan(value):
                    dark = value < (low + high) / 2
                    colour = "white" if dark else INK
                    axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
            axes.set_title(figure_label(teacher), fontsize=10)
            axes.set_xticks(range(len(temperatures)), [_shown(value) for value in temperatures])
            axes.set_yticks(range(len(alphas)), [_shown(value) for value in alphas])
            axes.set_xlabel("temperature τ")
        all_axes[0][0].set_ylabel("weight α of the hard losses")
        figure.colorbar(image, ax=list(all_axes[0]), label="macro F1", fraction=0.05)
        save(figure, target)
    rows = [
        [s.teacher, _value(s, ALPHA_KEY), _value(s, TEMPERATURE_KEY), s.mean, s.sd, s.num_seeds]
        for s in tried
    ]
    return Figure(
        target.name,
        write_csv(target, ["teacher", "alpha", "temperature", "mean", "sd", "seeds"], rows),
        "α × τ by teacher",
        "Mean over seeds of macro F1 on validation, percent. If further keys were tried, the best of their settings.",
    )


def curves_figure(
    settings: Sequence[SettingScore],
    points: Mapping[str, Sequence[Sequence[dict[str, Any]]]],
    metric: str,
    target: Path,
) -> Figure:
    """Macro F1 by epoch: the mean over seeds of the best settings in colour, every seed thin.

    `points`: key of a setting -> the points of each seed's `metrics.jsonl`.
    """
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 3.9))
        for place, setting in enumerate(settings):
            colour = COLOURS[place] if place < len(COLOURS) else MUTED
            curves = [[point[metric] for point in seed] for seed in points[setting.key] if seed]
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=colour, lw=0.7, alpha=0.35)
            # Seeds may stop early, so the mean ends with the first of them.
            shortest = min((len(curve) for curve in curves), default=0)
            if shortest and place < len(COLOURS):
                mean = np.mean([curve[:shortest] for curve in curves], axis=0)
                axes.plot(
                    range(1, shortest + 1),
                    mean,
                    color=colour,
                    lw=2,
                    marker="o",
                    ms=3,
                    label=figure_label(setting.label),
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel("macro F1 on validation, percent")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e9ef")
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
        save(figure, target)
    rows = [
        [setting.label, seed, point["epoch"], point[metric]]
        for setting in settings
        for seed, curve in enumerate(points[setting.key])
        for point in curve
    ]
    return Figure(
        target.name,
        write_csv(target, ["setting", "seed", "epoch", metric], rows),
        "Learning curves",
        f"Thin: each seed; thick: mean over seeds of the best {min(len(settings), len(COLOURS))} settings.",
    )


def _value(setting: SettingScore, key: str) -> float:
    """The value tried, or -1 if the key was fixed."""
    return float(setting.settings.get(key, -1.0))


def _shown(value: float) -> str:
    return "fixed" if value < 0 else f"{value:g}"


def write_csv(target: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a figure's data beside it and return the file's name. None is an empty cell."""
    path = target.with_suffix(".csv")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path.name


def shown_width(target: Path) -> int:
    """The width in CSS pixels at which a saved figure's letters are as large as those of every other figure."""
    with target.open("rb") as png:
        pixels = int.from_bytes(png.read(20)[16:], "big")  # IHDR's first field
    return round(pixels * _SHOWN_PER_INCH / _DPI)


def save(figure: Any, target: Path) -> None:
    """Write a figure as PNG and free its memory."""
    # Without matplotlib's version in the file, equal data give equal bytes.
    with warnings.catch_warnings(), atomic_path(target) as temporary:
        # A name in a script that the font lacks is drawn as boxes; the page and the data have its letters.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
