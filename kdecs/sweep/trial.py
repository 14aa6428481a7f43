"""One trial: a student trained in its own directory, resumable, with its log and status in files.

A trial's directory is a student artifact (its manifest makes it complete) that also holds

    trial.json   {status, started, finished, seconds, attempts, epoch, error}: written at every epoch
    log.txt      what the training printed, all attempts
    .lock        held while a process trains here; the kernel frees it when that process dies

Status is running, complete, failed or stopped. A `running` trial without a living process was killed.
"""

import contextlib
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kdecs.artifact import file_lock, is_complete, write_json
from kdecs.config import CONFIG_NAME, config_hash, load_config
from kdecs.errors import ArtifactError, KdecsError, Stopped
from kdecs.runtime import StopSignal, start_runtime
from kdecs.student.config import StudentConfig

STATUS_NAME = "trial.json"
LOG_NAME = "log.txt"
DEFAULT_TRAINER = "kdecs.sweep.trial:train_student_trial"
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
    epoch: float | None = None
    error: str | None = None

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


def run_trial(directory: Path, *, trainer: Trainer, report: OnEpoch, stop_file: Path) -> TrialStatus:
    """Train what `config.json` in the directory says, from its last checkpoint; a complete one is skipped.

    A refusal (KdecsError) or a stop ends as a status; any other error is written there and raised, so that
    the caller may try again. `stop_file`, once it exists, stops the training between steps.
    """
    with file_lock(directory / ".lock"), _output_to(directory / LOG_NAME):
        config = load_config(StudentConfig, directory / CONFIG_NAME)
        previous = read_status(directory) or TrialStatus(started=time.time())
        if is_complete(directory, "student", config_hash(config)):
            return _ended(previous, directory, "complete")
        if stop_file.exists():
            return previous
        return _train(directory, config, trainer, report, stop_file, previous)


def _train(
    directory: Path,
    config: StudentConfig,
    trainer: Trainer,
    report: OnEpoch,
    stop_file: Path,
    previous: TrialStatus,
) -> TrialStatus:
    began = time.time()
    status = TrialStatus(
        started=previous.started,
        seconds=previous.seconds,
        attempts=previous.attempts + 1,
        epoch=previous.epoch,
    )
    status.write(directory)

    def on_epoch(metrics: dict[str, float]) -> None:
        status.seconds = previous.seconds + time.time() - began
        status.epoch = metrics.get("epoch")
        status.write(directory)
        report(metrics)

    stop = StopSignal()
    try:
        with _stopping_with(stop_file, stop):
            trainer(config, on_epoch, stop)
    except Stopped:
        outcome, error = "stopped", None
    except KdecsError as refusal:
        outcome, error = "failed", str(refusal)
        print(f"kdecs: error: {refusal}", file=sys.stderr)
    except Exception as fault:
        traceback.print_exc()
        status.seconds = previous.seconds + time.time() - began
        _ended(status, directory, "failed", f"{type(fault).__name__}: {fault}")
        raise
    else:
        outcome, error = "complete", None
    status.seconds = previous.seconds + time.time() - began
    return _ended(status, directory, outcome, error)


def _ended(status: TrialStatus, directory: Path, outcome: str, error: str | None = None) -> TrialStatus:
    if status.status == outcome:
        return status
    status.status = outcome
    status.finished = time.time()
    status.error = " ".join(error.split()) if error else None
    status.write(directory)
    return status


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
