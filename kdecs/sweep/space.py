"""From a search space to its trials: configs of students and baselines, named by their hash and by what people read.

A trial's id is the first 12 hex digits of its student's config hash, so the same settings are the same trial in every
sweep, on every machine, and are trained once.

The driver makes a Space once and hands its trials on; the end of the module holds the constraints' little language.
"""

import ast
import contextlib
import copy
import hashlib
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdecs.artifact import MANIFEST_NAME, read_manifest
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.config import config_hash, has_key, parse_config, set_dotted
from kdecs.errors import ConfigError, printable
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import (
    MAX_POINTS,
    Dimension,
    GridSearch,
    SweepConfig,
    TrialConfig,
    TwoStageSearch,
    flat_keys,
    trial_type,
)

TEACHER_KEY = "teacher"
VARIANT_KEY = "variant"
SEED_KEY = "optimization.seed"
ALPHA_KEY = "distillation.alpha"
TEMPERATURE_KEY = "distillation.temperature"
SHARE_KEY = "distillation.hard_share"
MODE_KEY = "distillation.mode"
STEPS_KEY = "optimization.steps"
_LABELS_KEY, _TEACHERS_KEY = "distillation.labels", "distillation.teachers"
_TRIAL_ID_DIGITS = 12
_DIGITS = 4  # of drawn numbers: enough to search, short enough to read

# What a baseline takes from the students' config, so that both are compared on the same terms, and its own name for it.
_SHARED_KEYS = {
    key: key
    for key in ("corpus", "model.base", "task", "neutral_decision", "threshold_for", "precision", "threads")
}
# Its base is a decoder, and a student's an encoder.
_SHARED_WITH_GENERATIVE = {"corpus": "corpus", "precision": "zero.dtype", "threads": "threads_per_rank"}

Point = dict[str, Any]
"""A value for each key of the space: dotted keys of the student's config, and the words teacher and variant."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One student of a sweep, or a baseline beside it.

    `settings` are its values in the space without the seed: they are what is compared.

    `config_hash` is empty if labels are missing, so that nothing can be trained yet.
    """

    id: str
    label: str
    config: TrialConfig
    config_hash: str
    teacher: str | None
    settings: dict[str, Any]
    seed: int

    @property
    def setting_label(self) -> str:
        """The label without the seed."""
        return self.label.rpartition(" s")[0]

    @property
    def directory(self) -> Path:
        """Where the trial writes its student, log, metrics and notes."""
        return self.config.output


class Space:
    """The trials of a sweep's config. `planned`: labels may be missing; their trials have no hash yet.

    Raises ConfigError for an unknown teacher or variant, ArtifactError for unfinished labels unless `planned`.
    """

    def __init__(self, config: SweepConfig, *, planned: bool = False) -> None:
        self.config = config
        self.teachers = _tried_teachers(config)
        for key in (TEACHER_KEY, VARIANT_KEY):
            for name in config.space[key].values if key in config.space else ():
                self.check_names({key: name}, "space.")
        if TEACHER_KEY not in config.space and len(config.teachers) > 1:
            names = ", ".join(config.teachers)
            raise ConfigError(
                f"teachers: {len(config.teachers)} given ({names}) but space has no key teacher; "
                "add teacher: {grid: [...]} or keep one"
            )
        missing = missing_teachers(config) if planned else []
        for name in self.teachers:
            if name not in missing:
                read_manifest(config.teachers[name].labels, "soft-labels")

    def check_names(self, point: Point, prefix: str = "") -> None:
        """Raise ConfigError if a point names a teacher or variant that the config does not have."""
        variants = {**self.config.variants, **self.config.baselines}
        for key, known in ((TEACHER_KEY, self.config.teachers), (VARIANT_KEY, variants)):
            if key in point and not all(part in known for part in _members(point[key], known)):
                names = ", ".join(known) or "none"
                raise ConfigError(f"{prefix}{key}: found {point[key]!r}, expected a key of {key}s ({names})")

    def teachers_at(self, point: Point) -> list[str]:
        """Names of the teachers that a point names itself."""
        return _members(point[TEACHER_KEY], self.config.teachers) if TEACHER_KEY in point else []

    def trials(self) -> list[Trial]:
        """Every trial of the grids and draws, in the grid's order, equal settings once."""
        return self.trials_at(self.points())

    def points(self) -> list[Point]:
        """The grids' product for each draw of the other keys; seeds share a draw, so that they can be compared."""
        space = self.config.space
        grids = {key: dimension.values for key, dimension in space.items() if not dimension.is_drawn}
        # Counted before any is made: the product of a few long grids would fill the memory before it could be refused.
        num_points = math.prod(len(values) for values in grids.values())
        if any(dimension.is_drawn for dimension in space.values()):
            num_points *= getattr(self.config.search, "num_samples", 1)
        if num_points > MAX_POINTS:
            raise ConfigError(
                f"space: its grids and draws have {num_points:,} points, expected at most {MAX_POINTS:,}; shorten a "
                "grid, or let the search method tpe suggest points"
            )
        found = []
        for draw in self._draws():
            for values in itertools.product(*grids.values()):
                point = {**draw, **dict(zip(grids, values, strict=True))}
                # In the config's order, because a trial's label lists its keys in the order of the point.
                found.append({key: point[key] for key in space})
        return found

    def seeds(self) -> tuple[int, ...]:
        """The seeds that a setting is trained with. Raises ConfigError if they are drawn."""
        dimension = self.config.space.get(SEED_KEY)
        if dimension is None:
            return (int(student_value(self.config, SEED_KEY)),)
        if dimension.is_drawn:
            raise ConfigError(f"space.{SEED_KEY}: found {dimension.kind}, expected a grid of seeds")
        return dimension.values

    def trials_at(self, points: Sequence[Point]) -> list[Trial]:
        """The trials at these points, equal settings once, without those that a constraint refuses.

        Where two settings would have the same label, digits of their hash are added. Raises ConfigError for a value out
        of range, an unknown key, or constraints that leave nothing.
        """
        trials: dict[str, Trial] = {}
        for point in points:
            if trial := self.trial_at(point):
                trials.setdefault(trial.id, trial)
        if not trials:
            raise ConfigError("constraints: they leave no trial of the space; loosen one of them")
        # A label names a key by its last part and shows six digits of a number, so different settings may share one.
        settings_of: dict[str, set[str]] = {}
        for trial in trials.values():
            settings_of.setdefault(trial.setting_label, set()).add(settings_key(trial.settings))
        found = []
        for trial in trials.values():
            if len(settings_of[trial.setting_label]) > 1:
                digits = hashlib.sha256(settings_key(trial.settings).encode()).hexdigest()[:4]
                label = f"{trial.setting_label} #{digits} s{trial.seed}"
                config = trial.config.model_copy(update={"name": _ascii_name(label)})
                trial = replace(trial, label=label, config=config)
            found.append(trial)
        return found

    def trial_at(self, point: Point) -> Trial | None:
        """The trial at a point, None if a constraint refuses it.

        What a variant sets is not varied for it. A student that is not distilled has neither teacher nor temperature.
        """
        config = self.config
        if point.get(VARIANT_KEY) in config.baselines:
            return self._baseline_at(point)
        values = copy.deepcopy(config.student)  # `set_dotted` changes nested groups in place
        variant = config.variants.get(str(point.get(VARIANT_KEY)), {})
        set_by_variant = {name for name, _ in flat_keys(variant)}
        settings = {key: value for key, value in point.items() if key not in set_by_variant}
        for key, value in {**settings, **variant}.items():
            if key not in (TEACHER_KEY, VARIANT_KEY):
                set_dotted(values, key, value, StudentConfig)
        distillation = values.setdefault("distillation", {})
        is_distilled = not isinstance(distillation, dict) or distillation.get("mode", "kd") == "kd"
        teacher = None
        if not is_distilled:
            # Without them, points that differ in nothing else are one trial with one hash.
            settings.pop(TEMPERATURE_KEY, None)
            settings.pop(TEACHER_KEY, None)
            distillation.pop("temperature", None)
        elif config.teachers:
            teacher = str(settings.get(TEACHER_KEY, next(iter(config.teachers))))
            labels = [str(config.teachers[name].labels) for name in _members(teacher, config.teachers)]
            if len(labels) == 1:
                set_dotted(values, _LABELS_KEY, labels[0])
            else:
                set_dotted(values, _TEACHERS_KEY, [{"labels": path} for path in labels])
        # All trials of a sweep share one tokenised corpus.
        values.setdefault("cache", str(config.output / "cache"))
        values.setdefault("threads", max(1, math.floor(config.cpus_per_trial)))
        # The directory is named by the config's hash, which does not depend on it.
        values["output"] = str(trials_directory(config.output) / "unnamed")
        words = {TEACHER_KEY: teacher, VARIANT_KEY: settings.get(VARIANT_KEY)}
        try:
            student = parse_config(StudentConfig, values, source=f"student of sweep {config.name}")
        except ConfigError:
            # What a constraint keeps out need not be a valid config.
            if self._is_refused({**values, **words}):
                return None
            raise
        if student.tracking is not None:
            raise ConfigError(
                f"student.tracking of sweep {config.name}: trials write their metrics to files, and the sweep uploads "
                "them; set the sweep's own tracking instead"
            )
        # The config gives every student a temperature; a constraint must see that this one does not use it.
        resolved = student.model_dump(mode="json")
        if student.distillation.mode != "kd":
            resolved["distillation"]["temperature"] = None
        if not all(holds(text, {**resolved, **words}) for text in config.constraints):
            return None
        settings.pop(TEACHER_KEY, None)
        # Settings are what is compared and what a search's second stage starts from. So the teacher is always among
        # them, and the seed never is: trials that differ in the seed alone belong to one setting.
        settings.pop(SEED_KEY, None)
        return self._named_trial(student, teacher, {TEACHER_KEY: teacher, **settings})

    def _baseline_at(self, point: Point) -> Trial | None:
        """The trial of a baseline, None if a constraint refuses it.

        Keys of the space that its config does not have, such as the teacher and α, do not vary it.
        """
        config, name = self.config, str(point[VARIANT_KEY])
        own = config.baselines[name]
        kind = trial_type(own)
        set_by_baseline = {key for key, _ in flat_keys(own)}
        settings = {
            key: value for key, value in point.items() if key not in set_by_baseline and has_key(kind, key)
        }
        values: dict[str, Any] = {"name": "unnamed"}
        is_generative = kind is GenerativeConfig
        if is_generative:
            # A trial is ranked by the answers, and the family has no other choice.
            values |= {"answered_share": 1.0, "model": {"family": "causal"}}
        shared_keys = _SHARED_WITH_GENERATIVE if is_generative else _SHARED_KEYS
        for key, name_there in shared_keys.items():
            if has_key(kind, name_there) and (shared := _lookup(key, config.student)) is not None:
                set_dotted(values, name_there, copy.deepcopy(shared), kind)
        for key, value in {**settings, **own}.items():
            set_dotted(values, key, copy.deepcopy(value), kind)
        threads = "threads_per_rank" if is_generative else "threads"
        values.setdefault(threads, max(1, math.floor(config.cpus_per_trial)))
        values["output"] = str(trials_directory(config.output) / "unnamed")
        words = {TEACHER_KEY: None, VARIANT_KEY: name}
        baseline = parse_config(kind, values, source=f"baselines.{name} of sweep {config.name}")
        task = config.student.get("task", StudentConfig.model_fields["task"].default)
        if baseline.task != task:
            # One is ranked by spans and the other by utterances: their scores say nothing about each other.
            raise ConfigError(
                f"baselines.{name} of sweep {config.name}: its task is {baseline.task} and that of the students is "
                f"{task}; compare them in a sweep of one task (student.task={baseline.task})"
            )
        if isinstance(baseline, GenerativeConfig) and baseline.answered_share != 1:
            raise ConfigError(
                f"baselines.{name}.answered_share of sweep {config.name}: found {baseline.answered_share:g}, expected "
                "1, because trials are ranked by their scores on the whole validation split; leave the key out"
            )
        if baseline.tracking is not None:
            raise ConfigError(
                f"baselines.{name}.tracking of sweep {config.name}: trials write their metrics to files, and the sweep "
                "uploads them; set the sweep's own tracking instead"
            )
        if not all(holds(text, {**baseline.model_dump(mode="json"), **words}) for text in config.constraints):
            return None
        shown = {key: value for key, value in settings.items() if key != SEED_KEY}
        # Nobody should take its scores for those of a student that has to predict the emotions.
        given = ["(gold emotions)"] if baseline.is_given_emotions else []
        parts = [name, *given, *(f"{key.rpartition('.')[2]}={_shown(value)}" for key, value in shown.items())]
        label = printable(" ".join([*parts, f"s{baseline.optimization.seed}"]))
        digest = config_hash(baseline)
        identity = digest[:_TRIAL_ID_DIGITS]
        update = {"output": trials_directory(config.output) / identity, "name": _ascii_name(label)}
        return Trial(
            id=identity,
            label=label,
            config=baseline.model_copy(update=update),
            config_hash=digest,
            teacher=None,
            settings={TEACHER_KEY: None, VARIANT_KEY: name, **shown},
            seed=baseline.optimization.seed,
        )

    def _is_refused(self, values: Mapping[str, Any]) -> bool:
        """Whether a constraint refuses plain values. A constraint that they do not fit refuses nothing."""
        for text in self.config.constraints:
            with contextlib.suppress(ConfigError):
                if not holds(text, values):
                    return True
        return False

    def _named_trial(self, student: StudentConfig, teacher: str | None, settings: dict[str, Any]) -> Trial:
        label = _label(student, teacher, settings)
        if any(not (item.labels / MANIFEST_NAME).is_file() for item in student.distillation.used_teachers):
            # A hash needs the labels' content. In a dry run an id only has to tell trials apart.
            named = f"{label} {settings_key(settings)}"
            digest, identity = "", "planned-" + hashlib.sha256(named.encode()).hexdigest()[:_TRIAL_ID_DIGITS]
        else:
            digest = config_hash(student)
            identity = digest[:_TRIAL_ID_DIGITS]
        # Neither output nor name is part of the hash, so the hash can name the directory that its own config holds.
        update = {"output": trials_directory(self.config.output) / identity, "name": _ascii_name(label)}
        return Trial(
            id=identity,
            label=label,
            config=student.model_copy(update=update),
            config_hash=digest,
            teacher=teacher,
            settings=settings,
            seed=student.optimization.seed,
        )

    def _draws(self) -> Iterator[Point]:
        drawn = {key: dimension for key, dimension in self.config.space.items() if dimension.is_drawn}
        search = self.config.search
        if not drawn or not isinstance(search, GridSearch | TwoStageSearch):
            yield {}
            return
        # One generator for all draws, in the order of the keys, so that each start of the sweep makes the same points.
        generator = np.random.default_rng(search.sample_seed)
        for _ in range(search.num_samples):
            yield {key: drawn_value(dimension, generator) for key, dimension in drawn.items()}


def student_value(config: SweepConfig, key: str) -> Any:
    """What every student of a sweep has for a dotted key, unless the space or a variant sets it.

    For keys of groups that have a default.
    """
    if (found := _lookup(key, config.student)) is not None:
        return found
    group, name = key.split(".")
    return getattr(StudentConfig.model_fields[group].default, name)


def trials_directory(sweep: Path) -> Path:
    """The folder of a sweep that holds one directory per trial."""
    return sweep / "trials"


def missing_teachers(config: SweepConfig) -> list[str]:
    """Names of the teachers that the space needs and whose labels are not finished."""
    return [
        name
        for name in _tried_teachers(config)
        if not (config.teachers[name].labels / MANIFEST_NAME).is_file()
    ]


def _tried_teachers(config: SweepConfig) -> tuple[str, ...]:
    """Names of the teachers that the space needs, once each; others that the config knows are not looked at."""
    tried = config.space[TEACHER_KEY].values if TEACHER_KEY in config.space else tuple(config.teachers)
    members = [part for name in tried for part in _members(name, config.teachers)]
    return tuple(dict.fromkeys(name for name in members if name in config.teachers))


def _members(name: Any, known: Container[str]) -> list[str]:
    """The teachers of a value such as `llama-7b+t5-large`, whose distributions a student mixes."""
    return [name] if name in known else str(name).split("+")


def drawn_value(dimension: Dimension, generator: np.random.Generator) -> Any:
    """One draw of a dimension. A number of a range keeps four digits."""
    # By index, since numpy's own `choice` makes an array of the values: a list among them would become a row of it,
    # and a number beside a text would become text.
    if dimension.kind in ("grid", "choice"):
        return dimension.values[int(generator.integers(len(dimension.values)))]
    low, high = dimension.values
    if dimension.kind == "loguniform":
        return readable(math.exp(generator.uniform(math.log(low), math.log(high))))
    return readable(generator.uniform(low, high))


def readable(value: float) -> float:
    """A number with as many digits as are worth reading."""
    return float(f"{value:.{_DIGITS}g}")


def sweep_hash(trials: list[Trial]) -> str:
    """Hex sha256 that stands for a sweep's work: the set of its trials' config hashes."""
    # Sorted, since the order in which a space lists its keys and values is no part of the work.
    return hashlib.sha256("\n".join(sorted(trial.config_hash for trial in trials)).encode()).hexdigest()


def with_absolute_paths(config: SweepConfig, trials: list[Trial]) -> SweepConfig:
    """The config with the paths of students and baselines as their trials resolved them.

    It can then be read from any directory.
    """
    by_variant = {str(trial.settings.get(VARIANT_KEY)): trial.config for trial in reversed(trials)}
    first = next((trial for trial in trials if isinstance(trial.config, StudentConfig)), trials[0])
    baselines = {
        name: {
            key: _resolved({key: value}, {key: _lookup(key, by_variant[name].model_dump(mode="json"))})[key]
            for key, value in flat_keys(own)
        }
        if name in by_variant
        else own
        for name, own in config.baselines.items()
    }
    student = _resolved(config.student, first.config.model_dump(mode="json"))
    return config.model_copy(update={"student": student, "baselines": baselines})


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


def settings_key(settings: dict[str, Any]) -> str:
    """A text that is equal for equal settings, whatever the order of their keys."""
    return json.dumps(settings, sort_keys=True)


def _label(student: StudentConfig, teacher: str | None, settings: dict[str, Any]) -> str:
    """Such as `llama-7b α0.6 τ2 s3`; a joint student has neither teacher nor τ."""
    distillation = student.distillation
    parts = [str(settings[VARIANT_KEY])] if VARIANT_KEY in settings else []
    if teacher:
        parts.append(teacher)
    elif not parts or MODE_KEY in settings:
        parts.append(distillation.mode)
    parts.append(f"α{distillation.alpha:g}")
    if distillation.mode == "kd":
        parts.append(f"τ{distillation.temperature:g}")
    for key, value in settings.items():
        is_shown = value is not None  # null is the usual case, such as a budget without steps
        if is_shown and key not in (ALPHA_KEY, TEMPERATURE_KEY, MODE_KEY, TEACHER_KEY, VARIANT_KEY):
            parts.append(f"{key.rpartition('.')[2]}={_shown(value)}")
    # Names and values come from a config, and this text goes to terminals, figures and MLflow.
    return printable(" ".join([*parts, f"s{student.optimization.seed}"]))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ascii_name(label: str) -> str:
    text = label.replace("α", "a").replace("τ", "t").replace(" ", "-")
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("-._")


# Powers and shifts are left out: a few characters of them, such as 9 ** 9 ** 9, would take all time and memory.
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    # For people `is` means equal: whether two equal strings are one object is an accident of Python's.
    ast.Is: lambda left, right: left is right if right is None else left == right,
    ast.IsNot: lambda left, right: left is not right if right is None else left != right,
    ast.In: lambda item, values: item in values,
    ast.NotIn: lambda item, values: item not in values,
}


def holds(constraint: str, values: Mapping[str, Any]) -> bool:
    """Whether a constraint holds for the nested config `values`, which have `teacher` and `variant` beside its keys.

    A constraint is a Python expression of dotted keys, values, arithmetic and comparisons. It is walked here, because a
    config must not run code. Jinja's sandbox would not do: it refuses `teacher is 't5-large'`, and its errors do not
    say which key is None.
    Raises ConfigError for an expression that does not parse or that the values do not fit.
    """
    try:
        parsed = ast.parse(constraint.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise ConfigError(f"constraints: {constraint!r} is not an expression") from None
    except (
        RecursionError,
        MemoryError,
    ):  # the second one is what Python's parser raises for too many brackets
        raise ConfigError("constraints: an expression is nested too deeply; write it shorter") from None
    try:
        return bool(_value(parsed, values))
    except RecursionError:
        raise ConfigError("constraints: an expression is nested too deeply; write it shorter") from None
    except (TypeError, ArithmeticError, ValueError) as error:
        missing = [key for key in _keys(parsed) if _lookup(key, values) is None]
        hint = f" ({', '.join(missing)}: None for this trial)" if missing else ""
        raise ConfigError(f"constraints: {constraint!r}: {error}{hint}") from None


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.List(items) | ast.Tuple(items):
            return [_value(item, values) for item in items]
        case ast.Name() | ast.Attribute() if key := _dotted(node):
            return _lookup(key, values)
        case ast.BoolOp(kind, parts):
            # As lazy as Python's own: in `distillation.mode != 'kd' or distillation.temperature < 4` the second part
            # must not be looked at for a student without a temperature, whose None has no order.
            found = (_value(part, values) for part in parts)
            return all(found) if isinstance(kind, ast.And) else any(found)
        case ast.UnaryOp(ast.Not(), operand):
            return not _value(operand, values)
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, values)
        case ast.BinOp(left, kind, right) if type(kind) in _OPERATORS:
            operands = _value(left, values), _value(right, values)
            # A text or a list times a number would be as long as the config's author wants.
            if not all(isinstance(operand, int | float) for operand in operands):
                raise TypeError(f"{ast.unparse(node)}: arithmetic needs numbers")
            return _OPERATORS[type(kind)](*operands)
        case ast.Compare(left, kinds, rights):
            sides = [_value(side, values) for side in (left, *rights)]  # `0 < a < 1` compares neighbours
            pairs = zip(kinds, sides, sides[1:], strict=False)
            return all(_OPERATORS[type(kind)](a, b) for kind, a, b in pairs)
    raise ValueError(
        f"{ast.unparse(node)} is not supported here; a constraint has keys, values, + - * / and comparisons"
    )


def _keys(node: ast.AST) -> list[str]:
    """The dotted keys of an expression, in order, once each."""
    if key := _dotted(node):
        return [key]
    return list(dict.fromkeys(key for child in ast.iter_child_nodes(node) for key in _keys(child)))


def _dotted(node: ast.AST) -> str | None:
    """The key that a node spells, such as `distillation.alpha`, or None if it is not a key."""
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(value, name) if parent := _dotted(value):
            return f"{parent}.{name}"
    return None


def _lookup(key: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found
