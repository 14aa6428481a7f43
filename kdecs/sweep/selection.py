"""Selection: settings are ranked on validation, the best seed of the best setting is scored on test, once.

SWEEP/selection.json
    sweep             the finished sweep's config hash
    metric, universe, protocol
    settings          ranked: label, teacher, settings, trials, mean, sd, interval (95%), num_seeds
    winner            the trial's id, label, seed and validation metrics
    test_opened_at    when the test split was first read for this sweep (UTC), written before it is read
    test              scores of the winner (kdecs evaluate), null until it is scored
    test_baselines    the trivial rules' scores there, by rule
    registered        version and alias in MLflow's registry, null until MLflow answered
SWEEP/test-predictions.jsonl   what was scored
"""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from kdecs.artifact import MANIFEST_NAME, content_checksum, file_lock, read_manifest, write_json
from kdecs.config import CONFIG_NAME, load_config
from kdecs.errors import ArtifactError, ConfigError
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.records import sweep_records
from kdecs.sweep.results import SELECTION_METRIC, TrialResult, by_settings, read_results, trial_directory
from kdecs.sweep.space import Trial
from kdecs.sweep.trivial import trivial_scores
from kdecs.tracking import Tracker

SELECTION_NAME = "selection.json"
PREDICTIONS_NAME = "test-predictions.jsonl"
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class SettingScore:
    """A setting's macro F1 on validation over its seeds, in percent; sd and interval need two seeds."""

    label: str
    teacher: str | None
    settings: dict[str, Any]
    trials: list[str]
    num_seeds: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None


def mean_interval(scores: Sequence[float]) -> tuple[float, float | None, tuple[float, float] | None]:
    """Mean, standard deviation (n - 1) and Student's t interval of 95%; None for both with one score."""
    values = np.asarray(scores, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    sd = float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, sd, (mean - half, mean + half)


def rank_settings(results: list[TrialResult]) -> list[SettingScore]:
    """Settings by falling mean over seeds; equal means by label, so that the order is the same everywhere."""
    ranked = []
    for group in by_settings(results).values():
        mean, sd, interval = mean_interval([result.score for result in group])
        label = group[0].label.rpartition(" s")[0]
        first = group[0]
        ids = [result.id for result in sorted(group, key=lambda result: result.seed)]
        ranked.append(SettingScore(label, first.teacher, first.settings, ids, len(group), mean, sd, interval))
    return sorted(ranked, key=lambda setting: (-setting.mean, setting.label))


def choose_winner(results: list[TrialResult], ranked: list[SettingScore]) -> TrialResult:
    """The best seed, on validation, of the best setting; the lowest seed among equals."""
    group = [result for result in results if result.id in ranked[0].trials]
    return min(group, key=lambda result: (-result.score, result.seed))


def select_student(sweep: Path) -> dict[str, Any]:
    """Choose on validation, score the winner on test once, register it; returns the record.

    A second call reads the record. Raises ArtifactError where the sweep is unfinished, or where the test
    split was opened for an earlier state of the sweep; ConfigError where the config names no test split.
    """
    results = read_results(sweep)
    with file_lock(sweep / ".selection-lock"):
        record = _read_record(sweep) or _new_record(sweep, results)
        winner = next(result for result in results if result.id == record["winner"]["id"])
        if record["test"] is None:
            _score_on_test(sweep, record, winner)
        if record["registered"] is None:
            record["registered"] = _register(sweep, results, winner, record)
            write_json(sweep / SELECTION_NAME, record)
    return record


def read_selection(sweep: Path) -> dict[str, Any] | None:
    """The sweep's selection with its test result, None where there is none yet."""
    record = _read_record(sweep) if (sweep / SELECTION_NAME).is_file() else None
    return record if record and record["test"] else None


def _read_record(sweep: Path) -> dict[str, Any] | None:
    path = sweep / SELECTION_NAME
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        opened, digest = record["test_opened_at"], record["sweep"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: not a selection ({error}); the test split may have been opened"
        ) from None
    if digest != read_manifest(sweep, "sweep").config_hash:
        raise ArtifactError(
            f"{path}: the test split was opened on {opened} for another state of this sweep; "
            "remove the file only if a second look at test is what you want"
        )
    return record


def _new_record(sweep: Path, results: list[TrialResult]) -> dict[str, Any]:
    ranked = rank_settings(results)
    winner = choose_winner(results, ranked)
    return {
        "sweep": read_manifest(sweep, "sweep").config_hash,
        "metric": SELECTION_METRIC,
        "universe": "fold1",
        "protocol": "reccon",
        "settings": json.loads(json.dumps([asdict(setting) for setting in ranked])),  # tuples as lists
        "winner": {
            "id": winner.id,
            "label": winner.label,
            "seed": winner.seed,
            "directory": winner.directory,
            "valid": winner.metrics,
        },
        "test_opened_at": None,
        "test": None,
        "registered": None,
    }


def _score_on_test(sweep: Path, record: dict[str, Any], winner: TrialResult) -> None:
    """Open the test split: the time is on disk before it is read."""
    from kdecs.corpus.splits import read_split
    from kdecs.evaluation.metrics import evaluate
    from kdecs.evaluation.predictions import write_predictions
    from kdecs.runtime import start_runtime
    from kdecs.student.prediction import Student

    directory = trial_directory(sweep, winner)
    config = load_config(StudentConfig, directory / CONFIG_NAME)
    if config.corpus.test is None:
        raise ConfigError(
            f"{directory / CONFIG_NAME}: corpus.test: missing, selection scores the winner on it"
        )
    student = Student.from_pretrained(directory, device=start_runtime().device)
    record["test_opened_at"] = record["test_opened_at"] or datetime.now(UTC).isoformat(timespec="seconds")
    write_json(sweep / SELECTION_NAME, record)
    corpus = read_split(config.corpus, config.corpus.test)
    predictions = student.predict_pairs(corpus)
    write_predictions(sweep / PREDICTIONS_NAME, predictions.values())
    record["test_baselines"] = trivial_scores(corpus)
    record["test"] = evaluate(corpus, predictions).as_dict()
    write_json(sweep / SELECTION_NAME, record)


def _register(
    sweep: Path, results: list[TrialResult], winner: TrialResult, record: dict[str, Any]
) -> str | None:
    """Register the winner in MLflow's model registry; None where MLflow does not answer (tried again later)."""
    config = load_config(SweepConfig, sweep / CONFIG_NAME).model_copy(update={"output": sweep.absolute()})
    tracker = Tracker(config.tracking, config.output)
    trials = [_as_trial(sweep, result) for result in results]
    parent, children = sweep_records(config, trials, results, "FINISHED")
    if not tracker.sync_family(parent, children, now=True):
        return None
    run = next(child for child in children if child.identity["kdecs.trial"] == winner.id)
    run.scores = {f"test_{key}": value for key, value in record["test"].items() if isinstance(value, float)}
    run.results = [sweep / SELECTION_NAME, sweep / PREDICTIONS_NAME]
    student = trial_directory(sweep, winner)
    corpus = load_config(StudentConfig, student / CONFIG_NAME).corpus
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "student"
        _copy_artifact(student, copy)
        return tracker.register_student(
            run,
            copy,
            score=winner.score,
            corpus_checksum=content_checksum(corpus.valid),
            metric=SELECTION_METRIC,
        )


def _copy_artifact(directory: Path, target: Path) -> None:
    """The files of the manifest and the manifest: neither checkpoints nor logs."""
    names = [entry.path for entry in read_manifest(directory, "student").files]
    for name in [*names, MANIFEST_NAME]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / name, target / name)


def _as_trial(sweep: Path, result: TrialResult) -> Trial:
    directory = trial_directory(sweep, result)
    config = load_config(StudentConfig, directory / CONFIG_NAME)
    return Trial(
        id=result.id,
        label=result.label,
        config=config.model_copy(update={"output": directory}),
        config_hash=result.config_hash,
        teacher=result.teacher,
        settings=result.settings,
        seed=result.seed,
    )


def print_selection(sweep: Path, record: dict[str, Any]) -> None:
    """Print the ranked settings, then the winner's test scores beside the trivial rules."""
    console = Console(highlight=False)
    table = Table("setting", "seeds", "macro F1", "sd", "95% interval", title="validation, fold1, percent")
    for setting in record["settings"]:
        low_high = setting["interval"]
        table.add_row(
            setting["label"],
            str(setting["num_seeds"]),
            f"{setting['mean']:.2f}",
            f"{setting['sd']:.2f}" if setting["sd"] is not None else "one seed",
            f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else "",
        )
    console.print(table)
    test, winner = record["test"], record["winner"]
    best_rule = max(test["baselines"].items(), key=lambda item: item[1]["utterance_macro_f1"])
    console.print(
        f"winner {winner['label']} on test ({test['num_positive']} positive, {test['num_negative']} negative "
        f"rows): macro F1 {test['macro_f1']:.2f}, EM {test['exact_match']:.2f}, emotion accuracy "
        f"{test['emotion_accuracy']:.2f}, utterance macro F1 {test['utterance_macro_f1']:.2f} "
        f'(best trivial rule "{best_rule[0]}": {best_rule[1]["utterance_macro_f1"]:.2f})',
        soft_wrap=True,
    )
    registered = record["registered"] or "not registered yet: MLflow did not answer, run this again"
    console.print(
        f"test opened {record['test_opened_at']}; {registered}; student: {sweep / winner['directory']}",
        soft_wrap=True,
    )
