"""Trains a sweep's missing trials by Ray Tune, in a process of its own: the only module that imports Ray.

The driver starts it as `python -m kdecs.sweep.ray PLAN.json` in a session of its own and follows it
by the trials' files. So a SIGTERM to the driver's process group does not take Ray's servers away under
running trials, Ray's own messages go to a file, and Ray's handlers do not replace the driver's.

Nothing is pickled to disk that a later run needs: a trial resumes from its own directory, so a new start needs no
`Tuner.restore`.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kdecs.artifact import file_lock, write_json
from kdecs.errors import DeviceError, TrainingError
from kdecs.process import StopSignal, last_line, run_child, run_entry
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig, flat_keys
from kdecs.sweep.space import trials_directory
from kdecs.sweep.trial import TrialRun, run_trial
from kdecs.tracking.record import METRICS_NAME, read_points

RAY_LOG_NAME = "ray.log"
_POLL_S = 1.0
_COMMAND = (sys.executable, "-m", "kdecs.sweep.ray")

Follow = Callable[[], None]


def run_with_ray(plan: "Plan", stop: StopSignal, follow: Follow) -> None:
    """Run a plan's trials in a Ray Tune process of its own session, calling `follow` about once a second.

    Where Ray killed a worker for want of memory the trials go on from their checkpoints in another Ray process, as
    long as any of them gets further. Raises TrainingError where Ray fails otherwise.
    """
    output = plan.config.output
    log = output / RAY_LOG_NAME
    plan_path = output / ".plan.json"
    plan.write(plan_path)
    with file_lock(output / RAY_LOCK_NAME, blocking=False) as held:
        if not held:
            print("waiting for the trials of an earlier start to save their state and end", flush=True)
    while True:
        epochs = _epochs_trained(output)
        # The Ray process is asked by the stop file: a SIGTERM to its group would end Ray's servers under the trials.
        code = run_child(
            [*_COMMAND, str(plan_path)],
            stop,
            log=log,
            on_stop=plan.run.stop_file.touch,
            on_poll=follow,
            poll_s=_POLL_S,
        )
        if code == 0:
            return
        if code != OUT_OF_MEMORY:
            raise TrainingError(f"Ray ended with exit code {code}: {last_line(log)}; see {log}")
        if _epochs_trained(output) == epochs:
            raise TrainingError(
                "Ray killed trials for want of memory before any ended an epoch; lower max_concurrent_trials "
                f"(now {plan.config.max_concurrent_trials}) and run the same command again; see {log}"
            )
        print(
            "Ray killed a trial for want of memory; the trials go on from their checkpoints "
            "(a lower max_concurrent_trials needs less)",
            flush=True,
        )


def _epochs_trained(output: Path) -> int:
    return sum(len(read_points(path)) for path in trials_directory(output).glob(f"*/{METRICS_NAME}"))


RAY_LOCK_NAME = ".ray-lock"
OUT_OF_MEMORY = 75
"""Exit code: Ray killed a worker for want of memory."""
_LOCK_POLL_S = 1.0
_STOP_GRACE_S = 300.0  # a stop waits for the next step of each trial; then the rest is killed
_LONGEST_TEMPORARY = 40  # Ray's sockets lie below; their paths may have 107 bytes
_MAX_DEATHS = 100  # of one trial
_CUDA_CONTEXT_BYTES = 600 << 20  # of one process, with PyTorch's kernels
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


class _AllStoppedError(Exception):
    """Leaves `Tuner.fit` once a stop was asked for and no trial runs any more."""


@dataclass(frozen=True)
class Plan:
    """What the driver asks for: PLAN.json. `settled` trials of a search are only reported again.

    `driver` is the id of the driver's process: once it is not this process' parent, nothing is begun any more.
    """

    config: SweepConfig
    run: TrialRun
    trials: list[str]
    settled: list[str]
    grace_epochs: int | None
    reduction_factor: float
    num_suggestions: int
    metric: str
    driver: int

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        values = {field: getattr(self, field) for field in self.__dataclass_fields__}
        values["config"] = self.config.model_dump(mode="json")
        run = {name: getattr(self.run, name) for name in TrialRun.__dataclass_fields__}
        values["run"] = {k: str(v) if isinstance(v, Path) else v for k, v in run.items()}
        write_json(path, values)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan of a file that the driver wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        run = values.pop("run")
        run = TrialRun(**{**run, "stop_file": Path(run["stop_file"]), "store": Path(run["store"])})
        return cls(config=SweepConfig.model_validate(values.pop("config")), run=run, **values)


def main() -> None:
    """Train the plan's trials; failures are found in the trials' files, not in the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    train_with_ray(Plan.read(parser.parse_args().plan))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether Ray killed a worker for want of memory: Tune takes no such death for one of a trial, and ends."""
    from ray.exceptions import OutOfMemoryError

    return isinstance(error.__cause__, OutOfMemoryError)


def train_with_ray(plan: "Plan") -> None:
    """Run the plan's trials by Ray Tune, as many at a time as `max_concurrent_trials` and the resources allow.

    Waits while the Ray process of an earlier, killed driver still ends its trials.
    """
    os.environ.update(_DRIVER_ENVIRONMENT)
    with _only_ray_of_sweep(plan) as is_wanted:
        if not is_wanted:
            return
        storage = ray_storage(plan)
        temporary = Path(tempfile.mkdtemp(prefix="kdecs-ray-", dir=_short_temporary()))
        try:
            _start_ray(plan.config, temporary, plan.run.stop_file)
            if not _is_orphan(plan):
                _fit(plan, storage)
        except _AllStoppedError:
            return
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            sys.exit(OUT_OF_MEMORY)
        finally:
            import ray

            ray.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(storage, ignore_errors=True)


def ray_storage(plan: "Plan") -> Path:
    """Ray's own state of one start; nothing in it outlives the start."""
    return plan.config.output / f".ray{plan.run.stop_file.name}"


@contextlib.contextmanager
def _only_ray_of_sweep(plan: "Plan") -> Iterator[bool]:
    """Hold the right to run this sweep's trials; yields False once they are not wanted any more."""
    is_told = False
    while True:
        with file_lock(plan.config.output / RAY_LOCK_NAME, blocking=False) as held:
            if _is_orphan(plan) or plan.run.stop_file.exists():
                yield False
                return
            if held:
                for leftover in plan.config.output.glob(".ray.stop-*"):  # of a Ray process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                yield True
                return
        if not is_told:
            is_told = True
            print("waiting for the trials of an earlier start to save their state and end", flush=True)
        time.sleep(_LOCK_POLL_S)


def _is_orphan(plan: "Plan") -> bool:
    return os.getppid() != plan.driver


def worker_environment(config: SweepConfig) -> dict[str, str]:
    """Environment variables of every trial's process, on every node."""
    threads = str(max(1, math.floor(config.cpus_per_trial)))
    found = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # Each trial is a new thread of its worker, and glibc would give each another arena, which keeps what it freed: a
    # worker grew by 0.8 GiB a trial of MiniLM-L6. One arena takes no more processor time.
    found["MALLOC_ARENA_MAX"] = "1"
    if not config.gpus_per_trial:
        found["KDECS_DEVICE"] = "cpu"  # Ray hides no GPU from a trial that has none
    if 0 < config.gpus_per_trial < 1:
        # Trials that share a GPU cannot afford one another's fragments. Older releases of torch read the second.
        found["PYTORCH_ALLOC_CONF"] = found["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return found


def _short_temporary() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_TEMPORARY else "/tmp"


def _start_ray(config: SweepConfig, temporary: Path, stop_file: Path) -> None:
    import ray

    if config.ray_address:
        ray.init(
            address=config.ray_address,
            runtime_env={"env_vars": worker_environment(config)},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        # Workers inherit it; a runtime environment would cost each of them a process more to start.
        os.environ.update(worker_environment(config))
        at_a_time = config.max_concurrent_trials
        cores = len(os.sched_getaffinity(0))
        ray.init(
            address="local",  # not a cluster that somebody happens to run on this machine
            num_cpus=math.ceil(at_a_time * config.cpus_per_trial) if at_a_time else cores,
            num_gpus=None if config.gpus_per_trial else 0,  # None: those that Ray finds
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(temporary),
            _node_ip_address="127.0.0.1",
        )

    found = ray.cluster_resources()
    for resource, wanted in (("CPU", config.cpus_per_trial), ("GPU", config.gpus_per_trial)):
        if found.get(resource, 0) < wanted:
            raise DeviceError(
                f"a trial wants {wanted:g} {resource}, Ray has {found.get(resource, 0):g}; "
                f"lower {resource.lower()}s_per_trial or give ray_address of a larger cluster"
            )

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop_file.touch()

    signal.signal(signal.SIGTERM, stop)  # after ray.init, which installs handlers of its own
    signal.signal(signal.SIGINT, stop)


def _fit(plan: "Plan", storage: Path) -> None:
    from ray import tune

    config = plan.config
    trainable = tune.with_resources(
        tune.with_parameters(
            _run_in_worker,
            directory=str(trials_directory(config.output)),
            run=plan.run,
            gpu_share=config.gpus_per_trial,
        ),
        {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial},
    )
    searcher, scheduler = None, None
    if plan.num_suggestions:
        from kdecs.sweep.tpe import TpeSearcher

        searcher = TpeSearcher(config, plan.metric, plan.run.stop_file)
    if plan.grace_epochs is not None:
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="epoch",
            max_t=most_epochs(config) + 1,  # none is stopped for having come to its end
            grace_period=plan.grace_epochs,
            reduction_factor=plan.reduction_factor,
        )
    tune.Tuner(
        trainable,
        # Settled trials first: they only report again what they had reached, so that the scheduler knows it.
        param_space={} if searcher else {"trial": tune.grid_search([*plan.settled, *plan.trials])},
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode="max",
            num_samples=plan.num_suggestions or 1,
            search_alg=searcher,
            scheduler=scheduler,
            reuse_actors=True,
            max_concurrent_trials=config.max_concurrent_trials,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            # The trial itself counts attempts without progress; this only bounds deaths before it can count.
            failure_config=tune.FailureConfig(max_failures=_MAX_DEATHS),
            verbose=0,
            callbacks=[_stop_callback(plan)],
        ),
    ).fit()


def most_epochs(config: SweepConfig) -> int:
    """The most epochs that any trial may be trained: of the base, the space and the variants."""
    key = "optimization.epochs"
    default = StudentConfig.model_fields["optimization"].default.epochs
    found = [config.student.get("optimization", {}).get("epochs", default)]
    if key in config.space:
        found = list(config.space[key].values)
    for variant in config.variants.values():
        found += [value for name, value in flat_keys(variant) if name == key]
    return int(max(found))


def _run_in_worker(values: dict[str, Any], directory: str, run: TrialRun, gpu_share: float) -> None:
    from ray import tune

    if gpu_share > 0:
        limit_gpu_memory(gpu_share)
    run_trial(Path(directory) / values["trial"], run, tune.report)


def limit_gpu_memory(share: float) -> None:
    """Bind this process to its share of a GPU's memory: Ray's fractions are bookkeeping only.

    Every process' CUDA context lies outside what PyTorch's limit covers, so room for it is taken off the share.
    Raises DeviceError where torch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(f"a trial was given {share:g} GPU by Ray, but torch sees none; check its build")
    if share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share - _CUDA_CONTEXT_BYTES / total, 0.5 * share))


def _stop_callback(plan: "Plan") -> Any:
    from ray import tune

    stop_file = plan.run.stop_file

    class StopCallback(tune.Callback):
        """Looks at the stop file, and at whether the driver lives, in each turn of Tune's loop."""

        since: float | None = None

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if self.since is None:
                if _is_orphan(plan):
                    stop_file.touch()
                if not stop_file.exists():
                    return
                self.since = time.monotonic()
            running = any(trial.status == "RUNNING" for trial in trials)
            if not running or time.monotonic() - self.since > _STOP_GRACE_S:
                raise _AllStoppedError

    return StopCallback()


if __name__ == "__main__":
    run_entry(main)
