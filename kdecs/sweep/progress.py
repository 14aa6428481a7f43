"""The live state of a sweep: a table on a terminal, a line a finished trial elsewhere."""

import sys
import time
from collections import Counter
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdecs.sweep.config import SweepConfig
from kdecs.sweep.results import TrialResult

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
