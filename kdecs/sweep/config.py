"""The config of a sweep: base student, search space, resources (`tune/sweep.py`)."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, field_validator

from kdecs.config import Config, InputPath, Name, OutputPath, Unhashed
from kdecs.run_record import TrackingConfig


class Choices(Config):
    """A grid dimension of a search space: every value is tried."""

    grid: tuple[Any, ...] = Field(min_length=1)


class SweepConfig(Config):
    """`tune/sweep.py SPACE.yaml`: a grid of students over seeds, alpha, temperature and teacher.

    `student` holds the student's config without output and labels; `space` maps dotted keys of it, or
    the word `teacher` (a key of `teachers`), to the values tried.
    """

    name: Name
    output: OutputPath
    teachers: dict[str, InputPath] = Field(default_factory=dict, description="name -> soft-label directory")
    student: dict[str, Any] = Field(
        description="the student's config; cache defaults to <output>/cache, threads to cpus_per_trial"
    )
    space: dict[str, Choices] = Field(min_length=1)
    max_concurrent_trials: Annotated[int, Unhashed()] = Field(default=2, ge=1)
    cpus_per_trial: Annotated[float, Unhashed()] = Field(default=1, gt=0)
    gpus_per_trial: Annotated[float, Unhashed()] = Field(default=0, ge=0)
    max_failures: Annotated[int, Unhashed()] = Field(default=2, ge=0, description="restarts of a dying trial")
    ray_address: Annotated[str | None, Unhashed()] = Field(default=None, description="null: a local Ray")
    tracking: Annotated[TrackingConfig, Unhashed()] = TrackingConfig()

    @field_validator("space", mode="before")
    @classmethod
    def _dotted_keys(cls, space: Any) -> Any:
        """Nested keys become dotted ones, the later value winning: `--set space.optimization.seed.grid=[0]`."""
        return dict(_leaves(space, "")) if isinstance(space, dict) else space


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and not value.keys() & Choices.model_fields.keys():
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
