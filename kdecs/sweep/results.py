"""What a sweep's trials have reached, read from their directories: the driver, selection and report use this."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdecs.artifact import read_manifest, write_json
from kdecs.errors import ArtifactError
from kdecs.run_record import METRICS_NAME, read_points
from kdecs.sweep.space import Trial, settings_key, trials_directory
from kdecs.sweep.trial import LOG_NAME, read_status

TRIALS_NAME = "trials.json"
BASELINES_NAME = "baselines.json"
SELECTION_METRIC = "macro_f1"
_DIED = "the process died without a word: killed, or out of memory"


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial and where it stands; `metrics` are those of its best epoch on validation, in percent.

    `directory` and `log` are relative to the sweep's directory.
    """

    id: str
    label: str
    teacher: str | None
    seed: int
    settings: dict[str, Any]
    config_hash: str
    directory: str
    log: str
    status: str
    attempts: int
    seconds: float
    started: float | None
    finished: float | None
    best_epoch: int | None
    metrics: dict[str, float]
    error: str | None

    @property
    def score(self) -> float:
        """What trials are ranked by: macro F1 on validation."""
        return self.metrics[SELECTION_METRIC]


def best_point(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The epoch whose model a training keeps: the first with the highest macro F1 on validation."""
    scored = [point for point in points if SELECTION_METRIC in point]
    return max(scored, key=lambda point: point[SELECTION_METRIC]) if scored else None


def trial_result(trial: Trial, *, complete: bool, living: bool) -> TrialResult:
    """Read a trial's files. `living`: a process may be training it, so that `running` is believed."""
    status = read_status(trial.directory)
    found = status.status if status else "waiting"
    error = status.error if status else None
    if complete:
        found, error = "complete", None
    elif found == "complete":  # its files were removed since
        found = "waiting"
    elif found == "running" and not living:
        found, error = "failed", _DIED
    point = best_point(read_points(trial.directory / METRICS_NAME))
    metrics = {
        key: float(value)
        for key, value in (point or {}).items()
        if key not in ("epoch", "step", "time") and isinstance(value, int | float)
    }
    sweep = trial.directory.parent.parent
    return TrialResult(
        id=trial.id,
        label=trial.label,
        teacher=trial.teacher,
        seed=trial.seed,
        settings=trial.settings,
        config_hash=trial.config_hash,
        directory=trial.directory.relative_to(sweep).as_posix(),
        log=(trial.directory / LOG_NAME).relative_to(sweep).as_posix(),
        status=found,
        attempts=status.attempts if status else 0,
        seconds=status.seconds if status else 0.0,
        started=status.started if status else None,
        finished=status.finished if status else None,
        best_epoch=int(point["epoch"]) if point else None,
        metrics=metrics,
        error=error,
    )


def write_results(sweep: Path, results: list[TrialResult]) -> None:
    """Replace the sweep's `trials.json`."""
    write_json(sweep / TRIALS_NAME, [asdict(result) for result in results])


def read_results(sweep: Path) -> list[TrialResult]:
    """The trials of a finished sweep. Raises ArtifactError where it is unfinished or damaged."""
    read_manifest(sweep, "sweep")
    path = sweep / TRIALS_NAME
    try:
        results = [TrialResult(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: not a sweep's trials ({error}); run the sweep again") from None
    if not results:
        raise ArtifactError(f"{path}: no trials, expected at least one")
    return results


def by_settings(results: list[TrialResult]) -> dict[str, list[TrialResult]]:
    """Trials that differ by their seed alone, under a key of their settings."""
    groups: dict[str, list[TrialResult]] = {}
    for result in results:
        groups.setdefault(settings_key(result.settings), []).append(result)
    return groups


def trial_directory(sweep: Path, result: TrialResult) -> Path:
    """The directory of a trial, whatever place the sweep was moved to."""
    return trials_directory(sweep) / result.id
