"""Upload runs to MLflow, which only this folder imports: compare with the records on disk, send what is missing.

Nothing that trains talks to MLflow. Trainings write their metrics to `metrics.jsonl`, and one process (a sweep's
driver, or a teacher's rank 0) calls `Tracker.sync` with records that it has read from disk, as often as it likes:

- A run is found by its identity tags or created, so a resumed or replayed record never makes a second run.
- An epoch is sent once, under the time at which it was first written and with the epoch as its step. The run's metric
  `epoch` says how far MLflow is.
- If MLflow does not answer, one line warns, nothing waits, and a later sync sends what is missing.
- If MLflow refuses a part of one run, one line names that run; the rest of it and all other runs are still sent.

Environment: MLFLOW_TRACKING_URI if the config has no `uri`, MLFLOW_ALLOW_FILE_STORE, and what MLflow itself reads.
"""

import contextlib
import importlib.util
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kdecs.artifact import file_lock
from kdecs.errors import ConfigError, DependencyError, KdecsError, TrackingError
from kdecs.tracking.record import (
    RunRecord,
    TrackingConfig,
    environment_tags,
    redacted,
    source_tags,
    without_password,
)
from kdecs.tracking.run import MlflowRun, epoch_of, tags_of

_RETRY_S = 20.0  # an attempt at a server that is away can take as long itself
_MAX_REASON = 200

Identity = tuple[tuple[str, str], ...]
Result = TypeVar("Result")


class _AwayError(Exception):
    """MLflow does not answer. The cause is the error that showed it."""


class _UnusableError(Exception):
    """MLflow cannot be used as it is set up, until somebody changes that. The message or the cause says why."""


class _RefusedError(Exception):
    """MLflow answers, but refuses a part of a run. The cause is its first error."""


def tracking_uri(config: TrackingConfig, output: Path) -> str:
    """The URI that is in force for an output directory: the config's, the environment's, or its default database.

    Raises ConfigError for MLflow's retired file store: no later upload could succeed, so entries call this before any
    work.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default_database(output)}"
    # `databricks` and `uc` have no scheme either, but are MLflow's names of servers.
    is_directory = urlsplit(uri).scheme in ("file", "") and not re.match(r"databricks|uc$", uri)
    if is_directory and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        given = "tracking.uri" if config.uri else "MLFLOW_TRACKING_URI"
        raise ConfigError(
            f"{given} {without_password(uri)}: this is MLflow's file store, which MLflow has retired; expected a "
            f"database, such as sqlite:///{default_database(output)}, or the address of a server "
            "(`mlflow migrate-filestore` moves old runs; MLFLOW_ALLOW_FILE_STORE=true keeps the file store in use)"
        )
    return uri


def default_database(output: Path) -> Path:
    """The SQLite file that all outputs below one folder `runs` share: `mlflow.db` there, beside an output elsewhere.

    Outputs keep the file that there is: an `mlflow.db` between them and `runs`, where older versions wrote it.
    """
    folders = [output.parent]
    names = [folder.name for folder in output.parents]
    if "runs" in names:
        folders = list(output.parents)[: names.index("runs") + 1]
    found = (folder / "mlflow.db" for folder in folders if (folder / "mlflow.db").is_file())
    return next(found, folders[-1] / "mlflow.db")


class Uploader:
    """Uploads records in a background thread, so that no training waits for a server.

    An error that the tracker raises in the background surfaces at the next `start` or `finish`.
    """

    def __init__(self, tracker: "Tracker", *, every_s: float = 0.0) -> None:
        self._tracker = tracker
        self._every_s = every_s
        # One thread: of two uploads at once each would miss the other's run and create it again.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._pending: Future[bool] | None = None
        self._started_at = -math.inf

    @property
    def is_due(self) -> bool:
        """Whether the last upload has ended and began `every_s` ago. Reading the records before that is wasted."""
        is_free = self._pending is None or self._pending.done()
        return is_free and time.monotonic() - self._started_at >= self._every_s

    def start(self, records: Sequence[RunRecord]) -> None:
        """Upload in the background. The caller must not change the records any more."""
        self._wait()
        self._pending = self._thread.submit(self._tracker.sync, records)

    def finish(self, records: Sequence[RunRecord], *, final: bool = False) -> bool:
        """Upload in the foreground, after a pending upload. Returns whether MLflow has everything."""
        self._wait()
        return self._tracker.sync(records, now=True, final=final)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        self._started_at = time.monotonic()


class Tracker:
    """Makes MLflow agree with records. An error of MLflow's becomes one warning, and only KdecsError is raised."""

    def __init__(self, config: TrackingConfig, output: Path) -> None:
        self.config = config
        self.uri = tracking_uri(config, output)
        self.client: Any = None
        self._entities: Any = None  # the module mlflow.entities
        self._experiment = ""
        self._runs: dict[Identity, MlflowRun] = {}
        self._is_away = False
        self._retry_at = 0.0
        self._refused_until: dict[Identity, float] = {}

    @property
    def shown_uri(self) -> str:
        """The URI in force, without its password."""
        return without_password(self.uri)

    def run_id(self, identity: Mapping[str, str]) -> str | None:
        """The id of a run that this tracker has found or created."""
        run = self._runs.get(_key(identity))
        return run.id if run else None

    def sync(self, records: Iterable[RunRecord], *, now: bool = False, final: bool = False) -> bool:
        """Send what MLflow lacks of each record. Returns whether MLflow has all of it now.

        A record that names a parent comes after it. A record that MLflow refuses (because its run was deleted there,
        say) does not hold up the others. After a failure this waits before it tries again, unless `now`. `final`: look
        once more for duplicates of every run.
        """
        if not now and time.monotonic() < self._retry_at:
            return False
        return bool(self.attempt(lambda: self._send_all(records, now=now, final=final)))

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """The result of some work with MLflow, or None and one warning if MLflow cannot be reached or used."""
        try:
            self._connect()
            result = work()
        except KdecsError:
            raise
        except Exception as error:  # drivers and stores raise all kinds of errors; none may end a training
            if isinstance(error, _UnusableError):
                state = "cannot be used"
            else:
                is_away = isinstance(error, _AwayError) or not self._answers()
                state = "does not answer" if is_away else "refuses"
            self._retry_at = time.monotonic() + _RETRY_S
            if not self._is_away:
                self._is_away = True
                _warn(
                    f"warning: MLflow at {self.shown_uri} {state} ({self._reason(error)}). Training continues; "
                    "the metrics stay in files and are uploaded later."
                )
            return None
        if self._is_away:
            self._is_away = False
            _warn(f"MLflow at {self.shown_uri} answers again")
        return result

    def ask(self, question: Callable[[], Result]) -> Result:
        """MLflow's answer to a person, who waits for it. Raises TrackingError if there is none."""
        database = self.uri.removeprefix("sqlite:///")
        if database != self.uri and not Path(database).is_file():  # MLflow would make an empty one
            raise TrackingError(
                f"{database}: no such database of MLflow; check tracking.uri and MLFLOW_TRACKING_URI"
            )
        try:
            self._connect()
            return question()
        except KdecsError:
            raise
        except Exception as error:  # as in `attempt`
            raise TrackingError(
                f"MLflow at {self.shown_uri} does not answer ({self._reason(error)}); check its address and your "
                "password, then run the same command again"
            ) from None

    def ensure(self, record: RunRecord) -> str:
        """Send a record and return its run's id. Call it inside `attempt`."""
        return self._send(record, final=False).id

    def log_final(self, record: RunRecord) -> None:
        """Log the final scores and files of a record that was sent. Call it inside `attempt`."""
        self._runs[_key(record.identity)].log_results(record)

    def _send_all(self, records: Iterable[RunRecord], *, now: bool, final: bool) -> bool:
        """Send each record and return whether all went through. One warning names the newly refused ones."""
        is_all_sent = True
        refused: list[tuple[str, _RefusedError]] = []
        try:
            for record in records:
                key = _key(record.identity)
                if not now and time.monotonic() < self._refused_until.get(key, 0.0):
                    is_all_sent = False
                    continue
                try:
                    self._send(record, final=final)
                except _RefusedError as error:
                    is_all_sent = False
                    if key not in self._refused_until:
                        refused.append((record.name, error))
                    self._refused_until[key] = time.monotonic() + _RETRY_S
                else:
                    self._refused_until.pop(key, None)
        finally:
            if refused:
                name, first = refused[0]
                more = f" and of {len(refused) - 1} more" if len(refused) > 1 else ""
                _warn(
                    f"warning: MLflow at {self.shown_uri} refuses part of run {name!r}{more} "
                    f"({self._reason(first)}); everything else is uploaded"
                )
        return is_all_sent

    def _send(self, record: RunRecord, *, final: bool) -> MlflowRun:
        """Find or create a record's run and send every part that it lacks.

        A part that is refused does not hold up the others; the first error is raised after all of them.
        """
        first: Exception | None = None
        try:
            run = self._open(record, again=final)
            for send in (
                run.set_tags,
                run.describe,
                run.add_points,
                run.add_samples,
                run.add_model,
                run.add_scores,
                run.add_figures,
                run.end,
            ):
                try:
                    send(record)
                except Exception as error:
                    if not self._answers():
                        raise
                    first = first or error
        except Exception as error:
            # One more question tells the two apart, because stores and drivers raise errors of all kinds for both.
            raise (_RefusedError if self._answers() else _AwayError) from error
        if first is not None:
            raise _RefusedError from first
        return run

    def _open(self, record: RunRecord, *, again: bool) -> MlflowRun:
        """Find the record's run or create it. `again`: look once more for duplicates of a run that is known.

        A request to create a run is repeated if its answer was lost, so there may be two: the others are deleted.
        """
        key = _key(record.identity)
        parent = self._parent_id(record)
        run = self._runs.get(key)
        if run is None:
            run = self._find(record.identity)
        elif again:
            self._find(record.identity, keep=run.id)
        if run is None:
            # Only now: whoever resumes the run or selects it later has not trained it.
            source = source_tags(record.entry) if record.entry else {}
            created = self.client.create_run(
                self._experiment,
                start_time=round(1000 * (record.started or time.time())),
                # The identity goes with the request itself: a kill before a second one would leave a run unfound.
                tags={**source, **environment_tags(), **tags_of(record, parent), **record.identity},
                run_name=record.name,
            )
            run = self._find(record.identity, keep=str(created.info.run_id))
            run = run or MlflowRun.of(self.client, self._entities, created)
        run.parent = parent
        self._runs[key] = run
        return run

    def _parent_id(self, record: RunRecord) -> str | None:
        """The id of the run above a record's, None if MLflow has no such run."""
        if record.parent is None:
            return None
        known = self._runs.get(_key(record.parent)) or self._find(record.parent)
        return known.id if known else None

    def _find(self, identity: Mapping[str, str], *, keep: str | None = None) -> MlflowRun | None:
        """The run of an identity. Of several, keep `keep`, else the one with most epochs, and delete the others."""
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
        runs = self.client.search_runs([self._experiment], condition)
        runs = sorted(runs, key=lambda run: (run.info.run_id != keep, -epoch_of(run), run.info.run_id))
        for duplicate in runs[1:]:
            self.client.delete_run(duplicate.info.run_id)
        return MlflowRun.of(self.client, self._entities, runs[0]) if runs else None

    def _answers(self) -> bool:
        """Whether MLflow answers a simple question. If it does, an error was about what was asked."""
        if self.client is None:
            return False
        try:
            self.client.get_experiment(self._experiment)
        except Exception:
            return False
        return True

    def _reason(self, error: Exception) -> str:
        """One short line about an error's cause. Secrets go before it is cut, or a part of one could remain."""
        is_ours = isinstance(error, _AwayError | _UnusableError | _RefusedError)
        cause = (error.__cause__ if is_ours else None) or error
        line = " ".join(redacted(str(cause), self.uri).split())
        return line[:_MAX_REASON] or type(cause).__name__

    def _connect(self) -> None:
        if self.client is not None:
            return
        mlflow = import_mlflow()
        with contextlib.ExitStack() as stack:
            if self.uri.startswith("sqlite:///"):
                database = Path(self.uri.removeprefix("sqlite:///"))
                # Stages that start together would make the schema at the same time, and all but one would fail.
                stack.enter_context(file_lock(database.with_name(f".{database.name}.lock")))
            _probe_database(self.uri)
            # With its own registry named, or MLFLOW_REGISTRY_URI would send the versions elsewhere than their runs.
            client = mlflow.MlflowClient(self.uri, registry_uri=self.uri)
            experiment = client.get_experiment_by_name(self.config.experiment)
            if experiment is None:
                self._experiment = self._create_experiment(client)
            elif experiment.lifecycle_stage == "deleted":
                raise _UnusableError(
                    f"experiment {self.config.experiment!r} was deleted there; restore it with `mlflow experiments "
                    f"restore --experiment-id {experiment.experiment_id}`, or choose another tracking.experiment"
                )
            else:
                self._experiment = experiment.experiment_id
        self._entities = mlflow.entities
        # Last, since a client stands for a connection that is ready: a failure above is tried again as a whole.
        self.client = client

    def _create_experiment(self, client: Any) -> str:
        # For a database MLflow would put artifacts into the current directory.
        database = Path(self.uri.removeprefix("sqlite:///"))
        is_sqlite = self.uri.startswith("sqlite:///")
        location = (database.absolute().parent / "mlartifacts").as_uri() if is_sqlite else None
        try:
            return str(client.create_experiment(self.config.experiment, artifact_location=location))
        except Exception:
            # Of two stages that start together on one server, the second finds the experiment of the first.
            if (made := client.get_experiment_by_name(self.config.experiment)) is None:
                raise
            return str(made.experiment_id)


def _key(identity: Mapping[str, str]) -> Identity:
    return tuple(sorted(identity.items()))


def _warn(line: str) -> None:
    print(f"kdecs: {line}", file=sys.stderr, flush=True)


def _probe_database(uri: str) -> None:
    """Raise at once if a database does not answer. MLflow would try for nearly two minutes."""
    if urlsplit(uri).scheme in ("http", "https", "file", ""):
        return
    from sqlalchemy import create_engine

    try:
        engine = create_engine(uri)
    except Exception as error:  # no such kind of database, or its driver is not installed
        raise _UnusableError from error
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def is_mlflow_installed() -> bool:
    """Whether MLflow can be imported. It is not imported for this."""
    return importlib.util.find_spec("mlflow") is not None


def import_mlflow() -> Any:
    """Import MLflow with short timeouts, without telemetry and without its migration log."""
    # MLflow repeats a request seven times with two minutes each by default, and a training must not wait for that.
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
