"""Bringing a sweep to MLflow while it runs: from files, by one thread, so that a slow server holds nothing up."""

import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

from kdecs.artifact import content_checksum
from kdecs.config import CONFIG_NAME
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.search import Search
from kdecs.sweep.space import Trial
from kdecs.sweep.status import TrialResult
from kdecs.sweep.trial import ENVIRONMENT_NAME, SYSTEM_NAME, read_samples
from kdecs.tracking.mlflow import Tracker
from kdecs.tracking.record import METRICS_NAME, RunRecord, directory_identity, read_points

SWEEP_TAG = "kdecs.sweep"
TRIAL_TAG = "kdecs.trial"
_STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def sweep_record(config: SweepConfig, num_trials: int, results: list[TrialResult], status: str) -> RunRecord:
    """The sweep's own record, the parent of its trials'."""
    started = [result.started for result in results if result.started]
    report = config.output / "report"
    figures = [path for pattern in ("*.png", "*.csv", "*.tex") for path in sorted(report.glob(pattern))]
    return RunRecord(
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
        figures=figures if status == "FINISHED" else [],
    )


def trial_record(trial: Trial, result: TrialResult, sweep: RunRecord) -> RunRecord:
    """A trial's record; its parent is filled in when the sweep's run is known."""
    config = trial.config
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
    """16 hex digits that stand for the content of corpus files; read once a process."""
    joined = "\n".join(content_checksum(path) for path in paths)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


_UNDELIVERED_NAME = ".undelivered"
_EVERY_S = 3.0


class Delivery:
    """Delivers a sweep's records; the driver is the only one that talks to MLflow."""

    def __init__(self, config: SweepConfig, search: Search) -> None:
        self._config = config
        self._search = search
        self._tracker = Tracker(config.tracking, config.output)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._pending: Future[bool] | None = None
        self._last = 0.0
        self._is_told = False
        self._ended: dict[str, RunRecord] = {}
        self._marker = config.output / _UNDELIVERED_NAME

    @property
    def shown_uri(self) -> str:
        """Where MLflow is, without a password."""
        return self._tracker.shown_uri

    def deliver(
        self, results: list[TrialResult], status: str, *, now: bool = False, final: bool = False
    ) -> bool:
        """Bring MLflow up to date: every few seconds in the background, or `now`; whether it is, as far as known.

        `final`: look once more for runs that a repeated request made double.
        """
        if self._pending is not None:
            if not now and not self._pending.done():
                return False
            self._pending.result()
            self._pending = None
        if not now and time.monotonic() - self._last < _EVERY_S:
            return True
        self._last = time.monotonic()
        family = self._records(results, status)
        if now:
            return self._tracker.sync_family(*family, now=True, final=final)
        self._pending = self._thread.submit(self._tracker.sync_family, *family)
        return True

    def begin(self, results: list[TrialResult]) -> None:
        """Deliver what is known at the start; from now on MLflow lacks something until this start has ended."""
        self.expect()
        self.deliver(results, "RUNNING", now=True)

    def expect(self) -> None:
        """Note that MLflow lacks something, so that another start brings it where this one is killed."""
        self._marker.touch()

    def finish(self, results: list[TrialResult], status: str) -> None:
        """Deliver the end of this start; where MLflow lacks something then, say so and leave the note."""
        if self.deliver(results, status, now=True, final=True):
            self._marker.unlink(missing_ok=True)
        elif not self._is_told:
            self._is_told = True
            print(
                f"sweep {self._config.name}: MLflow at {self.shown_uri} lacks a part of it; once it takes it, the same "
                "command brings what is missing",
                flush=True,
            )

    def deliver_leftovers(self, results: list[TrialResult]) -> None:
        """What an MLflow that was away has not got of a complete sweep."""
        if self._marker.exists():
            self.finish(results, "FINISHED")

    def _records(self, results: list[TrialResult], status: str) -> tuple[RunRecord, list[RunRecord]]:
        trials = self._search.trials()
        parent = sweep_record(self._config, self._search.num_trials(), results, status)
        children = []
        for result in results:
            if result.status == "waiting" and not result.started:
                continue
            record = self._ended.get(result.id) if result.is_settled else None
            if record is None:
                record = trial_record(trials[result.id][0], result, parent)
            if result.is_settled:
                self._ended[result.id] = record
            children.append(record)
        return parent, children
