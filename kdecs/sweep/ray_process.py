"""The driver's side of Ray: a process in a session of its own, which is followed by the trials' files."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kdecs.artifact import file_lock
from kdecs.errors import TrainingError
from kdecs.run_record import METRICS_NAME, read_points
from kdecs.runtime import StopSignal
from kdecs.sweep.ray_trials import OUT_OF_MEMORY, RAY_LOCK_NAME, Plan
from kdecs.sweep.space import trials_directory

RAY_LOG_NAME = "ray.log"
_POLL_S = 1.0
_COMMAND = (sys.executable, "-m", "kdecs.sweep.ray_trials")

Follow = Callable[[], None]


def run_with_ray(plan: Plan, stop: StopSignal, follow: Follow) -> None:
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
        code = _run_once([*_COMMAND, str(plan_path)], log, plan.run.stop_file, stop, follow)
        if code == 0:
            return
        if code != OUT_OF_MEMORY:
            raise TrainingError(f"Ray ended with exit code {code}: {_last_line(log)}; see {log}")
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


def _run_once(command: list[str], log: Path, stop_file: Path, stop: StopSignal, follow: Follow) -> int:
    """One Ray process from its start to its end; its exit code."""
    with log.open("ab") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if stop.requested:
                    stop_file.touch()
                follow()
                _wait(process, _POLL_S)
        except BaseException:
            stop_file.touch()
            process.terminate()
            raise
        finally:
            code = process.wait()
    return code


def _epochs_trained(output: Path) -> int:
    return sum(len(read_points(path)) for path in trials_directory(output).glob(f"*/{METRICS_NAME}"))


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("kdecs: error: ") if lines else "it printed nothing"
