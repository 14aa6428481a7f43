"""A sweep in MLflow: one run for the sweep and one below it per trial, read from their files and uploaded as it goes.

SWEEP/.undelivered   exists while MLflow may lack something, so that the next start uploads the rest
"""

import hashlib
from functools import cache
from pathlib import Path

from kdecs.artifact import content_checksum
from kdecs.config import CONFIG_NAME
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.search import Search
from kdecs.sweep.space import Trial
from kdecs.sweep.status import TrialResult
from kdecs.tracking.machine import ENVIRONMENT_NAME, SYSTEM_NAME, read_samples
from kdecs.tracking.mlflow import Tracker, Uploader
from kdecs.tracking.record import METRICS_NAME, RunRecord, directory_identity, read_points

SWEEP_TAG = "kdecs.sweep"
TRIAL_TAG = "kdecs.trial"
_UNDELIVERED_NAME = ".undelivered"
_EVERY_S = 3.0  # between the beginnings of two uploads
_STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


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
        tags={"kdecs.kind": "sweep", "kdecs.sweep_name": config.name},
        params={
            "search": config.search.method,
            **{f"space.{key}": f"{d.kind} {list(d.values)}" for key, d in config.space.items()},
        },
        artifacts=[config.output / CONFIG_NAME, config.output / ENVIRONMENT_NAME],
        # Until then the folder may hold the report of an earlier state of the sweep.
        figures=figures if status == "FINISHED" else [],
    )


def trial_record(trial: Trial, result: TrialResult, sweep: RunRecord) -> RunRecord:
    """The record of a trial. Its parent is filled in once the sweep's run is known."""
    config = trial.config
    # Names and no paths, so that a trial has the same parameters on every machine.
    params = {
        "seed": trial.seed,
        "alpha": config.distillation.alpha,
        "temperature": config.distillation.temperature,
        "mode": config.distillation.mode,
        "base": Path(config.model.base).name,
        "learning_rate": config.optimization.learning_rate,
        "epochs": config.optimization.epochs,
        "global_batch_pairs": config.batches.global_batch_pairs,
    }
    extra = {key: value for key, value in trial.settings.items() if key.rpartition(".")[2] not in params}
    tags = {
        "kdecs.kind": "trial",
        "kdecs.sweep_name": sweep.name,
        "kdecs.teacher": trial.teacher or "none",
        "kdecs.corpus": corpus_checksum(config.corpus.train, config.corpus.valid),
        "kdecs.config_hash": trial.config_hash,
    }
    if result.reused_from:
        tags["kdecs.reused_from"] = result.reused_from
    return RunRecord(
        identity={SWEEP_TAG: sweep.identity[SWEEP_TAG], TRIAL_TAG: trial.id},
        name=trial.label,
        started=result.started,
        finished=result.finished,
        status=_STATUS.get(result.status, "RUNNING"),
        state=result.status,
        tags=tags,
        params={**params, **extra},
        points=read_points(trial.directory / METRICS_NAME),
        system=read_samples(trial.directory / SYSTEM_NAME),
        artifacts=[trial.directory / CONFIG_NAME, trial.directory / ENVIRONMENT_NAME],
    )


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
        self._uploader.finish(*self._records(results, "RUNNING"))

    def update(self, results: list[TrialResult]) -> None:
        """Upload in the background, every few seconds, so that a slow server holds nothing up."""
        if self._uploader.is_due:
            self._uploader.start(*self._records(results, "RUNNING"))

    def mark_pending(self) -> None:
        """Note that MLflow lacks something, so that the next start uploads it if this one is killed."""
        self._marker.touch()

    def finish(self, results: list[TrialResult], status: str) -> None:
        """Upload the end of this start. If MLflow does not take everything, say so and leave the note."""
        # Only now for duplicates: a search for each run costs a request, and a lost answer is rare.
        if self._uploader.finish(*self._records(results, status), final=True):
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

    def _records(self, results: list[TrialResult], status: str) -> tuple[RunRecord, list[RunRecord]]:
        trials = self._search.trials()
        parent = sweep_record(self._config, self._search.num_trials(), results, status)
        children = []
        for result in results:
            if result.status == "waiting" and not result.started:
                continue
            # A trial that has ended for good is read once.
            record = self._ended.get(result.id) if result.is_settled else None
            if record is None:
                record = trial_record(trials[result.id][0], result, parent)
            if result.is_settled:
                self._ended[result.id] = record
            children.append(record)
        return parent, children
