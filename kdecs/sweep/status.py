"""Where a sweep's trials stand, read from their directories. The driver, the trials, progress, selection and report
all ask here, so that they agree.

    SWEEP/trials/ID/trial.json   the last note of the process that trains the trial (TrialNote)
    SWEEP/trials.json            every trial of the sweep as the driver last saw it (TrialResult)

Four facts decide a trial's status: the last note, whether the student's files are complete, whether a process may
still be training, and what a person asks of the trial (kdecs.sweep.control). `trial_status` holds the one table.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kdecs.artifact import is_complete, listed_file, read_manifest, read_verified_manifest, write_json
from kdecs.errors import ArtifactError, printable
from kdecs.sweep.config import TRIAL_KINDS, TrialConfig, TrialKind, num_epochs
from kdecs.sweep.control import Wanted
from kdecs.sweep.space import ALPHA_KEY, TEMPERATURE_KEY, Trial, settings_key, trials_directory
from kdecs.tracking.record import METRICS_NAME, read_points

NOTE_NAME = "trial.json"
LOG_NAME = "log.txt"
TRIALS_NAME = "trials.json"
SELECTION_METRIC = "macro_f1"
DIED = "the process died without an error message (killed or out of memory)"

# fmt: off
_STATUS_BY_NOTE = {
    #            complete student         incomplete student
    # note       live        dead         live       dead process
    None:       ("complete", "complete", "waiting", "waiting"),
    "running":  ("running",  "complete", "running", "failed"),
    "complete": ("complete", "complete", "waiting", "waiting"),
    "failed":   ("complete", "complete", "failed",  "failed"),
    "stopped":  ("complete", "complete", "stopped", "stopped"),
    "pruned":   ("complete", "complete", "pruned",  "pruned"),
}
# fmt: on


def trial_status(note: str | None, *, is_complete: bool, is_live: bool, wanted: Wanted | None = None) -> str:
    """A trial's status: waiting, running, complete, failed, stopped (with its sweep), pruned (by the search for its
    metrics), held (by a person, until it is resumed) or dropped (by a person).

    `note` is the status that its process wrote last, None before the first; `is_complete` says whether all files of the
    student are there; `is_live` says whether a process may still be training it; `wanted` is what a person asks of it.

    A complete student whose process is live and has noted no end yet still counts as running, because what the process
    writes last belongs to the trial. A note `complete` without the files means that they were removed since. A trial
    that is to stop or to be dropped still runs until its process has noted the end. What is complete cannot be held.
    """
    status = _STATUS_BY_NOTE[note][2 * (not is_complete) + (not is_live)]
    if wanted is None or status == "running":
        return status
    if wanted == "drop":
        return "dropped"
    return status if status == "complete" else "held"


@dataclass
class TrialNote:
    """What `trial.json` holds: the status as its process saw it last. Times are unix seconds.

    `seconds` and `attempts` are summed over attempts. `stalled` counts the attempts in a row that finished no epoch, so
    that a trial on unreliable machines goes on as long as it advances. `run` names the driver's start.
    """

    status: str = "running"
    started: float = 0.0
    finished: float | None = None
    seconds: float = 0.0
    attempts: int = 0
    stalled: int = 0
    epoch: float | None = None
    error: str | None = None
    run: str | None = None
    reused_from: str | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the trial is complete and nothing of it will change any more."""
        return self.status == "complete" and self.finished is not None

    def write(self, directory: Path) -> None:
        """Replace the trial's `trial.json`."""
        write_json(directory / NOTE_NAME, asdict(self))


def read_note(directory: Path) -> TrialNote | None:
    """The last note of a trial, None if it never started. Raises ArtifactError for a damaged file."""
    path = directory / NOTE_NAME
    try:
        note = TrialNote(**json.loads(path.read_text(encoding="utf-8")))
        # Looked up here for its KeyError, so that `trial_status` never meets a status that it does not know.
        _STATUS_BY_NOTE[note.status]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: not a trial's status ({error}); remove the file") from None
    return note


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial and where it stands. `metrics` are those of its best epoch on validation, in percent.

    `directory` and `log` are relative to the sweep's directory. `stage` is grid, search (one seed, may be pruned) or
    seeds (of a survivor). `reused_from` names the directory of another sweep that trained it. `epoch` of `epochs` is
    done. `metric` is what students of this task are chosen by.
    """

    # A NaN compares with nothing, so `max` and `sort` would rank it anywhere.
    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

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
    stage: str = "grid"
    reused_from: str | None = None
    epoch: int = 0
    epochs: int = 0
    metric: str = SELECTION_METRIC

    @property
    def score(self) -> float:
        """What trials are ranked by, on validation. Raises KeyError if no epoch has ended."""
        return self.metrics[self.metric]

    @property
    def has_score(self) -> bool:
        """Whether an epoch has ended."""
        return self.metric in self.metrics

    @property
    def is_settled(self) -> bool:
        """Whether it is complete and its end is noted, so that nothing of it will change any more."""
        return self.status == "complete" and self.finished is not None

    @property
    def is_compared(self) -> bool:
        """Whether it counts when settings are compared. The trials of a search alone do not: they have one seed."""
        return self.status == "complete" and self.stage != "search"


_RESULTS = TypeAdapter(list[TrialResult])
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def selection_metric(config: TrialConfig) -> str:
    """What trials are chosen by on validation: macro F1 with spans, or of utterances if the task has no spans."""
    return "utterance_macro_f1" if config.task == "ecpe" else SELECTION_METRIC


def metric_title(metric: str) -> str:
    """The name of a metric for people, such as "utterance macro F1"."""
    return metric.replace("_", " ").replace("f1", "F1")


def trial_points(path: Path, kind: TrialKind) -> list[dict[str, Any]]:
    """The epochs of a trial in its `metrics.jsonl`.

    A generative baseline writes a line every few steps as a teacher does, and those with scores are its epochs.
    """
    points = read_points(path)
    if kind != "generative":
        return points
    scored = [point for point in points if SELECTION_METRIC in point]
    return [{**point, "epoch": number} for number, point in enumerate(scored, start=1)]


def best_point(points: list[dict[str, Any]], metric: str = SELECTION_METRIC) -> dict[str, Any] | None:
    """The epoch whose model a training keeps: the first with the highest score on validation.

    Of equal scores a generative baseline, which alone has a loss on validation, keeps the one with the lowest loss.
    """
    # `max` returns the first of equals, as the training keeps the earliest of equally good epochs.
    scored = [point for point in points if metric in point]
    return max(scored, key=lambda point: (point[metric], -point.get("valid_loss", 0.0))) if scored else None


def is_trained(trial: Trial) -> bool:
    """Whether the trial's student or baseline is complete."""
    return is_complete(trial.directory, trial.config.kind, trial.config_hash)


def trial_result(
    trial: Trial,
    *,
    is_live: bool,
    is_stopped: bool = False,
    stage: str = "grid",
    wanted: Wanted | None = None,
) -> TrialResult:
    """Read a trial's files. `is_live`: a process may be training it, so that a note `running` is believed.

    `is_stopped`: the sweep was stopped, so that a trial whose process is gone has not failed, but goes on later.
    `wanted` is what a person asks of it.
    """
    note = read_note(trial.directory)
    is_complete = is_trained(trial)
    status = trial_status(
        note.status if note else None, is_complete=is_complete, is_live=is_live, wanted=wanted
    )
    error = note.error if note and status not in ("complete", "held", "dropped") else None
    if note and note.status == "running" and status == "failed":
        # After the loss of a node a trial may wait for room on those that are left, with nobody to note its stop.
        status, error = ("stopped", error) if is_stopped else ("failed", DIED)
    # A complete student's scores go into the sweep's results, so a changed digit has to be seen here.
    points = trial_points(
        student_file(trial.directory, METRICS_NAME) if is_complete else trial.directory / METRICS_NAME,
        trial.config.kind,
    )
    metric = selection_metric(trial.config)
    point = best_point(points, metric)
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
        status=status,
        attempts=note.attempts if note else 0,
        seconds=note.seconds if note else 0.0,
        started=note.started if note else None,
        finished=note.finished if note else None,
        best_epoch=int(point["epoch"]) if point else None,
        metrics=metrics,
        error=error,
        stage=stage,
        reused_from=note.reused_from if note else None,
        epoch=int(points[-1]["epoch"]) if points else 0,
        epochs=num_epochs(trial.config),
        metric=metric,
    )


def write_results(sweep: Path, results: list[TrialResult]) -> None:
    """Replace the sweep's `trials.json`."""
    write_json(sweep / TRIALS_NAME, [asdict(result) for result in results])


def read_results(sweep: Path) -> list[TrialResult]:
    """The trials of a finished sweep, after checking every file that the sweep's manifest lists.

    Among them are the students' manifests, which `student_file` relies on. Raises ArtifactError if the sweep is
    unfinished or damaged.
    """
    read_verified_manifest(sweep, "sweep")
    path = sweep / TRIALS_NAME
    try:
        found = _RESULTS.validate_json(path.read_bytes())
        # A sweep's directory may be somebody else's, and its labels go to terminals, figures and pages.
        results = [replace(result, label=printable(result.label)) for result in found]
    except (OSError, ValidationError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise ArtifactError(f"{path}: not a sweep's trials ({reason}); run the sweep again") from None
    if not results:
        raise ArtifactError(f"{path}: no trials, expected at least one")
    for result in results:
        # The directories of trials are found by this name.
        if not _ID.fullmatch(result.id):
            raise ArtifactError(f"{path}: {result.id!r} is no trial's id; run the sweep again")
        if result.is_compared and not result.has_score:
            raise ArtifactError(
                f"{path}: trial {result.id} is complete without {result.metric}; run the sweep again"
            )
        for key in (ALPHA_KEY, TEMPERATURE_KEY):
            if not isinstance(result.settings.get(key, 0.0), float | int):
                raise ArtifactError(f"{path}: trial {result.id}: {key} is no number; run the sweep again")
    return results


def by_settings(results: list[TrialResult]) -> dict[str, list[TrialResult]]:
    """The compared trials by their settings. Those of one group differ in the seed alone."""
    groups: dict[str, list[TrialResult]] = {}
    for result in (result for result in results if result.is_compared):
        groups.setdefault(settings_key(result.settings), []).append(result)
    return groups


def student_file(directory: Path, name: str) -> Path:
    """A file of a trial's finished student or baseline. Raises ArtifactError unless it is as the manifest says."""
    return listed_file(
        directory,
        read_manifest(directory, *TRIAL_KINDS),
        name,
        remedy=f"restore the file, or remove {directory} and run the sweep again",
    )


def trial_directory(sweep: Path, result: TrialResult) -> Path:
    """The directory of a trial, wherever the sweep was moved to."""
    return trials_directory(sweep) / result.id
