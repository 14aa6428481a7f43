"""From a search space to its trials: one student config each, named by its hash and by what people read.

A trial's id is the first 12 hex digits of its student's config hash, so the same settings are the same
trial in every sweep, on every machine, and are trained once.
"""

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdecs.artifact import read_manifest
from kdecs.config import config_hash, parse_config, set_dotted
from kdecs.errors import ConfigError
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig

TEACHER_KEY = "teacher"
SEED_KEY = "optimization.seed"
ALPHA_KEY = "distillation.alpha"
TEMPERATURE_KEY = "distillation.temperature"
_LABELS_KEY = "distillation.labels"
_TRIAL_ID_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Trial:
    """One student of a sweep. `settings` are its values in the space without the seed: what is compared."""

    id: str
    label: str
    config: StudentConfig
    config_hash: str
    teacher: str | None
    settings: dict[str, Any]
    seed: int

    @property
    def directory(self) -> Path:
        """Where the trial writes: its student, log, metrics and status."""
        return self.config.output


def trials_directory(sweep: Path) -> Path:
    """The folder of a sweep that holds one directory a trial."""
    return sweep / "trials"


def enumerate_trials(config: SweepConfig) -> list[Trial]:
    """Every trial of a sweep's grid, in the grid's order, equal settings once.

    Raises ConfigError (unknown teacher or key, value out of range) and ArtifactError (labels unfinished).
    """
    _check_teachers(config)
    trials: dict[str, Trial] = {}
    for overrides in _grid(config):
        trial = _trial(config, overrides)
        trials.setdefault(trial.id, trial)
    return list(trials.values())


def sweep_hash(trials: list[Trial]) -> str:
    """Hex sha256 that stands for a sweep's work: the set of its trials' config hashes."""
    return hashlib.sha256("\n".join(sorted(trial.config_hash for trial in trials)).encode()).hexdigest()


def with_absolute_paths(config: SweepConfig, trials: list[Trial]) -> SweepConfig:
    """The config with the student's paths as its trials resolved them, to be read from any directory."""
    resolved = trials[0].config.model_dump(mode="json")
    return config.model_copy(update={"student": _resolved(config.student, resolved)})


def _resolved(values: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        other = by.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found[key] = _resolved(value, other)
        else:
            is_path = isinstance(value, str) and isinstance(other, str) and Path(other).is_absolute()
            found[key] = other if is_path else value
    return found


def _check_teachers(config: SweepConfig) -> None:
    tried = config.space[TEACHER_KEY].grid if TEACHER_KEY in config.space else ()
    for name in tried:
        if name not in config.teachers:
            known = ", ".join(config.teachers) or "none"
            raise ConfigError(f"space.teacher: found {name!r}, expected a key of teachers ({known})")
    if not tried and len(config.teachers) > 1:
        names = ", ".join(config.teachers)
        raise ConfigError(
            f"teachers: {len(config.teachers)} given ({names}) but space has no key teacher; "
            "add teacher: {grid: [...]} or keep one"
        )
    for name in tried or config.teachers:
        read_manifest(config.teachers[name], "soft-labels")


def _grid(config: SweepConfig) -> Iterator[dict[str, Any]]:
    keys = list(config.space)
    for values in itertools.product(*(config.space[key].grid for key in keys)):
        yield dict(zip(keys, values, strict=True))


def _trial(config: SweepConfig, overrides: dict[str, Any]) -> Trial:
    values = copy.deepcopy(config.student)
    for key, value in overrides.items():
        if key != TEACHER_KEY:
            set_dotted(values, key, value)
    distillation = values.setdefault("distillation", {})
    is_joint = isinstance(distillation, dict) and distillation.get("mode") == "joint"
    if is_joint and TEMPERATURE_KEY in overrides:  # it has none: one trial, not one a temperature
        overrides = {key: value for key, value in overrides.items() if key != TEMPERATURE_KEY}
        del distillation["temperature"]
    teacher = None
    if not is_joint and config.teachers:
        teacher = str(overrides.get(TEACHER_KEY, next(iter(config.teachers))))
        set_dotted(values, _LABELS_KEY, str(config.teachers[teacher]))
    values.setdefault("cache", str(config.output / "cache"))
    values.setdefault("threads", max(1, math.floor(config.cpus_per_trial)))
    values["output"] = str(trials_directory(config.output) / "unnamed")
    student = parse_config(StudentConfig, values, source=f"student of sweep {config.name}")
    digest = config_hash(student)
    settings = {key: value for key, value in overrides.items() if key not in (SEED_KEY, TEACHER_KEY)}
    label = _label(student, teacher, settings)
    identity = digest[:_TRIAL_ID_DIGITS]
    update = {"output": trials_directory(config.output) / identity, "name": _ascii_name(label)}
    return Trial(
        id=identity,
        label=label,
        config=student.model_copy(update=update),
        config_hash=digest,
        teacher=teacher,
        settings={TEACHER_KEY: teacher, **settings},
        seed=student.optimization.seed,
    )


def settings_key(settings: dict[str, Any]) -> str:
    """A text that is equal for equal settings, whatever the order of their keys."""
    return json.dumps(settings, sort_keys=True)


def _label(student: StudentConfig, teacher: str | None, settings: dict[str, Any]) -> str:
    """Such as `llama-tiny α0.6 τ2 s3`; a joint student has neither teacher nor τ."""
    distillation = student.distillation
    parts = [teacher or distillation.mode, f"α{distillation.alpha:g}"]
    if distillation.mode == "kd":
        parts.append(f"τ{distillation.temperature:g}")
    for key, value in settings.items():
        if key not in (ALPHA_KEY, TEMPERATURE_KEY, "distillation.mode"):
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return " ".join([*parts, f"s{student.optimization.seed}"])


def _ascii_name(label: str) -> str:
    text = label.replace("α", "a").replace("τ", "t").replace(" ", "-")
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("-._")
