"""One trial: a student trained in its own directory, resumable, with its log and status in files.

A trial's directory is a student artifact (its manifest makes it complete) that also holds

    trial.json   {status, started, finished, seconds, attempts, stalled, epoch, error, run, reused_from}
    log.txt      what the training printed, all attempts
    environment.json, system.jsonl   the machine (kdecs.sweep.trial)
    .lock        held while a process trains here; the kernel frees it when that process dies

Status is running, complete, failed, stopped, or pruned (by the search, for its metrics). A `running` trial without a
living process was killed. `stalled` counts the attempts in a row that finished no epoch: a trial that dies again and
again on unreliable machines goes on as long as it advances. `run` names the driver's start that this was in.
"""

import contextlib
import importlib
import json
import os
import platform
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from kdecs.artifact import MANIFEST_NAME, file_lock, is_complete, read_manifest, write_json
from kdecs.config import CONFIG_NAME, config_hash, load_config
from kdecs.errors import ArtifactError, KdecsError, Stopped
from kdecs.process import StopSignal
from kdecs.runtime import start_runtime
from kdecs.student.config import StudentConfig
from kdecs.tracking.record import METRICS_NAME, environment_tags, read_points

ENVIRONMENT_NAME = "environment.json"
SYSTEM_NAME = "system.jsonl"
_PACKAGES = ("kdecs", "torch", "transformers", "deepspeed", "peft", "ray", "mlflow", "pyarrow", "numpy")
_INTERVAL_S = 10.0
_MIB = 1 << 20


def write_environment(directory: Path) -> None:
    """Replace `environment.json` of a trial or sweep."""
    write_json(directory / ENVIRONMENT_NAME, environment())


def environment() -> dict[str, Any]:
    """Versions, host and device of this process."""
    found: dict[str, Any] = {
        **environment_tags(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": _versions(),
    }
    cuda = _cuda()
    if cuda is not None:
        found["gpu"] = cuda.get_device_name(0)
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cuda() -> Any:
    """torch.cuda where this process uses it; torch is not imported for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


@contextlib.contextmanager
def sampled_load(directory: Path, *, interval_s: float = _INTERVAL_S) -> Iterator[None]:
    """Append a sample of this machine's and process' load to `system.jsonl` at both ends and in between."""
    ended = threading.Event()
    process = psutil.Process()
    psutil.cpu_percent(None)  # the first call measures nothing
    process.cpu_percent(None)

    def append() -> None:
        line = json.dumps({"time": time.time(), **load(process)})
        with (directory / SYSTEM_NAME).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def sample() -> None:
        while not ended.wait(interval_s):
            append()

    sampler = threading.Thread(target=sample, daemon=True, name="load")
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()
        append()


def read_samples(path: Path) -> list[dict[str, float]]:
    """The samples of a `system.jsonl`; one that was cut by a kill is left out."""
    found: list[dict[str, float]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def load(process: psutil.Process) -> dict[str, float]:
    """The load now: percent and MiB since the last call of this process."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(None),
        "system/system_memory_usage_megabytes": (memory.total - memory.available) / _MIB,
        "system/trial_cpu_utilization_percentage": process.cpu_percent(None),
        "system/trial_memory_usage_megabytes": process.memory_info().rss / _MIB,
    }
    cuda = _cuda()
    if cuda is not None and cuda.is_initialized():
        free, total = cuda.mem_get_info()
        found["system/gpu_0_memory_usage_megabytes"] = (total - free) / _MIB
        found["system/gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
        found["system/trial_gpu_memory_usage_megabytes"] = cuda.memory_reserved() / _MIB
        with contextlib.suppress(ModuleNotFoundError):  # NVIDIA's own bindings are optional
            found["system/gpu_0_utilization_percentage"] = float(cuda.utilization())
    return found


_POLL_S = 1.0


def find_student(store: Path, digest: str) -> Path | None:
    """The directory of a finished student with this config hash, or None."""
    target = (store / digest).resolve()
    with contextlib.suppress(ArtifactError):  # damaged since: it is trained again
        if is_complete(target, "student", digest):
            return target
    return None


def add_student(store: Path, digest: str, directory: Path) -> None:
    """Note where a finished student lies; a link that leads nowhere is replaced."""
    if find_student(store, digest):
        return
    store.mkdir(parents=True, exist_ok=True)
    temporary = store / f".{digest}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(directory, store))
    os.replace(temporary, store / digest)


def take_student(source: Path, target: Path) -> None:
    """Make `target` a finished student from the files of `source`, without a second copy on disk where possible."""
    target.mkdir(parents=True, exist_ok=True)
    for name in [*(entry.path for entry in read_manifest(source, "student").files), MANIFEST_NAME]:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source / name, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / name, temporary)
        os.replace(temporary, place)


@contextlib.contextmanager
def training_lock(store: Path, digest: str, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Wait until nobody else trains this student and hold the right to; yields False once a stop is asked for."""
    path = store / ".locks" / digest
    while True:
        with file_lock(path, blocking=False) as held:
            if held:
                yield True
                return
        if should_stop():
            yield False
            return
        time.sleep(_POLL_S)


STATUS_NAME = "trial.json"
LOG_NAME = "log.txt"
DEFAULT_TRAINER = "kdecs.sweep.trial:train_student_trial"
DIED = "the process died without a word: killed, or out of memory"
_STOP_POLL_S = 0.5

OnEpoch = Callable[[dict[str, float]], None]
Trainer = Callable[[StudentConfig, OnEpoch, StopSignal], Path]


@dataclass
class TrialStatus:
    """What `trial.json` holds: times in unix seconds, `seconds` summed over attempts."""

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
        """Replace the trial's status file."""
        write_json(directory / STATUS_NAME, asdict(self))


def read_status(directory: Path) -> TrialStatus | None:
    """The trial's status, or None where it never started. Raises ArtifactError for a damaged file."""
    path = directory / STATUS_NAME
    try:
        return TrialStatus(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: not a trial's status ({error}); remove the file") from None


def load_trainer(reference: str) -> Trainer:
    """The trainer at `module:function`; a reference crosses processes where a function would not."""
    module, _, name = reference.partition(":")
    trainer: Trainer = getattr(importlib.import_module(module), name)
    return trainer


def train_student_trial(config: StudentConfig, on_epoch: OnEpoch, stop: StopSignal) -> Path:
    """The real trainer: `train_student` on the device and threads that the trial was given."""
    from kdecs.student.training import train_student

    runtime = start_runtime(threads=config.threads)
    return train_student(config, runtime, on_epoch=on_epoch, stop=stop)


@dataclass(frozen=True)
class TrialRun:
    """What one start of a driver gives its trials: it stands in the plan, for every node.

    `stop_file`, once it exists, stops trainings between steps; its name tells starts apart. `store` holds finished
    students; `max_failures` bounds the attempts in a row that finish no epoch. `keep_pruned`: a trial that the search
    stopped is reported again, not trained on.
    """

    trainer: str
    stop_file: Path
    store: Path
    reuse_students: bool = True
    max_failures: int = 0
    keep_pruned: bool = False

    @property
    def is_stopping(self) -> bool:
        """Whether the driver asked its trials to stop."""
        return self.stop_file.exists()


def run_trial(directory: Path, run: TrialRun, report: OnEpoch) -> TrialStatus:
    """Train what `config.json` in the directory says, from its last checkpoint; a complete one is skipped.

    A student that another sweep has finished is taken from the store, unless this trial has epochs of its own: those
    may be told already, and another training's differ. Epochs of earlier attempts are reported again first, so that a
    scheduler knows them. A refusal (KdecsError) or a stop ends as a status; any other error is written there and
    raised while another attempt is allowed.
    """
    with file_lock(directory / ".lock"), _output_to(directory / LOG_NAME):
        attempt = _Attempt(directory, run, read_status(directory) or TrialStatus(started=time.time()))
        try:
            return _run(attempt, report)
        except KdecsError as refusal:
            print(f"kdecs: error: {refusal}", file=sys.stderr)
            attempt.begin()
            return attempt.end("failed", str(refusal))
        except Exception as fault:
            traceback.print_exc()
            attempt.begin()
            status = attempt.end("failed", f"{type(fault).__name__}: {fault}")
            if status.stalled > run.max_failures:
                return status
            raise


def settle(directory: Path) -> None:
    """Note the end of a trial that was killed after its student was complete and before its status said so.

    For a directory whose student is complete; a trial that a process holds is left to it.
    """
    ended = (directory / MANIFEST_NAME).stat().st_mtime
    status = read_status(directory) or TrialStatus(started=ended)
    if status.is_settled:
        return
    with file_lock(directory / ".lock", blocking=False) as held:
        if held:
            status.status, status.finished, status.error = "complete", ended, None
            status.write(directory)


class _Attempt:
    """One call of `run_trial`: the trial's status, counted as an attempt once it begins."""

    def __init__(self, directory: Path, run: TrialRun, previous: TrialStatus) -> None:
        self.directory, self.run, self.status = directory, run, previous
        self._began: float | None = None
        self._seconds_before = previous.seconds
        if previous.run != run.stop_file.name:
            previous.stalled = 0  # a new start tries again

    def begin(self) -> None:
        """Count this attempt, once, and write that it runs."""
        if self._began is None:
            self._began = time.time()
            before = self.status
            self.status = TrialStatus(
                started=before.started,
                seconds=before.seconds,
                attempts=before.attempts + 1,
                stalled=before.stalled + 1,
                epoch=before.epoch,
                error=before.error if before.stalled else None,
                run=self.run.stop_file.name,
            )
            self.status.write(self.directory)

    def reach(self, epoch: float | None) -> None:
        """Note an epoch that has ended: whatever happens next, this attempt or the one before it advanced."""
        self._measure()
        self.status.epoch = epoch
        self.status.stalled, self.status.error = 0, None
        self.status.write(self.directory)

    def end(self, outcome: str, error: str | None = None) -> TrialStatus:
        """Write how the trial ended; an end that stands there already keeps its time."""
        status = self.status
        if status.status != outcome or not status.finished:
            self._measure()
            status.status = outcome
            status.finished = time.time()
            status.error = " ".join(error.split()) if error else None
            status.write(self.directory)
        return status

    def _measure(self) -> None:
        if self._began is not None:
            self.status.seconds = self._seconds_before + time.time() - self._began


def _run(attempt: _Attempt, report: OnEpoch) -> TrialStatus:
    directory, run = attempt.directory, attempt.run
    config = load_config(StudentConfig, directory / CONFIG_NAME)
    digest = config_hash(config)
    with training_lock(run.store, digest, lambda: run.is_stopping) as held:
        if not held or run.is_stopping:
            return attempt.status
        from kdecs.training.checkpoint import restore_metrics  # torch takes seconds to import

        restore_metrics(directory, digest)
        points = read_points(directory / METRICS_NAME)
        is_done = is_complete(directory, "student", digest)
        is_own = bool(points) and not attempt.status.reused_from
        if not is_done and run.reuse_students and not is_own and _take(attempt, digest):
            is_done, points = True, read_points(directory / METRICS_NAME)
        if points and points[-1]["epoch"] > (attempt.status.epoch or 0):
            attempt.status.epoch, attempt.status.stalled = points[-1]["epoch"], 0
        try:
            for point in points:  # a scheduler may stop the trial by what it had reached
                report(point)
        except SystemExit:
            if not is_done:
                attempt.end("pruned")
            raise
        if attempt.status.status == "pruned" and run.keep_pruned:
            return attempt.status
        status = attempt.end("complete") if is_done else _train(attempt, config, report)
        if status.status == "complete":
            add_student(run.store, digest, directory)
        return status


def _take(attempt: _Attempt, digest: str) -> bool:
    """Take the student from the store where it is there; whether it was."""
    directory = attempt.directory
    source = find_student(attempt.run.store, digest)
    if source is None or source == directory.resolve():
        return False
    found = read_status(source) or TrialStatus(started=time.time())
    taken = replace(found, status="running", finished=None, error=None, reused_from=str(source))
    taken.write(directory)  # first: a kill in between leaves epochs here that are not this trial's own
    take_student(source, directory)
    taken.status = "complete"
    taken.finished = found.finished or (source / MANIFEST_NAME).stat().st_mtime
    taken.write(directory)
    attempt.status = taken
    print(f"taken from {source}, trained there with the same settings", flush=True)
    return True


def _train(attempt: _Attempt, config: StudentConfig, report: OnEpoch) -> TrialStatus:
    directory, run = attempt.directory, attempt.run
    if attempt.status.stalled > run.max_failures:
        return attempt.end("failed", attempt.status.error or DIED)
    attempt.begin()
    write_environment(directory)

    def on_epoch(metrics: dict[str, float]) -> None:
        attempt.reach(metrics.get("epoch"))
        if metrics["epoch"] < config.optimization.epochs:  # a scheduler must not stop what is trained already
            report(metrics)

    stop = StopSignal()
    try:
        with _stopping_with(run.stop_file, stop), sampled_load(directory):
            load_trainer(run.trainer)(config, on_epoch, stop)
    except Stopped:
        return attempt.end("stopped")
    except SystemExit:  # how Tune ends what its scheduler stopped
        attempt.end("pruned")
        raise
    return attempt.end("complete")


@contextlib.contextmanager
def _stopping_with(stop_file: Path, stop: StopSignal) -> Iterator[None]:
    """Request the stop when the file appears: a file reaches trials on every node, a signal does not."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_STOP_POLL_S):
            if stop_file.exists():
                stop.requested = True
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append the process's output to a file, at the level of descriptors: libraries in C print too."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with (
            os.fdopen(os.dup(1), "w", buffering=1) as out,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            yield
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
