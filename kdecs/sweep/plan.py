"""What a sweep would do: its trials, which are complete or to be had, what the rest will take, what is missing."""

import math
import os
import shlex

from rich.console import Console
from rich.table import Table

from kdecs.artifact import is_complete
from kdecs.errors import ConfigError
from kdecs.run_record import METRICS_NAME, read_points
from kdecs.sweep.build import build_commands
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.estimate import estimate_left
from kdecs.sweep.progress import duration
from kdecs.sweep.results import trial_result
from kdecs.sweep.search import Search
from kdecs.sweep.space import Trial, missing_teachers
from kdecs.sweep.store import find_student


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
