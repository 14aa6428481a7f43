"""What a sweep would do: its trials, which are complete, and what the rest will take."""

import statistics

from rich.console import Console
from rich.table import Table

from kdecs.artifact import is_complete
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.progress import duration
from kdecs.sweep.results import SELECTION_METRIC, trial_result
from kdecs.sweep.space import enumerate_trials


def print_plan(config: SweepConfig) -> None:
    """Print every trial with its state; time left by the mean of the complete trials, where there are any."""
    table = Table("trial", "id", "state", "epochs", "macro F1", "time", title=f"sweep {config.name}")
    seconds = []
    trials = enumerate_trials(config)
    for trial in trials:
        done = is_complete(trial.directory, "student", trial.config_hash)
        result = trial_result(trial, complete=done, living=True)
        if done:
            seconds.append(result.seconds)
        score = result.metrics.get(SELECTION_METRIC)
        table.add_row(
            trial.label,
            trial.id,
            result.status,
            str(trial.config.optimization.epochs),
            f"{score:.2f}" if score is not None else "",
            duration(result.seconds) if result.seconds else "",
        )
    left = len(trials) - len(seconds)
    line = f"{len(trials)} trials, {len(seconds)} complete, {left} to train"
    if seconds and left:
        hours = left * statistics.mean(seconds)
        line += (
            f": about {duration(hours / config.max_concurrent_trials)} with {config.max_concurrent_trials} "
            f"at a time ({hours * max(config.gpus_per_trial, 0) / 3600:.1f} GPU hours)"
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(line, soft_wrap=True)
