"""The ranked settings of a finished sweep and the record of its selection, `selection.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from kdecs.artifact import read_manifest, read_record
from kdecs.errors import ArtifactError
from kdecs.evaluation.significance import Comparison, Distance, summarise_seeds
from kdecs.sweep.space import settings_key
from kdecs.sweep.status import TrialResult, by_settings

SELECTION_NAME = "selection.json"
_REMEDY = (
    "the test split may have been opened, so restore the file from a backup, or remove it only if you want to look at "
    "test a second time"
)


@dataclass(frozen=True, slots=True)
class SettingScore:
    """A setting's score on validation over its seeds, in percent. sd and interval (95%) need two seeds."""

    label: str
    teacher: str | None
    settings: dict[str, Any]
    trials: list[str]
    num_seeds: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def key(self) -> str:
        """What tells settings apart, whatever they are called."""
        return settings_key(self.settings)


def rank_settings(results: list[TrialResult]) -> list[SettingScore]:
    """Settings by falling mean over seeds, equal means by label, so that the order is the same everywhere."""
    ranked = []
    for group in by_settings(results).values():
        summary = summarise_seeds([result.score for result in group])
        has_interval = summary.low is not None and summary.high is not None
        # Those of a group differ in the seed alone, which is the last word of a label.
        first = group[0]
        ranked.append(
            SettingScore(
                label=first.label.rpartition(" s")[0],
                teacher=first.teacher,
                settings=first.settings,
                trials=[result.id for result in sorted(group, key=lambda result: result.seed)],
                num_seeds=summary.num_seeds,
                mean=summary.mean,
                sd=summary.std,
                interval=(summary.low, summary.high) if has_interval else None,  # type: ignore[arg-type]
            )
        )
    if not ranked:
        raise ArtifactError("no setting of the sweep has a complete trial, so there is nothing to rank")
    return sorted(ranked, key=lambda setting: (-setting.mean, setting.label))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Winner(_Record):
    """The chosen trial, with its metrics on validation."""

    id: str
    label: str
    seed: int
    directory: str
    valid: dict[str, float]


class SettingComparison(_Record):
    """Paired tests of two settings on validation, by score: `label` and `against` say which."""

    label: str
    against: str
    tests: dict[str, Comparison]


class VariantComparison(SettingComparison):
    """The best setting of a variant against that of the first variant."""

    variant: str


class SettingOnTest(_Record):
    """A setting's chosen seed on test, for tables alone: the choice was made before.

    `opened_at` (UTC) is written before the split is read. After that come `scores` (as `kdecs evaluate` gives them),
    their 95% bootstrap intervals, and how far they are above the rule "j >= i-1".
    """

    id: str
    label: str
    seed: int
    opened_at: str
    scores: dict[str, Any] | None = None
    intervals: dict[str, tuple[float, float]] = {}
    above_rule: dict[str, Distance] = {}


class SelectionRecord(_Record):
    """What `selection.json` holds. Keys that are not decided yet are left out or null.

    `settings` are ranked. `picked` names the run or setting that a person picked in MLflow; it is null if the winner is
    the best seed of the first setting. `runner_up` compares the winner's setting with the best other one, and is null
    if there is only one.
    `test_opened_at` (UTC) is written before the test split is read for the first time. `test` holds the winner's scores
    as `kdecs evaluate` gives them; `test_intervals` their 95% bootstrap intervals over dialogues; `test_baselines` the
    trivial rules' scores; `test_above_rule` says how far each score is above the rule "j >= i-1", with a 95% interval
    paired over dialogues. `table` holds the chosen seed of every setting on test, if a table was asked for.
    `registered` is the version and alias in MLflow's registry, null until MLflow has answered.
    """

    sweep: str
    metric: str
    universe: str
    protocol: str
    settings: list[SettingScore]
    winner: Winner
    picked: str | None = None
    runner_up: SettingComparison | None = None
    variants: list[VariantComparison] = []
    test_opened_at: str | None
    test: dict[str, Any] | None
    test_intervals: dict[str, tuple[float, float]] = {}
    test_baselines: dict[str, dict[str, float]] = {}
    test_above_rule: dict[str, Distance] = {}
    table: list[SettingOnTest] = []
    registered: str | None

    @model_validator(mode="after")
    def _is_whole(self) -> "SelectionRecord":
        """What selection and report show of a test that was opened must be there."""
        if self.test is not None:
            if self.test_opened_at is None:
                raise ValueError("test: scores, but test_opened_at is null")
            numbers = [
                self.metric,
                "exact_match",
                "utterance_macro_f1",
                "num_positive",
                "num_negative",
                "missing",
            ]
            missing = [key for key in numbers if not isinstance(self.test.get(key), float | int)]
            if missing:
                raise ValueError(f"test.{missing[0]}: expected a number")
            if not any(self.metric in scores for scores in self.test_baselines.values()):
                raise ValueError(f"test_baselines: no {self.metric}")
        if self.runner_up is not None and self.metric not in self.runner_up.tests:
            raise ValueError(f"runner_up.tests: no {self.metric}")
        return self

    @property
    def setting(self) -> SettingScore:
        """The winner's setting. Raises ArtifactError if the record names none, since somebody has changed it."""
        found = next((setting for setting in self.settings if self.winner.id in setting.trials), None)
        if found is None:
            raise ArtifactError(
                f"{SELECTION_NAME}: its winner {self.winner.id!r} is in none of its settings; {_REMEDY}"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values of the keys that are decided."""
        # Left out and null are different: without the key `runner_up` nothing was compared yet, null says that there is
        # no second setting. `select_student` goes by that.
        return self.model_dump(mode="json", exclude_unset=True)


def read_selection(sweep: Path) -> SelectionRecord | None:
    """The selection with its test result, or None if there is none yet or it is of another state of the sweep."""
    record = load_selection(sweep)
    return record if record and record.test and not is_selection_outdated(sweep) else None


def is_selection_outdated(sweep: Path) -> bool:
    """Whether there is a selection of another state of the sweep."""
    record = load_selection(sweep)
    return record is not None and record.sweep != read_manifest(sweep, "sweep").config_hash


def load_selection(sweep: Path) -> SelectionRecord | None:
    """The record as it is on disk, None if there is none. Raises ArtifactError for a damaged one."""
    path = sweep / SELECTION_NAME
    if not path.is_file():
        return None
    return read_record(SelectionRecord, path, f"this is no selection; {_REMEDY}")
