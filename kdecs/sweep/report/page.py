"""The report of a finished sweep: one page that opens offline, with its figures as PNG and their data as CSV.

SWEEP/report/index.html
SWEEP/report/manifest.json      of kind report
SWEEP/report/table.tex          the leaderboard in LaTeX
SWEEP/report/settings.csv       every setting: scores on validation, and on test where it was scored
SWEEP/report/table4.csv, .tex   the paper's Table 4 with our rows; table5 and table6 if the sweep tried their variants
SWEEP/report/NAME.png, .csv     leaderboard, curves, time, and by what the sweep tried: spread, alpha-temperature,
                                teachers, share
SWEEP/report/ablation.csv       if variants were tried
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from pydantic import TypeAdapter

from kdecs import __version__
from kdecs.artifact import MANIFEST_NAME, content_checksum, read_manifest, write_manifest, write_text
from kdecs.config import CONFIG_NAME, load_config
from kdecs.errors import ArtifactError, KdecsError
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import (
    BASELINES_NAME,
    REPORT_FOLDER,
    TRIAL_KINDS,
    SweepConfig,
    TrialKind,
    trial_type,
)
from kdecs.sweep.report.figures import (
    Figure,
    alpha_temperature_figure,
    curves_figure,
    leaderboard_figure,
    shown_width,
)
from kdecs.sweep.report.paper_tables import TITLES, ScoredSweep, paper_tables, write_settings_csv, write_table
from kdecs.sweep.report.study_figures import share_figures, spread_figure, teacher_figure, time_figure
from kdecs.sweep.report.tables import (
    ablation_rows,
    columns_of,
    latex_table,
    setting_means,
    write_ablation_csv,
)
from kdecs.sweep.selection.model_card import above_rule, verdict
from kdecs.sweep.selection.record import (
    SelectionRecord,
    SettingScore,
    is_selection_outdated,
    rank_settings,
    read_selection,
)
from kdecs.sweep.space import TEACHER_KEY, VARIANT_KEY
from kdecs.sweep.status import TrialResult, read_results, student_file, trial_directory, trial_points
from kdecs.tables import duration
from kdecs.tracking.record import METRICS_NAME

_BASELINES = TypeAdapter(dict[str, dict[str, float]])
PAGE_NAME = "index.html"
TABLE_NAME = "table.tex"


def write_report(sweep: Path, beside: Sequence[Path] = ()) -> Path:
    """Write the report of a finished sweep and return its page. An earlier report is replaced.

    The winners of the sweeps `beside` are rows of Table 4, too. Test scores appear once a student was selected, those
    of every setting once a table was asked for. Raises ArtifactError for an unfinished sweep.
    """
    scored = _scored_sweep(sweep)
    others = [_scored_sweep(other) for other in beside]
    results, config, ranked = list(scored.results), scored.config, list(scored.ranked)
    baselines, selection = scored.baselines, scored.selection
    folder = sweep / REPORT_FOLDER
    if not folder.resolve().is_relative_to(sweep.resolve()):  # the sweep may be somebody else's
        raise ArtifactError(
            f"{folder}: is a link that leaves the sweep; remove it, and the report is written here"
        )
    folder.mkdir(exist_ok=True)
    # A manifest of the earlier report must not stand over files of two reports if this is killed.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    figures = _figures(scored, folder)
    tables = paper_tables(scored, others)
    ablation = ablation_rows(ranked, results, [*config.variants, *config.baselines], selection)
    files = [PAGE_NAME, TABLE_NAME, *(name for figure in figures for name in (figure.path, figure.data))]
    if ablation:
        files.append(write_ablation_csv(folder / "ablation.csv", ablation))
    files += [name for table in tables for name in write_table(folder, table)]
    files.append(write_settings_csv(folder / "settings.csv", scored))
    write_text(folder / TABLE_NAME, latex_table(config.name, ranked, results, baselines))
    by_id = {result.id: result for result in results}
    trained = [
        result for result in results if not result.reused_from
    ]  # a student from the store cost nothing
    seconds = sum(result.seconds for result in trained)
    unit, share = _resource(config)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=config.name,
            version=__version__,
            columns=columns_of(results[0].metric),
            metric=results[0].metric,
            settings=[_setting_row(setting, by_id) for setting in ranked],
            rules=_rule_rows(baselines, results[0].metric),
            tables=tables,
            titles=TITLES,
            recipes=_recipes(config),
            on_test=_rows_on_test(scored),
            figures=[(figure, shown_width(folder / figure.path)) for figure in figures],
            ablation=ablation,
            trials=sorted((r for r in results if r.status == "complete"), key=lambda result: -result.score),
            others=[result for result in results if result.status != "complete"],
            space=[(key, f"{d.kind}: {', '.join(map(str, d.values))}") for key, d in config.space.items()],
            method=config.search.method,
            selection=selection,
            outdated=is_selection_outdated(sweep),
            test=_test_rows(selection) if selection else [],
            verdict=_verdict(selection) if selection else "",
            above_rule=above_rule(selection) if selection else "",
            total_time=duration(seconds),
            hours=f"{share * seconds / 3600:.2f} {unit} hours",
            num_reused=len(results) - len(trained),
        )
    )
    write_text(folder / PAGE_NAME, page)
    sweep_digest = read_manifest(sweep, "sweep").config_hash
    digest = hashlib.sha256(sweep_digest.encode())
    # A page with test scores is other work than the page before the selection.
    digest.update(json.dumps(selection and selection.as_json(), sort_keys=True).encode())
    write_manifest(
        folder,
        "report",
        config_hash=digest.hexdigest(),
        inputs={
            "sweep": sweep_digest,
            **{
                f"beside.{other.config.name}": read_manifest(other.directory, "sweep").config_hash
                for other in others
            },
        },
        files=files,
        details={"has_test": selection is not None},
    )
    return folder / PAGE_NAME


def _scored_sweep(sweep: Path) -> ScoredSweep:
    """What the report shows of a finished sweep. Raises ArtifactError for one that is unfinished or damaged."""
    results = read_results(sweep)
    return ScoredSweep(
        directory=sweep,
        config=load_config(SweepConfig, sweep / CONFIG_NAME),
        ranked=rank_settings(results),
        results=results,
        baselines=_baselines(sweep),
        selection=read_selection(sweep),
    )


def _rows_on_test(sweep: ScoredSweep) -> list[dict[str, Any]]:
    """Every setting that was scored on test for a table, in the ranking's order."""
    record = sweep.selection
    if record is None or not record.table:
        return []
    scored = {row.id: row for row in record.table if row.scores is not None}
    rows = []
    for setting in sweep.ranked:
        row = next((scored[identity] for identity in setting.trials if identity in scored), None)
        if row is not None and row.scores is not None:
            values = {key: row.scores.get(key) for key, _ in columns_of(record.metric)}
            above = row.above_rule.get(record.metric)
            rows.append(
                {
                    "label": setting.label,
                    "seed": row.seed,
                    "valid": setting.mean,
                    "means": values,
                    "above": above,
                }
            )
    return rows


def _resource(config: SweepConfig) -> tuple[str, float]:
    """The device that a trial's hours are counted on, GPU or CPU, and the share of it that a trial has."""
    return ("GPU", config.gpus_per_trial) if config.gpus_per_trial else ("CPU", config.cpus_per_trial)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kdecs.sweep.report"),
        # Jinja looks at the last extension, so html alone would let a label in `report.html.j2` become markup.
        autoescape=select_autoescape(["html", "j2"]),
        trim_blocks=True,
    )
    environment.filters["score"] = lambda value: f"{value:.2f}" if isinstance(value, int | float) else "–"
    environment.filters["duration"] = duration
    environment.filters["p"] = lambda value: (
        "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
    )
    return environment


def _baselines(sweep: Path) -> dict[str, dict[str, float]]:
    path = sweep / BASELINES_NAME
    try:
        return _BASELINES.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: not readable ({reason}); run the sweep again") from None


def _figures(scored: ScoredSweep, folder: Path) -> list[Figure]:
    sweep, config, ranked, results = scored.directory, scored.config, scored.ranked, scored.results
    by_id = {result.id: result for result in results}
    metric = results[0].metric
    scores = {setting.key: [by_id[i].score for i in setting.trials] for setting in ranked}
    points = {
        setting.key: [
            trial_points(student_file(trial_directory(sweep, by_id[i]), METRICS_NAME), _kind(config, setting))
            for i in setting.trials
        ]
        for setting in ranked
    }
    teachers = config.space[TEACHER_KEY].values if TEACHER_KEY in config.space else tuple(config.teachers)
    found = [
        leaderboard_figure(ranked, scores, scored.baselines, metric, folder / "leaderboard.png"),
        alpha_temperature_figure(ranked, folder / "alpha-temperature.png"),
        teacher_figure(
            scored, scores, teachers, _own_scores(sweep, ranked), _recipes(config), folder / "teachers.png"
        ),
        *share_figures(scored, scores, points, folder),
        spread_figure(ranked, scores, folder / "spread.png"),
        curves_figure(ranked, points, metric, folder / "curves.png"),
        time_figure(ranked, by_id, _resource(config), folder / "time.png"),
    ]
    return [figure for figure in found if figure]


def _kind(config: SweepConfig, setting: SettingScore) -> TrialKind:
    own = config.baselines.get(str(setting.settings.get(VARIANT_KEY)))
    return StudentConfig.kind if own is None else trial_type(own).kind


def _own_scores(sweep: Path, ranked: Sequence[SettingScore]) -> dict[str, float]:
    """Teacher -> its own macro F1 on validation, if the manifests of its students have it."""
    found: dict[str, float] = {}
    for setting in ranked:
        if setting.teacher and setting.teacher not in found:
            found_there: Any = read_manifest(sweep / "trials" / setting.trials[0], *TRIAL_KINDS).details
            # Step by step: the labels' details are free facts, which other tools may have left out or shaped otherwise.
            for key in ("teacher", "details", "agreement", "valid", "macro_f1"):
                found_there = found_there.get(key) if isinstance(found_there, dict) else None
            if isinstance(found_there, int | float):
                found[setting.teacher] = float(found_there)
    return found


def _recipes(config: SweepConfig) -> dict[str, dict[str, Any]]:
    """Teacher -> how it was trained, as far as its labels lead to it on this machine."""
    found = {}
    for name, source in config.teachers.items():
        try:
            labels = read_manifest(source.labels, "soft-labels")
            export = json.loads((source.labels / CONFIG_NAME).read_text(encoding="utf-8"))
            teacher = Path(str(export["teacher"]))
            if content_checksum(teacher) != labels.inputs.get("teacher"):
                continue  # trained again since then, perhaps by another recipe
            # Plain JSON: the sweep knows a teacher only by its labels and files.
            values = json.loads((teacher / CONFIG_NAME).read_text(encoding="utf-8"))
            steps = values["optimization"].get("steps")
            found[name] = {
                "tuning": f"LoRA rank {values['lora']['rank']}" if values["lora"] else "all parameters",
                "learning_rate": values["optimization"]["learning_rate"],
                "length": f"{steps} steps" if steps else f"{values['optimization']['epochs']} epochs",
                "global_batch_pairs": values["batches"]["global_batch_pairs"],
                "max_prompt_tokens": values["batches"]["max_prompt_tokens"],
                "train_share": values["corpus"]["train_share"],
            }
        except (KdecsError, OSError, ValueError, KeyError, TypeError):
            continue  # labels may outlive their teacher, or come from elsewhere
    return found


def _setting_row(setting: SettingScore, by_id: Mapping[str, TrialResult]) -> dict[str, Any]:
    half = (setting.interval[1] - setting.interval[0]) / 2 if setting.interval else None
    return {
        "label": setting.label,
        "seeds": setting.num_seeds,
        "half": half,
        "means": setting_means([by_id[identity] for identity in setting.trials]),
        "sd": setting.sd,
    }


def _rule_rows(baselines: Mapping[str, Mapping[str, float]], metric: str) -> list[dict[str, Any]]:
    return [
        {"label": name, "means": {key: values.get(key) for key, _ in columns_of(metric)}}
        for name, values in baselines.items()
    ]


def _verdict(selection: SelectionRecord) -> str:
    """How the winner compares with the best trivial rule, in plain words."""
    difference, name = verdict(selection)
    side = "above" if difference >= 0 else "below"
    return f"Its macro F1 is {abs(difference):.2f} points {side} the best trivial rule, {name}."


def _test_rows(selection: SelectionRecord) -> list[dict[str, Any]]:
    test = selection.test or {}
    winner = {
        "label": selection.winner.label,
        # Emotions that were given have no score.
        "means": {key: test.get(key) for key, _ in columns_of(selection.metric)},
        "intervals": selection.test_intervals,
    }
    return [winner, *_rule_rows(selection.test_baselines, selection.metric)]
