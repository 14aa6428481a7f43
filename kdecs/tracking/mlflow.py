"""Tracking in MLflow, the only module that imports it: what is on disk is made true there, once.

Nothing that trains talks to MLflow. Trainings write their points to `metrics.jsonl`; one process, a sweep's
driver or a teacher's rank 0, calls `Tracker.sync` with records read from disk, as often as it likes:

- a run is found by its identity tags or made, so a resumed or replayed record never makes a second one;
- an epoch is delivered once, under the time at which it was first written, with the epoch as its step
  (the metric `epoch` of the run says how far that is);
- where MLflow does not answer, one line warns, nothing waits, and a later sync delivers what is missing;
- what MLflow refuses of one run is said by its name, and holds up neither the rest of it nor other runs.

Environment: MLFLOW_TRACKING_URI where the config names no `uri`, and what MLflow itself reads.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kdecs.errors import DependencyError, KdecsError
from kdecs.tracking.record import RunRecord, TrackingConfig, environment_tags, redacted, without_password

PARENT_TAG = "mlflow.parentRunId"
_STATE_TAG = "kdecs.state"
_DESCRIBED_TAG = "kdecs.described"  # digest of the parameters and artifacts that were sent
_CHANGED_TAG = "kdecs.changed."  # of a parameter: MLflow keeps the first value for good
_SAMPLES_TAG = "kdecs.system_samples"
_MAX_METRICS_A_BATCH = 900  # MLflow takes 1000 metrics a call
_MAX_PARAMS_A_BATCH = 90
_MAX_PARAM, _MAX_TAG = 6000, 5000  # characters of a value

Identity = tuple[tuple[str, str], ...]


@dataclass
class _Known:
    """A run as MLflow has it."""

    run_id: str
    epoch: float
    status: str
    ended: int | None = None
    num_samples: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    figures: set[tuple[Path, int]] = field(default_factory=set)


class RunWriter:
    """Writes records to one experiment; `entities` is the module `mlflow.entities`."""

    def __init__(self, client: Any, experiment: str, entities: Any) -> None:
        self._client, self._experiment, self._entities = client, experiment, entities
        self._known: dict[Identity, _Known] = {}

    def run_id(self, identity: Mapping[str, str]) -> str | None:
        """The id of a run that this process has seen."""
        known = self._known.get(identity_key(identity))
        return known.run_id if known else None

    def open(self, record: RunRecord, *, again: bool = False) -> None:
        """Find the record's run or make it. `again`: look once more for doubles of a run that is known.

        A request to make a run is repeated where its answer was lost, so there may be two: the others are deleted.
        """
        key = identity_key(record.identity)
        known = self._known.get(key)
        if known is None:
            known = self._find(record)
        elif again:
            self._find(record, keep=known.run_id)
        if known is None:
            made = self._create(record)
            known = self._find(record, keep=made) or _Known(made, -math.inf, "RUNNING")
        self._known[key] = known

    def steps(self, record: RunRecord) -> list[Callable[[], None]]:
        """What is to be done for a record whose run is open, in order; a step does not need those before it."""
        known = self._known[identity_key(record.identity)]
        steps = (self._tags, self._describe, self._points, self._samples, self._figures, self._end)
        return [lambda step=step: step(known, record) for step in steps]  # type: ignore[misc]

    def log_final(self, run_id: str, record: RunRecord) -> None:
        """Log scores without an epoch, and files, under the time at which the run ended; a repeat adds nothing."""
        stamp = round(1000 * (record.finished or time.time()))
        there = self._client.get_run(run_id).data.metrics
        metrics = [
            self._entities.Metric(key, value, stamp, 0)
            for key, value in record.scores.items()
            if there.get(key) != value
        ]
        if metrics:
            self._client.log_batch(run_id, metrics=metrics)
        for path in record.results:
            self._client.log_artifact(run_id, str(path))

    def _find(self, record: RunRecord, *, keep: str | None = None) -> _Known | None:
        """The run of a record, of several the one to keep, else the one that holds most; the others are deleted."""
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in record.identity.items())
        runs = self._client.search_runs([self._experiment], condition)
        runs = sorted(runs, key=lambda run: (run.info.run_id != keep, -_epoch(run), run.info.run_id))
        for double in runs[1:]:
            self._client.delete_run(double.info.run_id)
        if not runs:
            return None
        data, info = runs[0].data, runs[0].info
        return _Known(
            info.run_id,
            _epoch(runs[0]),
            info.status,
            info.end_time,
            int(data.tags.get(_SAMPLES_TAG, "0")),
            dict(data.tags),
            dict(data.params),
        )

    def _create(self, record: RunRecord) -> str:
        run = self._client.create_run(
            self._experiment,
            start_time=round(1000 * (record.started or time.time())),
            tags={**environment_tags(), **_tags_of(record), **record.identity},
            run_name=record.name,
        )
        return str(run.info.run_id)

    def _tags(self, known: _Known, record: RunRecord) -> None:
        for key, value in _tags_of(record).items():
            self._set_tag(known, key, value)

    def _describe(self, known: _Known, record: RunRecord) -> None:
        """Parameters and artifacts; both again where they changed, as far as MLflow lets them."""
        params = {key: _cut(str(value), _MAX_PARAM) for key, value in record.params.items()}
        artifacts = [path for path in record.artifacts if path.is_file()]
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
        for path in artifacts:
            digest.update(path.read_bytes())
        if known.tags.get(_DESCRIBED_TAG) == digest.hexdigest()[:16]:
            return
        new = [(key, value) for key, value in params.items() if key not in known.params]
        for first in range(0, len(new), _MAX_PARAMS_A_BATCH):
            batch = new[first : first + _MAX_PARAMS_A_BATCH]
            self._client.log_batch(known.run_id, params=[self._entities.Param(*pair) for pair in batch])
            known.params.update(batch)
        for key, value in params.items():
            if known.params[key] != value or f"{_CHANGED_TAG}{key}" in known.tags:
                self._set_tag(known, f"{_CHANGED_TAG}{key}", value)
        for path in artifacts:
            self._client.log_artifact(known.run_id, str(path))
        self._set_tag(known, _DESCRIBED_TAG, digest.hexdigest()[:16])

    def _points(self, known: _Known, record: RunRecord) -> None:
        for point in record.points:
            epoch = float(point["epoch"])
            if epoch <= known.epoch:
                continue
            stamp = round(1000 * point["time"])
            values = {key: point[key] for key in point if key not in ("time", "epoch", "step")}
            metrics = [
                self._entities.Metric(key, float(value), stamp, round(epoch))
                for key, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ][:_MAX_METRICS_A_BATCH]
            # `epoch` goes with the rest in one transaction: it says that they are there
            metrics.append(self._entities.Metric("epoch", epoch, stamp, round(epoch)))
            self._client.log_batch(known.run_id, metrics=metrics)
            known.epoch = epoch

    def _samples(self, known: _Known, record: RunRecord) -> None:
        """Samples of the machine; one delivered twice, by a driver that died in between, is the same to MLflow."""
        samples = record.system
        while known.num_samples < len(samples):
            batch = 0
            metrics: list[Any] = []
            for number in range(known.num_samples, len(samples)):
                sample = samples[number]
                if len(metrics) + len(sample) > _MAX_METRICS_A_BATCH:
                    break
                stamp = round(1000 * sample["time"])
                metrics += [
                    self._entities.Metric(key, float(value), stamp, number)
                    for key, value in sample.items()
                    if key != "time"
                ]
                batch += 1
            self._client.log_batch(known.run_id, metrics=metrics)
            known.num_samples += batch
            self._set_tag(known, _SAMPLES_TAG, str(known.num_samples))

    def _figures(self, known: _Known, record: RunRecord) -> None:
        for path in record.figures:
            if (stamp := (path, path.stat().st_mtime_ns)) not in known.figures:
                self._client.log_artifact(known.run_id, str(path), "report")
                known.figures.add(stamp)

    def _end(self, known: _Known, record: RunRecord) -> None:
        """Status, and the time of the end: a pruned trial that went on ends a second time with the same status."""
        ended = round(1000 * record.finished) if record.finished else None
        if record.status == "RUNNING":
            if known.status != "RUNNING":
                self._client.update_run(known.run_id, status="RUNNING")
        elif record.status != known.status or (ended is not None and ended != known.ended):
            ended = ended or round(1000 * time.time())
            self._client.set_terminated(known.run_id, record.status, end_time=ended)
            known.ended = ended
        known.status = record.status

    def _set_tag(self, known: _Known, key: str, value: str) -> None:
        value = _cut(value, _MAX_TAG)
        if known.tags.get(key) != value:
            self._client.set_tag(known.run_id, key, value)
            known.tags[key] = value


def identity_key(identity: Mapping[str, str]) -> Identity:
    """A record's identity as the key of a dictionary."""
    return tuple(sorted(identity.items()))


def _tags_of(record: RunRecord) -> dict[str, str]:
    tags = dict(record.tags)
    if record.parent:
        tags[PARENT_TAG] = record.parent
    if record.state:
        tags[_STATE_TAG] = record.state
    return {key: _cut(value, _MAX_TAG) for key, value in tags.items()}


def _epoch(run: Any) -> float:
    return float(run.data.metrics.get("epoch", -math.inf))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


_RETRY_S = 20.0
_MAX_REASON = 200
_STILL_REFUSED = Exception("said before")


class _AwayError(Exception):
    """MLflow does not answer; holds the fault that showed it."""


def tracking_uri(config: TrackingConfig, output: Path) -> str:
    """The URI in force for an output directory (docstring of the module)."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output.parent / 'mlflow.db'}"


class Tracker:
    """Makes records true in MLflow. Raises for no fault of MLflow's, only for what kdecs refuses: it warns once."""

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self.config = config
        self.uri = tracking_uri(config, output)
        self._artifacts = output.parent / "mlartifacts"
        self._client: Any = None
        self._writer: RunWriter | None = None
        self._experiment = ""
        self._retry_at = 0.0
        self._is_away = False
        self._refused: dict[Identity, float] = {}  # -> when to try again

    def sync(self, records: Iterable[RunRecord], *, now: bool = False, final: bool = False) -> bool:
        """Deliver what MLflow lacks of each record; whether all of it is there now.

        A record that MLflow refuses (its run was deleted there, say) holds up no other. After a failure it waits
        before it tries again, unless `now`. `final`: look once more for doubles of every run.
        """
        if not now and time.monotonic() < self._retry_at:
            return False
        with self.answering() as answer:
            self._connect()
            refused: list[tuple[RunRecord, Exception]] = []
            try:
                for record in records:
                    if fault := self._brought(record, now=now, final=final):
                        refused.append((record, fault))
            finally:
                self._say_refused([item for item in refused if item[1] is not _STILL_REFUSED])
            answer.append(not refused)
        return bool(answer and answer[0])

    def sync_family(
        self, parent: RunRecord, children: list[RunRecord], *, now: bool = False, final: bool = False
    ) -> bool:
        """Deliver a run and those nested below it; whether all of it is there now."""
        is_parent_there = self.sync([parent], now=now, final=final)
        if not is_parent_there and (self._is_away or self.run_id(parent.identity) is None):
            return False
        for child in children:
            child.parent = self.run_id(parent.identity)
        return self.sync(children, now=now, final=final) and is_parent_there

    def ensure(self, record: RunRecord) -> str:
        """Make a record true and return its run's id; inside `answering`."""
        self._connect()
        self._sync(record, final=False)
        run_id = self.run_id(record.identity)
        assert run_id is not None
        return run_id

    def log_final(self, run_id: str, record: RunRecord) -> None:
        """Log scores without an epoch, and files; inside `answering`."""
        assert self._writer is not None
        self._writer.log_final(run_id, record)

    @property
    def client(self) -> Any:
        """MLflow's client; inside `answering`."""
        return self._client

    @property
    def shown_uri(self) -> str:
        """The URI in force, without its password."""
        return without_password(self.uri)

    def run_id(self, identity: Mapping[str, str]) -> str | None:
        """The id of a run that a sync of this process has seen."""
        return self._writer.run_id(identity) if self._writer else None

    @contextlib.contextmanager
    def answering(self) -> Iterator[list[Any]]:
        """Yield a list to fill; an MLflow that cannot be reached or used leaves it empty, with one warning."""
        answer: list[Any] = []
        try:
            yield answer
        except KdecsError:
            raise
        except Exception as fault:  # drivers and stores raise what they like: tracking ends no sweep
            is_away = isinstance(fault, _AwayError) or not self._answers()
            error = fault.args[0] if isinstance(fault, _AwayError) else fault
            self._retry_at = time.monotonic() + _RETRY_S
            if not self._is_away:
                self._is_away = True
                how = "does not answer" if is_away else "refuses"
                _warn(
                    f"warning: MLflow at {self.shown_uri} {how} ({self._reason(error)}); "
                    "training goes on, metrics are kept in files and delivered once it does"
                )
        else:
            if self._is_away:
                self._is_away = False
                _warn(f"MLflow at {self.shown_uri} answers again")

    def _brought(self, record: RunRecord, *, now: bool, final: bool) -> Exception | None:
        """What MLflow has against a record, None where it is there now. Raises where MLflow does not answer."""
        key = identity_key(record.identity)
        if not now and time.monotonic() < self._refused.get(key, 0.0):
            return _STILL_REFUSED
        try:
            self._sync(record, final=final)
        except (KdecsError, _AwayError):
            raise
        except Exception as error:
            if not self._answers():
                raise _AwayError(error) from error
            is_told = key in self._refused
            self._refused[key] = time.monotonic() + _RETRY_S
            return _STILL_REFUSED if is_told else error
        self._refused.pop(key, None)
        return None

    def _sync(self, record: RunRecord, *, final: bool) -> None:
        """Every step of a record; the first fault is raised once the others were tried."""
        assert self._writer is not None
        self._writer.open(record, again=final)
        first: Exception | None = None
        for step in self._writer.steps(record):
            try:
                step()
            except Exception as error:
                if not self._answers():
                    raise _AwayError(error) from error
                first = first or error
        if first is not None:
            raise first

    def _say_refused(self, refused: list[tuple[RunRecord, Exception]]) -> None:
        if not refused:
            return
        record, fault = refused[0]
        more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        _warn(
            f"warning: MLflow at {self.shown_uri} refuses part of run {record.name!r}{more} "
            f"({self._reason(fault)}); the rest is delivered"
        )

    def _answers(self) -> bool:
        """Whether MLflow answers a simple question: what fails all the same fails by itself."""
        if self._client is None:
            return False
        try:
            self._client.get_experiment(self._experiment)
        except Exception:
            return False
        return True

    def _reason(self, error: Exception) -> str:
        """One short line: redacted first, then cut."""
        line = " ".join(redacted(str(error), self.uri).split())
        return line[:_MAX_REASON] or type(error).__name__

    def _connect(self) -> None:
        if self._client is not None:
            return
        mlflow = import_mlflow()
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
        self._writer = RunWriter(client, self._experiment, mlflow.entities)
        self._client = client


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


def import_mlflow() -> Any:
    """The package, told to give up soon, to send nothing home, and to keep its migrations' lines to itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        import mlflow
        import mlflow.entities
        import mlflow.pyfunc
    except ImportError as error:
        raise DependencyError(
            f"MLflow is not installed ({error}); install it with: pip install 'kdecs[sweep]'"
        ) from None
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow
