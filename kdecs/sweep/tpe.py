"""Optuna's TPE as a searcher of Ray Tune: it asks for points and has them written as trials of the sweep.

What was suggested stands in the sweep's `suggestions.jsonl` before it is trained, and what trials reached in their own
files; so a search that was killed goes on with what it knew, without Optuna's or Ray's own state.
"""

import logging
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from kdecs.config import write_config
from kdecs.errors import DependencyError
from kdecs.sweep.config import Dimension, SweepConfig, TpeSearch
from kdecs.sweep.search import points_digest, read_suggestions, search_point, write_suggestions
from kdecs.sweep.space import SEED_KEY, Trial, make_trial, readable
from kdecs.sweep.status import best_point
from kdecs.sweep.trial import read_status
from kdecs.tracking.record import METRICS_NAME, read_points

_MAX_REPEATS = 30  # asks for a point that is new, before the space counts as exhausted


class TpeSearcher(Searcher):
    """Suggests `{"trial": id}` for points of the space, maximising macro F1 on validation.

    Once `stop_file` exists nothing is suggested: a point that is written is one that will be trained.
    """

    def __init__(self, config: SweepConfig, metric: str, stop_file: Path) -> None:
        super().__init__(metric=metric, mode="max")
        self._metric_name = metric
        assert isinstance(config.search, TpeSearch)
        self._optuna = _import_optuna()
        self._config, self._search, self._stop_file = config, config.search, stop_file
        sampler = self._optuna.samplers.TPESampler(
            seed=self._search.sample_seed, n_startup_trials=self._search.startup_trials
        )
        self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        self._space = {
            key: _distribution(self._optuna, dimension)
            for key, dimension in config.space.items()
            if key != SEED_KEY
        }
        self._asked: dict[str, Any] = {}
        self._trials: set[str] = set()
        self._pending: list[Trial] = []
        self._num_suggested = 0
        self._points, self._digest = read_suggestions(config.output), points_digest(config)
        for point in self._points:
            self._remember(point)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial: one that an earlier start left, or a new point; FINISHED at the end of the search.

        None, which Ray takes for "not now", while the sweep stops.
        """
        if self._stop_file.exists():
            return None
        if self._pending:
            waiting = self._pending.pop(0)
            self._asked[trial_id] = (self._study.ask(self._space), waiting)
            return {"trial": waiting.id}
        if self._num_suggested >= self._search.num_trials:
            return self.FINISHED
        for _ in range(_MAX_REPEATS):
            asked = self._study.ask(self._space)
            point = search_point(self._config, {k: self._value(k, v) for k, v in asked.params.items()})
            trial = make_trial(self._config, point)
            if trial is None or trial.id in self._trials:
                self._tell(asked, trial)
                continue
            self._write(point, trial)
            self._asked[trial_id] = (asked, trial)
            return {"trial": trial.id}
        return self.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna what the trial's files say it has reached."""
        asked, trial = self._asked.pop(trial_id)
        self._tell(asked, trial)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's files hold it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's files hold it."""

    def _value(self, key: str, value: Any) -> Any:
        dimension = self._config.space[key]
        if dimension.kind in ("grid", "choice"):
            return dimension.values[value]
        return readable(value)

    def _remember(self, point: dict[str, Any]) -> None:
        """Give Optuna a point of an earlier start: its value, or, where it has none yet, its turn."""
        trial = make_trial(self._config, point)
        if trial is None or trial.id in self._trials:
            return
        self._trials.add(trial.id)
        self._num_suggested += 1
        params = {key: self._parameter(key, point[key]) for key in self._space}
        status = read_status(trial.directory)
        best = best_point(read_points(trial.directory / METRICS_NAME), self._metric_name)
        if status and status.status in ("complete", "pruned", "failed") and best:
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=params, distributions=self._space, value=best[self._metric_name]
                )
            )
        elif not status or status.status != "failed":
            self._study.enqueue_trial(params)
            self._pending.append(trial)

    def _parameter(self, key: str, value: Any) -> Any:
        dimension = self._config.space[key]
        return dimension.values.index(value) if dimension.kind in ("grid", "choice") else value

    def _write(self, point: dict[str, Any], trial: Trial) -> None:
        trial.directory.mkdir(parents=True, exist_ok=True)
        write_config(trial.config, trial.directory)
        self._points.append(point)
        write_suggestions(self._config.output, self._points, self._digest)
        self._trials.add(trial.id)
        self._num_suggested += 1

    def _tell(self, asked: Any, trial: Trial | None) -> None:
        """The value of a trial's best epoch so far; a point without one counts as failed."""
        best = best_point(read_points(trial.directory / METRICS_NAME), self._metric_name) if trial else None
        if best:
            self._study.tell(asked, best[self._metric_name])
        else:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    if dimension.kind in ("grid", "choice"):  # by place: values may be lists, which Optuna would not take
        return optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
    low, high = dimension.values
    return optuna.distributions.FloatDistribution(low, high, log=dimension.kind == "loguniform")


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise DependencyError(
            f"Optuna is not installed ({error}), which search.method tpe needs; "
            "install it with: pip install 'kdecs[search]'"
        ) from None
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna
