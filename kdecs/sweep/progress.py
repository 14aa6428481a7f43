"""What a sweep would do: its trials, which are complete or to be had, what the rest will take, what is missing."""

import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdecs.artifact import is_complete
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.splits import CorpusConfig, training_split
from kdecs.errors import ConfigError, KdecsError
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.search import Search
from kdecs.sweep.space import Trial, missing_teachers
from kdecs.sweep.status import TrialResult, trial_result
from kdecs.sweep.teachers import build_commands
from kdecs.sweep.trial import find_student, read_status
from kdecs.tracking.record import METRICS_NAME, read_points

_MOVING = ("running", "stopped")
_ENDED = ("complete", "pruned", "failed")
_BAR_WIDTH = 12
_NUM_BEST = 5


class SweepProgress:
    """Shows trials that run, the best so far and the time left; use as a context manager."""

    def __init__(
        self, config: SweepConfig, num_trials: int, already_done: int, *, console: Console | None = None
    ) -> None:
        self._name = config.name
        self._num_trials = num_trials
        self._already_done = already_done
        self._began = time.monotonic()
        self._epochs_before: int | None = None
        self._printed: set[str] = set()
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, results: list[TrialResult]) -> None:
        """Show the state; a trial that ended is printed once."""
        if self._epochs_before is None:
            self._epochs_before = _epochs_done(results)
        for result in results:
            if result.status in _ENDED and result.id not in self._printed:
                self._printed.add(result.id)
                self._console.print(self._ended_line(result), soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(self.table(results), refresh=True)

    def skip(self, results: list[TrialResult]) -> None:
        """Count these as printed: they had ended before this start."""
        self._printed.update(result.id for result in results if result.status in ("complete", "pruned"))
        self._epochs_before = _epochs_done(results)

    def table(self, results: list[TrialResult]) -> Group:
        """What runs now, the best so far, and a line of totals."""
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        table.add_column("trial", overflow="ellipsis", no_wrap=True, ratio=1)
        table.add_column("epoch", no_wrap=True)
        for title in ("macro F1", "time"):
            table.add_column(title, justify="right", no_wrap=True)
        room = max(3, self._console.size.height - _NUM_BEST - 5)
        running = [result for result in results if result.status in _MOVING]
        for result in running[:room]:
            table.add_row(result.label, _bar(result), _score(result), duration(self._age(result)))
        if len(running) > room:
            table.add_row(f"and {len(running) - room} more", "", "", "", style="dim")
        scored = [r for r in results if r.status == "complete" and r.has_score]
        for result in sorted(scored, key=lambda r: -r.score)[:_NUM_BEST]:
            table.add_row(
                f"✓ {result.label}", _bar(result), _score(result), duration(result.seconds), style="green"
            )
        return Group(table, Text(f"{self._name}: {self.summary(results)}", style="bold"))

    def summary(self, results: list[TrialResult]) -> str:
        """Such as `3/8 trials done, 2 running, best macro F1 61.20 (llama-7b α0.6 τ2 s3), 1m40s, about 3m left`."""
        counts = Counter(result.status for result in results)
        parts = [f"{counts['complete'] + counts['pruned']}/{self._num_trials} trials done"]
        if counts["pruned"]:
            parts.append(f"{counts['pruned']} of them stopped by the search")
        if moving := sum(counts[status] for status in _MOVING):
            parts.append(f"{moving} running")
        if counts["failed"]:
            parts.append(f"{counts['failed']} failed")
        scored = [r for r in results if r.status == "complete" and r.has_score]
        if scored:
            best = max(scored, key=lambda result: result.score)
            parts.append(f"best macro F1 {best.score:.2f} ({best.label})")
        parts.append(duration(time.monotonic() - self._began))
        if left := self.seconds_left(results):
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def seconds_left(self, results: list[TrialResult]) -> float | None:
        """What the epochs that are left take at this start's rate; None before its first epoch, or at the end."""
        done = _epochs_done(results) - (self._epochs_before or 0)
        known = [result for result in results if result.status not in _ENDED]
        unknown = max(0, self._num_trials - len(results))  # of a search's second stage
        mean_epochs = sum(result.epochs for result in results) / max(1, len(results))
        left = sum(result.epochs - result.epoch for result in known) + unknown * mean_epochs
        if done <= 0 or left <= 0:
            return None
        return (time.monotonic() - self._began) / done * left

    @staticmethod
    def _age(result: TrialResult) -> float:
        return max(
            result.seconds, time.time() - result.started if result.attempts == 1 and result.started else 0
        )

    def _ended_line(self, result: TrialResult) -> str:
        line = f"trial {len(self._printed)}/{self._num_trials} {result.label}: "
        if result.status == "failed":
            return f"{line}failed ({result.error}); log: {result.log}"
        shown = f"validation macro F1 {_score(result)}" if _score(result) else "no validation score"
        if result.status == "pruned":
            return f"{line}{shown}, stopped by the search after {result.epoch} of {result.epochs} epochs"
        if result.reused_from:
            return f"{line}{shown}, taken from {result.reused_from}"
        return f"{line}{shown}, {duration(result.seconds)}"


def _epochs_done(results: list[TrialResult]) -> int:
    """Epochs that were trained here; a student from the store cost nothing."""
    return sum(result.epoch for result in results if not result.reused_from)


def _score(result: TrialResult) -> str:
    return f"{result.score:.2f}" if result.has_score else ""


def _bar(result: TrialResult) -> str:
    share = 1.0 if result.status == "complete" else result.epoch / max(1, result.epochs)
    filled = round(_BAR_WIDTH * share)
    return f"{'━' * filled}{'╌' * (_BAR_WIDTH - filled)} {result.epoch}/{result.epochs}"


def duration(seconds: float) -> str:
    """Such as 12s, 1m40s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


_CHARACTERS_A_TOKEN = 4.0
_GPU_TFLOPS = 40.0  # what a data-centre GPU keeps up in such a training, not its peak
_CORE_TFLOPS = 0.03
_PARAMETERS = {"roberta-base": 0.125e9, "roberta-large": 0.355e9, "bert-base-uncased": 0.11e9}
_USUAL_PARAMETERS = 0.125e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hours of one trial after another, and where the figure comes from."""

    seconds: float
    source: str


def estimate_left(config: SweepConfig, trials: Sequence[Trial], left: Sequence[Trial]) -> Estimate:
    """What the trials in `left` take, summed. `trials` are all of the sweep: complete ones are the measure."""
    measured = [rate for trial in trials if (rate := _seconds_an_epoch(config, trial)) is not None]
    if measured:
        mean = sum(measured) / len(measured)
        seconds = sum(mean * trial.config.optimization.epochs for trial in left)
        return Estimate(seconds, f"measured: {len(measured)} trials, {mean:.1f} s an epoch")
    tflops = config.effective_tflops or (
        _GPU_TFLOPS * config.gpus_per_trial if config.gpus_per_trial else _CORE_TFLOPS * config.cpus_per_trial
    )
    seconds = sum(_operations(trial) for trial in left) / (tflops * 1e12)
    return Estimate(seconds, f"arithmetic: {tflops:g} TFLOP/s a trial (set effective_tflops), all epochs")


def _seconds_an_epoch(config: SweepConfig, trial: Trial) -> float | None:
    store = config.store or config.output.parent / "students"
    places = [trial.directory if is_complete(trial.directory, "student", trial.config_hash) else None]
    places.append(find_student(store, trial.config_hash) if trial.config_hash else None)
    for place in places:
        status = read_status(place) if place else None
        points = read_points(place / METRICS_NAME) if place else []
        if status and status.seconds and points:
            return status.seconds / len(points)
    return None


def _operations(trial: Trial) -> float:
    config = trial.config
    tokens = _training_tokens(config.corpus.model_dump_json(), config.model.max_prompt_tokens)
    return 6 * _parameters(config.model.base) * tokens * config.optimization.epochs


@cache
def _training_tokens(corpus: str, longest: int) -> float:
    """Tokens of an epoch, from the characters of every pair's prompt; 0 where the corpus cannot be read yet."""
    try:
        dialogues = training_split(CorpusConfig.model_validate_json(corpus))
    except KdecsError:
        return 0.0
    total = 0.0
    for dialogue in dialogues:
        lengths = [len(utterance.text) for utterance in dialogue.utterances]
        for pair in pairs_of(dialogue, "fold1+neutral"):
            characters = sum(lengths[: pair.target]) + lengths[pair.candidate - 1] + 120
            total += min(characters / _CHARACTERS_A_TOKEN, longest)
    return total


@cache
def _parameters(base: str) -> float:
    """Parameters of a base by its config or weights, or by name."""
    folder = Path(base)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if weights:
        config = folder / "config.json"
        dtype = json.loads(config.read_text(encoding="utf-8")).get("dtype") if config.is_file() else None
        return weights / (2 if dtype in ("bfloat16", "float16") else 4)
    return _PARAMETERS.get(folder.name, _USUAL_PARAMETERS)


def print_plan(config: SweepConfig) -> None:
    """Print every trial with its state, then the hours left by estimate and the teachers that are missing."""
    search = Search(config, planned=True)
    if not missing_teachers(config):
        search.refuse_other_search()
    table = Table("trial", "id", "state", "epochs", "macro F1", "time", title=f"sweep {config.name}")
    known, left, reused = search.trials(), [], 0
    for trial, stage in known.values():
        done = bool(trial.config_hash) and is_complete(trial.directory, "student", trial.config_hash)
        result = trial_result(trial, complete=done, living=True, stage=stage)
        state = result.status
        if not trial.config_hash:
            state = "no labels"
        elif not done and config.reuse_students and _is_stored(config, trial):
            state, reused = "in the store", reused + 1
        elif not done and not (stage == "search" and state == "pruned"):
            left.append(trial)
        if not trial.config_hash:
            left.append(trial)
        table.add_row(
            trial.label,
            trial.id if trial.config_hash else "",
            state,
            str(trial.config.optimization.epochs),
            f"{result.score:.2f}" if result.has_score else "",
            duration(result.seconds) if result.seconds else "",
        )
    console = Console(highlight=False)
    console.print(table)
    number = search.num_trials()
    done_count = len(known) - len(left) - reused
    line = f"{number} trials, {done_count} complete, {number - done_count - reused} to train"
    console.print(line + (f", {reused} in the store" if reused else ""), soft_wrap=True)
    if number > len(known):
        console.print(
            f"{number - len(known)} of them become known during the search ({config.search.method})",
            soft_wrap=True,
        )
    example = search.example()
    measure = [example] if example else [trial for trial, _ in known.values()]
    _print_hours(console, config, measure, left, number - len(known))
    _print_missing(console, config)


def _print_hours(
    console: Console, config: SweepConfig, trials: list[Trial], left: list[Trial], num_unknown: int
) -> None:
    if not left and not num_unknown:
        return
    estimate = estimate_left(config, trials, left or trials)
    mean = estimate.seconds / max(1, len(left or trials))
    seconds = mean * (len(left) + num_unknown)
    at_a_time = config.max_concurrent_trials or _at_a_time_here(config)
    unit = "GPU" if config.gpus_per_trial else "CPU"
    hours = seconds / 3600 * (config.gpus_per_trial or config.cpus_per_trial)
    when = f"about {duration(seconds / at_a_time)} with {at_a_time} at a time, " if at_a_time else ""
    console.print(f"{when}{hours:.1f} {unit} hours ({estimate.source})", soft_wrap=True)


def _at_a_time_here(config: SweepConfig) -> int | None:
    """Trials at a time on this machine's cores; None where GPUs or a cluster decide."""
    if config.gpus_per_trial or config.ray_address:
        return None
    return max(1, math.floor(len(os.sched_getaffinity(0)) / config.cpus_per_trial))


def _is_stored(config: SweepConfig, trial: Trial) -> bool:
    if read_points(trial.directory / METRICS_NAME):  # it goes on with its own epochs
        return False
    return find_student(config.store or config.output.parent / "students", trial.config_hash) is not None


def _print_missing(console: Console, config: SweepConfig) -> None:
    for name in missing_teachers(config):
        labels = config.teachers[name].labels
        try:
            commands = build_commands(config, name)
        except ConfigError:
            console.print(f"teacher {name}: no soft labels at {labels}; export them first", soft_wrap=True)
            continue
        console.print(f"teacher {name}: no soft labels at {labels}; --build runs", soft_wrap=True)
        for _, arguments in commands:
            console.print(f"  {shlex.join(arguments)}", soft_wrap=True, style="dim")
