"""Trains a sweep's missing trials by Ray Tune, in a process of its own: the only module that imports Ray.

The driver starts it as `python -m kdecs.sweep.ray_trials PLAN.json` in a session of its own and follows it
by the trials' files. So a SIGTERM to the driver's process group does not take Ray's servers away under
running trials, Ray's own messages go to a file, and Ray's handlers do not replace the driver's.

PLAN.json: {sweep, trials: [id], trainer, stop_file, config: the resources}. Nothing is pickled to disk that
a later run needs: a trial resumes from its own directory, so a new start needs no `Tuner.restore`.
"""

import argparse
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from kdecs.entry import run_entry
from kdecs.errors import DeviceError
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.space import trials_directory

_STOP_GRACE_S = 300.0  # a stop waits for the next step of each trial; then the rest is killed
_LONGEST_TEMPORARY = 40  # Ray's sockets lie below; their paths may have 107 bytes


class _AllStoppedError(Exception):
    """Leaves `Tuner.fit` once a stop was asked for and no trial runs any more."""


def main() -> None:
    """Train the plan's trials; failures are found in the trials' files, not in the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    plan = json.loads(parser.parse_args().plan.read_text(encoding="utf-8"))
    config = SweepConfig.model_validate(plan["config"])
    train_with_ray(config, plan["trials"], trainer=plan["trainer"], stop_file=Path(plan["stop_file"]))


def train_with_ray(config: SweepConfig, trials: list[str], *, trainer: str, stop_file: Path) -> None:
    """Run the trials by Ray Tune, `max_concurrent_trials` at a time, each restarted `max_failures` times."""
    _set_environment(config)
    temporary = Path(tempfile.mkdtemp(prefix="kdecs-ray-", dir=_short_temporary()))
    storage = config.output / ".ray"
    try:
        _start_ray(config, temporary, stop_file)
        _fit(config, trials, trainer, stop_file, storage)
    except _AllStoppedError:
        return
    finally:
        import ray

        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(storage, ignore_errors=True)


def _set_environment(config: SweepConfig) -> None:
    threads = str(max(1, math.floor(config.cpus_per_trial)))
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.update(defaults)
    if 0 < config.gpus_per_trial < 1:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _short_temporary() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_TEMPORARY else "/tmp"


def _start_ray(config: SweepConfig, temporary: Path, stop_file: Path) -> None:
    import ray

    if config.ray_address:
        ray.init(address=config.ray_address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            num_cpus=math.ceil(config.max_concurrent_trials * config.cpus_per_trial),
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


def _fit(config: SweepConfig, trials: list[str], trainer: str, stop_file: Path, storage: Path) -> None:
    from ray import tune

    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    trainable = tune.with_resources(
        tune.with_parameters(
            _run_in_worker,
            directory=str(trials_directory(config.output)),
            trainer=trainer,
            stop_file=str(stop_file),
            gpu_share=config.gpus_per_trial,
        ),
        resources,
    )
    tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=config.max_concurrent_trials),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            verbose=0,
            callbacks=[_stop_callback(stop_file)],
        ),
    ).fit()


def _run_in_worker(
    values: dict[str, Any], directory: str, trainer: str, stop_file: str, gpu_share: float
) -> None:
    from ray import tune

    from kdecs.sweep.trial import load_trainer, run_trial

    if gpu_share > 0:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(
                f"a trial was given {gpu_share} GPU by Ray, but torch sees none; check its build"
            )
        if gpu_share < 1:  # Ray's fraction is bookkeeping only
            torch.cuda.set_per_process_memory_fraction(gpu_share)
    run_trial(
        Path(directory) / values["trial"],
        trainer=load_trainer(trainer),
        report=tune.report,
        stop_file=Path(stop_file),
    )


def _stop_callback(stop_file: Path) -> Any:
    from ray import tune

    driver = os.getppid()

    class StopCallback(tune.Callback):
        """Looks at the stop file, and at whether the driver lives, in each turn of Tune's loop."""

        since: float | None = None

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if self.since is None:
                if os.getppid() != driver:
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
