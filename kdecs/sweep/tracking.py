"""A sweep in MLflow, read from its files and uploaded as it goes: a run for the sweep, per setting and per trial.

    sweep
        setting        mean, sd and num_seeds of its trials' scores; tag `kdecs.setting`
            trial      one seed, with its metrics per epoch and its student as a LoggedModel
        trial          of a search, which tries a setting with one seed alone

SWEEP/.undelivered   exists while MLflow may lack something, so that the next start uploads the rest
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kdecs.artifact import content_checksum
from kdecs.config import CONFIG_NAME, files_of
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.search import Search
from kdecs.sweep.space import SEED_KEY, Trial, settings_key
from kdecs.sweep.status import TrialResult, trial_points
from kdecs.tracking.datasets import TRAIN_UNIVERSE, corpus_datasets, label_dataset
from kdecs.tracking.machine import ENVIRONMENT_NAME, SYSTEM_NAME, read_samples
from kdecs.tracking.mlflow import Tracker, Uploader
from kdecs.tracking.record import METRICS_NAME, ModelRecord, RunRecord, directory_identity

SWEEP_TAG = "kdecs.sweep"
TRIAL_TAG = "kdecs.trial"
SETTING_TAG = "kdecs.setting"  # of a setting's run: `settings_key`
_SETTING_ID_TAG = "kdecs.setting_id"  # finds the run: a digest holds no quotes, which a filter cannot express
_ENTRY = "kdecs.launch.sweep"
_SPLITS = ("train", "valid", "soft labels")  # what a trial reads
_UNDELIVERED_NAME = ".undelivered"
_EVERY_S = 3.0  # between the beginnings of two uploads
_STATUS = {
    "complete": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "stopped": "KILLED",
    "held": "KILLED",
    "dropped": "KILLED",
}


def sweep_record(config: SweepConfig, num_trials: int, results: list[TrialResult], status: str) -> RunRecord:
    """The record of the sweep itself, the parent of its trials' records."""
    started = [result.started for result in results if result.started]
    report = config.output / "report"
    figures = [path for pattern in ("*.png", "*.csv", "*.tex") for path in sorted(report.glob(pattern))]
    return RunRecord(
        # With a tag for the trial here too: a search for the sweep's tag alone would find the runs of its trials as
        # well, and all but one of several runs of an identity are deleted as duplicates.
        identity={SWEEP_TAG: directory_identity(config.output), TRIAL_TAG: "none"},
        name=config.name,
        started=min(started, default=None),
        status=status,
        entry=_ENTRY,
        tags={"kdecs.kind": "sweep", "kdecs.sweep_name": config.name, "kdecs.directory": str(config.output)},
        params={
            "search": config.search.method,
            **{f"space.{key}": f"{d.kind} {list(d.values)}" for key, d in config.space.items()},
        },
        artifacts=[config.output / CONFIG_NAME, config.output / ENVIRONMENT_NAME],
        # Until then the folder may hold the report of an earlier state of the sweep.
        figures=figures if status == "FINISHED" else [],
    )


def trial_record(trial: Trial, result: TrialResult, sweep: RunRecord) -> RunRecord:
    """The record of a trial."""
    config = trial.config
    tags = {
        "kdecs.kind": "trial",
        "kdecs.sweep_name": sweep.name,
        "kdecs.teacher": trial.teacher or "none",
        "kdecs.corpus": corpus_checksum(*files_of(config.corpus.train), config.corpus.valid),
        "kdecs.config_hash": trial.config_hash,
    }
    if result.reused_from:
        tags["kdecs.reused_from"] = result.reused_from
    datasets = corpus_datasets(config.corpus, universe=TRAIN_UNIVERSE)
    # A finished sweep is selected from and shown without the labels, which are large and may have been removed.
    labels = []
    if isinstance(config, StudentConfig):
        labels = [used.labels for used in config.distillation.used_teachers if used.labels.is_dir()]
    model = None
    if result.is_settled:
        model = ModelRecord(
            name=trial.label,
            kind=config.kind,
            directory=trial.directory,
            checksum=content_checksum(trial.directory)[:16],
            epoch=result.best_epoch or 0,
            dataset=datasets[1],
        )
    return RunRecord(
        identity={SWEEP_TAG: sweep.identity[SWEEP_TAG], TRIAL_TAG: trial.id},
        name=trial.label,
        parent=sweep.identity if result.stage == "search" else _setting_identity(trial.settings, sweep),
        started=result.started,
        finished=result.finished,
        status=_STATUS.get(result.status, "RUNNING"),
        state=result.status,
        entry=_ENTRY,
        tags=tags,
        params={"seed": trial.seed, **_params(trial)},
        points=trial_points(trial.directory / METRICS_NAME, config.kind),
        system=read_samples(trial.directory / SYSTEM_NAME),
        artifacts=[trial.directory / CONFIG_NAME, trial.directory / ENVIRONMENT_NAME],
        datasets=[*datasets, *(label_dataset(path) for path in labels)],
        model=model,
    )


def setting_record(trial: Trial, results: Sequence[TrialResult], sweep: RunRecord) -> RunRecord:
    """The record of a setting, from one of its trials and the results of all: mean and sd of each score over seeds."""
    complete = [result for result in results if result.is_compared]
    scores: dict[str, float] = {"num_seeds": float(len(complete))} if complete else {}
    for key in complete[0].metrics if complete else ():
        values = [result.metrics[key] for result in complete if key in result.metrics]
        if len(values) == len(complete):
            scores[f"mean/{key}"] = float(np.mean(values))
            if len(values) > 1:
                scores[f"sd/{key}"] = float(np.std(values, ddof=1))
    states = {_STATUS.get(result.status, "RUNNING") for result in results}
    status = next((state for state in ("RUNNING", "FAILED", "KILLED") if state in states), "FINISHED")
    started = [result.started for result in results if result.started]
    finished = [result.finished for result in complete if result.finished]
    return RunRecord(
        identity=_setting_identity(trial.settings, sweep),
        name=trial.setting_label,
        parent=sweep.identity,
        started=min(started, default=None),
        finished=max(finished, default=None),
        status=status,
        entry=_ENTRY,
        tags={
            "kdecs.kind": "setting",
            "kdecs.sweep_name": sweep.name,
            SETTING_TAG: settings_key(trial.settings),
            "kdecs.teacher": trial.teacher or "none",
        },
        params=_params(trial),
        datasets=corpus_datasets(trial.config.corpus, universe=TRAIN_UNIVERSE),
        scores=scores,
    )


def sweep_records(
    sweep: RunRecord, trials: Sequence[tuple[Trial, TrialResult]], records: Sequence[RunRecord]
) -> list[RunRecord]:
    """The sweep's record, those of the settings that are compared, and those of the trials: each after its parent."""
    read = {(dataset.name, dataset.digest): dataset for record in records for dataset in record.datasets}
    # The corpora first, as a trial has them: MLflow's list shows one or two of them.
    sweep.datasets = sorted(read.values(), key=lambda d: (_SPLITS.index(d.split), d.name, d.digest))
    groups: dict[str, list[tuple[Trial, TrialResult]]] = {}
    for trial, result in trials:
        if result.stage != "search":
            groups.setdefault(settings_key(trial.settings), []).append((trial, result))
    settings = [
        setting_record(group[0][0], [result for _, result in group], sweep) for group in groups.values()
    ]
    return [sweep, *settings, *records]


def _setting_identity(settings: dict[str, Any], sweep: RunRecord) -> dict[str, str]:
    digest = hashlib.sha256(settings_key(settings).encode()).hexdigest()
    return {SWEEP_TAG: sweep.identity[SWEEP_TAG], _SETTING_ID_TAG: digest[:12]}


def _params(trial: Trial) -> dict[str, Any]:
    """What the trials of a setting have in common. Names and no paths: a trial has the same ones on every machine."""
    config = trial.config
    params: dict[str, Any] = {
        "base": Path(config.model.base).name,
        "learning_rate": config.optimization.learning_rate,
        **config.optimization.budget,
        **config.batches.size,
    }
    if isinstance(config, StudentConfig):
        params |= {
            "alpha": config.distillation.alpha,
            "temperature": config.distillation.temperature,
            "mode": config.distillation.mode,
        }
    else:
        params["system"] = config.system_name
    extra = {
        key: value
        for key, value in trial.settings.items()
        if key.rpartition(".")[2] not in params and key != SEED_KEY
    }
    return {**params, **extra}


@cache
def corpus_checksum(*paths: Path) -> str:
    """16 hex digits that stand for the content of corpus files, which are read once per process."""
    joined = "\n".join(content_checksum(path) for path in paths)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


class SweepUpload:
    """Uploads a sweep's records. The driver is the only process of a sweep that talks to MLflow."""

    def __init__(self, config: SweepConfig, search: Search) -> None:
        self._config = config
        self._search = search
        tracker = Tracker(config.tracking, config.output)
        self.shown_uri = tracker.shown_uri
        self._uploader = Uploader(tracker, every_s=_EVERY_S)
        self._is_reported = False
        self._ended: dict[str, RunRecord] = {}
        self._marker = config.output / _UNDELIVERED_NAME

    def begin(self, results: list[TrialResult]) -> None:
        """Upload what is known at the start. From now on MLflow lacks something until this start has ended."""
        self.mark_pending()
        self._uploader.finish(self._records(results, "RUNNING"))

    def update(self, results: list[TrialResult]) -> None:
        """Upload in the background, every few seconds, so that a slow server holds nothing up."""
        if self._uploader.is_due:
            self._uploader.start(self._records(results, "RUNNING"))

    def mark_pending(self) -> None:
        """Note that MLflow lacks something, so that the next start uploads it if this one is killed."""
        self._marker.touch()

    def finish(self, results: list[TrialResult], status: str) -> None:
        """Upload the end of this start. If MLflow does not take everything, say so and leave the note."""
        # Only now for duplicates: a search for each run costs a request, and a lost answer is rare.
        if self._uploader.finish(self._records(results, status), final=True):
            self._marker.unlink(missing_ok=True)
        elif not self._is_reported:
            self._is_reported = True
            print(
                f"sweep {self._config.name}: could not upload all results to MLflow at {self.shown_uri}. "
                "Run the same command again to upload the rest.",
                flush=True,
            )

    def upload_leftovers(self, results: list[TrialResult]) -> None:
        """Upload whatever MLflow missed of a complete sweep while it was unreachable."""
        if self._marker.exists():
            self.finish(results, "FINISHED")

    def _records(self, results: list[TrialResult], status: str) -> list[RunRecord]:
        trials = self._search.trials()
        sweep = sweep_record(self._config, self._search.num_trials(), results, status)
        known, records = [], []
        for result in results:
            if result.status in ("waiting", "held", "dropped") and not result.started:
                continue
            trial = trials[result.id][0]
            known.append((trial, result))
            # A trial that has ended for good is read once.
            record = self._ended.get(result.id) if result.is_settled else None
            if record is None:
                record = trial_record(trial, result, sweep)
            if result.is_settled:
                self._ended[result.id] = record
            records.append(record)
        return sweep_records(sweep, known, records)
