"""Tracking in MLflow, the only module that imports it: what is on disk is made true there, once.

Nothing that trains talks to MLflow. Trainings write their points to `metrics.jsonl`; one process, a sweep's
driver or a teacher's rank 0, calls `Tracker.sync` with records read from disk, as often as it likes:

- a run is found by its identity tags or made, so a resumed or replayed record never makes a second one;
- an epoch is delivered once, under the time at which it was first written, with the epoch as its step
  (the metric `epoch` of the run says how far that is);
- where MLflow does not answer, one line warns, nothing waits, and a later sync delivers what is missing.

Environment: MLFLOW_TRACKING_URI where the config names no `uri`, and what MLflow itself reads.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kdecs import __version__
from kdecs.errors import DependencyError
from kdecs.run_record import (
    METRICS_NAME,
    RunRecord,
    TrackingConfig,
    environment_tags,
    read_points,
    without_password,
)

PARENT_TAG = "mlflow.parentRunId"
_MAX_METRICS_A_BATCH = 900  # MLflow takes 1000 metrics a call
_RETRY_S = 20.0
_EXAMPLE_DIALOGUE = {
    "id": "example",
    "utterances": [
        {"speaker": "A", "utterance": "I got the job!"},
        {"speaker": "B", "utterance": "That is wonderful news."},
    ],
}


@dataclass
class _Known:
    run_id: str
    epoch: float
    status: str
    has_artifacts: bool


def tracking_uri(config: TrackingConfig, output: Path) -> str:
    """The URI in force for an output directory (docstring of the module)."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output.parent / 'mlflow.db'}"


class Tracker:
    """Makes records true in MLflow. Never raises for an MLflow that does not answer: it warns once."""

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self.config = config
        self.uri = tracking_uri(config, output)
        self._artifacts = output.parent / "mlartifacts"
        self._client: Any = None
        self._experiment = ""
        self._known: dict[tuple[tuple[str, str], ...], _Known] = {}
        self._retry_at = 0.0
        self._warned = False

    def sync(self, records: Iterable[RunRecord], *, now: bool = False) -> bool:
        """Deliver what MLflow lacks of each record; whether all of it is there now.

        After a failure it waits before it tries again, unless `now`.
        """
        if not now and time.monotonic() < self._retry_at:
            return False
        with self._answering() as answer:
            self._connect()
            for record in records:
                self._sync(record)
            answer.append(True)
        return bool(answer)

    def sync_family(self, parent: RunRecord, children: list[RunRecord], *, now: bool = False) -> bool:
        """Deliver a run and those nested below it; whether all of it is there now."""
        if not self.sync([parent], now=now):
            return False
        for child in children:
            child.parent = self.run_id(parent.identity)
        return self.sync(children, now=now)

    @property
    def shown_uri(self) -> str:
        """The URI in force, without its password."""
        return without_password(self.uri)

    def run_id(self, identity: Mapping[str, str]) -> str | None:
        """The id of a run that a sync of this process has seen."""
        known = self._known.get(_key(identity))
        return known.run_id if known else None

    def register_student(
        self, record: RunRecord, directory: Path, score: float, corpus_checksum: str, *, metric: str
    ) -> str | None:
        """Log a student to its run as a pyfunc model, register it, and give it its alias; the version.

        `champion` if it beats the current champion on the same validation corpus (or there is none),
        otherwise `challenger`. None where MLflow does not answer. A student is registered once.
        The record's `scores` and `results` go to its run.
        """
        with self._answering() as answer:
            self._connect()
            self._sync(record)
            run_id = self._known[_key(record.identity)].run_id
            version = self._registered_version(run_id) or self._log_student(record, run_id, directory)
            self._log_final(run_id, record)
            tags = {"kdecs.valid": corpus_checksum, "kdecs.metric": metric, "kdecs.score": repr(score)}
            for key, value in tags.items():
                self._client.set_model_version_tag(self.config.registered_model, version, key, value)
            alias = "champion" if self._beats_champion(version, tags, score) else "challenger"
            self._client.set_registered_model_alias(self.config.registered_model, alias, version)
            answer.append(f"{self.config.registered_model} version {version}, alias {alias}")
        return str(answer[0]) if answer else None

    @contextlib.contextmanager
    def _answering(self) -> Iterator[list[Any]]:
        """Yield a list to fill; an MLflow that does not answer leaves it empty, with one warning a process."""
        answer: list[Any] = []
        try:
            yield answer
        except _mlflow_faults() as error:
            self._retry_at = time.monotonic() + _RETRY_S
            if not self._warned:
                self._warned = True
                reason = " ".join(str(error).split())[:200].replace(self.uri, self.shown_uri)
                _warn(
                    f"warning: MLflow at {self.shown_uri} does not answer ({reason}); "
                    "training goes on, metrics are kept in files and delivered once it does"
                )
        else:
            if self._warned:
                self._warned = False
                _warn(f"MLflow at {self.shown_uri} answers again")

    def _connect(self) -> None:
        if self._client is not None:
            return
        mlflow = _import_mlflow()
        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        _probe_database(self.uri)
        client = mlflow.MlflowClient(self.uri, registry_uri=self.uri)
        experiment = client.get_experiment_by_name(self.config.experiment)
        if experiment is None:
            location = self._artifacts.as_uri() if self.uri.startswith("sqlite:") else None
            self._experiment = client.create_experiment(self.config.experiment, artifact_location=location)
        else:
            self._experiment = experiment.experiment_id
        self._client = client

    def _sync(self, record: RunRecord) -> None:
        from mlflow.entities import Param

        known = self._known.get(_key(record.identity)) or self._find(record) or self._create(record)
        self._known[_key(record.identity)] = known
        if not known.has_artifacts:
            params = [Param(key, str(value)) for key, value in record.params.items()]
            self._client.log_batch(known.run_id, params=params)
            for path in record.artifacts:
                self._client.log_artifact(known.run_id, str(path))
            self._client.set_tag(known.run_id, "kdecs.described", "yes")
            known.has_artifacts = True
        self._deliver(known, record.points)
        if record.status != known.status:
            if record.status == "RUNNING":
                self._client.update_run(known.run_id, status="RUNNING")
            else:
                ended = record.finished or time.time()
                self._client.set_terminated(known.run_id, record.status, end_time=round(1000 * ended))
            known.status = record.status

    def _find(self, record: RunRecord) -> _Known | None:
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in record.identity.items())
        runs = self._client.search_runs([self._experiment], condition, max_results=1)
        if not runs:
            return None
        data, info = runs[0].data, runs[0].info
        epoch = data.metrics.get("epoch", -math.inf)
        return _Known(info.run_id, epoch, info.status, data.tags.get("kdecs.described") == "yes")

    def _create(self, record: RunRecord) -> _Known:
        tags = {**environment_tags(), **record.tags, **record.identity}
        if record.parent:
            tags[PARENT_TAG] = record.parent
        run = self._client.create_run(
            self._experiment,
            start_time=round(1000 * (record.started or time.time())),
            tags=tags,
            run_name=record.name,
        )
        return _Known(run.info.run_id, -math.inf, "RUNNING", has_artifacts=False)

    def _deliver(self, known: _Known, points: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        for point in points:
            epoch = float(point["epoch"])
            if epoch <= known.epoch:
                continue
            stamp = round(1000 * point["time"])
            values = {key: point[key] for key in point if key not in ("time", "epoch", "step")}
            metrics = [
                Metric(key, float(value), stamp, round(epoch))
                for key, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ][:_MAX_METRICS_A_BATCH]
            # `epoch` goes with the rest in one transaction: it says that they are there
            self._client.log_batch(
                known.run_id, metrics=[*metrics, Metric("epoch", epoch, stamp, round(epoch))]
            )
            known.epoch = epoch

    def _log_final(self, run_id: str, record: RunRecord) -> None:
        """Scores without an epoch, and files, under the time at which the run ended."""
        from mlflow.entities import Metric

        stamp = round(1000 * (record.finished or time.time()))
        metrics = [Metric(key, value, stamp, 0) for key, value in record.scores.items()]
        self._client.log_batch(run_id, metrics=metrics)
        for path in record.results:
            self._client.log_artifact(run_id, str(path))

    def _registered_version(self, run_id: str) -> str | None:
        name = self.config.registered_model
        found = self._client.search_model_versions(f"name = '{name}'")
        return next((version.version for version in found if version.run_id == run_id), None)

    def _log_student(self, record: RunRecord, run_id: str, directory: Path) -> str:
        mlflow = _import_mlflow()
        import pandas

        example = pandas.DataFrame({"dialogue": [json.dumps(_EXAMPLE_DIALOGUE)]})

        before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        try:
            with mlflow.start_run(run_id=run_id):
                logged = mlflow.pyfunc.log_model(
                    name="student",
                    loader_module="kdecs.student.pyfunc",
                    data_path=str(directory),
                    signature=mlflow.models.infer_signature(example, ["[]"]),
                    input_example=example,
                    pip_requirements=[f"kdecs=={__version__}"],
                    registered_model_name=self.config.registered_model,
                )
        finally:
            mlflow.set_tracking_uri(before[0])
            mlflow.set_registry_uri(before[1])
        ended = record.finished or time.time()  # start_run opened the run again
        self._client.set_terminated(run_id, record.status, end_time=round(1000 * ended))
        return str(logged.registered_model_version)

    def _beats_champion(self, version: str, tags: Mapping[str, str], score: float) -> bool:
        """A champion of another validation corpus or metric cannot be compared: it stays."""
        model = self._client.get_registered_model(self.config.registered_model)
        current = model.aliases.get("champion")
        if current is None or str(current) == str(version):
            return True
        champion = self._client.get_model_version(self.config.registered_model, current).tags
        comparable = all(champion.get(key) == tags[key] for key in ("kdecs.valid", "kdecs.metric"))
        return comparable and score > float(champion["kdecs.score"])


@contextlib.contextmanager
def track_run(
    config: TrackingConfig, record: RunRecord, directory: Path, *, root: Path | None = None
) -> Iterator[None]:
    """Track one training, such as a teacher's: its run is there while the body runs, and is complete after.

    `directory` holds its `metrics.jsonl`; the database lies beside `root` (default: `directory`) unless the
    config names another. Points are delivered on entry (those of an earlier attempt) and on leaving.
    """
    tracker = Tracker(config, root or directory)
    metrics = directory / METRICS_NAME
    record.started = record.started or time.time()
    record.points = read_points(metrics)
    tracker.sync([record])
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    finally:
        record.status, record.finished, record.points = status, time.time(), read_points(metrics)
        tracker.sync([record], now=True)


def _key(identity: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(identity.items()))


def _warn(line: str) -> None:
    print(f"kdecs: {line}", file=sys.stderr, flush=True)


def _probe_database(uri: str) -> None:
    """Raise at once where a database does not answer; MLflow would try for nearly two minutes."""
    if urlsplit(uri).scheme in ("http", "https", "file", ""):
        return
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _import_mlflow() -> Any:
    """The package, told to give up soon, to send nothing home, and to keep its migrations' lines to itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
        import mlflow.pyfunc
    except ImportError as error:
        raise DependencyError(
            f"MLflow is not installed ({error}); install it with: pip install 'kdecs[sweep]'"
        ) from None
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _mlflow_faults() -> tuple[type[Exception], ...]:
    _import_mlflow()
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, OSError
