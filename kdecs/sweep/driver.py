"""The sweep's driver: make the trials, have the missing ones trained, upload them to MLflow, write the manifest.

    SWEEP/config.json      the resolved config
    SWEEP/environment.json versions, host and device of the driver
    SWEEP/trials/ID/       one student directory per trial (kdecs.sweep.trial)
    SWEEP/trials.json      every trial with settings, status, metrics of its best epoch, seconds, error
    SWEEP/search.json      of a search in two stages: its survivors (kdecs.sweep.search)
    SWEEP/control.json     what people ask of it while it runs (kdecs.sweep.control)
    SWEEP/baselines.json   the trivial rules' scores on validation
    SWEEP/ray.log          what Ray printed
    SWEEP/manifest.json    last, once every trial is complete

The files are the truth: the driver may die at any point, and the same command resumes from them.

    run_sweep       refuse what cannot run, skip what is complete, else run and complete a _Sweep
    _Sweep          one start of the driver: trains stage after stage, and records how it ended
    run_with_ray    a stage's trials in a Ray process (kdecs.sweep.ray), followed by their files
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kdecs.artifact import MANIFEST_NAME, check_output, file_lock, is_complete, write_json, write_manifest
from kdecs.config import CONFIG_NAME, files_of, input_checksums, load_config, names_of, write_config
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import iter_dialogues
from kdecs.corpus.schema import FINE_TO_COARSE, NO_TABLE
from kdecs.corpus.splits import emotion_table, read_split, require_causes
from kdecs.errors import ArtifactError, ConfigError, CorpusError, KdecsError, Stopped, TrainingError
from kdecs.evaluation.metrics import rule_scores
from kdecs.output import refuse_overlaps
from kdecs.process import StopSignal, last_error, run_child
from kdecs.student.config import StudentConfig
from kdecs.sweep.commands import is_report_of, write_report_of
from kdecs.sweep.config import BASELINES_NAME, SweepConfig
from kdecs.sweep.control import CONTROL_NAME, control_lock
from kdecs.sweep.progress import SweepProgress
from kdecs.sweep.search import SEARCH_NAME, Search, Stage
from kdecs.sweep.space import Trial, missing_teachers, trials_directory, with_absolute_paths
from kdecs.sweep.status import (
    SELECTION_METRIC,
    TRIALS_NAME,
    TrialResult,
    is_trained,
    metric_title,
    selection_metric,
    write_results,
)
from kdecs.sweep.teachers import build_teachers, refuse_missing
from kdecs.sweep.tracking import SweepUpload
from kdecs.sweep.trial import (
    OUT_OF_MEMORY,
    RAY_LOCK_NAME,
    STAGE_NAME,
    StageRun,
    Trainer,
    TrialRun,
    settle,
    train_student_trial,
)
from kdecs.tables import duration
from kdecs.tracking.machine import ENVIRONMENT_NAME, write_environment
from kdecs.tracking.mlflow import tracking_uri
from kdecs.tracking.record import METRICS_NAME, read_points

RAY_LOG_NAME = "ray.log"
_NUM_SHOWN = 5  # of trials that join the queue
_POLL_S = 1.0  # between two looks at the trials' files
_RAY_COMMAND = (sys.executable, "-m", "kdecs.sweep.ray")
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers stay in the directory in which the user started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Tune would write CSV, JSON and TensorBoard files beside the trials' own metrics.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Tune's handler would replace the one that touches the stop file.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
# For a Ray that only this sweep uses. Ray reads these when it is imported, so its own process could set them too late.
_LOCAL_RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # With clusters off, which the name says of two systems only, Ray's servers listen on loopback alone on every one.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

Follow = Callable[[], None]
Runner = Callable[[StageRun, StopSignal, Follow], None]


def run_sweep(
    config: SweepConfig,
    *,
    trainer: Trainer = train_student_trial,
    stop: StopSignal | None = None,
    runner: Runner | None = None,
    build: bool = False,
) -> Path:
    """Train the sweep's missing trials and complete its directory, which is returned.

    `trainer` trains one student; `runner` runs the trials of a stage (default: by Ray Tune). With `build`, missing
    teachers are trained and exported first.
    Raises TrainingError, after all others ended, if a trial failed for good; ArtifactError if labels are missing; and
    Stopped.
    """
    stop = stop or StopSignal()
    missing = missing_teachers(config)
    if missing and not build:
        refuse_missing(config, missing)
    # What can be refused is refused before the directory exists, and before --build trains teachers for hours.
    tracking_uri(config.tracking, config.output)
    search = Search(config, planned=bool(missing))
    # A TPE search has no trial before its first suggestion.
    corpus = (search.stage().trials or (search.example,))[0].config.corpus
    valid = read_split(corpus, corpus.valid).dialogues
    require_causes(corpus.valid, (pair.is_cause for dialogue in valid for pair in pairs_of(dialogue)))
    refuse_equal_emotions(search)
    refuse_unequal_reaches(search)
    if not missing:
        _refuse_other_sweep(config, search)
    with file_lock(config.output / ".lock", blocking=False) as is_held:
        if not is_held:
            raise ArtifactError(
                f"{config.output}: another driver runs this sweep; wait for it or stop it first"
            )
        if missing:
            build_teachers(config, missing, stop)
            search = Search(config)
        # Again, since another driver may have ended its work here before this one got the lock.
        digest = _refuse_other_sweep(config, search)
        sweep = _Sweep(config, search, stop)
        if is_complete(config.output, "sweep", digest) and not sweep.missing(search.stage()):
            print(f"sweep {config.name}: {config.output} complete, skipped", flush=True)
            sweep.make_up(digest)
            return config.output
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)  # files of a trial were removed since
        is_over = False
        while not is_over:
            try:
                sweep.run(trainer, runner or run_with_ray)
            except BaseException:
                # What ended the sweep is raised; a failure to record it must not take its place.
                with contextlib.suppress(KdecsError):
                    sweep.record_end("KILLED" if stop.requested else "FAILED")
                raise
            is_over = sweep.complete()
    return config.output


def refuse_equal_emotions(search: Search) -> None:
    """Raise CorpusError if some students are given fine and some coarse emotions, and the corpus has no fine ones.

    The same students would be trained twice (Table 6).
    """
    trials = search.stage().trials
    students = [trial.config for trial in trials if isinstance(trial.config, StudentConfig)]
    if not {"fine", "coarse"} <= {student.model.given_emotions for student in students}:
        return
    corpus = trials[0].config.corpus
    table = emotion_table(corpus) or NO_TABLE
    # The validation split first, since it is small.
    for path in (corpus.valid, *files_of(corpus.train)):
        for dialogue in iter_dialogues(path, table=table):
            labels = (table.get(str(u.emotion), str(u.emotion)) for u in dialogue.utterances)
            if any(FINE_TO_COARSE.get(label, label) != label for label in labels):
                return
    raise CorpusError(
        f"{names_of(corpus.train)}: no emotion that a coarse one would replace, so the students that are given the "
        "fine emotion (model.given_emotions: fine) and those that are given the coarse one would be the same; name a "
        "corpus with fine labels, such as FG-RECCON's, or leave one of the two out of the space"
    )


def refuse_unequal_reaches(search: Search) -> None:
    """Raise ConfigError if trials look ahead differently far, since each is validated on the pairs within its reach."""
    reaches = {trial.config.candidates_after for trial in search.stage().trials}
    # A search has no trials before its first suggestion.
    if dimension := search.config.space.get("candidates.after"):
        reaches |= set(dimension.values)
    if len(reaches) > 1:
        found = ", ".join(map(str, sorted(reaches)))
        raise ConfigError(
            f"candidates.after: found {found} in one sweep, whose trials would be ranked by scores over different "
            "pairs; give all students and baselines one value, and compare sweeps of several values by kdecs compare "
            "with the option --after"
        )


def _refuse_other_sweep(config: SweepConfig, search: Search) -> str:
    """Raise ArtifactError if the output holds another sweep or another search, else return the sweep's digest."""
    # A sweep may hold its teachers' labels; a trial, whose config has the base and the corpus too, holds no input.
    refuse_overlaps(config, may_hold=True)
    refuse_overlaps((search.stage().trials or (search.example,))[0].config)
    search.refuse_other_search()
    digest = search.digest()
    check_output(
        config.output,
        "sweep",
        digest,
        can_repair=True,
        remedy=f"choose another output, or remove its {MANIFEST_NAME} to continue with its trials",
    )
    return digest


class _Sweep:
    """One start of the driver."""

    def __init__(self, config: SweepConfig, search: Search, stop: StopSignal) -> None:
        self.config = config
        self.search = search
        self.stop = stop
        self.upload = SweepUpload(config, search)
        self.began = time.monotonic()
        self._settled: dict[tuple[str, str], TrialResult] = {}
        self._begun = ""  # the stage whose missing trials have been handed out
        self._late: set[str] = set()  # trials that were resumed or added since, and not handed out yet
        self._is_control_read = True

    def missing(self, stage: Stage) -> list[Trial]:
        """The stage's trials that are to be trained: neither complete, nor pruned by their own search, nor kept out."""
        # Survivors are trained to their end with every seed, also those that the search itself had pruned.
        ended = {"complete", "held", "dropped"} | ({"pruned"} if stage.name == "search" else set())
        return [
            trial
            for trial in stage.trials
            if self.search.result(trial, stage.name, is_live=False).status not in ended
        ]

    def follow_control(self) -> bool:
        """Read what people ask of the sweep. Returns whether that has changed."""
        before, known = set(self.search.control.trials), set(self.search.trials())
        try:
            is_changed = self.search.refresh()
        except KdecsError as error:
            # The trials that train have no part in it; what was asked before still holds.
            if self._is_control_read:
                print(f"sweep {self.config.name}: {error}", flush=True)
            self._is_control_read = False
            return False
        self._is_control_read = True
        if is_changed:
            self._settled.clear()
            added = self.search.trials().keys() - known
            self._late |= added | (before - self.search.control.trials.keys())
        return is_changed

    def due(self, stage: Stage) -> list[Trial]:
        """The trials to hand out now: all that miss in a stage, then those that were resumed or added since."""
        missing = self.missing(stage)
        if self._begun != stage.name:
            return missing
        late = [trial for trial in missing if trial.id in self._late]
        # What has failed is tried again by the next start.
        return [t for t in late if self.search.result(t, stage.name, is_live=False).status != "failed"]

    def results(self, *, is_live: bool) -> list[TrialResult]:
        """Where every known trial stands. `is_live`: the Ray process may still run."""
        found = []
        for trial, stage in self.search.trials().values():
            key = trial.id, stage
            result = self._settled.get(key)
            if result is None:
                if not is_live and is_trained(trial):
                    settle(trial.directory)
                is_stopped = self.stop.requested and not is_live
                result = self.search.result(trial, stage, is_live=is_live, is_stopped=is_stopped)
                if result.is_settled:  # it is read no more: there may be thousands
                    self._settled[key] = result
            found.append(result)
        return found

    def run(self, trainer: Trainer, runner: Runner) -> None:
        """Train stage after stage. Ends early if a stop was requested or a stage cannot be finished."""
        # The Ray process, selection and report read this config, from whatever directory they start in.
        known = self.search.stage().trials  # none before TPE's first suggestion
        config = with_absolute_paths(self.config, known) if known else self.config
        write_config(config, self.config.output)
        write_environment(self.config.output)
        self.upload.begin(self.results(is_live=False))
        # A grid has one stage. A search has two, and the second is known once the first is over.
        while True:
            self.follow_control()
            stage = self.search.stage()
            is_first = self._begun != stage.name
            due = self.due(stage)
            is_asking = is_first and len(stage.trials) < stage.num_suggestions
            if (due or is_asking) and (is_first or not self.stop.requested):
                self._begun = stage.name
                self._late -= {trial.id for trial in due}
                self._train(stage, due, trainer, runner)
                continue  # a trial may have been resumed or added at the last moment
            if stage.name != "search":
                return
            results = self.results(is_live=False)
            if self.stop.requested or any(r.status in ("waiting", "stopped", "held") for r in results):
                return  # survivors of a part of the search would not be those of the whole
            self.search.choose_survivors(results)
            print(
                f"sweep {self.config.name}: search over {len(results)} trials is done, "
                f"{len(self.search.survivors or [])} settings are trained with all seeds",
                flush=True,
            )

    def _train(self, stage: Stage, missing: list[Trial], trainer: Trainer, runner: Runner) -> None:
        """Have the missing trials of a stage trained, and show and upload how far they are."""
        config = self.config
        self._hand_out(missing)
        before = self.results(is_live=False)
        number, done = self.search.num_trials(), sum(r.status in ("complete", "pruned") for r in before)
        kept_out = sum(r.status in ("held", "dropped") for r in before)
        at_a_time = config.max_concurrent_trials
        print(
            f"sweep {config.name}: {number} trials, {done} complete, {number - done - kept_out} to train, "
            f"{at_a_time or 'as many'} at a time{'' if at_a_time else ' as the resources hold'}; "
            f"MLflow at {self.upload.shown_uri}",
            flush=True,
        )
        # The trials stop once this file exists. Its name is unlike that of any other start.
        stop_file = config.output / f".stop-{os.getpid()}-{time.time_ns()}"
        waiting = {trial.id for trial in missing}
        run = StageRun(
            sweep=config.output,
            trials=tuple(trial.id for trial in missing),
            settled=tuple(
                trial.id
                for trial in stage.trials
                if trial.id not in waiting and not self.search.control.wanted(trial.id)
            ),
            metric=selection_metric((stage.trials[0] if stage.trials else self.search.example).config),
            driver=os.getpid(),
            run=TrialRun(
                trainer=trainer,
                stop_file=stop_file,
                store=config.student_store,
                reuse_students=config.reuse_students,
                max_failures=config.max_failures,
                is_search=stage.name == "search",
            ),
        )
        with SweepProgress(config, number, before) as progress:

            def follow() -> None:
                nonlocal run
                if self.follow_control():
                    run = self._extended(run)
                    progress.num_trials = self.search.num_trials()
                results = self.results(is_live=True)
                progress.update(results)
                self.upload.update(results)

            try:
                runner(run, self.stop, follow)
            finally:  # the Ray process has ended, so nobody reads the file any more
                stop_file.unlink(missing_ok=True)
            progress.update(self.results(is_live=False))

    def _hand_out(self, trials: list[Trial]) -> None:
        """Write the trials' configs. A worker on any node reads them: nothing of a trial's settings crosses Ray."""
        for trial in trials:
            trial.directory.mkdir(parents=True, exist_ok=True)
            write_config(trial.config, trial.directory)

    def _extended(self, run: StageRun) -> StageRun:
        """Hand the Ray process the trials that were resumed or added; it leaves alone what it has already."""
        due = [trial for trial in self.due(self.search.stage()) if trial.id not in run.trials]
        if not due:
            return run
        labels = ", ".join(trial.label for trial in due[:_NUM_SHOWN])
        more = f" and {len(due) - _NUM_SHOWN} more" if len(due) > _NUM_SHOWN else ""
        print(f"sweep {self.config.name}: joining the queue: {labels}{more}", flush=True)
        self._hand_out(due)
        run = run.model_copy(update={"trials": (*run.trials, *(trial.id for trial in due))})
        run.write(run.sweep / STAGE_NAME)
        return run

    def record_end(self, outcome: str) -> list[TrialResult]:
        """Write trials.json and upload how this start ended."""
        results = self.results(is_live=False)
        write_results(self.config.output, results)
        self.upload.finish(results, outcome)
        return results

    def make_up(self, digest: str) -> None:
        """Do what a complete sweep lacks if its driver was killed at the very end, or MLflow was unreachable."""
        if self.config.report and not is_report_of(self.config.output, digest):
            self._report()
        else:
            self.upload.upload_leftovers(self.results(is_live=False))

    def complete(self) -> bool:
        """Write trials.json, then the manifest. Returns False, having done nothing, if trials have joined the queue.

        Raises Stopped if a stop was requested, TrainingError if the sweep is not finished for another reason.
        """
        output = self.config.output
        # From here to the manifest nobody can ask anything: a complete sweep is what it says it is.
        with control_lock(output):
            self.follow_control()
            if self.due(self.search.stage()) and not self.stop.requested:
                return False
            results = self.results(is_live=False)
            self._refuse_unfinished(results)
            for leftover in output.glob(".stop-*"):  # of drivers that were killed
                leftover.unlink()
            self._write_manifest(results, self.search.digest())
        best = max((r for r in results if r.is_compared), key=lambda result: result.score)
        num_dropped = sum(r.status == "dropped" for r in results)
        dropped = f" ({num_dropped} more were dropped)" if num_dropped else ""
        print(
            f"sweep {self.config.name}: {len(results) - num_dropped} trials complete{dropped} in "
            f"{duration(time.monotonic() - self.began)}, best on validation {best.label} "
            f"({metric_title(best.metric)} {best.score:.2f}) -> {output}",
            flush=True,
        )
        if self.config.report:
            self._report()
        return True

    def _refuse_unfinished(self, results: list[TrialResult]) -> None:
        """Record how this start ended. Raises Stopped or TrainingError unless the sweep is finished."""
        config, output, number = self.config, self.config.output, self.search.num_trials()
        # A failure in the search costs one setting; a failure of a trial that is compared costs the sweep.
        failed_in_search = [r for r in results if r.status == "failed" and r.stage == "search"]
        failed = [r for r in results if r.status == "failed" and r.stage != "search"]
        waiting = [r for r in results if r.status in ("waiting", "stopped")]
        held = [r for r in results if r.status == "held"]
        is_compared = any(r.is_compared for r in results)
        is_finished = (
            self.search.stage().name != "search" and is_compared and not failed and not waiting and not held
        )
        is_by_hand = not failed and not waiting and (bool(held) or not is_compared)
        self.record_end(
            "FINISHED" if is_finished else "KILLED" if self.stop.requested or is_by_hand else "FAILED"
        )
        if not is_finished and self.stop.requested:
            done = sum(r.status in ("complete", "pruned") for r in results)
            raise Stopped(
                f"sweep {config.name} stopped after {sum(r.epoch for r in results)} epochs, with {done} of {number} "
                "trials complete; run the same command again to resume"
            )
        kept_out = (
            f"stopped by hand: {', '.join(r.label for r in held)}; resume or drop them (kdecs sweep resume {output} "
            "NAME, kdecs sweep drop), then run the same command again"
        )
        if is_by_hand and held:
            raise TrainingError(f"sweep {config.name} is not complete; {kept_out}")
        if is_by_hand and not failed_in_search:
            raise TrainingError(
                f"sweep {config.name}: every trial was dropped, so there is nothing to compare; resume some of them "
                f"(kdecs sweep resume {output} NAME), then run the same command again"
            )
        if not is_finished:
            failed = failed or failed_in_search
            parts = [f"{r.label}: {r.error} (log: {output / r.log})" for r in failed]
            if waiting:
                parts.append(f"{len(waiting)} were never trained (log: {output / RAY_LOG_NAME})")
            if held:
                parts.append(kept_out)
            raise TrainingError(
                f"{len(failed) + len(waiting)} of {number} trials failed; run the same command to try them again. "
                + "; ".join(parts)
            )
        for result in failed_in_search:
            print(f"in the search {result.label} failed: {result.error} (log: {output / result.log})")

    def _write_manifest(self, results: list[TrialResult], digest: str) -> None:
        output = self.config.output
        # Students that are compared are validated on the same files, so those of the first trial stand for all.
        configs = [trial.config for trial, _ in self.search.trials().values()]
        corpus = configs[0].corpus
        rules = rule_scores(
            read_split(corpus, corpus.valid), max(config.candidates_after for config in configs)
        )
        write_json(output / BASELINES_NAME, rules)
        # A student's manifest stands for its files, so the sweep's manifest is short and quick to check.
        manifests = [
            f"{result.directory}/{MANIFEST_NAME}" for result in results if result.status == "complete"
        ]
        optional = [name for name in (SEARCH_NAME, CONTROL_NAME) if (output / name).is_file()]
        labels = {f"labels.{name}": self.config.teachers[name].labels for name in self.search.teachers}
        write_manifest(
            output,
            "sweep",
            config_hash=digest,
            inputs=input_checksums(train=corpus.train, valid=corpus.valid, **labels),
            files=[CONFIG_NAME, ENVIRONMENT_NAME, TRIALS_NAME, BASELINES_NAME, *optional, *manifests],
            rows={TRIALS_NAME: len(results)},
            details={"num_trials": len(results), "metric": "macro F1 on validation"},
        )

    def _report(self) -> None:
        self.upload.mark_pending()  # if this process is killed before the figures are there, they are not in MLflow
        print(f"report: {write_report_of(self.config.output)}", flush=True)
        self.upload.finish(self.results(is_live=False), "FINISHED")


def run_with_ray(stage: StageRun, stop: StopSignal, follow: Follow) -> None:
    """Run a stage's trials in a Ray Tune process of its own session, calling `follow` about once a second.

    If Ray killed a worker because memory ran out, the trials resume from their checkpoints in another Ray process, as
    long as any of them gets further. Raises TrainingError if Ray fails otherwise.
    """
    log = stage.sweep / RAY_LOG_NAME
    stage.write(stage.sweep / STAGE_NAME)
    joins = load_config(SweepConfig, stage.sweep / CONFIG_NAME).ray_address
    # The Ray process waits by itself, but its messages go to the log, and the user should see why nothing happens.
    with file_lock(stage.sweep / RAY_LOCK_NAME, blocking=False) as is_free:
        if not is_free:
            print("waiting for the trials of an earlier start to save their state and end", flush=True)
    while True:
        epochs = _epochs_trained(stage.sweep)
        # A stop reaches the trials by the stop file: SIGTERM to the group would end Ray's servers under them.
        code = run_child(
            [*_RAY_COMMAND, str(stage.sweep / STAGE_NAME)],
            stop,
            environment=_RAY_ENVIRONMENT | ({} if joins else _LOCAL_RAY_ENVIRONMENT),
            log=log,
            on_stop=stage.run.stop_file.touch,
            on_poll=follow,
            poll_s=_POLL_S,
        )
        if code == 0:
            return
        if code != OUT_OF_MEMORY:
            raise TrainingError(f"Ray ended with exit code {code}: {last_error(log)}; see {log}")
        if _epochs_trained(stage.sweep) == epochs:
            raise TrainingError(
                "Ray killed trials because memory ran out before any finished an epoch; lower max_concurrent_trials "
                f"and run the same command again; see {log}"
            )
        print(
            "Ray killed a trial because it ran out of memory; the trials resume from their checkpoints "
            "(a lower max_concurrent_trials needs less memory)",
            flush=True,
        )


def _epochs_trained(sweep: Path) -> int:
    paths = trials_directory(sweep).glob(f"*/{METRICS_NAME}")
    # Lines without a score lie between the validations of a generative baseline, and a resume writes them again.
    return sum(SELECTION_METRIC in point for path in paths for point in read_points(path))
