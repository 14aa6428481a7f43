"""Bringing a sweep to MLflow while it runs: from files, by one thread, so that a slow server holds nothing up."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from kdecs.run_record import RunRecord
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.records import sweep_record, trial_record
from kdecs.sweep.results import TrialResult
from kdecs.sweep.search import Search
from kdecs.tracking import Tracker

_UNDELIVERED_NAME = ".undelivered"
_EVERY_S = 3.0


class Delivery:
    """Delivers a sweep's records; the driver is the only one that talks to MLflow."""

    def __init__(self, config: SweepConfig, search: Search) -> None:
        self._config = config
        self._search = search
        self._tracker = Tracker(config.tracking, config.output)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._pending: Future[bool] | None = None
        self._last = 0.0
        self._is_told = False
        self._ended: dict[str, RunRecord] = {}
        self._marker = config.output / _UNDELIVERED_NAME

    @property
    def shown_uri(self) -> str:
        """Where MLflow is, without a password."""
        return self._tracker.shown_uri

    def deliver(
        self, results: list[TrialResult], status: str, *, now: bool = False, final: bool = False
    ) -> bool:
        """Bring MLflow up to date: every few seconds in the background, or `now`; whether it is, as far as known.

        `final`: look once more for runs that a repeated request made double.
        """
        if self._pending is not None:
            if not now and not self._pending.done():
                return False
            self._pending.result()
            self._pending = None
        if not now and time.monotonic() - self._last < _EVERY_S:
            return True
        self._last = time.monotonic()
        family = self._records(results, status)
        if now:
            return self._tracker.sync_family(*family, now=True, final=final)
        self._pending = self._thread.submit(self._tracker.sync_family, *family)
        return True

    def begin(self, results: list[TrialResult]) -> None:
        """Deliver what is known at the start; from now on MLflow lacks something until this start has ended."""
        self.expect()
        self.deliver(results, "RUNNING", now=True)

    def expect(self) -> None:
        """Note that MLflow lacks something, so that another start brings it where this one is killed."""
        self._marker.touch()

    def finish(self, results: list[TrialResult], status: str) -> None:
        """Deliver the end of this start; where MLflow lacks something then, say so and leave the note."""
        if self.deliver(results, status, now=True, final=True):
            self._marker.unlink(missing_ok=True)
        elif not self._is_told:
            self._is_told = True
            print(
                f"sweep {self._config.name}: MLflow at {self.shown_uri} lacks a part of it; once it takes it, the same "
                "command brings what is missing",
                flush=True,
            )

    def deliver_leftovers(self, results: list[TrialResult]) -> None:
        """What an MLflow that was away has not got of a complete sweep."""
        if self._marker.exists():
            self.finish(results, "FINISHED")

    def _records(self, results: list[TrialResult], status: str) -> tuple[RunRecord, list[RunRecord]]:
        trials = self._search.trials()
        parent = sweep_record(self._config, self._search.num_trials(), results, status)
        children = []
        for result in results:
            if result.status == "waiting" and not result.started:
                continue
            record = self._ended.get(result.id) if result.is_settled else None
            if record is None:
                record = trial_record(trials[result.id][0], result, parent)
            if result.is_settled:
                self._ended[result.id] = record
            children.append(record)
        return parent, children
