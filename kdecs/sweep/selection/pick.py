"""A student or setting that a person picked in MLflow: from the id of a run, or the name of a setting, to a trial."""

import re
from dataclasses import dataclass
from pathlib import Path

from kdecs.config import CONFIG_NAME, load_config
from kdecs.errors import ArtifactError, printable
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.selection.record import SettingScore
from kdecs.sweep.status import TrialResult
from kdecs.sweep.tracking import SWEEP_TAG, TRIAL_TAG
from kdecs.tracking.mlflow import Tracker
from kdecs.tracking.record import TrackingConfig, directory_identity
from kdecs.tracking.registry import find_runs, run_tags

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_KIND_TAG, _SETTING_TAG, _DIRECTORY_TAG = "kdecs.kind", "kdecs.setting", "kdecs.directory"
_NAME_TAG = "mlflow.runName"
_NUM_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Pick:
    """What a person picked: a trial by its id, or a setting by its name or settings. `origin` says it in words."""

    origin: str
    trial: str | None = None
    setting: str | None = None


def pick_from_mlflow(name: str, sweep: Path | None) -> tuple[Path, Pick]:
    """The sweep's directory and the pick that a run's id, or a setting's name, stands for.

    Without `sweep`, MLflow knows the directory: the server of MLFLOW_TRACKING_URI, else `runs/mlflow.db`.
    Raises TrackingError if MLflow cannot be asked, and ArtifactError for what it does not know and for a run that is
    neither a trial nor a setting of that sweep.
    """
    if sweep is not None and not _RUN_ID.fullmatch(name):
        return sweep, Pick(f"setting {name}", setting=name)
    tracker = _tracker(sweep)
    if _RUN_ID.fullmatch(name):
        tags, origin = run_tags(tracker, name), f"run {name}"
        if tags is None:
            raise ArtifactError(
                f"{name}: MLflow at {tracker.shown_uri} has no such run; copy its id from the run's page"
            )
    else:
        origin = f"setting {name}"
        settings = find_runs(tracker, {_KIND_TAG: "setting"})
        same = [run for run in settings if name in (run.get(_NAME_TAG), run.get(_SETTING_TAG))]
        if len({run.get(SWEEP_TAG) for run in same}) != 1:
            found = (
                f"{len(same)} sweeps have a setting of this name" if same else "no sweep has such a setting"
            )
            raise ArtifactError(
                f"{printable(name)}: {found} in MLflow at {tracker.shown_uri}; give the id of its run, or --sweep DIR"
            )
        tags = same[0]
    kind, identity = tags.get(_KIND_TAG), tags.get(SWEEP_TAG, "")
    if kind not in ("trial", "setting") or not _RUN_ID.fullmatch(identity):
        what = "the run of a sweep" if kind == "sweep" else "no run of a sweep"
        raise ArtifactError(f"{name}: this is {what}; expected the run of a trial or of a setting")
    directory = sweep or _directory(tracker, identity, name)
    if directory_identity(directory) != identity:
        raise ArtifactError(
            f"{name}: this run belongs to another sweep, {printable(tags.get('kdecs.sweep_name', 'without a name'))}, "
            f"not to {directory}; give --sweep with its directory"
        )
    if kind == "trial":
        return directory, Pick(origin, trial=tags.get(TRIAL_TAG))
    return directory, Pick(origin, setting=tags.get(_SETTING_TAG))


def picked_student(results: list[TrialResult], ranked: list[SettingScore], pick: Pick) -> TrialResult:
    """The picked trial, or the best seed of the picked setting. Raises ArtifactError if it is not compared."""
    if pick.trial is not None:
        found = next((result for result in results if result.id == pick.trial), None)
        if found is None:
            raise ArtifactError(
                f"{pick.origin}: no trial of this sweep; it was trained before the sweep changed"
            )
        if not found.is_compared:
            state = "part of the search alone" if found.stage == "search" else found.status
            raise ArtifactError(
                f"{pick.origin}: {found.label} is {state}, so it was not compared with others; pick a trial that was"
            )
        return found
    name = " ".join((pick.setting or "").split())
    setting = next((setting for setting in ranked if name in (setting.label, setting.key)), None)
    if setting is None:
        names = "; ".join(setting.label for setting in ranked[:_NUM_SHOWN])
        more = f" and {len(ranked) - _NUM_SHOWN} more" if len(ranked) > _NUM_SHOWN else ""
        raise ArtifactError(
            f"{printable(pick.origin)}: this sweep compares no such setting; it has {names}{more}"
        )
    return best_seed(results, setting)


def best_seed(results: list[TrialResult], setting: SettingScore) -> TrialResult:
    """The best seed, on validation, of a setting. Among equals it is the lowest seed."""
    group = [result for result in results if result.id in setting.trials]
    return min(group, key=lambda result: (-result.score, result.seed))


def _tracker(sweep: Path | None) -> Tracker:
    if sweep is not None:
        config = load_config(SweepConfig, sweep / CONFIG_NAME)
        return Tracker(config.tracking, sweep)
    # The server that the environment names, else the database that all stages of a checkout share.
    return Tracker(TrackingConfig(), Path.cwd() / "runs" / "sweep")


def _directory(tracker: Tracker, identity: str, name: str) -> Path:
    """Where the sweep's driver wrote it, as its run says."""
    runs = find_runs(tracker, {_KIND_TAG: "sweep", SWEEP_TAG: identity})
    place = Path(runs[0].get(_DIRECTORY_TAG, "")) if runs else Path()
    if not place.is_absolute() or not (place / CONFIG_NAME).is_file():
        shown = (
            f"its sweep is at {place}, which is not on this machine"
            if place.is_absolute()
            else "where is its sweep?"
        )
        raise ArtifactError(f"{name}: {shown}; give --sweep DIR")
    return place
