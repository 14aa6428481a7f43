"""A sweep and its trials as run records for tracking: parent and children, described from what is on disk."""

import hashlib
from functools import cache
from pathlib import Path

from kdecs.artifact import content_checksum
from kdecs.config import CONFIG_NAME
from kdecs.run_record import METRICS_NAME, RunRecord, directory_identity, read_points
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.machine import ENVIRONMENT_NAME, SYSTEM_NAME, read_samples
from kdecs.sweep.results import TrialResult
from kdecs.sweep.space import Trial

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
