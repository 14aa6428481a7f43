"""A sweep and its trials as run records for tracking: parent and children, described from what is on disk."""

import hashlib
from functools import cache
from pathlib import Path

from kdecs.artifact import content_checksum
from kdecs.config import CONFIG_NAME
from kdecs.run_record import METRICS_NAME, RunRecord, directory_identity, read_points
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.results import TrialResult
from kdecs.sweep.space import Trial

SWEEP_TAG = "kdecs.sweep"
TRIAL_TAG = "kdecs.trial"
_STATUS = {"complete": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def sweep_records(
    config: SweepConfig, trials: list[Trial], results: list[TrialResult], status: str
) -> tuple[RunRecord, list[RunRecord]]:
    """The sweep's own record and those of the trials that have started, in the trials' order."""
    identity = directory_identity(config.output)
    started = [result.started for result in results if result.started]
    parent = RunRecord(
        identity={SWEEP_TAG: identity, TRIAL_TAG: "none"},
        name=config.name,
        started=min(started, default=None),
        status=status,
        tags={"kdecs.kind": "sweep"},
        params={"trials": len(trials), **{f"space.{k}": list(v.grid) for k, v in config.space.items()}},
        artifacts=[config.output / CONFIG_NAME],
    )
    children = [
        trial_record(trial, result, identity)
        for trial, result in zip(trials, results, strict=True)
        if result.status != "waiting" or result.started
    ]
    return parent, children


def trial_record(trial: Trial, result: TrialResult, sweep_identity: str) -> RunRecord:
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
    return RunRecord(
        identity={SWEEP_TAG: sweep_identity, TRIAL_TAG: trial.id},
        name=trial.label,
        started=result.started,
        finished=result.finished,
        status=_STATUS.get(result.status, "RUNNING"),
        tags={
            "kdecs.kind": "trial",
            "kdecs.teacher": trial.teacher or "none",
            "kdecs.corpus": corpus_checksum(config.corpus.train, config.corpus.valid),
            "kdecs.config_hash": trial.config_hash,
        },
        params={**params, **extra},
        points=read_points(trial.directory / METRICS_NAME),
        artifacts=[trial.directory / CONFIG_NAME],
    )


@cache
def corpus_checksum(*paths: Path) -> str:
    """16 hex digits that stand for the content of corpus files; read once a process."""
    joined = "\n".join(content_checksum(path) for path in paths)
    return hashlib.sha256(joined.encode()).hexdigest()[:16]
