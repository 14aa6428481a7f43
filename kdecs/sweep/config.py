"""The config of a sweep (`kdecs.launch.sweep`): base student, search space, search, teachers, resources."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from kdecs.baselines.config import AnyBaseline, BaselineConfig, MrcConfig, baseline_type
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.config import (
    Config,
    HashedUnlessDefault,
    InputPath,
    KeysOf,
    Name,
    OutputPath,
    Seed,
    Unhashed,
    find_config,
    load_config,
    read_yaml,
)
from kdecs.student.config import StudentConfig
from kdecs.tracking.record import TrackingConfig

BASELINES_NAME = "baselines.json"
REPORT_FOLDER = "report"
TrialConfig = StudentConfig | AnyBaseline | GenerativeConfig
"""What a trial trains. Each of them says what the sweep asks of all: `kind`, the artifact that a trial's directory
becomes, `task`, `is_given_emotions`, `candidates_after`, `threads`, `batches.size`, and of `optimization` the seed, the
rate and the budget."""
TrialKind = Literal["student", "baseline", "mrc", "generative"]
TRIAL_KINDS: tuple[TrialKind, ...] = ("student", "baseline", "mrc", "generative")
MAX_POINTS = 100_000
"""Of a search space. Each is a config in memory, so that a few long grids of a stranger's file could fill it."""


class Dimension(Config):
    """One key of a search space, with exactly one way to get its values.

    `grid`: every value is tried, crossed with all other grids. Values of `choice`, `uniform` and `loguniform` (low,
    high) are drawn, `search.num_samples` times, and each draw is crossed with the grids; or TPE suggests them.
    """

    grid: tuple[Any, ...] | None = Field(default=None, min_length=1)
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Dimension":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"expected exactly one of grid, choice, uniform, loguniform, found {found}")
        for name in ("uniform", "loguniform"):
            bounds = getattr(self, name)
            if bounds and bounds[0] >= bounds[1]:
                raise ValueError(f"{name}: found [{bounds[0]:g}, {bounds[1]:g}], expected low < high")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform: found the bound {self.loguniform[0]:g}, expected two above 0")
        return self

    @property
    def kind(self) -> str:
        """grid, choice, uniform or loguniform."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a grid or choice, the bounds of a range."""
        return tuple(getattr(self, self.kind))

    @property
    def is_drawn(self) -> bool:
        """Whether values are drawn or suggested, not enumerated."""
        return self.grid is None


class GridSearch(Config):
    """Every point of the grids, for each of `num_samples` draws of the other keys."""

    method: Literal["grid"] = "grid"
    num_samples: int = Field(
        default=1, ge=1, le=MAX_POINTS, description="draws of choice, uniform and loguniform keys"
    )
    sample_seed: Seed = 0


class _Staged(Config):
    """What both searches in two stages share. The second stage trains every seed of the survivors."""

    survivors: int = Field(default=3, ge=1, description="settings that get all seeds")
    search_seed: Seed | None = Field(
        default=None, description="seed of the first stage; null: the first of the seeds' grid"
    )
    reduction_factor: float = Field(default=3.0, gt=1, description="ASHA keeps 1 in so many at each rung")


class TwoStageSearch(_Staged):
    """ASHA over all settings with one seed, then every seed of the survivors."""

    method: Literal["two-stage"]
    num_samples: int = Field(default=1, ge=1, le=MAX_POINTS)
    sample_seed: Seed = 0
    grace_epochs: int = Field(default=1, ge=1, description="no trial is stopped before")


class TpeSearch(_Staged):
    """Optuna's tree-structured Parzen estimator with one seed, then every seed of the survivors."""

    method: Literal["tpe"]
    num_trials: int = Field(default=30, ge=1, le=MAX_POINTS)
    startup_trials: int = Field(default=10, ge=1, description="drawn at random before the estimator begins")
    sample_seed: Seed = 0
    grace_epochs: int | None = Field(default=None, ge=1, description="null: no trial is stopped early")


SearchConfig = Annotated[GridSearch | TwoStageSearch | TpeSearch, Field(discriminator="method")]


class StageCommand(Config):
    """A stage that `--build` runs: its config (a file or a committed name), and the keys that are set over it."""

    config: InputPath
    set: dict[str, Any] = Field(default_factory=dict, description="dotted key -> value")


class ControlSource(Config):
    """Labels that no model made, as `kdecs soft-labels control` writes them."""

    kind: Literal["oracle", "rule", "random"]
    smoothing: float = Field(default=0.1, description="probability left for the other decision")
    wrong_share: float = Field(default=0.0, description="share of pairs that the oracle gets wrong")
    seed: int = 0


class TeacherSource(Config):
    """A teacher's soft labels, and how `--build` makes them if they are missing."""

    labels: InputPath
    train: StageCommand | None = Field(default=None, description="kdecs.launch.train_teacher")
    export: StageCommand | None = Field(default=None, description="kdecs.launch.export_soft_labels")
    control: Annotated[ControlSource | None, HashedUnlessDefault()] = Field(
        default=None, description="labels without a teacher, in the place of train and export"
    )

    @model_validator(mode="after")
    def _has_one_origin(self) -> "TeacherSource":
        if self.control is not None and (self.train is not None or self.export is not None):
            raise ValueError("control: found beside train or export; labels come from one of them")
        return self

    @field_validator("train", "export", mode="before")
    @classmethod
    def _find_committed(cls, value: Any, info: ValidationInfo) -> Any:
        # Before validation, which would make a path of a name such as `llama-7b`.
        if not isinstance(value, dict) or not isinstance(value.get("config"), str):
            return value
        stage = "teacher" if info.field_name == "train" else "export"
        return {**value, "config": find_config(stage, value["config"])}


class SweepConfig(Config):
    """A sweep of students over seeds, alpha, temperature, teacher and any other keys of a student's config.

    `student` holds the student's config without output and labels. `space` maps dotted keys of it, or the words
    `teacher` (a key of `teachers`) and `variant` (a key of `variants`), to the values to try.
    """

    name: Name
    output: OutputPath
    teachers: dict[str, TeacherSource] = Field(
        default_factory=dict,
        description="name -> soft-label directory, or {labels, train, export}, or {labels, control}",
    )
    student: Annotated[dict[str, Any], KeysOf(StudentConfig)] = Field(
        description="the student's config; cache defaults to <output>/cache, threads to cpus_per_trial"
    )
    variants: dict[str, Annotated[dict[str, Any], KeysOf(StudentConfig)]] = Field(
        default_factory=dict, description="name -> dotted keys of the student's config set together"
    )
    baselines: Annotated[
        dict[
            str,
            Annotated[dict[str, Any], KeysOf(BaselineConfig), KeysOf(MrcConfig), KeysOf(GenerativeConfig)],
        ],
        HashedUnlessDefault(),
    ] = Field(
        default_factory=dict,
        description="name -> keys of a baseline's config; as a value of the space's `variant` it is trained instead of "
        "a student, with the student's corpus, base, task and decisions unless it sets its own",
    )
    space: dict[str, Dimension] = Field(min_length=1)
    constraints: tuple[Annotated[str, StringConstraints(max_length=1000)], ...] = Field(
        default=(),
        max_length=100,
        description="such as `distillation.alpha < 0.9 or teacher == 'llama-7b'`: all must hold",
    )
    search: SearchConfig = GridSearch()
    store: OutputPath | None = Field(
        default=None, description="finished students by hash; null: <output>/../students"
    )
    reuse_students: Annotated[bool, Unhashed()] = Field(
        default=True, description="false: train again what another sweep has finished"
    )
    max_concurrent_trials: Annotated[int | None, Unhashed()] = Field(
        default=None, ge=1, description="null: as many as the resources hold"
    )
    cpus_per_trial: Annotated[float, Unhashed()] = Field(default=1, gt=0, le=4096)
    gpus_per_trial: Annotated[float, Unhashed()] = Field(default=0, ge=0, le=4096)
    max_failures: Annotated[int, Unhashed()] = Field(
        default=2, ge=0, description="restarts in a row of a trial that dies without finishing an epoch"
    )
    ray_address: Annotated[str | None, Unhashed()] = Field(default=None, description="null: a local Ray")
    build_launcher: Annotated[tuple[str, ...], Unhashed()] = Field(
        default=("python",),
        description="the command that starts each stage of --build: [deepspeed] with GPUs",
    )
    effective_tflops: Annotated[float | None, Unhashed()] = Field(
        default=None, gt=0, description="of a trial's device, for the first estimate of hours"
    )
    report: Annotated[bool, Unhashed()] = Field(default=True, description="write the report at the end")
    tracking: Annotated[TrackingConfig, Unhashed()] = TrackingConfig()

    @property
    def student_store(self) -> Path:
        """Where finished students are found by their hash."""
        return self.store or self.output.parent / "students"

    @field_validator("space", mode="before")
    @classmethod
    def _dotted_keys(cls, space: Any) -> Any:
        """Make nested keys dotted, so that `--set space.optimization.seed.grid=[0]` works. The later value wins."""
        return dict(_leaves(space, "")) if isinstance(space, dict) else space

    @field_validator("teachers", mode="before")
    @classmethod
    def _teachers_by_path(cls, teachers: Any) -> Any:
        """A teacher may be given by the path of its labels alone."""
        if not isinstance(teachers, dict):
            return teachers
        return {
            name: {"labels": value} if isinstance(value, str | Path) else value
            for name, value in teachers.items()
        }

    @model_validator(mode="after")
    def _names_are_clear(self) -> "SweepConfig":
        if both := sorted(self.variants.keys() & self.baselines.keys()):
            raise ValueError(f"baselines.{both[0]}: variants has this name, too; rename one of them")
        return self

    @model_validator(mode="after")
    def _method_fits_space(self) -> "SweepConfig":
        # TPE's draws are its trials: it has `num_trials` and no `num_samples`.
        if isinstance(self.search, TpeSearch):
            return self
        if self.search.num_samples > 1 and not any(d.is_drawn for d in self.space.values()):
            # Every draw would give the same points, and equal points are one trial: the number would do nothing.
            raise ValueError("search.num_samples: every key of space is a grid, so there is nothing to draw")
        return self


def load_trial_config(path: Path) -> TrialConfig:
    """The config of a trial, of a student or of a baseline. Raises ConfigError."""
    values = read_yaml(path)
    # Only a baseline's has this key, and in a sweep it must have it.
    if "system" in values:
        return load_config(trial_type(values), path)
    return load_config(StudentConfig, path)


def trial_type(values: Mapping[str, Any]) -> type[AnyBaseline | GenerativeConfig]:
    """The type of the config of a baseline in a sweep that has these values, by their `system`."""
    return GenerativeConfig if values.get("system") == GenerativeConfig.kind else baseline_type(values)


def num_epochs(config: TrialConfig) -> int:
    """The epochs of a whole trial. Each ends with a validation, also where that is amid a pass over the data."""
    return config.num_validations if isinstance(config, GenerativeConfig) else config.optimization.num_epochs


def flat_keys(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested or dotted keys."""
    for key, value in values.items():
        # An empty mapping has no keys below it. To go into it would lose its own key, so it is a value.
        if isinstance(value, dict) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        # A mapping with a key of Dimension says how to try a value; any other one is a group of the student's keys.
        if isinstance(value, dict) and value and not value.keys() & Dimension.model_fields.keys():
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
