"""One trial: train a student or baseline in its own directory so that it can be killed at any moment and resume.

A trial's directory is an artifact of that kind (its manifest makes it complete) that also holds

    trial.json         the last note of the process that trains here (kdecs.sweep.status)
    log.txt            what the training printed, over all attempts
    environment.json, system.jsonl   the machine and its load (kdecs.tracking.machine)
    .lock              held while a process trains here; the kernel releases it when that process dies

`run_trial` is called in a worker on any node. It reads the trial's own `config.json`; what one start of the driver asks
for beyond that is in TrialRun.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ImportString

from kdecs.artifact import (
    MANIFEST_NAME,
    file_lock,
    fsync,
    is_complete,
    read_manifest,
    read_verified_manifest,
    remove_leftovers,
    temporary_path,
    write_text,
)
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.config import CONFIG_NAME, config_hash
from kdecs.errors import ArtifactError, KdecsError, Stopped
from kdecs.process import StopSignal
from kdecs.runtime import Runtime, import_deepspeed, process_group, start_runtime
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import TRIAL_KINDS, TrialConfig, load_trial_config, num_epochs
from kdecs.sweep.control import wanted_of
from kdecs.sweep.status import (
    DIED,
    LOG_NAME,
    SELECTION_METRIC,
    TrialNote,
    read_note,
    trial_points,
    trial_status,
)
from kdecs.tracking.machine import sampled_load, write_environment
from kdecs.tracking.record import METRICS_NAME

STAGE_NAME = ".stage.json"  # what the driver asks of the Ray process (StageRun)
RAY_LOCK_NAME = ".ray-lock"  # held by the Ray process of a sweep
OUT_OF_MEMORY = 75  # exit code of the Ray process: Ray killed a worker because memory ran out
_LOCK_POLL_S = 1.0
_STOP_POLL_S = 0.5

OnEpoch = Callable[[dict[str, float]], None]
Trainer = Callable[[TrialConfig, OnEpoch, StopSignal], Path]


def train_student_trial(config: TrialConfig, on_epoch: OnEpoch, stop: StopSignal) -> Path:
    """The trainer of a real sweep: a student, or a baseline, on the device and threads that the trial was given."""
    from kdecs.student.training import train_student

    runtime = start_runtime(threads=config.threads)
    if isinstance(config, GenerativeConfig):
        return _train_generative(config, runtime, on_epoch, stop)
    if not isinstance(config, StudentConfig):
        from kdecs.baselines.training import train_baseline

        return train_baseline(config, runtime, on_epoch=on_epoch, stop=stop)
    return train_student(config, runtime, on_epoch=on_epoch, stop=stop)


def _train_generative(
    config: GenerativeConfig, runtime: Runtime, on_epoch: OnEpoch, stop: StopSignal
) -> Path:
    """Fine-tune a language model as the only rank, whose process group DeepSpeed's engine needs all the same."""
    import_deepspeed()
    from kdecs.baselines.generative.training import train_generative

    def on_validation() -> None:
        # As the driver reads it, so that both count the same epochs.
        on_epoch(trial_points(config.output / METRICS_NAME, config.kind)[-1])

    with process_group(runtime, single=True):
        return train_generative(config, runtime, stop, on_validation)


class TrialRun(BaseModel):
    """What one start of a driver asks of its trials. It goes to the Ray process as JSON, the trainer by its name.

    `stop_file`, once it exists, stops trainings between steps; its name tells starts apart. `store` holds links to
    finished students. `max_failures` bounds the attempts in a row that finish no epoch. `is_search`: a trial that the
    search has pruned is only reported again, not trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stop_file: Path
    store: Path
    trainer: ImportString[Trainer] = train_student_trial
    reuse_students: bool = True
    max_failures: int = 0
    is_search: bool = False

    @property
    def is_stopping(self) -> bool:
        """Whether the driver asked its trials to stop."""
        return self.stop_file.exists()


class StageRun(BaseModel):
    """What the driver asks of one Ray process: SWEEP/.stage.json. All else is in the configs of sweep and trials.

    `settled` are trials of a search that are over. `metric` is what trials are ranked by. `driver` is the id of the
    driver's process: once it is not the Ray process' parent any more, nothing new begins. While the Ray process runs,
    the driver replaces the file to append to `trials`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sweep: Path
    run: TrialRun
    trials: tuple[str, ...]
    settled: tuple[str, ...] = ()
    metric: str = SELECTION_METRIC
    driver: int

    def write(self, path: Path) -> None:
        """Replace the file."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "StageRun":
        """What the driver wrote."""
        return cls.model_validate_json(path.read_bytes())


def run_trial(directory: Path, run: TrialRun, report: OnEpoch) -> TrialNote:
    """Train what `config.json` in the directory says, from its last checkpoint. Returns the trial's note.

    A trial that is complete, or that a person has stopped or dropped (kdecs.sweep.control), is skipped. A student that
    another sweep has finished is taken from the store. `report` is called with each epoch, first with those of earlier
    attempts, so that a scheduler knows them. A refusal (KdecsError) or a stop ends as a note; any other error is noted
    and raised as long as another attempt is allowed.
    """
    # The lock comes first: nothing may be written into the log of a trial that another process trains.
    with file_lock(directory / ".lock"), _output_to(directory / LOG_NAME):
        attempt = _Attempt(directory, run)
        try:
            config = load_trial_config(directory / CONFIG_NAME)
            digest = config_hash(config)
            # A trial that was stopped or dropped while it waited for its turn does not begin.
            with training_lock(run.store, digest, attempt.should_stop) as is_held:
                if is_held and not attempt.should_stop():
                    _train_or_skip(attempt, config, digest, report)
        except Stopped:
            attempt.stop()
        except KdecsError as refusal:
            print(f"kdecs: error: {refusal}", file=sys.stderr)
            attempt.begin()
            attempt.end("failed", str(refusal))
        except Exception as fault:
            traceback.print_exc()
            # A fault before the training began is an attempt too, or only Tune's own bound would end the retries.
            attempt.begin()
            attempt.end("failed", f"{type(fault).__name__}: {fault}")
            # Tune starts a trial again whose error is raised, and lets one rest that returns.
            if attempt.note.stalled <= run.max_failures:
                raise
        return attempt.note


def _train_or_skip(attempt: "_Attempt", config: TrialConfig, digest: str, report: OnEpoch) -> None:
    """Bring the trial to its end, under the locks of its directory and of its student."""
    from kdecs.training.checkpoint import restore_metrics  # torch takes seconds to import

    directory, run = attempt.directory, attempt.run
    restore_metrics(directory, digest)
    points = trial_points(directory / METRICS_NAME, config.kind)
    is_trained = is_complete(directory, config.kind, digest)
    # Epochs that this trial trained may be in MLflow already, and those of another training differ from them.
    has_own_epochs = bool(points) and not attempt.note.reused_from
    if run.reuse_students and not is_trained and not has_own_epochs and attempt.take_from_store(digest):
        is_trained, points = True, trial_points(directory / METRICS_NAME, config.kind)
    attempt.count_epochs(points)
    try:
        for point in points:
            report(point)
        status = trial_status(attempt.note.status, is_complete=is_trained, is_live=False)
        if status == "complete":
            attempt.end("complete")
        elif status != "pruned" or not run.is_search:
            _train(attempt, config, report)
    except SystemExit:
        # This is how Tune ends a trial that its scheduler stopped, at any epoch that is reported.
        if not is_trained:
            attempt.end("pruned")
        raise
    if attempt.note.status == "complete":
        add_student(run.store, digest, directory)


def _train(attempt: "_Attempt", config: TrialConfig, report: OnEpoch) -> None:
    if attempt.note.stalled > attempt.run.max_failures:
        attempt.end("failed", attempt.note.error or DIED)
        return
    attempt.begin()
    write_environment(attempt.directory)

    def on_epoch(metrics: dict[str, float]) -> None:
        # Noted before it is reported: `report` may not return, since Tune ends a pruned trial in it.
        attempt.reach(metrics.get("epoch"))
        if metrics["epoch"] < num_epochs(config):  # a scheduler must not stop what is trained already
            report(metrics)

    stop = StopSignal()
    with _stopping_if(attempt.should_stop, stop), sampled_load(attempt.directory):
        attempt.run.trainer(config, on_epoch, stop)
    attempt.end("complete")


class _Attempt:
    """One call of `run_trial`: the trial's note, and the attempt that counts once a training begins."""

    def __init__(self, directory: Path, run: TrialRun) -> None:
        self.directory, self.run = directory, run
        self.note = read_note(directory) or TrialNote(started=time.time())
        self._began: float | None = None
        self._seconds_before = self.note.seconds
        if self.note.run != run.stop_file.name:
            self.note.stalled = 0  # each start of the driver tries again

    def should_stop(self) -> bool:
        """Whether the driver stops all trials, or a person this one."""
        return self.run.is_stopping or wanted_of(self.directory) is not None

    def begin(self) -> None:
        """Count this attempt, once, and note that it runs."""
        if self._began is not None:
            return
        self._began = time.time()
        before = self.note
        self.note = TrialNote(
            started=before.started,
            seconds=before.seconds,
            attempts=before.attempts + 1,
            stalled=before.stalled + 1,
            epoch=before.epoch,
            error=before.error if before.stalled else None,
            run=self.run.stop_file.name,
        )
        self.note.write(self.directory)

    def count_epochs(self, points: list[dict[str, Any]]) -> None:
        """Count epochs that only the checkpoint knew, because a kill came before they were noted."""
        if points and points[-1]["epoch"] > (self.note.epoch or 0):
            self.note.epoch, self.note.stalled = points[-1]["epoch"], 0

    def reach(self, epoch: float | None) -> None:
        """Note an epoch that has ended, so that this attempt counts as advanced whatever happens next."""
        self._measure()
        self.note.epoch = epoch
        self.note.stalled, self.note.error = 0, None
        self.note.write(self.directory)

    def end(self, status: str, error: str | None = None) -> None:
        """Note how the trial ended. An end that was noted already keeps its time."""
        note = self.note
        if note.status == status and note.finished:
            return
        self._measure()
        note.status, note.finished = status, time.time()
        note.error = " ".join(error.split()) if error else None
        note.write(self.directory)

    def stop(self) -> None:
        """Note that the attempt was stopped. It did not fail, so it does not count as one without an epoch."""
        if self._began is not None:
            self.note.stalled = max(0, self.note.stalled - 1)
        self.end("stopped")

    def take_from_store(self, digest: str) -> bool:
        """Take the student from the store if it is there. Returns whether it was."""
        source = find_student(self.run.store, digest)
        if source is None or source == self.directory.resolve():
            return False
        try:
            read_verified_manifest(source, *TRIAL_KINDS)
        except ArtifactError as fault:  # as if it were not there
            print(f"not taken from {source}: {fault}", flush=True)
            return False
        found = read_note(source) or TrialNote(started=time.time())
        self.note = replace(found, status="running", finished=None, error=None, reused_from=str(source))
        # Before the files: if a kill comes in between, the epochs that are here then are not this trial's own.
        self.note.write(self.directory)
        take_student(source, self.directory)
        self.note.status = "complete"
        # If the source was killed before it noted its end, the manifest's time is that end.
        self.note.finished = found.finished or (source / MANIFEST_NAME).stat().st_mtime
        self.note.write(self.directory)
        print(f"taken from {source}, trained there with the same settings", flush=True)
        return True

    def _measure(self) -> None:
        if self._began is not None:
            self.note.seconds = self._seconds_before + time.time() - self._began


def settle(directory: Path) -> None:
    """Note the end of a trial that was killed after its student was complete and before its note said so.

    The directory's student must be complete. A trial that a process holds is left to that process.
    """
    ended = (directory / MANIFEST_NAME).stat().st_mtime
    note = read_note(directory) or TrialNote(started=ended)
    if note.is_settled:
        return
    with file_lock(directory / ".lock", blocking=False) as is_held:
        if is_held:
            note.status, note.finished, note.error = "complete", ended, None
            note.write(directory)


def find_student(store: Path, digest: str) -> Path | None:
    """The directory of a finished student with this config hash, or None."""
    target = (store / digest).resolve()  # the store holds links to the trials' directories
    with contextlib.suppress(ArtifactError):  # damaged since then, so it is trained again
        if (target / MANIFEST_NAME).is_file():
            manifest = read_manifest(target, *TRIAL_KINDS)
            kind = next(kind for kind in TRIAL_KINDS if kind == manifest.kind)
            if is_complete(target, kind, digest):
                return target
    return None


def add_student(store: Path, digest: str, directory: Path) -> None:
    """Link to a finished student, under its `training_lock`. A link that leads nowhere is replaced."""
    if find_student(store, digest):
        return
    store.mkdir(parents=True, exist_ok=True)
    # In one step, because another sweep may look for the link at any moment.
    temporary = store / f".{digest}.link"
    temporary.unlink(missing_ok=True)  # of a process that was killed
    temporary.symlink_to(os.path.relpath(directory, store))
    os.replace(temporary, store / digest)


def take_student(source: Path, target: Path) -> None:
    """Make `target` a finished student from the files of `source`, without a second copy on disk where possible."""
    target.mkdir(parents=True, exist_ok=True)
    # The manifest comes last: until then a kill leaves an unfinished student.
    for name in [*(entry.path for entry in read_manifest(source, *TRIAL_KINDS).files), MANIFEST_NAME]:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place)
        temporary = temporary_path(place)
        try:
            os.link(source / name, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / name, temporary)
            fsync(temporary)
        os.replace(temporary, place)
        # A rename does nothing where both names are links to one file, as after an attempt that was killed.
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def training_lock(store: Path, digest: str, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Hold the right to train this student, after any other sweep that does. Yields False once a stop is requested."""
    # Two sweeps that need the same student train it once: the second waits here, then finds it in the store.
    path = store / ".locks" / digest
    while True:
        with file_lock(path, blocking=False) as held:
            if held:
                yield True
                return
        if should_stop():
            yield False
            return
        time.sleep(_LOCK_POLL_S)


@contextlib.contextmanager
def _stopping_if(should_stop: Callable[[], bool], stop: StopSignal) -> Iterator[None]:
    """Request the stop once files ask for it. A file reaches trials on every node, a signal does not."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_STOP_POLL_S):
            if should_stop():
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
    """Append the process's output to a file. At the level of descriptors, because libraries in C print too."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with (
            # By the line: a process that is killed must leave what it has printed.
            os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as out,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            yield
    finally:
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
