"""The sweep's driver: enumerates trials, has the missing ones trained, tells MLflow, writes the manifest.

    SWEEP/config.json      the resolved config
    SWEEP/trials/ID/       one student directory a trial (kdecs.sweep.trial)
    SWEEP/trials.json      every trial with settings, status, metrics of its best epoch, seconds, error
    SWEEP/baselines.json   what the trivial rules reach on validation
    SWEEP/ray.log          what Ray printed
    SWEEP/manifest.json    last, once every trial is complete

The files are the truth: the driver may die at any point, and the same command goes on from them.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kdecs.artifact import MANIFEST_NAME, file_lock, is_complete, read_manifest, write_json, write_manifest
from kdecs.config import CONFIG_NAME, input_checksums, write_config
from kdecs.errors import ArtifactError, Stopped, TrainingError
from kdecs.runtime import StopSignal
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.progress import SweepProgress, duration
from kdecs.sweep.records import sweep_records
from kdecs.sweep.results import BASELINES_NAME, TRIALS_NAME, TrialResult, trial_result, write_results
from kdecs.sweep.space import Trial, enumerate_trials, sweep_hash, with_absolute_paths
from kdecs.sweep.trial import DEFAULT_TRAINER
from kdecs.sweep.trivial import trivial_scores_on_validation
from kdecs.tracking import Tracker

RAY_LOG_NAME = "ray.log"
_UNDELIVERED_NAME = ".undelivered"
_POLL_S = 1.0

Follow = Callable[[], None]
Runner = Callable[[SweepConfig, list[Trial], str, StopSignal, Follow], None]


def run_sweep(
    config: SweepConfig,
    *,
    trainer: str = DEFAULT_TRAINER,
    stop: StopSignal | None = None,
    runner: Runner | None = None,
) -> Path:
    """Train the sweep's missing trials and complete its directory; returns the directory.

    `trainer` is `module:function` (kdecs.sweep.trial.Trainer); `runner` runs trials (default: by Ray Tune).
    Raises TrainingError, after all others ended, where a trial failed for good, and Stopped.
    """
    stop = stop or StopSignal()
    trials = enumerate_trials(config)
    digest = sweep_hash(trials)
    config.output.mkdir(parents=True, exist_ok=True)
    _refuse_other_sweep(config.output, digest)
    with file_lock(config.output / ".lock", blocking=False) as held:
        if not held:
            raise ArtifactError(
                f"{config.output}: another driver runs this sweep; wait for it or stop it first"
            )
        sweep = _Sweep(config, trials)
        missing = sweep.missing()
        if not missing and is_complete(config.output, "sweep", digest):
            sweep.deliver_leftovers()
            print(f"sweep {config.name}: {config.output} complete, skipped", flush=True)
            return config.output
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)  # a trial's files are gone since
        sweep.train(missing, trainer, stop, runner or run_with_ray)
        sweep.complete(digest, stop)
    return config.output


class _Sweep:
    """The state of one start of a driver."""

    def __init__(self, config: SweepConfig, trials: list[Trial]) -> None:
        self.config = config
        self.trials = trials
        self.tracker = Tracker(config.tracking, config.output)
        self.began = time.monotonic()
        self._complete: dict[str, TrialResult] = {}

    def missing(self) -> list[Trial]:
        """The trials that no manifest makes complete."""
        return [trial for trial in self.trials if not _is_trained(trial)]

    def results(self, *, living: bool) -> list[TrialResult]:
        """Where every trial stands; complete ones are read once."""
        for trial in self.trials:
            if trial.id not in self._complete and _is_trained(trial):
                self._complete[trial.id] = trial_result(trial, complete=True, living=False)
        return [
            self._complete.get(trial.id) or trial_result(trial, complete=False, living=living)
            for trial in self.trials
        ]

    def train(self, missing: list[Trial], trainer: str, stop: StopSignal, runner: Runner) -> None:
        """Have the missing trials trained, showing and delivering what they reach."""
        output = self.config.output
        write_config(with_absolute_paths(self.config, self.trials), output)
        for trial in missing:
            trial.directory.mkdir(parents=True, exist_ok=True)
            write_config(trial.config, trial.directory)
        before = self.results(living=False)
        done = len(self.trials) - len(missing)
        print(
            f"sweep {self.config.name}: {len(self.trials)} trials, {done} complete, {len(missing)} to train, "
            f"{self.config.max_concurrent_trials} at a time; MLflow at {self.tracker.shown_uri}",
            flush=True,
        )
        self.deliver(before, "RUNNING", now=True)
        if not missing:
            return
        with SweepProgress(len(self.trials), done) as progress:
            progress.skip(before)

            def follow() -> None:
                results = self.results(living=True)
                progress.update(results)
                self.deliver(results, "RUNNING")

            runner(self.config, missing, trainer, stop, follow)
            progress.update(self.results(living=False))

    def deliver(self, results: list[TrialResult], status: str, *, now: bool = False) -> bool:
        """Bring MLflow up to date; whether it is."""
        return self.tracker.sync_family(*sweep_records(self.config, self.trials, results, status), now=now)

    def deliver_leftovers(self) -> None:
        """What an MLflow that was away has not got of a complete sweep."""
        marker = self.config.output / _UNDELIVERED_NAME
        if marker.exists() and self.deliver(self.results(living=False), "FINISHED", now=True):
            marker.unlink()

    def complete(self, digest: str, stop: StopSignal) -> None:
        """Write trials.json, then the manifest; or raise for what is stopped or failed."""
        output, results = self.config.output, self.results(living=False)
        write_results(output, results)
        failed = [result for result in results if result.status == "failed"]
        waiting = [result for result in results if result.status in ("waiting", "stopped")]
        outcome = "KILLED" if stop.requested else "FAILED" if failed or waiting else "FINISHED"
        if not self.deliver(results, outcome, now=True):
            (output / _UNDELIVERED_NAME).touch()
        else:
            (output / _UNDELIVERED_NAME).unlink(missing_ok=True)
        done = len(results) - len(failed) - len(waiting)
        if done < len(results) and stop.requested:
            raise Stopped(
                f"sweep {self.config.name} stopped with {done} of {len(results)} trials complete; "
                "run the same command again to go on"
            )
        if done < len(results):
            raise TrainingError(_failure_message(output, failed, waiting, len(results)))
        for leftover in output.glob(".stop-*"):  # of drivers that were killed
            leftover.unlink()
        _write_sweep_manifest(self.config, self.trials, results, digest)
        best = max(results, key=lambda result: result.score)
        print(
            f"sweep {self.config.name}: {len(results)} trials complete in "
            f"{duration(time.monotonic() - self.began)}, best on validation {best.label} "
            f"(macro F1 {best.score:.2f}) -> {output}",
            flush=True,
        )


def run_with_ray(
    config: SweepConfig, trials: list[Trial], trainer: str, stop: StopSignal, follow: Follow
) -> None:
    """Run trials in a Ray Tune process of its own session, calling `follow` about once a second."""
    plan = {
        "config": config.model_dump(mode="json"),
        "trials": [trial.id for trial in trials],
        "trainer": trainer,
    }
    log = config.output / RAY_LOG_NAME
    with _stop_file(config.output) as stop_file, log.open("ab") as log_file:
        plan_path = config.output / ".plan.json"
        write_json(plan_path, {**plan, "stop_file": str(stop_file)})
        process = subprocess.Popen(
            [sys.executable, "-m", "kdecs.sweep.ray_trials", str(plan_path)],
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
    if code != 0:
        raise TrainingError(f"Ray ended with exit code {code}: {_last_line(log)}; see {log}")


def _is_trained(trial: Trial) -> bool:
    return is_complete(trial.directory, "student", trial.config_hash)


def _refuse_other_sweep(output: Path, digest: str) -> None:
    if not (output / MANIFEST_NAME).is_file():
        return
    if read_manifest(output, "sweep").config_hash != digest:
        raise ArtifactError(
            f"{output}: holds a finished sweep over other settings; choose another output, or remove "
            f"its {MANIFEST_NAME} to go on from its trials"
        )


def _failure_message(
    output: Path, failed: list[TrialResult], waiting: list[TrialResult], num_trials: int
) -> str:
    parts = [f"{result.label}: {result.error} (log: {output / result.log})" for result in failed]
    if waiting:
        parts.append(f"{len(waiting)} were never trained (log: {output / RAY_LOG_NAME})")
    count = len(failed) + len(waiting)
    return f"{count} of {num_trials} trials failed; the same command tries them again. " + "; ".join(parts)


def _write_sweep_manifest(
    config: SweepConfig, trials: list[Trial], results: list[TrialResult], digest: str
) -> None:
    output = config.output
    manifests = [(trial.directory / MANIFEST_NAME).relative_to(output).as_posix() for trial in trials]
    corpus = trials[0].config.corpus
    write_json(output / BASELINES_NAME, trivial_scores_on_validation(corpus))
    labels = {trial.teacher: trial.config.distillation.labels for trial in trials if trial.teacher}
    write_manifest(
        output,
        "sweep",
        config_hash=digest,
        inputs=input_checksums(
            train=corpus.train,
            valid=corpus.valid,
            **{f"labels.{name}": path for name, path in labels.items()},
        ),
        files=[CONFIG_NAME, TRIALS_NAME, BASELINES_NAME, *manifests],
        rows={TRIALS_NAME: len(results)},
        details={"num_trials": len(results), "metric": "macro F1 on validation"},
    )


@contextmanager
def _stop_file(output: Path) -> Iterator[Path]:
    """A path that exists once the trials of this start shall stop; unlike that of any other start."""
    path = output / f".stop-{os.getpid()}-{time.time_ns()}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("kdecs: error: ") if lines else "it printed nothing"
