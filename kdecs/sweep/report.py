"""The report of a finished sweep: one page that opens offline, its figures as PNG beside it.

SWEEP/report/index.html, leaderboard.png, alpha-temperature.png, curves.png, manifest.json (kind report)
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from kdecs import __version__
from kdecs.artifact import read_manifest, write_manifest, write_text
from kdecs.config import CONFIG_NAME, load_config
from kdecs.errors import ArtifactError
from kdecs.run_record import METRICS_NAME, read_points
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.figures import Figure, alpha_temperature_figure, curves_figure, leaderboard_figure
from kdecs.sweep.progress import duration
from kdecs.sweep.results import BASELINES_NAME, SELECTION_METRIC, TrialResult, read_results, trial_directory
from kdecs.sweep.selection import SettingScore, rank_settings, read_selection

REPORT_FOLDER = "report"
PAGE_NAME = "index.html"
COLUMNS = (
    ("macro_f1", "macro F1"),
    ("positive_f1", "Pos F1"),
    ("negative_f1", "Neg F1"),
    ("exact_match", "EM"),
    ("emotion_accuracy", "Emo Acc"),
    ("utterance_macro_f1", "utt. macro F1"),
)


def write_report(sweep: Path) -> Path:
    """Write the report of a finished sweep and return its page; an earlier one is replaced.

    The test section appears once a student was selected. Raises ArtifactError for an unfinished sweep.
    """
    results = read_results(sweep)
    ranked = rank_settings(results)
    baselines = _baselines(sweep)
    selection = read_selection(sweep)
    folder = sweep / REPORT_FOLDER
    folder.mkdir(exist_ok=True)
    figures = _figures(sweep, folder, ranked, results, baselines)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=load_config(SweepConfig, sweep / CONFIG_NAME).name,
            version=__version__,
            columns=COLUMNS,
            settings=[_setting_row(setting, results) for setting in ranked],
            rules=_rule_rows(baselines),
            figures=figures,
            trials=sorted(results, key=lambda result: -result.score),
            total_time=duration(sum(result.seconds for result in results)),
            space=_space_rows(sweep),
            selection=selection,
            test=_test_rows(selection) if selection else [],
            verdict=_verdict(selection) if selection else "",
        )
    )
    write_text(folder / PAGE_NAME, page)
    digest = hashlib.sha256(read_manifest(sweep, "sweep").config_hash.encode())
    digest.update(json.dumps(selection, sort_keys=True).encode())
    write_manifest(
        folder,
        "report",
        config_hash=digest.hexdigest(),
        inputs={"sweep": read_manifest(sweep, "sweep").config_hash},
        files=[PAGE_NAME, *(figure.path for figure in figures)],
        details={"has_test": selection is not None},
    )
    return folder / PAGE_NAME


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kdecs.sweep"), autoescape=select_autoescape(["html", "j2"]), trim_blocks=True
    )
    environment.filters["score"] = lambda value: "–" if value is None else f"{value:.2f}"
    environment.filters["duration"] = duration
    return environment


def _baselines(sweep: Path) -> dict[str, dict[str, float]]:
    path = sweep / BASELINES_NAME
    try:
        found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); run the sweep again") from None
    return found


def _figures(
    sweep: Path,
    folder: Path,
    ranked: list[SettingScore],
    results: list[TrialResult],
    baselines: Mapping[str, Mapping[str, float]],
) -> list[Figure]:
    by_id = {result.id: result for result in results}
    scores = {setting.label: [by_id[i].score for i in setting.trials] for setting in ranked}
    points = {
        setting.label: [read_points(trial_directory(sweep, by_id[i]) / METRICS_NAME) for i in setting.trials]
        for setting in ranked
    }
    found = [
        leaderboard_figure(ranked, scores, baselines, folder / "leaderboard.png"),
        alpha_temperature_figure(ranked, folder / "alpha-temperature.png"),
        curves_figure(ranked, points, folder / "curves.png"),
    ]
    return [figure for figure in found if figure]


def _setting_row(setting: SettingScore, results: list[TrialResult]) -> dict[str, Any]:
    group = [result for result in results if result.id in setting.trials]
    means: dict[str, float | None] = {}
    for key, _ in COLUMNS:
        values = [result.metrics[key] for result in group if key in result.metrics]
        means[key] = sum(values) / len(values) if values else None
    half = (setting.interval[1] - setting.interval[0]) / 2 if setting.interval else None
    return {
        "label": setting.label,
        "seeds": setting.num_seeds,
        "half": half,
        "means": means,
        "sd": setting.sd,
    }


def _rule_rows(baselines: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    return [
        {"label": name, "means": {key: values.get(key) for key, _ in COLUMNS}}
        for name, values in baselines.items()
    ]


def _space_rows(sweep: Path) -> list[tuple[str, str]]:
    config = load_config(SweepConfig, sweep / CONFIG_NAME)
    rows = [(key, ", ".join(str(value) for value in choices.grid)) for key, choices in config.space.items()]
    return rows


def _verdict(selection: Mapping[str, Any]) -> str:
    """How the winner stands to the best trivial rule, said plainly."""
    rules = {
        name: v[SELECTION_METRIC] for name, v in selection["test_baselines"].items() if SELECTION_METRIC in v
    }
    name = max(rules, key=lambda rule: rules[rule])
    difference = selection["test"][SELECTION_METRIC] - rules[name]
    side = "above" if difference >= 0 else "below"
    return f"In macro F1 it stands {abs(difference):.2f} points {side} the best trivial rule, {name}."


def _test_rows(selection: Mapping[str, Any]) -> list[dict[str, Any]]:
    test = selection["test"]
    winner = {"label": selection["winner"]["label"], "means": {key: test[key] for key, _ in COLUMNS}}
    return [winner, *_rule_rows(selection["test_baselines"])]
