"""Selection: settings are ranked on validation, the best seed of the best setting is scored on test, once.

SWEEP/selection.json
    sweep             the finished sweep's config hash
    metric, universe, protocol
    settings          ranked: label, teacher, settings, trials, mean, sd, interval (95%), num_seeds
    winner            the trial's id, label, seed and validation metrics
    runner_up         the second setting against the first: label and paired tests by score (null: one setting)
    variants          where variants were tried: each one's best setting against the first variant's
    test_opened_at    when the test split was first read for this sweep (UTC), written before it is read
    test              scores of the winner (kdecs evaluate), null until it is scored
    test_intervals    score -> 95% interval, bootstrap over dialogues
    test_baselines    the trivial rules' scores there, by rule
    registered        version and alias in MLflow's registry, null until MLflow answered
SWEEP/test-predictions.jsonl   what was scored
SWEEP/model-card.md            what the registry says of the winner
"""

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from kdecs.artifact import (
    MANIFEST_NAME,
    content_checksum,
    file_lock,
    read_manifest,
    read_verified_manifest,
    write_json,
    write_text,
)
from kdecs.config import CONFIG_NAME, config_hash, load_config
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import read_split
from kdecs.errors import ArtifactError, ConfigError
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import PairKey, Prediction, read_predictions, write_predictions
from kdecs.evaluation.significance import compare_systems
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.report.model_card import CARD_NAME, model_card
from kdecs.sweep.space import VARIANT_KEY, Trial, settings_key
from kdecs.sweep.status import TrialResult, by_settings, read_results, trial_directory, trivial_scores
from kdecs.sweep.tracking import sweep_record, trial_record
from kdecs.tracking.mlflow import Tracker
from kdecs.tracking.registry import register_student

PREDICTIONS_FOLDER = "valid-predictions"
_EMOTIONS = "emotion_accuracy"
COMPARED = (
    "macro_f1",
    "positive_f1",
    "negative_f1",
    "exact_match",
    _EMOTIONS,
    "utterance_macro_f1",
)


def compare_settings(
    sweep: Path, first: Sequence[TrialResult], second: Sequence[TrialResult]
) -> dict[str, dict[str, Any]]:
    """By score: first minus second in points, its 95% bootstrap interval and the paired permutation p.

    Without the emotions' accuracy where one of the two was given them: it would be that of the gold.
    """
    seeds = {result.seed for result in first} & {result.seed for result in second}
    configs = [
        load_config(StudentConfig, trial_directory(sweep, group[0]) / CONFIG_NAME)
        for group in (first, second)
    ]
    corpus = read_split(configs[0].corpus, configs[0].corpus.valid)
    are_given = any(config.model.given_emotions != "none" for config in configs)
    keys = [key for key in COMPARED if not (are_given and key == _EMOTIONS)]
    sums = [
        np.sum([_sums(sweep, result, corpus) for result in group if result.seed in seeds], axis=0)
        for group in (first, second)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's on degenerate samples: equal systems
        found = compare_systems(sums[0], sums[1], keys=keys)
    return {key: asdict(comparison) for key, comparison in found.items()}


def _sums(sweep: Path, result: TrialResult, corpus: Corpus) -> NDArray[np.float64]:
    """(D, K) contributions of one student's predictions (kdecs.evaluation.rows)."""
    return evaluate(corpus, validation_predictions(sweep, result, corpus)).sums_by_dialogue


def validation_predictions(sweep: Path, result: TrialResult, corpus: Corpus) -> dict[PairKey, Prediction]:
    """A student's predictions for the validation pairs, from the files of sweep or trial where they are there.

    Raises ArtifactError for a student that is damaged.
    """
    from kdecs.runtime import start_runtime
    from kdecs.student.predict.predictor import Student

    directory = trial_directory(sweep, result)
    path = sweep / PREDICTIONS_FOLDER / f"{result.id}-{content_checksum(directory)[:8]}.jsonl"
    if not path.is_file():
        if (kept := _kept_predictions(directory, corpus)) is not None:
            return kept
        student = Student.from_pretrained(directory, device=start_runtime().device)
        path.parent.mkdir(exist_ok=True)
        write_predictions(path, student.predict_pairs(corpus).values())
    return read_predictions(path, corpus)


def _kept_predictions(directory: Path, corpus: Corpus) -> dict[PairKey, Prediction] | None:
    """What the training kept beside the weights; None where it did not, or where an input is another one now."""
    from kdecs.student.product import VALIDATION_NAME

    manifest = read_verified_manifest(directory, "student")
    if VALIDATION_NAME not in {entry.path for entry in manifest.files}:
        return None
    try:
        is_same_work = (
            config_hash(load_config(StudentConfig, directory / CONFIG_NAME)) == manifest.config_hash
        )
    except ConfigError:  # an input is gone that predicting does without
        return None
    return read_predictions(directory / VALIDATION_NAME, corpus) if is_same_work else None


SELECTION_NAME = "selection.json"
PREDICTIONS_NAME = "test-predictions.jsonl"
_CONFIDENCE = 0.95
_EMOTIONS, _STRICT = "emotion_accuracy", "strict_"


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

    @property
    def key(self) -> str:
        """What tells settings apart, whatever they are called."""
        return settings_key(self.settings)


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
    if not ranked:
        raise ArtifactError("no setting of the sweep was trained whole, so there is nothing to rank")
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
        if "runner_up" not in record:
            record.update(_comparisons(sweep, results))
        winner = next(result for result in results if result.id == record["winner"]["id"])
        if record["test"] is None:
            _score_on_test(sweep, record, winner)
        if record["registered"] is None:
            record["registered"] = _register(sweep, results, winner, record)
            write_json(sweep / SELECTION_NAME, record)
    return record


def read_selection(sweep: Path) -> dict[str, Any] | None:
    """The selection of the sweep as it is, with its test result; None where there is none yet, or it is outdated."""
    record = _load_record(sweep)
    return record if record and record["test"] and not is_selection_outdated(sweep) else None


def is_selection_outdated(sweep: Path) -> bool:
    """Whether there is a selection of another state of the sweep."""
    record = _load_record(sweep)
    return record is not None and record["sweep"] != read_manifest(sweep, "sweep").config_hash


def _read_record(sweep: Path) -> dict[str, Any] | None:
    record = _load_record(sweep)
    if record and is_selection_outdated(sweep):
        raise ArtifactError(
            f"{sweep / SELECTION_NAME}: the test split was opened on {record['test_opened_at']} for another state of "
            "this sweep; remove the file only if a second look at test is what you want"
        )
    return record


def _load_record(sweep: Path) -> dict[str, Any] | None:
    path = sweep / SELECTION_NAME
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["test_opened_at"], record["sweep"], record["test"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: not a selection ({error}); the test split may have been opened"
        ) from None
    return record


def _new_record(sweep: Path, results: list[TrialResult]) -> dict[str, Any]:
    ranked = rank_settings(results)
    winner = choose_winner(results, ranked)
    return {
        "sweep": read_manifest(sweep, "sweep").config_hash,
        "metric": winner.metric,
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


def _comparisons(sweep: Path, results: list[TrialResult]) -> dict[str, Any]:
    """Paired tests on validation: the winner's setting against the next, and variants against the first."""
    ranked = rank_settings(results)
    by_id = {result.id: result for result in results}
    groups = {setting.key: [by_id[identity] for identity in setting.trials] for setting in ranked}
    runner_up = None
    if len(ranked) > 1:
        first, second = ranked[0], ranked[1]
        tests = compare_settings(sweep, groups[first.key], groups[second.key])
        runner_up = {"label": second.label, "against": first.label, "tests": tests}
    best: dict[str, SettingScore] = {}
    for setting in ranked:
        if VARIANT_KEY in setting.settings:
            best.setdefault(str(setting.settings[VARIANT_KEY]), setting)
    names = [name for name in load_config(SweepConfig, sweep / CONFIG_NAME).variants if name in best]
    variants = [
        {
            "variant": name,
            "label": best[name].label,
            "against": best[names[0]].label,
            "tests": compare_settings(sweep, groups[best[name].key], groups[best[names[0]].key]),
        }
        for name in names[1:]
    ]
    return {"runner_up": runner_up, "variants": variants}


def _score_on_test(sweep: Path, record: dict[str, Any], winner: TrialResult) -> None:
    """Open the test split: the time is on disk before it is read."""
    from kdecs.corpus.splits import read_split
    from kdecs.evaluation.metrics import evaluate
    from kdecs.evaluation.predictions import write_predictions
    from kdecs.evaluation.significance import bootstrap_intervals
    from kdecs.runtime import start_runtime
    from kdecs.student.predict.predictor import Student

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
    scores = evaluate(corpus, predictions)
    intervals = bootstrap_intervals(scores.sums_by_dialogue)
    record["test_intervals"] = {key: list(interval) for key, interval in intervals.items()}
    record["test"] = _of_this_student(scores.as_dict(), config)
    write_json(sweep / SELECTION_NAME, record)


def _of_this_student(scores: dict[str, Any], config: StudentConfig) -> dict[str, Any]:
    """Without the scores of emotions where they were given: they would be those of the gold."""
    if config.model.given_emotions == "none":
        return scores
    return {key: value for key, value in scores.items() if key != _EMOTIONS and not key.startswith(_STRICT)}


def _register(
    sweep: Path, results: list[TrialResult], winner: TrialResult, record: dict[str, Any]
) -> str | None:
    """Register the winner in MLflow's model registry; None where MLflow does not answer (tried again later)."""
    config = load_config(SweepConfig, sweep / CONFIG_NAME).model_copy(update={"output": sweep.absolute()})
    tracker = Tracker(config.tracking, config.output)
    parent = sweep_record(config, len(results), results, "FINISHED")
    children = [trial_record(_as_trial(sweep, r), r, parent) for r in results if r.started]
    if not tracker.sync_family(parent, children, now=True):
        return None
    run = next(child for child in children if child.identity["kdecs.trial"] == winner.id)
    run.scores = {f"test_{key}": value for key, value in record["test"].items() if isinstance(value, float)}
    card = model_card(sweep, record, load_config(StudentConfig, trial_directory(sweep, winner) / CONFIG_NAME))
    write_text(sweep / CARD_NAME, card)
    run.results = [sweep / SELECTION_NAME, sweep / PREDICTIONS_NAME, sweep / CARD_NAME]
    student = trial_directory(sweep, winner)
    corpus = load_config(StudentConfig, student / CONFIG_NAME).corpus
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "student"
        _copy_artifact(student, copy)
        return register_student(
            tracker,
            run,
            copy,
            score=winner.score,
            corpus_checksum=content_checksum(corpus.valid),
            metric=winner.metric,
            card=card,
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
    console.print(_runner_up_line(record), soft_wrap=True)
    test, winner = record["test"], record["winner"]
    best_rule = max(test["baselines"].items(), key=lambda item: item[1]["utterance_macro_f1"])
    emotions = f"emotion accuracy {test[_EMOTIONS]:.2f}, " if _EMOTIONS in test else ""
    console.print(
        f"winner {winner['label']} on test ({test['num_positive']} positive, {test['num_negative']} negative "
        f"rows): macro F1 {test['macro_f1']:.2f}, EM {test['exact_match']:.2f}, {emotions}"
        f"utterance macro F1 {test['utterance_macro_f1']:.2f} "
        f'(best trivial rule "{best_rule[0]}": {best_rule[1]["utterance_macro_f1"]:.2f})',
        soft_wrap=True,
    )
    registered = record["registered"] or "not registered yet: MLflow did not answer, run this again"
    console.print(
        f"test opened {record['test_opened_at']}; {registered}; student: {sweep / winner['directory']}",
        soft_wrap=True,
    )


def _runner_up_line(record: dict[str, Any]) -> str:
    second = record["runner_up"]
    if second is None:
        return "one setting, so there is no runner-up to test against"
    test = second["tests"][record["metric"]]
    return (
        f"{second['against']} against {second['label']} on validation: {test['difference']:+.2f} points "
        f"(95% {test['low']:+.2f} to {test['high']:+.2f}, paired permutation p {test['p']:.3f})"
    )
