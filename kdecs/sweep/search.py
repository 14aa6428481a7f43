"""How a sweep searches: the whole grid, or a search with one seed whose survivors get all seeds.

    SWEEP/suggestions.jsonl   points that TPE asked for, in order: {"point": {dotted key: value}, "points_of": digest}
    SWEEP/search.json         {"survivors": [settings], "search_of": digest}, once the first stage is over

The digests stand for the space (without the seeds, which may be extended), the student and the teachers, that of
search.json for the search too: what was found for other settings is refused.

Seeds are no competitors of one another: the first stage holds one seed, so that settings are compared, and the means of
the second are over the same seeds for every survivor.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdecs.artifact import content_checksum, write_json, write_text
from kdecs.errors import ArtifactError, ConfigError
from kdecs.sweep.config import Dimension, GridSearch, SweepConfig, TpeSearch
from kdecs.sweep.space import (
    SEED_KEY,
    Trial,
    check_names,
    enumerate_trials,
    make_trial,
    points,
    seeds_of,
    sweep_hash,
    tried_teachers,
    unique_trials,
)
from kdecs.sweep.status import TrialResult

SUGGESTIONS_NAME = "suggestions.jsonl"
SEARCH_NAME = "search.json"
_MAX_CORNERS = 1000


@dataclass(frozen=True, slots=True)
class Stage:
    """Trials that run together. `num_suggestions`: how many TPE asks for in all; 0 where the trials are known."""

    name: str
    trials: list[Trial]
    grace_epochs: int | None = None
    reduction_factor: float = 3.0
    num_suggestions: int = 0


class Search:
    """The stages of a sweep and how far it is; its files are the truth."""

    def __init__(self, config: SweepConfig, *, planned: bool = False) -> None:
        self.config = config
        self.planned = planned
        self._grid: list[Trial] | None = None
        self._made: dict[
            str, list[Trial]
        ] = {}  # a driver asks every second; hashing every config takes longer
        if isinstance(config.search, GridSearch):
            self._grid = enumerate_trials(config, planned=planned)
        else:
            seeds_of(config)
            check_names(config, planned=planned)

    @property
    def survivors(self) -> list[dict[str, Any]] | None:
        """The settings that get all seeds, None while the first stage is not over."""
        if not (self.config.output / SEARCH_NAME).is_file():
            return None
        found: list[dict[str, Any]] = self._state()["survivors"]
        return found

    def stage(self) -> Stage:
        """The stage that the sweep is in."""
        if self._grid is not None:
            return Stage("grid", self._grid)
        survivors = self.survivors
        if survivors is None:
            return self._first()
        seeds = seeds_of(self.config)
        seeded = [{**point, SEED_KEY: seed} for point in map(point_of, survivors) for seed in seeds]
        return Stage("seeds", self._trials_at(seeded))

    def trials(self) -> dict[str, tuple[Trial, str]]:
        """Every trial known so far and the last stage that it belongs to, by id."""
        stage = self.stage()
        found = {}
        if stage.name == "seeds":
            found = {trial.id: (trial, "search") for trial in self._first().trials}
        return {**found, **{trial.id: (trial, stage.name) for trial in stage.trials}}

    def choose_survivors(self, results: list[TrialResult]) -> None:
        """End the first stage: keep the best settings by their best epoch, whole trials before stopped ones.

        Raises ConfigError where no trial has a score.
        """
        assert not isinstance(self.config.search, GridSearch)
        scored = [result for result in results if result.has_score]
        if not scored:
            raise ConfigError(f"{self.config.output}: no trial of the search has a score; see their logs")
        scored.sort(key=lambda result: (result.status != "complete", -result.score, result.label))
        kept = [result.settings for result in scored[: self.config.search.survivors]]
        state = {"survivors": kept, "search_of": search_digest(self.config)}
        write_json(self.config.output / SEARCH_NAME, state)

    def refuse_other_search(self) -> None:
        """Raise ArtifactError where the directory holds suggestions or survivors of other settings.

        The labels of the teachers that the space needs must be there.
        """
        if self._grid is not None:
            return
        output = self.config.output
        of = {line.get("points_of") for line in _suggestion_lines(output)}
        if of - {points_digest(self.config)}:
            raise _other_search(output / SUGGESTIONS_NAME, "points")
        path = output / SEARCH_NAME
        if path.is_file() and self._state().get("search_of") != search_digest(self.config):
            raise _other_search(path, "survivors")

    def example(self) -> Trial | None:
        """A trial of the search before any is known; None where one is."""
        return None if self._grid is not None or self.stage().trials else example_trial(self.config)

    def _state(self) -> dict[str, Any]:
        path = self.config.output / SEARCH_NAME
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found["survivors"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: not a search's state ({error}); remove the file") from None
        return found

    def digest(self) -> str:
        """Hex sha256 of the sweep's work, known before anything is trained."""
        if self._grid is not None:
            return sweep_hash(self._grid)
        seeds = {"seeds": list(seeds_of(self.config)), "search": search_digest(self.config)}
        return hashlib.sha256(json.dumps(seeds, sort_keys=True).encode()).hexdigest()

    def num_trials(self) -> int:
        """How many trials the sweep will have, as far as is known: a search's stages may share some."""
        stage = self.stage()
        if self._grid is not None or stage.name == "seeds":
            return len(self.trials())
        assert not isinstance(self.config.search, GridSearch)
        seeds = seeds_of(self.config)
        further = len(seeds) - (_search_seed(self.config) in seeds)
        first = stage.num_suggestions or len(stage.trials)
        return first + min(self.config.search.survivors, first) * further

    def _first(self) -> Stage:
        config = self.config
        assert not isinstance(config.search, GridSearch)
        if isinstance(config.search, TpeSearch):
            suggested = read_suggestions(config.output)
            trials = self._trials_at(suggested) if suggested else []
            number = config.search.num_trials
        else:
            one_seed = {**config.space, SEED_KEY: Dimension(grid=(_search_seed(config),))}
            searched = config.model_copy(update={"space": one_seed})
            trials, number = self._trials_at(points(searched)), 0
        return Stage("search", trials, config.search.grace_epochs, config.search.reduction_factor, number)

    def _trials_at(self, found: list[dict[str, Any]]) -> list[Trial]:
        key = json.dumps(found)
        if key not in self._made:
            self._made[key] = unique_trials(self.config, found, planned=self.planned)
        return self._made[key]


def point_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The point of the space that settings stand for (a student without a teacher has none in its point)."""
    return {key: value for key, value in settings.items() if value is not None}


def search_point(config: SweepConfig, values: dict[str, Any]) -> dict[str, Any]:
    """A point of the first stage: the values that were suggested, with its one seed."""
    return {**values, SEED_KEY: _search_seed(config)}


def points_digest(config: SweepConfig) -> str:
    """Hex sha256 of what a suggested point stands for: space (no seeds), variants, constraints, student, teachers."""
    space = config.model_dump(mode="json", include={"space", "constraints", "variants"})
    space["space"].pop(SEED_KEY, None)
    parts = {
        **space,
        "base": example_trial(config).config_hash,
        "labels": {name: content_checksum(config.teachers[name].labels) for name in tried_teachers(config)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def search_digest(config: SweepConfig) -> str:
    """Hex sha256 of what survivors were chosen by: the points and the search."""
    parts = {"points": points_digest(config), "search": config.search.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def example_trial(config: SweepConfig) -> Trial:
    """The first trial at the ends of the space's ranges that no constraint refuses, for what all trials share."""
    ends = {key: dimension.values for key, dimension in config.space.items() if key != SEED_KEY}
    corners = (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))
    for corner in itertools.islice(corners, _MAX_CORNERS):
        if trial := make_trial(config, search_point(config, corner)):
            return trial
    free = config.model_copy(update={"constraints": ()})  # what they leave lies amid the ranges
    trial = make_trial(free, search_point(config, {key: values[0] for key, values in ends.items()}))
    assert trial is not None
    return trial


def read_suggestions(sweep: Path) -> list[dict[str, Any]]:
    """The points suggested so far, in order."""
    return [line["point"] for line in _suggestion_lines(sweep)]


def write_suggestions(sweep: Path, found: list[dict[str, Any]], digest: str) -> None:
    """Replace the suggestions, which stand for the work of `digest`."""
    lines = [json.dumps({"point": point, "points_of": digest}) + "\n" for point in found]
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


def _other_search(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: holds {what} of a search over other settings (space, constraints, student or search); choose another "
        "output, or remove the file to search anew"
    )


def _search_seed(config: SweepConfig) -> int:
    assert not isinstance(config.search, GridSearch)
    return config.search.search_seed if config.search.search_seed is not None else seeds_of(config)[0]
