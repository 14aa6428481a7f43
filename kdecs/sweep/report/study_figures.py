"""The figures of the paper's studies: teacher scale (Figure 4), data share (Figure 3), spread over seeds, time."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from kdecs.sweep.report.figures import (
    ACCENT,
    COLOURS,
    INK,
    MUTED,
    RULE,
    STYLE,
    Figure,
    figure_label,
    save,
    write_csv,
)
from kdecs.sweep.report.paper_tables import ScoredSweep
from kdecs.sweep.report.published import FIGURE_3, FIGURE_4
from kdecs.sweep.selection.record import SettingScore
from kdecs.sweep.space import SHARE_KEY, STEPS_KEY, VARIANT_KEY
from kdecs.sweep.status import TrialResult

mpl.use("Agg")

_SHARE_KEYS = (SHARE_KEY, "corpus.train_share")
_MAX_SPREAD = 30


def teacher_figure(
    sweep: ScoredSweep,
    scores: Mapping[str, Sequence[float]],
    order: Sequence[str],
    own_scores: Mapping[str, float],
    recipes: Mapping[str, Mapping[str, Any]],
    target: Path,
) -> Figure | None:
    """The best students of each teacher, in the space's order, or None if only one teacher was tried.

    `scores`: key of a setting -> the score of each seed. `own_scores`: teacher -> its own macro F1 on validation at
    utterance level. `recipes`: teacher -> how it was trained. Both are there as far as the labels lead to them.
    """
    best: dict[str, SettingScore] = {}
    for setting in sweep.ranked:
        if setting.teacher:
            best.setdefault(setting.teacher, setting)
    names = [name for name in order if name in best]
    if len(names) < 2:
        return None
    split, paper_scores = sweep.scores_of([best[name] for name in names])
    with mpl.rc_context(STYLE):
        figure, (axes, right) = plt.subplots(1, 2, figsize=(max(9.0, 2.2 * len(names) + 1.5), 4.0))
        means = [best[name].mean for name in names]
        axes.plot(range(len(names)), means, color=ACCENT, lw=1.5, zorder=2)
        for place, name in enumerate(names):
            _point(axes, place, best[name], scores[best[name].key], ACCENT)
        axes.set_ylabel("student's macro F1 on validation, percent")
        values = [paper_scores[best[name].key].get(_PAPER_SCORE) for name in names]
        right.plot(range(len(names)), values, color=ACCENT, lw=1.5, marker="D", ms=6, label="ours")
        published = [(place, FIGURE_4[name]) for place, name in enumerate(names) if name in FIGURE_4]
        if published:
            right.plot(*zip(*published, strict=True), "*", ms=12, color=RULE, label="paper")
            right.legend(frameon=False)
        right.set_ylabel(f"student's Pos F1 on {split}, percent")
        ticks = [
            figure_label(name) + (f"\nown {own_scores[name]:.1f}" if name in own_scores else "")
            for name in names
        ]
        for panel in (axes, right):
            panel.set_xticks(range(len(names)), ticks, fontsize=8.5)
            panel.set_xlim(-0.5, len(names) - 0.5)
            panel.grid(axis="y", color="#e6e9ef", zorder=0)
        rule = _draw_best_rule(sweep, split, axes, right)
        save(figure, target)
    recipe_keys = list(dict.fromkeys(key for name in names for key in recipes.get(name, {})))
    rows = [
        [
            name,
            own_scores.get(name),
            *(recipes.get(name, {}).get(key) for key in recipe_keys),
            best[name].label,
            best[name].mean,
            best[name].sd,
            *_study_cells(sweep, best[name], split, paper_scores),
            FIGURE_4.get(name),
            *scores[best[name].key],
        ]
        for name in names
    ]
    caption = (
        "Left: mean over seeds with its 95% interval; grey: seeds. Right: Pos F1, which the paper's Figure 4 shows. "
        "The best setting of each teacher. "
    )
    if own_scores:
        caption += "own: the teacher's own macro F1 over utterances on validation. "
    if published:
        caption += "Star: the only point of the figure that the paper prints, LLaMA-7B's. "
    if len({tuple(recipe.items()) for recipe in recipes.values()}) > 1:
        caption += "The teachers were trained by different recipes (in the CSV), so size alone explains no difference. "
    header = ["teacher", "own_utterance_macro_f1", *recipe_keys, "setting", "mean", "sd", *_STUDY_HEADS]
    return Figure(
        target.name,
        write_csv(target, [*header, "paper_positive_f1", "seeds"], rows),
        "Students by teacher (Figure 4)",
        caption + rule + sweep.about(split, [best[name] for name in names]),
    )


# Batches are filled by whole targets, so that the steps of an epoch differ a little from pairs / batch size.
_STEPS_TOLERANCE = 0.05
_PAPER_SCORE = "positive_f1"  # of Figures 3 and 4
_STUDY_KEYS = ("exact_match", "positive_f1", "macro_f1", "emotion_accuracy")
_STUDY_HEADS = (*(f"valid_{key}" for key in _STUDY_KEYS), *(f"test_{key}" for key in _STUDY_KEYS))


def _study_cells(
    sweep: ScoredSweep, setting: SettingScore, split: str, scores: Mapping[str, Mapping[str, float | None]]
) -> list[float | None]:
    """The scores of the paper's studies on validation, and on test if that is what `scores` has."""
    valid = sweep.on_validation(setting)
    test = scores[setting.key] if split == "test" else {}
    return [*(valid.get(key) for key in _STUDY_KEYS), *(test.get(key) for key in _STUDY_KEYS)]


def share_figures(
    sweep: ScoredSweep,
    scores: Mapping[str, Sequence[float]],
    points: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    folder: Path,
) -> list[Figure]:
    """A figure by share of the gold labels for each budget of the trainings: epochs, or a number of steps.

    A setting whose epochs take as many steps as the other budget is in both figures, so that a sweep trains it once.
    `points` has the epochs of each seed by setting.
    """
    by_budget: dict[int | None, list[SettingScore]] = {}
    for setting in sweep.ranked:
        by_budget.setdefault(setting.settings.get(STEPS_KEY), []).append(setting)
    by_epochs = by_budget.get(None, [])
    epochs = {result.id: result.epochs for result in sweep.results}
    for steps, members in by_budget.items():
        if steps is None:
            continue
        for setting in by_epochs:
            first = points[setting.key][0][0]
            planned = epochs[setting.trials[0]] * first["step"] / first["epoch"]
            if abs(planned - steps) <= _STEPS_TOLERANCE * steps:
                members.append(setting)  # after the budget's own settings, which have precedence
    found = []
    for steps, members in sorted(by_budget.items(), key=lambda item: item[0] or 0):
        name, title, caption = "share.png", "", ""
        if steps:
            name, title = f"share-{steps}-steps.png", ", equal steps"
            caption = (
                f"Every training takes {steps:,} steps: the fewer pairs it has, the more often it sees them. "
            )
        elif len(by_budget) > 1:
            title = ", equal epochs"
            caption = (
                "Every training passes equally often over its own pairs, so that each sees its gold labels equally "
                "often; one that also distils pairs without them takes more steps. "
            )
        if figure := _share_figure(sweep, members, scores, folder / name, title, caption):
            found.append(figure)
    return found


def _share_figure(
    sweep: ScoredSweep,
    settings: Sequence[SettingScore],
    scores: Mapping[str, Sequence[float]],
    target: Path,
    title: str,
    caption: str,
) -> Figure | None:
    """Scores by share, one line per variant or teacher, or None if only one share was tried."""
    key = next((key for key in _SHARE_KEYS if len({s.settings.get(key, 1.0) for s in settings}) > 1), None)
    if key is None:
        return None
    lines: dict[str, dict[float, SettingScore]] = {}
    for setting in settings:  # the best of other settings comes first
        name = str(setting.settings.get(VARIANT_KEY) or setting.teacher or "no teacher")
        lines.setdefault(name, {}).setdefault(float(setting.settings.get(key, 1.0)), setting)
    shown = [setting for by_share in lines.values() for setting in by_share.values()]
    split, paper_scores = sweep.scores_of(shown)
    with mpl.rc_context(STYLE):
        figure, (axes, right) = plt.subplots(1, 2, figsize=(10.6, 4.2))
        for place, (name, by_share) in enumerate(sorted(lines.items())):
            shares = sorted(by_share)
            colour = COLOURS[place % len(COLOURS)]
            percent = [100 * share for share in shares]
            style = {"color": colour, "lw": 1.8, "marker": "o", "ms": 4, "label": figure_label(name)}
            axes.plot(percent, [by_share[share].mean for share in shares], **style)
            bands = [by_share[s].interval or (by_share[s].mean, by_share[s].mean) for s in shares]
            low, high = zip(*bands, strict=True)
            axes.fill_between(percent, low, high, color=colour, alpha=0.14, lw=0)
            right.plot(percent, [paper_scores[by_share[s].key].get(_PAPER_SCORE) for s in shares], **style)
            if name in FIGURE_3:
                share, value = FIGURE_3[name]
                right.plot(100 * share, value, "*", ms=12, color=colour, label=f"{figure_label(name)}, paper")
        # The frame follows the seeds and not the bands: with two seeds Student's t multiplies the standard error by
        # 12.7, and a frame that held such a band would flatten every line.
        everything = [score for setting in settings for score in scores[setting.key]]
        pad = max(1.0, 0.25 * (max(everything) - min(everything)))
        axes.set_ylim(max(0.0, min(everything) - pad), min(100.0, max(everything) + pad))
        axes.set_ylabel("macro F1 on validation, percent")
        right.set_ylabel(f"Pos F1 on {split}, percent")
        for panel in (axes, right):
            panel.set_xlabel("share of the training dialogues with gold labels, percent")
            panel.grid(color="#e6e9ef")
        right.legend(frameon=False, fontsize=8.5)
        rule = _draw_best_rule(sweep, split, axes, right)
        save(figure, target)
    rows = [
        [
            name,
            share,
            s.label,
            s.mean,
            s.sd,
            *(s.interval or (None, None)),
            *_study_cells(sweep, s, split, paper_scores),
            dict([FIGURE_3[name]]).get(share) if name in FIGURE_3 else None,
        ]
        for name, by_share in sorted(lines.items())
        for share, s in sorted(by_share.items())
    ]
    header = ["line", "share", "setting", "mean", "sd", "low", "high", *_STUDY_HEADS, "paper_positive_f1"]
    return Figure(
        target.name,
        write_csv(target, header, rows),
        f"Share of the gold labels (Figure 3){title}",
        "Left: mean over seeds; band: its 95% interval (Student's t), cut where it leaves the frame. Right: Pos F1, "
        "which the paper's Figure 3 shows; stars: the points that the paper prints, with all of the data. "
        + caption
        + rule
        + sweep.about(split, shown),
    )


def _draw_best_rule(sweep: ScoredSweep, split: str, left: Any, right: Any) -> str:
    """Draw the trivial rule with the best macro F1 on validation into both panels; returns a sentence about it.

    A panel is stretched for the rule, but not so far that its own lines could no longer be told apart.
    """
    metric = sweep.results[0].metric
    known = {name: values[metric] for name, values in sweep.baselines.items() if metric in values}
    if not known:
        return ""
    name = max(known, key=lambda rule: known[rule])
    for panel, value in ((left, known[name]), (right, sweep.rules(split).get(name, {}).get(_PAPER_SCORE))):
        low, high = panel.get_ylim()
        if value is not None and low - 2 * (high - low) <= value <= high + 2 * (high - low):
            pad = 0.08 * (high - low)
            panel.axhline(value, color=MUTED, ls="--", lw=1, zorder=1)
            panel.set_ylim(min(low, value - pad), max(high, value + pad))
    return f"Dashed: the trivial rule {name}. "


def spread_figure(
    settings: Sequence[SettingScore], scores: Mapping[str, Sequence[float]], target: Path
) -> Figure | None:
    """Each seed's distance from its setting's mean, or None with fewer than two seeds."""
    shown = [setting for setting in settings if setting.sd is not None][:_MAX_SPREAD]
    if not shown:
        return None
    pooled = pooled_sd(shown)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.6, 1.4 + 0.27 * len(shown)))
        axes.axvspan(-pooled, pooled, color=ACCENT, alpha=0.08, lw=0)
        axes.axvline(0, color=MUTED, lw=0.8)
        for place, setting in enumerate(shown):
            distances = [score - setting.mean for score in scores[setting.key]]
            axes.plot(distances, [place] * len(distances), "o", ms=4.5, color=ACCENT, alpha=0.7)
        axes.set_yticks(range(len(shown)), [figure_label(setting.label) for setting in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("points of macro F1 from the setting's mean")
        save(figure, target)
    seeds = min(setting.num_seeds for setting in shown)
    # Two standard errors of the difference of two means over so many seeds each, about a 95% test.
    needed = 2 * pooled * math.sqrt(2 / seeds)
    rows = [[s.label, s.sd, *(score - s.mean for score in scores[s.key])] for s in shown]
    return Figure(
        target.name,
        write_csv(target, ["setting", "sd", "distances"], rows),
        "Spread over seeds",
        f"Points: seeds; band: the pooled standard deviation, {pooled:.2f} points. With {seeds} seeds, means that "
        f"differ by less than about {needed:.2f} points cannot be told apart.",
    )


def pooled_sd(settings: Sequence[SettingScore]) -> float:
    """The square root of the mean variance, weighted by degrees of freedom."""
    weights = [setting.num_seeds - 1 for setting in settings]
    variances = [setting.sd**2 for setting in settings if setting.sd is not None]
    return math.sqrt(float(np.average(variances, weights=weights)))


def time_figure(
    settings: Sequence[SettingScore],
    trials: Mapping[str, TrialResult],
    resource: tuple[str, float],
    target: Path,
) -> Figure:
    """The time of a trial of each setting against its score. `resource`: GPU or CPU, and a trial's part of it."""
    seconds = {
        setting.key: float(np.mean([trials[identity].seconds for identity in setting.trials]))
        for setting in settings
    }
    largest = max(seconds.values())
    unit, factor = (
        ("hours", 3600) if largest >= 7200 else ("minutes", 60) if largest >= 120 else ("seconds", 1)
    )
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 4.0))
        groups = sorted({_group(setting) for setting in settings})
        for place, group in enumerate(groups):
            members = [setting for setting in settings if _group(setting) == group]
            axes.plot(
                [seconds[setting.key] / factor for setting in members],
                [setting.mean for setting in members],
                "o",
                ms=6,
                alpha=0.75,
                color=COLOURS[place % len(COLOURS)],
                label=figure_label(group),
            )
        best = settings[0]
        axes.annotate(
            figure_label(best.label),
            (seconds[best.key] / factor, best.mean),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
        )
        axes.margins(x=0.15, y=0.15)
        axes.set_xlabel(f"time of one training, {unit}")
        axes.set_ylabel("macro F1 on validation, percent")
        axes.grid(color="#e6e9ef")
        axes.legend(frameon=False, fontsize=8.5)
        save(figure, target)
    device, share = resource
    hours = {key: share * value / 3600 for key, value in seconds.items()}
    rows = [[s.label, seconds[s.key], hours[s.key], s.mean] for s in settings]
    low, high = min(hours.values()), max(hours.values())
    return Figure(
        target.name,
        write_csv(target, ["setting", "seconds_a_trial", f"{device.lower()}_hours_a_trial", "mean"], rows),
        "Time against score",
        "One point per setting: the mean time of a training, as it ran beside others, and its mean score. A training "
        f"took {low:.2g} to {high:.2g} {device} hours.",
    )


def _group(setting: SettingScore) -> str:
    return str(setting.settings.get(VARIANT_KEY) or setting.teacher or "no teacher")


def _point(axes: Any, place: float, setting: SettingScore, seeds: Sequence[float], colour: str) -> None:
    axes.plot([place] * len(seeds), seeds, "o", ms=4, color=MUTED, zorder=3)
    if setting.interval:
        axes.plot([place, place], setting.interval, color=RULE, lw=1.4, alpha=0.6, zorder=2)
    axes.plot(place, setting.mean, "D", ms=7, color=colour, zorder=4)
