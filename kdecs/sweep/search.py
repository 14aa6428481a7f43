"""How a sweep searches: the complete grid, or a search with one seed whose survivors get all seeds.

    SWEEP/suggestions.jsonl   points that TPE asked for, in order: {"point": {dotted key: value}, "points_of": digest}
    SWEEP/search.json         {"survivors": [settings], "search_of": digest, "num_added": N}, after the first stage

A setting that a person adds (kdecs.sweep.control) joins the grid or the first stage. Once that stage is over, it is
trained with every seed, like a survivor; `num_added` says how many came before. A trial that is stopped or dropped
stays among the trials; what is dropped does not survive the first stage.

The digests stand for the space (without the seeds, which may be extended), the student and the teachers, and that of
search.json for the search too: what was found for other settings is refused.

Seeds do not compete with one another. The first stage trains one seed, so that settings are compared; the second trains
the same seeds for every survivor, so that their means are comparable.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdecs.artifact import content_checksum, write_json, write_text
from kdecs.config import write_config
from kdecs.errors import ArtifactError, ConfigError, DependencyError, KdecsError
from kdecs.sweep.config import Dimension, GridSearch, SweepConfig, TpeSearch
from kdecs.sweep.control import CONTROL_NAME, Control, read_control
from kdecs.sweep.space import SEED_KEY, Point, Space, Trial, readable, sweep_hash
from kdecs.sweep.status import TrialResult, best_point, read_note, trial_result
from kdecs.tracking.record import METRICS_NAME, read_points

SUGGESTIONS_NAME = "suggestions.jsonl"
SEARCH_NAME = "search.json"
_MAX_CORNERS = 1000  # of the space, tried one by one for one that the constraints allow
_MAX_REPEATS = 30  # points that TPE may repeat before the space counts as exhausted


@dataclass(frozen=True, slots=True)
class Stage:
    """Trials that run together: all of a grid, the search's first seed, or the survivors' seeds.

    `num_suggestions` says how many trials there will be once TPE has asked for all; it is 0 if the trials are known.
    """

    name: str
    trials: list[Trial]
    num_suggestions: int = 0


class Search:
    """The stages of a sweep and how far it is. Its files are the truth, and its trials are made once.

    `control` stands in for what the sweep's file says that people ask of it.
    """

    def __init__(self, config: SweepConfig, *, planned: bool = False, control: Control | None = None) -> None:
        self.config = config
        self.space = Space(config, planned=planned)
        self.control = read_control(config.output) if control is None else control
        self._seeds = () if isinstance(config.search, GridSearch) else self.space.seeds()
        # Trials by their points: the driver asks every second, and hashing their configs takes longer than that.
        self._made: dict[str, list[Trial]] = {}
        self._grid = self._grid_trials() if isinstance(config.search, GridSearch) else None

    def refresh(self) -> bool:
        """Read again what people ask of the sweep. Returns whether that has changed.

        Raises ArtifactError or ConfigError, and changes nothing, if it cannot be read or an added setting does not fit.
        """
        before, self.control = self.control, read_control(self.config.output)
        try:
            if self.control.added != before.added:
                if self._grid is not None:
                    self._grid = self._grid_trials()
                self.trials()
        except KdecsError:
            self.control = before
            raise
        return self.control != before

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that the sweep's trials need, once each."""
        added = [name for point in self.control.added for name in self.space.teachers_at(point)]
        return tuple(dict.fromkeys([*self.space.teachers, *added]))

    def result(self, trial: Trial, stage: str, *, is_live: bool, is_stopped: bool = False) -> TrialResult:
        """Where a trial of this sweep stands, as `trial_result` says, with what a person asks of it."""
        wanted = self.control.wanted(trial.id)
        return trial_result(trial, is_live=is_live, is_stopped=is_stopped, stage=stage, wanted=wanted)

    def stage(self) -> Stage:
        """The stage that the sweep is in."""
        if self._grid is not None:
            return Stage("grid", self._grid)
        survivors = self.survivors
        if survivors is None:
            return self._first_stage()
        # A student without a teacher has the teacher None in its settings and none in its point.
        points = [
            {key: value for key, value in settings.items() if value is not None} for settings in survivors
        ]
        points += self._added()[self._num_added_before :]
        return Stage(
            "seeds", self._trials_at([{**point, SEED_KEY: seed} for point in points for seed in self._seeds])
        )

    def trials(self) -> dict[str, tuple[Trial, str]]:
        """Every trial known so far and the last stage that it belongs to, by id."""
        stage = self.stage()
        found = {}
        if stage.name == "seeds":
            found = {trial.id: (trial, "search") for trial in self._first_stage().trials}
        # A survivor's trial with the search's seed is in both stages, and counts as one that is compared.
        return {**found, **{trial.id: (trial, stage.name) for trial in stage.trials}}

    def num_trials(self) -> int:
        """How many trials the sweep will have, as far as is known: a search's stages may share some."""
        stage = self.stage()
        if isinstance(self.config.search, GridSearch) or stage.name == "seeds":
            return len(self.trials())
        # A survivor has been trained with the search's own seed already.
        further = len(self._seeds) - (self.search_seed in self._seeds)
        first = stage.num_suggestions or len(stage.trials)
        return first + min(self.config.search.survivors, first) * further

    @property
    def search_seed(self) -> int:
        """The seed of the first stage."""
        assert not isinstance(self.config.search, GridSearch)
        seed = self.config.search.search_seed
        return seed if seed is not None else self._seeds[0]

    @property
    def survivors(self) -> list[dict[str, Any]] | None:
        """The settings that get all seeds, None while the first stage is not over."""
        state = self._state()
        return None if state is None else list(state["survivors"])

    def choose_survivors(self, results: list[TrialResult]) -> None:
        """End the first stage: keep the best settings by their best epoch, complete trials before pruned ones.

        Raises ConfigError if no trial has a score.
        """
        assert not isinstance(self.config.search, GridSearch)
        scored = [result for result in results if result.has_score and result.status != "dropped"]
        if not scored:
            raise ConfigError(f"{self.config.output}: no trial of the search has a score; see their logs")
        # A pruned trial had fewer epochs to score in, so it comes after every complete one.
        scored.sort(key=lambda result: (result.status != "complete", -result.score, result.label))
        kept = [result.settings for result in scored[: self.config.search.survivors]]
        state = {"survivors": kept, "search_of": self.search_digest, "num_added": len(self.control.added)}
        write_json(self.config.output / SEARCH_NAME, state)

    def refuse_other_search(self) -> None:
        """Raise ArtifactError if the directory holds suggestions or survivors of other settings.

        The labels of the teachers that the space needs must be there.
        """
        if self._grid is not None:
            return
        output = self.config.output
        other = (
            "of a search over other settings (space, constraints, student or search); choose another output, or remove "
            "the file to search anew"
        )
        if {line.get("points_of") for line in _suggestion_lines(output)} - {self.points_digest}:
            raise ArtifactError(f"{output / SUGGESTIONS_NAME}: holds points {other}")
        state = self._state()
        if state is not None and state.get("search_of") != self.search_digest:
            raise ArtifactError(f"{output / SEARCH_NAME}: holds survivors {other}")

    def digest(self) -> str:
        """Hex sha256 of the sweep's work, known before anything is trained.

        What is compared is the work: a trial that was dropped is no part of it, and an added one is.
        """
        dropped = sorted(trial for trial, wanted in self.control.trials.items() if wanted == "drop")
        if self._grid is not None:
            return sweep_hash([trial for trial in self._grid if trial.id not in dropped])
        seeds = {"seeds": list(self._seeds), "search": self.search_digest}
        if dropped or self.control.added:
            seeds |= {"dropped": dropped, "added": self.control.added}
        return hashlib.sha256(json.dumps(seeds, sort_keys=True).encode()).hexdigest()

    @cached_property
    def points_digest(self) -> str:
        """Hex sha256 of what a point stands for: space without seeds, variants, constraints, student, teachers."""
        teachers = self.config.teachers
        space = self.config.model_dump(mode="json", include={"space", "constraints", "variants"})
        space["space"].pop(SEED_KEY, None)
        if self.config.baselines:  # digests of sweeps without any stay what they were
            space["baselines"] = self.config.model_dump(mode="json")["baselines"]
        parts = {
            **space,
            "base": self.example.config_hash,
            "labels": {name: content_checksum(teachers[name].labels) for name in self.space.teachers},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def search_digest(self) -> str:
        """Hex sha256 of what survivors were chosen by: the points and the search."""
        parts = {"points": self.points_digest, "search": self.config.search.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def example(self) -> Trial:
        """A trial for what all trials of a search share, before any is known.

        The first one at the ends of the space's ranges that no constraint refuses.
        """
        space = self.config.space
        ends = {key: dimension.values for key, dimension in space.items() if key != SEED_KEY}
        corners = (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))
        for corner in itertools.islice(corners, _MAX_CORNERS):
            if trial := self.space.trial_at({**corner, SEED_KEY: self.search_seed}):
                return trial
        # What the constraints leave lies in the middle of the ranges: take the first corner, without constraints.
        free = Space(self.config.model_copy(update={"constraints": ()}), planned=True)
        first = {key: values[0] for key, values in ends.items()}
        trial = free.trial_at({**first, SEED_KEY: self.search_seed})
        assert trial is not None
        return trial

    def _first_stage(self) -> Stage:
        config = self.config
        # Settings that were added after the first stage never took part in it.
        joined = [{**point, SEED_KEY: self.search_seed} for point in self._added()[: self._num_added_before]]
        if isinstance(config.search, TpeSearch):
            points = [*read_suggestions(config.output), *joined]
            number = config.search.num_trials + len(joined)
            return Stage("search", self._trials_at(points) if points else [], number)
        one_seed = {**config.space, SEED_KEY: Dimension(grid=(self.search_seed,))}
        # `self.space` has refused missing labels already, unless this is a plan, which may lack them.
        searched = Space(config.model_copy(update={"space": one_seed}), planned=True)
        return Stage("search", self._trials_at([*searched.points(), *joined]))

    def _grid_trials(self) -> list[Trial]:
        seeds = self.space.seeds() if self.control.added else ()
        added = [{**point, SEED_KEY: seed} for point in self._added() for seed in seeds]
        return self.space.trials_at([*self.space.points(), *added])

    def _added(self) -> list[Point]:
        """The settings that people have added. Raises ConfigError for one that this config cannot train."""
        for point in self.control.added:
            try:
                self.space.check_names(point)
            except ConfigError as error:
                path = self.config.output / CONTROL_NAME
                raise ConfigError(f"{path}: an added setting does not fit the config: {error}") from None
        return list(self.control.added)

    @property
    def _num_added_before(self) -> int | None:
        """How many settings were added before the first stage was over; None, which is all, while it is not."""
        state = self._state()
        return None if state is None else int(state.get("num_added", 0))

    def _trials_at(self, points: Sequence[Point]) -> list[Trial]:
        key = json.dumps(points)
        if key not in self._made:
            self._made[key] = self.space.trials_at(points)
        return self._made[key]

    def _state(self) -> dict[str, Any] | None:
        """What search.json holds, None before the first stage is over."""
        path = self.config.output / SEARCH_NAME
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found["survivors"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: not a search's state ({error}); remove the file") from None
        return found


class TpeSuggester:
    """Suggests trials of a search by Optuna's tree-structured Parzen estimator; maximises `metric` on validation.

    A suggested point is in `suggestions.jsonl` before it is trained, and what a trial reached is in its own files. So a
    search that was killed resumes with what it knew, without any state of Optuna or Ray.

    Ray's OptunaSearch cannot stand in. Its `evaluated_rewards` need a value for every point, so a search that is
    partly finished cannot be replayed; it reports a trial's last epoch, not its best; and it neither skips points that
    repeat or break a constraint nor writes a point down before it is trained.
    """

    def __init__(self, search: Search, metric: str) -> None:
        config = search.config
        assert isinstance(config.search, TpeSearch)
        self._optuna = _import_optuna()
        self._search, self._metric = search, metric
        self._num_trials = config.search.num_trials
        sampler = self._optuna.samplers.TPESampler(
            seed=config.search.sample_seed, n_startup_trials=config.search.startup_trials
        )
        self._study = self._optuna.create_study(direction="maximize", sampler=sampler)
        # The estimator never sees the seed: it would learn which seed is lucky.
        self._dimensions = {key: dimension for key, dimension in config.space.items() if key != SEED_KEY}
        self._distributions = {
            key: _distribution(self._optuna, dimension) for key, dimension in self._dimensions.items()
        }
        self._asked: dict[str, tuple[Any, Trial]] = {}
        self._known: set[str] = set()
        self._kept_out: set[str] = set()
        self._unfinished: list[Trial] = []
        self._points = read_suggestions(config.output)
        for point in self._points:
            self._replay(point)

    def suggest(self, key: str) -> Trial | None:
        """The next trial: one that an earlier start left unfinished, or a new point. None at the end of the search.

        The result is reported under the same `key` later.
        """
        if self._unfinished:
            # Replayed points were enqueued in this order, so the next `ask` returns the values of this very trial.
            unfinished = self._unfinished.pop(0)
            self._asked[key] = (self._study.ask(self._distributions), unfinished)
            return unfinished
        if len(self._known) >= self._num_trials:
            return None
        for _ in range(_MAX_REPEATS):
            # Again and again, since Optuna takes no constraint on what it suggests, only the outcome of a suggestion.
            asked = self._study.ask(self._distributions)
            point = {name: self._value(name, value) for name, value in asked.params.items()}
            point[SEED_KEY] = self._search.search_seed
            trial = self._search.space.trial_at(point)
            if trial is None or trial.id in self._known:
                # A refused point counts as failed and a repeated one with its value, so TPE looks elsewhere.
                self._tell(asked, trial)
                continue
            # The config before the suggestion: a kill in between leaves a directory that nobody counts.
            trial.directory.mkdir(parents=True, exist_ok=True)
            write_config(trial.config, trial.directory)
            self._points.append(point)
            write_suggestions(self._search.config.output, self._points, self._search.points_digest)
            self._known.add(trial.id)
            self._asked[key] = (asked, trial)
            return trial
        return None

    @property
    def known(self) -> frozenset[str]:
        """The ids of all suggested trials, except those that a person kept out when this start began."""
        return frozenset(self._known - self._kept_out)

    def complete(self, key: str) -> None:
        """Tell Optuna what the files of the trial that was suggested for `key` say it has reached.

        A trial that it did not suggest, an added one, tells it nothing.
        """
        if key in self._asked:
            self._tell(*self._asked.pop(key))

    def _replay(self, point: Point) -> None:
        """Give Optuna a point of an earlier start: with its value, or as the next one if it has none yet."""
        trial = self._search.space.trial_at(point)
        if trial is None or trial.id in self._known:
            return
        self._known.add(trial.id)
        # Optuna knows a value of a grid or choice by its index alone, see `_distribution`.
        params = {
            key: dimension.values.index(point[key]) if dimension.kind in ("grid", "choice") else point[key]
            for key, dimension in self._dimensions.items()
        }
        note = read_note(trial.directory)
        best = best_point(read_points(trial.directory / METRICS_NAME), self._metric)
        if note and note.status in ("complete", "pruned", "failed") and best:
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=params, distributions=self._distributions, value=best[self._metric]
                )
            )
        elif self._search.control.wanted(trial.id):  # it waits for the person who has stopped or dropped it
            self._kept_out.add(trial.id)
        # A point whose training failed is not tried again; any other one goes on where it stopped.
        elif not note or note.status != "failed":
            self._study.enqueue_trial(params)
            self._unfinished.append(trial)

    def _value(self, key: str, suggested: Any) -> Any:
        dimension = self._dimensions[key]
        return dimension.values[suggested] if dimension.kind in ("grid", "choice") else readable(suggested)

    def _tell(self, asked: Any, trial: Trial | None) -> None:
        """Tell Optuna the value of a trial's best epoch so far. A point without one counts as failed."""
        best = best_point(read_points(trial.directory / METRICS_NAME), self._metric) if trial else None
        if best:
            self._study.tell(asked, best[self._metric])
        else:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    if dimension.kind in ("grid", "choice"):  # by index: values may be lists, which Optuna does not take
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


def read_suggestions(sweep: Path) -> list[Point]:
    """The points suggested so far, in order."""
    return [line["point"] for line in _suggestion_lines(sweep)]


def write_suggestions(sweep: Path, points: list[Point], digest: str) -> None:
    """Replace the suggestions, which stand for the work of `digest`."""
    lines = [json.dumps({"point": point, "points_of": digest}) + "\n" for point in points]
    write_text(sweep / SUGGESTIONS_NAME, "".join(lines))


def _suggestion_lines(sweep: Path) -> list[dict[str, Any]]:
    path = sweep / SUGGESTIONS_NAME
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        [line["point"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a search's suggestions ({error}); remove the file") from None
    return lines
