"""The live state of a sweep on the terminal: one line that moves, or a line a finished trial in a log file."""

import sys
import time
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kdecs.sweep.results import SELECTION_METRIC, TrialResult

_MOVING = ("running", "stopped")


class SweepProgress:
    """Shows trials done, running, the best so far and the time left; use as a context manager."""

    def __init__(self, num_trials: int, already_done: int) -> None:
        self._num_trials = num_trials
        self._already_done = already_done
        self._began = time.monotonic()
        self._printed: set[str] = set()
        self._console = Console(file=sys.stdout, highlight=False)
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
        for result in results:
            if result.status in ("complete", "failed") and result.id not in self._printed:
                self._printed.add(result.id)
                self._console.print(self._ended_line(result, results), soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(Text(self.summary(results)), refresh=True)

    def skip(self, results: list[TrialResult]) -> None:
        """Count these as printed: they were complete before this start."""
        self._printed.update(result.id for result in results if result.status == "complete")

    def summary(self, results: list[TrialResult]) -> str:
        """Such as `3/8 trials done, 2 running, best 61.20 (llama-tiny α0.6 τ2 s3), 1m40s, about 3m00s left`."""
        counts = Counter(result.status for result in results)
        parts = [f"{counts['complete']}/{self._num_trials} trials done"]
        if moving := sum(counts[status] for status in _MOVING):
            parts.append(f"{moving} running")
        if counts["failed"]:
            parts.append(f"{counts['failed']} failed")
        scored = [r for r in results if r.status == "complete" and SELECTION_METRIC in r.metrics]
        if scored:
            best = max(scored, key=lambda result: result.score)
            parts.append(f"best macro F1 {best.score:.2f} ({best.label})")
        elapsed = time.monotonic() - self._began
        parts.append(duration(elapsed))
        done_here = counts["complete"] - self._already_done
        left = self._num_trials - counts["complete"] - counts["failed"]
        if done_here > 0 and left > 0:
            parts.append(f"about {duration(elapsed / done_here * left)} left")
        return ", ".join(parts)

    def _ended_line(self, result: TrialResult, results: list[TrialResult]) -> str:
        done = sum(r.status in ("complete", "failed") for r in results)
        line = f"trial {done}/{self._num_trials} {result.label}: "
        if result.status == "failed":
            return f"{line}failed ({result.error}); log: {result.log}"
        score = result.metrics.get(SELECTION_METRIC)
        shown = f"validation macro F1 {score:.2f}" if score is not None else "no validation score"
        return f"{line}{shown}, {duration(result.seconds)}"


def duration(seconds: float) -> str:
    """Such as 12s, 1m40s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
