"""Train the trials of one stage by Ray Tune, in a separate process. No other module imports Ray.

The driver starts `python -m kdecs.sweep.ray SWEEP/.stage.json` in its own session and follows the trials by their
files. This has three reasons: a SIGTERM to the driver's process group does not take Ray's servers away from running
trials, Ray's messages go to a file, and Ray's signal handlers do not replace the driver's.

    train_stage     hold the sweep's lock, start Ray, fit, clean up
    _fit            the trials as a Tune experiment; each runs `run_trial` in a worker
    _StopCallback   ends the experiment once the stop file exists or the driver has died
    _Queue          the trials in their order, or as Optuna suggests them (kdecs.sweep.search), as a searcher of Tune

A stop has one path. The driver, a signal to this process, and the callback that finds its driver dead all touch the
stop file. The trials see it on any node, save their state and end; then the callback leaves `Tuner.fit`.

Nothing that a later start needs is in Ray's own state: a trial resumes from its own directory.
"""

import argparse
import contextlib
import hashlib
import logging
import math
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError
from ray.tune.search import Searcher

from kdecs.artifact import file_lock
from kdecs.config import CONFIG_NAME, BudgetedOptimization, load_config
from kdecs.errors import DeviceError
from kdecs.process import run_entry
from kdecs.sweep.config import GridSearch, SweepConfig, TpeSearch, flat_keys, num_epochs
from kdecs.sweep.control import wanted_of
from kdecs.sweep.search import Search, TpeSuggester
from kdecs.sweep.space import VARIANT_KEY, Space, student_value, trials_directory
from kdecs.sweep.status import read_note
from kdecs.sweep.trial import OUT_OF_MEMORY, RAY_LOCK_NAME, STAGE_NAME, StageRun, TrialRun, run_trial

_LOCK_POLL_S = 1.0
_STOP_GRACE_S = 300.0  # a stop waits for the next step of each trial; after this time the rest is killed
_LONGEST_TEMPORARY = 19  # Ray's sockets lie 88 characters below it, and a socket's path may have 107 bytes
_MAX_DEATHS = 100  # of one trial
_MAX_PENDING = 200  # trials that wait for resources at the same time
_CUDA_CONTEXT_BYTES = 600 << 20  # of one process, with PyTorch's kernels


class _AllStoppedError(Exception):
    """Leaves `Tuner.fit` once a stop was requested and no trial runs any more."""


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(
        description="Train the trials of one stage of a sweep (started by its driver)."
    )
    parser.add_argument("stage", type=Path, metavar="STAGE.json")
    train_stage(StageRun.read(parser.parse_args().stage))


def train_stage(stage: StageRun) -> None:
    """Train the stage's trials, as many at a time as `max_concurrent_trials` and the resources allow.

    Waits while the Ray process of an earlier, killed driver still ends its trials. Why a trial failed is in its
    files; the exit code OUT_OF_MEMORY says that Ray killed a worker because memory ran out.
    """
    config = load_config(SweepConfig, stage.sweep / CONFIG_NAME)
    with _sweep_lock(stage) as is_wanted:
        if not is_wanted:
            return
        private = private_directory(stage.sweep)
        try:
            _start_ray(config, private, stage.run.stop_file)
            if not _is_orphan(stage):
                _fit(stage, config)
        except _AllStoppedError:
            return
        except RuntimeError as error:
            # If Ray kills a worker because memory runs out, Tune fails the entire run and not only that trial.
            if isinstance(error.__cause__, OutOfMemoryError):
                sys.exit(OUT_OF_MEMORY)
            raise
        finally:
            ray.shutdown()
            shutil.rmtree(private, ignore_errors=True)
            shutil.rmtree(ray_storage(stage), ignore_errors=True)


def ray_storage(stage: StageRun) -> Path:
    """The folder of Ray's own state in one start. Nothing in it outlives the start."""
    return stage.sweep / f".ray{stage.run.stop_file.name}"


def private_directory(sweep: Path) -> Path:
    """A new temporary directory that nobody but this user can enter, for Ray's files and token. Hold the sweep's lock.

    It replaces what a killed Ray process of this sweep left on this machine.
    """
    usual = tempfile.gettempdir()
    # Not below the run's directory, which may be deep: the paths of Ray's sockets would be too long.
    place = Path(usual if len(usual) <= _LONGEST_TEMPORARY else "/tmp")
    prefix = f"kdecs-{hashlib.sha256(os.fsencode(sweep.resolve())).hexdigest()[:6]}-"
    for leftover in place.glob(f"{prefix}*"):
        status = leftover.lstat()
        if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode):
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=place))


@contextlib.contextmanager
def _sweep_lock(stage: StageRun) -> Iterator[bool]:
    """Hold the right to run this sweep's trials. Yields False once nobody wants them to run any more."""
    is_reported = False
    while True:
        with file_lock(stage.sweep / RAY_LOCK_NAME, blocking=False) as is_held:
            if _is_orphan(stage) or stage.run.is_stopping:
                yield False
                return
            if is_held:
                for leftover in stage.sweep.glob(".ray.stop-*"):  # of a Ray process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                yield True
                return
        if not is_reported:
            is_reported = True
            print("waiting for the trials of an earlier start to save their state and end", flush=True)
        time.sleep(_LOCK_POLL_S)


def _is_orphan(stage: StageRun) -> bool:
    """Whether the driver has died, after which nothing may begin."""
    return os.getppid() != stage.driver


def _start_ray(config: SweepConfig, private: Path, stop_file: Path) -> None:
    if config.ray_address:  # the cluster's own token counts, by the user's environment or home directory
        ray.init(
            address=config.ray_address,
            runtime_env={"env_vars": worker_environment(config)},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        # Workers inherit this environment. A runtime environment would cost each of them one more process to start.
        os.environ.update(worker_environment(config))
        # Whoever has the token runs code as this user. Ray would keep one in the home directory, readable by all.
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(write_token(private))
        os.environ.pop("RAY_AUTH_TOKEN", None)  # Ray would prefer it
        at_a_time = config.max_concurrent_trials
        cores = len(os.sched_getaffinity(0))
        ray.init(
            address="local",  # not a cluster that somebody happens to run on this machine
            num_cpus=math.ceil(at_a_time * config.cpus_per_trial) if at_a_time else cores,
            num_gpus=None if config.gpus_per_trial else 0,  # None: those that Ray finds
            include_dashboard=False,  # through it anybody who reaches the port can run code
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(private / "r"),  # Ray opens it to all users, but not the directory above it
            _node_ip_address="127.0.0.1",
        )
    # Tune would wait without end for resources that no node has.
    available = ray.cluster_resources()
    for resource, wanted in (("CPU", config.cpus_per_trial), ("GPU", config.gpus_per_trial)):
        if available.get(resource, 0) < wanted:
            raise DeviceError(
                f"a trial needs {wanted:g} {resource}, but Ray has {available.get(resource, 0):g}; "
                f"lower {resource.lower()}s_per_trial or give ray_address of a larger cluster"
            )

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop_file.touch()

    # Only now: ray.init installs handlers of its own, which would take Ray down under the trials.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def write_token(directory: Path) -> Path:
    """Write a new random token of Ray's into a directory, readable by this user alone, and return its path."""
    path = directory / "token"
    path.touch(
        mode=0o600, exist_ok=False
    )  # before it has content: a later chmod would leave a moment to read it
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path


def worker_environment(config: SweepConfig) -> dict[str, str]:
    """Environment variables of every trial's process, on every node."""
    threads = str(max(1, math.floor(config.cpus_per_trial)))
    found = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # Each trial is a new thread of its worker, and glibc would give each one another arena, which keeps what was freed:
    # a worker grew by 0.8 GiB per trial of MiniLM-L6. One arena takes no more processor time.
    found["MALLOC_ARENA_MAX"] = "1"
    if not config.gpus_per_trial:
        found["KDECS_DEVICE"] = "cpu"  # Ray hides no GPU from a trial that has none
    if 0 < config.gpus_per_trial < 1:
        # Trials that share a GPU cannot afford one another's fragments. Older releases of torch read the second name.
        found["PYTORCH_ALLOC_CONF"] = found["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return found


def _fit(stage: StageRun, config: SweepConfig) -> None:
    search = config.search if stage.run.is_search else None
    assert not isinstance(search, GridSearch)
    trainable = tune.with_resources(
        tune.with_parameters(
            _run_in_worker,
            directory=str(trials_directory(stage.sweep)),
            run=stage.run,
            gpu_share=config.gpus_per_trial,
        ),
        {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial},
    )
    suggester, scheduler = None, None
    first: tuple[str, ...] = ()
    if isinstance(search, TpeSearch):
        suggester = TpeSuggester(Search(config), stage.metric)
    else:
        # As many as Tune itself takes of a list. With the one that it takes of a searcher, whose next point may depend
        # on the last one, workers would start one after the other.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(_MAX_PENDING)
    if search is not None and search.grace_epochs is not None:
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="epoch",
            max_t=most_epochs(config) + 1,  # so that no trial is stopped because it reached its end
            grace_period=search.grace_epochs,
            reduction_factor=search.reduction_factor,
        )
        # Trials that are over come first: they only report again what they reached, so that the scheduler knows it.
        first = stage.settled
    tune.Tuner(
        trainable,
        param_space={},
        tune_config=tune.TuneConfig(
            metric=stage.metric,
            mode="max",
            num_samples=-1,  # until the queue says that it is over
            search_alg=_Queue(stage, first, suggester),
            scheduler=scheduler,
            reuse_actors=True,  # a new worker would import torch again, for seconds per trial
            max_concurrent_trials=config.max_concurrent_trials,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(ray_storage(stage)),
            # The trial itself counts attempts without progress; this only bounds deaths that come before it can count.
            failure_config=tune.FailureConfig(max_failures=_MAX_DEATHS),
            verbose=0,
            callbacks=[_StopCallback(stage)],
        ),
    ).fit()


def most_epochs(config: SweepConfig) -> int:
    """The most epochs that any trial may train, by the base, the space, the variants and the baselines."""

    def found(name: str) -> list[float]:
        key = f"optimization.{name}"
        values = list(config.space[key].values) if key in config.space else [student_value(config, key)]
        for variant in config.variants.values():
            values += [value for other, value in flat_keys(variant) if other == key]
        return [value for value in values if value is not None]

    # An epoch of a training for steps ends with a validation. Without its length their number is always the same.
    by_steps = [
        BudgetedOptimization(epochs=None, steps=int(steps), validate_every_steps=every).num_epochs
        for steps in found("steps")
        for every in (None, *map(int, found("validate_every_steps")))
    ]
    space = Space(config, planned=True)
    baselines = [space.trial_at({VARIANT_KEY: name}) for name in config.baselines]
    of_baselines = [num_epochs(trial.config) for trial in baselines if trial is not None]
    return int(max([*found("epochs"), *by_steps, *of_baselines], default=1))


def _run_in_worker(values: dict[str, Any], directory: str, run: TrialRun, gpu_share: float) -> None:
    if gpu_share > 0:
        limit_gpu_memory(gpu_share)
    run_trial(Path(directory) / values["trial"], run, tune.report)


def limit_gpu_memory(share: float) -> None:
    """Bind this process to its share of a GPU's memory, because Ray only counts its fractions.

    The CUDA context of each process lies outside what PyTorch's limit covers, so room for it is taken off the share.
    Raises DeviceError if torch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(f"Ray gave a trial {share:g} GPU, but torch sees none; check the build of torch")
    if share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share - _CUDA_CONTEXT_BYTES / total, 0.5 * share))


class _StopCallback(tune.Callback):  # type: ignore[misc]
    """Looks at the stop file, and at whether the driver lives, in each turn of Tune's loop."""

    def __init__(self, stage: StageRun) -> None:
        self._stage = stage
        self._stopping_since: float | None = None

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raise _AllStoppedError once a stop was requested and the trials have ended or used up the time for it."""
        if self._stopping_since is None:
            if _is_orphan(self._stage):
                self._stage.run.stop_file.touch()
            if not self._stage.run.is_stopping:
                return
            self._stopping_since = time.monotonic()
        is_running = any(trial.status == "RUNNING" for trial in trials)
        if not is_running or time.monotonic() - self._stopping_since > _STOP_GRACE_S:
            raise _AllStoppedError


class _Queue(Searcher):  # type: ignore[misc]
    """Gives Tune the stage's trials as `{"trial": id}`, those of TPE when it suggests them.

    Trials that a person stops or drops stay in the queue without being given. A trial that ended because of that comes
    back once it is resumed, and trials that the driver appends to the stage's file join at the end.
    """

    def __init__(
        self, stage: StageRun, first: Sequence[str] = (), suggester: TpeSuggester | None = None
    ) -> None:
        super().__init__(metric=stage.metric, mode="max")
        self._stage, self._suggester = stage, suggester
        self._is_suggesting = suggester is not None
        self._waiting = list(first)
        self._running: dict[str, str] = {}  # trials by Tune's own ids
        self._file_state: tuple[int, int] | None = None
        self._known = set(first)
        self._append(stage.trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial, None for "not now", or FINISHED once nothing runs that could be followed by anything.

        A point that TPE has written down will be trained, so none may be written while the sweep stops.
        """
        if self._stage.run.is_stopping:
            return None
        self._read_appended()
        for identity in self._waiting:
            if self._wanted(identity) is None:
                self._waiting.remove(identity)
                return self._given(trial_id, identity)
        if self._suggester is not None and self._is_suggesting:
            trial = self._suggester.suggest(trial_id)
            if trial is not None:
                return self._given(trial_id, trial.id)
            self._is_suggesting = False
        # Tune asks again, so that what is resumed or added meanwhile need not wait for the trials that run.
        return None if self._running else self.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass on to TPE that a trial has ended, or put it back if a person has stopped it."""
        identity = self._running.pop(trial_id)
        if self._suggester is not None:
            # TPE learns what the trial has reached so far, also of one that goes on later.
            self._suggester.complete(trial_id)
        if error or self._stage.run.is_stopping:
            return
        note = read_note(trials_directory(self._stage.sweep) / identity)
        # It may have been resumed since it ended.
        if self._wanted(identity) or note is None or note.status == "stopped":
            self._waiting.append(identity)

    def _given(self, trial_id: str, identity: str) -> dict[str, Any]:
        self._known.add(identity)
        self._running[trial_id] = identity
        return {"trial": identity}

    def _read_appended(self) -> None:
        """Take the trials that the driver has appended to the stage's file."""
        path = self._stage.sweep / STAGE_NAME
        if not path.is_file():  # only tests have none
            return
        status = path.stat()
        state = status.st_ino, status.st_mtime_ns
        if state != self._file_state:
            self._file_state = state
            self._append(StageRun.read(path).trials)

    def _append(self, trials: Sequence[str]) -> None:
        known = self._known | (self._suggester.known if self._suggester is not None else frozenset())
        new = [identity for identity in trials if identity not in known]
        self._waiting += new
        self._known |= {*new}

    def _wanted(self, identity: str) -> str | None:
        return wanted_of(trials_directory(self._stage.sweep) / identity)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing, because the sweep's files hold all state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, because the sweep's files hold all state."""


if __name__ == "__main__":
    run_entry(main)
