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
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kdecs.errors import DependencyError, KdecsError
from kdecs.run_record import RunRecord, TrackingConfig, redacted, without_password
from kdecs.run_writer import Identity, RunWriter, identity_key

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
