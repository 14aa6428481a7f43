"""The sweep's driver: enumerates trials, has the missing ones trained, tells MLflow, writes the manifest.

    SWEEP/config.json      the resolved config
    SWEEP/environment.json the driver's versions, host and device
    SWEEP/trials/ID/       one student directory a trial (kdecs.sweep.trial)
    SWEEP/trials.json      every trial with settings, status, metrics of its best epoch, seconds, error
    SWEEP/search.json      of a search in two stages: its survivors (kdecs.sweep.search)
    SWEEP/baselines.json   what the trivial rules reach on validation
    SWEEP/ray.log          what Ray printed
    SWEEP/manifest.json    last, once every trial is complete

The files are the truth: the driver may die at any point, and the same command goes on from them.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdecs.artifact import (
    MANIFEST_NAME,
    claim,
    file_lock,
    is_complete,
    write_json,
    write_manifest,
)
from kdecs.config import CONFIG_NAME, input_checksums, write_config
from kdecs.errors import ArtifactError, KdecsError, Stopped, TrainingError
from kdecs.process import StopSignal
from kdecs.sweep.commands import is_report_of, write_report_of
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.progress import SweepProgress, duration
from kdecs.sweep.ray import RAY_LOG_NAME, Follow, Plan, run_with_ray
from kdecs.sweep.search import SEARCH_NAME, Search, Stage
from kdecs.sweep.space import Trial, missing_teachers, tried_teachers, with_absolute_paths
from kdecs.sweep.status import (
    BASELINES_NAME,
    SELECTION_METRIC,
    TRIALS_NAME,
    TrialResult,
    trial_result,
    trivial_scores_on_validation,
    write_results,
)
from kdecs.sweep.teachers import build_teachers, refuse_missing
from kdecs.sweep.tracking import SweepUpload
from kdecs.sweep.trial import DEFAULT_TRAINER, ENVIRONMENT_NAME, TrialRun, settle, write_environment

Runner = Callable[[Plan, StopSignal, Follow], None]


def run_sweep(
    config: SweepConfig,
    *,
    trainer: str = DEFAULT_TRAINER,
    stop: StopSignal | None = None,
    runner: Runner | None = None,
    build: bool = False,
) -> Path:
    """Train the sweep's missing trials and complete its directory; returns the directory.

    `trainer` is `module:function` (kdecs.sweep.trial.Trainer); `runner` runs a plan's trials (default: by Ray Tune);
    `build` has missing teachers trained and exported first.
    Raises TrainingError, after all others ended, where a trial failed for good, ArtifactError where labels are
    missing, and Stopped.
    """
    stop = stop or StopSignal()
    config.output.mkdir(parents=True, exist_ok=True)
    with file_lock(config.output / ".lock", blocking=False) as held:
        if not held:
            raise ArtifactError(
                f"{config.output}: another driver runs this sweep; wait for it or stop it first"
            )
        if missing_teachers(config):
            if not build:
                refuse_missing(config)
            build_teachers(config, stop)
        search = Search(config)
        search.refuse_other_search()
        digest = search.digest()
        claim(
            config.output,
            "sweep",
            digest,
            can_repair=True,
            remedy=f"choose another output, or remove its {MANIFEST_NAME} to go on from its trials",
        )
        sweep = _Sweep(config, search)
        if is_complete(config.output, "sweep", digest) and not sweep.missing(search.stage()):
            print(f"sweep {config.name}: {config.output} complete, skipped", flush=True)
            sweep.bring_leftovers(digest)
            return config.output
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)  # a trial's files are gone since
        try:
            sweep.run(trainer, stop, runner or run_with_ray)
        except BaseException:
            with contextlib.suppress(KdecsError):  # what ended the sweep is what is told
                sweep.record_end("KILLED" if stop.requested else "FAILED")
            raise
        sweep.complete(digest, stop)
    return config.output


class _Sweep:
    """The state of one start of a driver."""

    def __init__(self, config: SweepConfig, search: Search) -> None:
        self.config = config
        self.search = search
        self.upload = SweepUpload(config, search)
        self.began = time.monotonic()
        self._settled: dict[tuple[str, str], TrialResult] = {}

    def missing(self, stage: Stage) -> list[Trial]:
        """The stage's trials that are neither trained nor, in a search, stopped by it."""
        found = []
        for trial in stage.trials:
            if not _is_trained(trial):
                result = trial_result(trial, complete=False, living=False)
                if stage.name != "search" or result.status != "pruned":
                    found.append(trial)
        return found

    def results(self, *, living: bool) -> list[TrialResult]:
        """Where every known trial stands; those that are complete to the last file are read once."""
        found = []
        for trial, stage in self.search.trials().values():
            key = trial.id, stage
            result = self._settled.get(key)
            if result is None:
                is_trained = _is_trained(trial)
                if is_trained and not living:
                    settle(trial.directory)
                result = trial_result(trial, complete=is_trained, living=living, stage=stage)
                if result.is_settled:
                    self._settled[key] = result
            found.append(result)
        return found

    def run(self, trainer: str, stop: StopSignal, runner: Runner) -> None:
        """Train stage after stage; ends early where a stop was asked for or a stage cannot be finished."""
        known = self.search.stage().trials  # none before TPE's first suggestion
        config = with_absolute_paths(self.config, known) if known else self.config
        write_config(config, self.config.output)
        write_environment(self.config.output)
        self.upload.begin(self.results(living=False))
        while True:
            stage = self.search.stage()
            missing = self.missing(stage)
            if missing or len(stage.trials) < stage.num_suggestions:
                self._train(stage, missing, trainer, stop, runner)
            if stage.name != "search":
                return
            results = self.results(living=False)
            if stop.requested or any(r.status in ("waiting", "stopped") for r in results):
                return
            self.search.choose_survivors(results)
            survivors = self.search.survivors or []
            print(
                f"sweep {self.config.name}: search over {len(results)} trials is done, "
                f"{len(survivors)} settings go on with all seeds",
                flush=True,
            )

    def _train(
        self, stage: Stage, missing: list[Trial], trainer: str, stop: StopSignal, runner: Runner
    ) -> None:
        config = self.config
        for trial in missing:
            trial.directory.mkdir(parents=True, exist_ok=True)
            write_config(trial.config, trial.directory)
        before = self.results(living=False)
        number, done = self.search.num_trials(), sum(r.status in ("complete", "pruned") for r in before)
        print(self._opening_line(number, done), flush=True)
        with SweepProgress(config, number, done) as progress, _stop_file(config.output) as stop_file:
            progress.skip(before)

            def follow() -> None:
                results = self.results(living=True)
                progress.update(results)
                self.upload.update(results)

            waiting = {trial.id for trial in missing}
            run = TrialRun(
                trainer=trainer,
                stop_file=stop_file,
                store=config.store or config.output.parent / "students",
                reuse_students=config.reuse_students,
                max_failures=config.max_failures,
                keep_pruned=stage.name == "search",
            )
            settled = [trial.id for trial in stage.trials if trial.id not in waiting]
            plan = Plan(
                config=config,
                run=run,
                trials=[trial.id for trial in missing],
                settled=settled if stage.grace_epochs is not None else [],
                grace_epochs=stage.grace_epochs,
                reduction_factor=stage.reduction_factor,
                num_suggestions=stage.num_suggestions,
                metric=before[0].metric if before else SELECTION_METRIC,
                driver=os.getpid(),
            )
            runner(plan, stop, follow)
            progress.update(self.results(living=False))

    def _opening_line(self, number: int, done: int) -> str:
        at_a_time = self.config.max_concurrent_trials
        shown = f"{at_a_time} at a time" if at_a_time else "as many at a time as the resources hold"
        return (
            f"sweep {self.config.name}: {number} trials, {done} complete, {number - done} to train, {shown}; "
            f"MLflow at {self.upload.shown_uri}"
        )

    def record_end(self, outcome: str) -> list[TrialResult]:
        """Write trials.json and tell MLflow how this start ended."""
        results = self.results(living=False)
        write_results(self.config.output, results)
        self.upload.finish(results, outcome)
        return results

    def bring_leftovers(self, digest: str) -> None:
        """What a complete sweep lacks where its driver was killed at the very end, or MLflow was away."""
        if self.config.report and not is_report_of(self.config.output, digest):
            self._report()
        else:
            self.upload.upload_leftovers(self.results(living=False))

    def complete(self, digest: str, stop: StopSignal) -> None:
        """Write trials.json, then the manifest; or raise for what is stopped or failed."""
        output, results = self.config.output, self.results(living=False)
        searched = [result for result in results if result.stage == "search" and result.status == "failed"]
        failed = [result for result in results if result.status == "failed" and result.stage != "search"]
        waiting = [result for result in results if result.status in ("waiting", "stopped")]
        is_whole = self.search.stage().name != "search" and not failed and not waiting
        self.record_end("FINISHED" if is_whole else "KILLED" if stop.requested else "FAILED")
        done, number = sum(r.status in ("complete", "pruned") for r in results), self.search.num_trials()
        if not is_whole and stop.requested:
            raise Stopped(
                f"sweep {self.config.name} stopped with {done} of {number} trials complete; "
                "run the same command again to go on"
            )
        if not is_whole:
            raise TrainingError(_failure_message(output, failed or searched, waiting, number))
        for result in searched:
            print(f"in the search {result.label} failed: {result.error} (log: {output / result.log})")
        for leftover in output.glob(".stop-*"):  # of drivers that were killed
            leftover.unlink()
        _write_sweep_manifest(self.config, self.search, results, digest)
        best = max((r for r in results if r.is_compared), key=lambda result: result.score)
        print(
            f"sweep {self.config.name}: {len(results)} trials complete in "
            f"{duration(time.monotonic() - self.began)}, best on validation {best.label} "
            f"(macro F1 {best.score:.2f}) -> {output}",
            flush=True,
        )
        if self.config.report:
            self._report()

    def _report(self) -> None:
        self.upload.mark_pending()  # figures, even where this process is killed before they are there
        print(f"report: {write_report_of(self.config.output)}", flush=True)
        self.upload.finish(self.results(living=False), "FINISHED")


def _is_trained(trial: Trial) -> bool:
    return is_complete(trial.directory, "student", trial.config_hash)


def _failure_message(
    output: Path, failed: list[TrialResult], waiting: list[TrialResult], num_trials: int
) -> str:
    parts = [f"{result.label}: {result.error} (log: {output / result.log})" for result in failed]
    if waiting:
        parts.append(f"{len(waiting)} were never trained (log: {output / RAY_LOG_NAME})")
    count = len(failed) + len(waiting)
    return f"{count} of {num_trials} trials failed; the same command tries them again. " + "; ".join(parts)


def _write_sweep_manifest(
    config: SweepConfig, search: Search, results: list[TrialResult], digest: str
) -> None:
    output = config.output
    trials = [trial for trial, _ in search.trials().values()]
    manifests = [
        (trial.directory / MANIFEST_NAME).relative_to(output).as_posix()
        for trial, result in zip(trials, results, strict=True)
        if result.status == "complete"
    ]
    corpus = trials[0].config.corpus
    write_json(output / BASELINES_NAME, trivial_scores_on_validation(corpus))
    labels = {f"labels.{name}": config.teachers[name].labels for name in tried_teachers(config)}
    optional = [SEARCH_NAME] if (output / SEARCH_NAME).is_file() else []
    write_manifest(
        output,
        "sweep",
        config_hash=digest,
        inputs=input_checksums(train=corpus.train, valid=corpus.valid, **labels),
        files=[CONFIG_NAME, ENVIRONMENT_NAME, TRIALS_NAME, BASELINES_NAME, *optional, *manifests],
        rows={TRIALS_NAME: len(results)},
        details={"num_trials": len(results), "metric": "macro F1 on validation"},
    )


@contextlib.contextmanager
def _stop_file(output: Path) -> Iterator[Path]:
    """A path that exists once the trials of this start shall stop; unlike that of any other start."""
    path = output / f".stop-{os.getpid()}-{time.time_ns()}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
