"""The run of a stage that is started by itself: a teacher, an export, a student or a baseline.

Rank 0 uploads what the stage's files say, in the background while it works and once more at the end. A sweep's trials
are uploaded by its driver instead (kdecs.sweep.tracking).
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kdecs.artifact import MANIFEST_NAME, content_checksum, read_manifest
from kdecs.config import CONFIG_NAME, Config
from kdecs.errors import KdecsError, Stopped
from kdecs.tracking.mlflow import Tracker, Uploader, is_mlflow_installed
from kdecs.tracking.record import (
    METRICS_NAME,
    DatasetRecord,
    ModelRecord,
    RunRecord,
    TrackingConfig,
    directory_identity,
    read_points,
)

_EVERY_S = 10.0  # between the beginnings of two uploads
Kind = Literal["teacher", "export", "student", "mrc", "baseline", "generative"]
_ENTRIES: dict[Kind, str] = {
    "teacher": "train_teacher",
    "export": "export_soft_labels",
    "student": "train_student",
    "mrc": "train_baseline",
    "baseline": "train_baseline",
    "generative": "train_generative",
}


def stage_record(
    config: Config,
    kind: Kind,
    *,
    output: Path,
    name: str,
    config_hash: str,
    datasets: list[DatasetRecord],
    points: list[dict[str, Any]] | None = None,
) -> RunRecord:
    """The record of a stage as its directory is now: a run in progress, with its model once the manifest is there.

    `points` are those of `metrics.jsonl` unless they are given. An export has neither points nor a model.
    """
    model = None
    if kind != "export" and (output / MANIFEST_NAME).is_file():
        details = read_manifest(output).details
        model = ModelRecord(
            name=name,
            kind=kind,
            directory=output,
            checksum=content_checksum(output)[:16],
            epoch=details["best_step"] if "best_step" in details else details["valid"]["epoch"],
            dataset=next(dataset for dataset in datasets if dataset.split == "valid"),
        )
    return RunRecord(
        identity=stage_identity(kind, output),
        name=name,
        entry=f"kdecs.launch.{_ENTRIES[kind]}",
        tags={"kdecs.kind": kind, "kdecs.config_hash": config_hash, "kdecs.directory": str(output)},
        params=_flat(config.model_dump(mode="json", exclude={"output", "cache", "tracking", "name"})),
        points=read_points(output / METRICS_NAME) if points is None else points,
        artifacts=[output / CONFIG_NAME],
        datasets=datasets,
        model=model,
    )


def stage_identity(kind: Kind, output: Path) -> dict[str, str]:
    """The tag that finds the run of a stage's directory."""
    return {f"kdecs.{kind}": directory_identity(output)}


class StageUpload:
    """Uploads a stage's run if its config asks for tracking. `record` reads the stage's files."""

    def __init__(
        self, tracking: TrackingConfig | None, output: Path, record: Callable[[], RunRecord]
    ) -> None:
        self._record = record
        self._uploader: Uploader | None = None
        self._is_begun = False
        self._started = time.time()
        if tracking is None:
            return
        if is_mlflow_installed():
            self._uploader = Uploader(Tracker(tracking, output), every_s=_EVERY_S)
        else:
            print(
                "kdecs: warning: the config sets tracking but MLflow is not installed; the metrics stay in files",
                file=sys.stderr,
                flush=True,
            )

    def sync(self, _: object = None) -> None:
        """Upload in the background what MLflow lacks, unless the last upload still runs or began seconds ago."""
        if self._uploader and self._uploader.is_due:
            self._is_begun = True
            self._uploader.start([self._current()])

    def close(self, status: str) -> None:
        """Upload the rest and end the run. A stage that ended before it began has no run."""
        if self._uploader and (self._is_begun or status == "FINISHED"):
            record = replace(self._current(), status=status, finished=time.time())
            self._uploader.finish([record], final=True)

    def _current(self) -> RunRecord:
        return replace(self._record(), started=self._started)


@contextlib.contextmanager
def stage_upload(
    tracking: TrackingConfig | None, output: Path, record: Callable[[], RunRecord], *, is_main: bool
) -> Iterator[StageUpload]:
    """The upload of a stage, closed with how the stage ended. On other ranks than the main one it does nothing."""
    upload = StageUpload(tracking if is_main else None, output, record)
    try:
        yield upload
    except BaseException as error:
        # What ended the stage is raised; a failure to record it must not take its place.
        with contextlib.suppress(KdecsError):
            upload.close("KILLED" if isinstance(error, Stopped) else "FAILED")
        raise
    upload.close("FINISHED")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
