"""What the configs of all stages share: a YAML file, then `--set a.b=value`, resolved once and frozen. No torch.

Each stage defines its config in its folder's `config.py`; the committed ones are in `kdecs/configs/STAGE/NAME.yaml`.
Paths in a YAML file or in `--set` are relative to the current directory, and absolute once resolved.
The resolved config is written beside a stage's outputs as `config.json`, which its workers read.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from kdecs.artifact import content_checksum, write_text
from kdecs.errors import ArtifactError, ConfigError
from kdecs.strict_yaml import Unreadable, parse_yaml

CONFIG_NAME = "config.json"
_SHOWN_CHARACTERS = 200  # of a value in a message
_VALIDATIONS = 10  # of a training for steps, unless its config says how often
_MAX_FILE_BYTES = 1 << 20  # hundreds of times any real config
COMMITTED = Path(__file__).parent / "configs"  # STAGE/NAME.yaml, a part of the installed package


class Unhashed:
    """Marks a field that does not change what is computed: output place, threads, logging."""


class HashedUnlessDefault:
    """Marks a field that came later: at its default the hash is that of configs without it, so old work stays valid."""


class InsteadOf:
    """Marks a field that stands in the place of another: whoever gives the one leaves out the other."""

    def __init__(self, other: str) -> None:
        self.other = other


def _absolute(path: Path) -> Path:
    # Links are not resolved: config.json shows the path that the user wrote.
    return Path(_writable(os.path.abspath(os.path.expanduser(path))))


def _one_or_several(paths: tuple[Path, ...]) -> Path | tuple[Path, ...]:
    if repeated := next((path for path in paths if paths.count(path) > 1), None):
        raise ValueError(f"{repeated} is named twice")
    return paths[0] if len(paths) == 1 else paths


def _local_or_hub(reference: str) -> str:
    # `roberta-base` is a hub name unless a directory of that name is here. What is written as a path never is one, nor
    # what has more than one slash.
    expanded = os.path.expanduser(reference)
    is_path = reference.startswith(("/", "./", "../", "~")) or reference.count("/") > 1
    looks_local = is_path or os.path.exists(expanded)
    return _writable(os.path.abspath(expanded) if looks_local else reference)


def _writable(path: str) -> str:
    """The same path, which config.json must be able to hold: it is UTF-8, while a path may be any bytes."""
    if "\0" in path or any("\ud800" <= letter <= "\udfff" for letter in path):
        raise ValueError("the path is no UTF-8 text; rename the file or directory, or choose another one")
    return path


InputPath = Annotated[Path, AfterValidator(_absolute)]
"""A file or directory that is read: its content stands for it in the config hash."""

_FILE_TAG, _FILES_TAG = "[file]", "[files]"  # in brackets, which no key has: messages leave them out

InputFiles = Annotated[
    Annotated[InputPath, Tag(_FILE_TAG)]
    | Annotated[tuple[InputPath, ...], Field(min_length=1), AfterValidator(_one_or_several), Tag(_FILES_TAG)],
    Discriminator(lambda value: _FILES_TAG if isinstance(value, list | tuple) else _FILE_TAG),
]
"""One input file, or a list of several. A list of one is that file, so that both have one hash."""

OutputPath = Annotated[Path, AfterValidator(_absolute), Unhashed()]
"""A directory that is written: no part of the config hash."""

ModelReference = Annotated[str, AfterValidator(_local_or_hub)]
"""A local model directory (absolute path, its content hashed) or a hub name such as `roberta-base`."""


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), Unhashed()]
"""A run's name for people; no part of the config hash."""


class KeysOf:
    """Marks a mapping that holds keys of another config, nested or dotted, which that config checks later."""

    def __init__(self, model: "type[Config]") -> None:
        self.model = model


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of random numbers; numpy and Optuna take 32 bits."""

Threads = Annotated[int, Field(ge=0, le=4096), Unhashed()]
"""CPU threads; 0: the library's choice."""

LostRankSeconds = Annotated[float, Field(ge=0), Unhashed()]
"""Seconds without a sign of life after which a rank counts as lost and the job ends; 0: never."""


class Config(BaseModel):
    """Base of all configs. Unknown keys are refused, and values never change.

    A group of keys that is given in part keeps the stage's own defaults for the others: a student whose config sets
    `optimization.seed` alone has a student's learning rate, not that of the class Optimization.
    """

    # Defaults are validated too: a default of 32 for a float must hash as the 32.0 that config.json gives back.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    method_versions: ClassVar[dict[str, int]] = {}
    """Versions of what a result depends on besides the config, such as prompt templates: part of the hash."""

    @property
    def versions(self) -> dict[str, int]:
        """`method_versions`, and what only configs with some value depend on."""
        return dict(self.method_versions)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults_of_groups(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in values}
        merged = {name: _over_default(defaults.get(name), given) for name, given in values.items()}
        return _replaced(cls, values) | merged


class Optimizer(Config):
    """AdamW with linear warm-up, and then linear decay to zero or a constant rate."""

    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_share: float = Field(default=0.06, ge=0, lt=1, description="share of all steps")
    schedule: Annotated[Literal["linear", "constant"], HashedUnlessDefault()] = Field(
        default="linear",
        description="of the learning rate after the warm-up: linear decay to zero, or constant",
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: Seed = 0


class Optimization(Optimizer):
    """A training for a number of passes over its data."""

    epochs: int = Field(default=3, ge=1, le=10_000)  # a teacher deals the batches of all of them at once

    @property
    def budget(self) -> dict[str, int]:
        """The key that bounds the training, with its value."""
        return {"epochs": self.epochs}


class BudgetedOptimization(Optimizer):
    """A training for a number of epochs, which are passes over its data, or for a number of steps.

    With steps an epoch ends with each validation, however much data there is: trainings on unequal data are then
    compared at equal steps and after equally many validations.
    """

    epochs: Annotated[int | None, InsteadOf("steps")] = Field(default=3, ge=1, le=10_000)
    steps: Annotated[int | None, InsteadOf("epochs"), HashedUnlessDefault()] = Field(
        default=None, ge=1, le=1_000_000_000, description="optimizer steps in all, instead of epochs"
    )
    validate_every_steps: Annotated[int | None, HashedUnlessDefault()] = Field(
        default=None,
        ge=1,
        description="with steps: the steps from one validation to the next; null: a tenth of all",
    )

    @model_validator(mode="after")
    def _has_one_budget(self) -> "BudgetedOptimization":
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else f"epochs {self.epochs} and steps {self.steps}"
            raise ValueError(f"expected either epochs or steps, found {found}; set the other one to null")
        if self.validate_every_steps is not None and self.steps is None:
            raise ValueError(
                "validate_every_steps needs steps; a training for epochs validates after each of them"
            )
        return self

    @property
    def steps_per_validation(self) -> int:
        """With steps: the steps of an epoch, that is, until the next validation."""
        assert self.steps is not None
        return self.validate_every_steps or math.ceil(self.steps / _VALIDATIONS)

    @property
    def num_epochs(self) -> int:
        """How often a whole training validates."""
        return self.epochs or math.ceil((self.steps or 0) / self.steps_per_validation)

    @property
    def budget(self) -> dict[str, int]:
        """The key that bounds the training, with its value."""
        return {"epochs": self.epochs} if self.epochs else {"steps": self.steps or 0}


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(model: type[AnyConfig], path: Path | None, overrides: Iterable[str] = ()) -> AnyConfig:
    """The resolved config: the YAML (or JSON) file, then each `a.b=value`.

    A value is taken whole where the key holds text or a path, and is YAML where it holds anything else.
    Raises ConfigError, one line, naming the file, the field, the value and what is allowed.
    """
    values = read_yaml(path) if path else {}
    overrides = list(overrides)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, such as optimization.epochs=2")
        set_dotted(values, key, value_of_text(model, key, text, source=f"--set {override}"), model)
    source = f"{path} with --set" if path and overrides else str(path or "--set")
    return parse_config(model, values, source=source)


def value_of_text(model: type[Config], key: str, text: str, *, source: str) -> Any:
    """The value that a text gives a dotted key on a command line. Raises ConfigError, which begins with `source`."""
    try:
        return _value_of(text, _types_at(model, key))
    except Unreadable as error:
        raise ConfigError(f"{source}: {error}") from None


def has_key(model: type[Config], key: str) -> bool:
    """Whether a config has a dotted key."""
    return bool(_types_at(model, key))


def find_config(stage: str, reference: str | Path, prefix: str = "") -> Path:
    """The file that a reference names: a path, or a committed config as NAME (of this stage) or STAGE/NAME.

    An existing file comes first, and then the stage's config whose name is the reference after `prefix`.
    Raises ConfigError, one line, with the names of the stage's committed configs.
    """
    path = Path(reference).expanduser()
    # A missing file is reported as a missing file, by its reader, not as an unknown name.
    if path.is_file() or path.suffix in (".yaml", ".yml", ".json"):
        return path
    for name in (f"{stage}/{prefix}{reference}", f"{stage}/{reference}", reference):
        if (place := COMMITTED / f"{name}.yaml").is_file():
            return place
    names = ", ".join(sorted(file.stem for file in (COMMITTED / stage).glob("*.yaml")))
    raise ConfigError(
        f"{reference}: found no such file and no config of this name; kdecs comes with these for {stage}: {names}"
    )


def parse_config(model: type[AnyConfig], values: Mapping[str, Any], *, source: str) -> AnyConfig:
    """Validate plain values. `source` names them in the error. Raises ConfigError, one line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(error, model)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) file whose top level is a mapping, with each key once. Raises ConfigError, one line."""
    try:
        with path.open("rb") as file:
            # One byte more shows that a file is too large without reading the rest of it.
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise ConfigError(f"{path}: more than {_MAX_FILE_BYTES:,} bytes, expected a YAML config file")
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}, expected a YAML config file") from None
    try:
        values, _ = parse_yaml(text)
    except Unreadable as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of config keys, found {type(values).__name__}")
    return values


def set_dotted(values: dict[str, Any], key: str, value: Any, model: type[Config] | None = None) -> None:
    """Set `a.b.c` in nested dicts in place, creating missing levels.

    With `model`, the config whose keys these are, a group of keys changes only the keys that it names.
    """
    *parents, last = key.split(".")
    group = values
    for parent in parents:
        child = group.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {parent} is {child!r}, not a group of keys")
        group = child
    there = group.get(last)
    groups = [kind for kind in _types_at(model, key) if _is_config(kind)] if model else []
    if (
        groups
        and isinstance(value, dict)
        and isinstance(there, dict)
        and not any(_is_other_kind(kind, there, value) for kind in groups)
    ):
        for name, item in value.items():
            set_dotted(values, f"{key}.{name}", item, model)
    else:
        group[last] = value
        # What came before stands for the same thing: the later word counts.
        parents_of = _types_at(model, key.rpartition(".")[0]) if model and parents else []
        for kind in filter(_is_config, parents_of):
            for other in _replaced(kind, {last: value}):
                group.pop(other, None)


def write_config(config: Config, directory: Path) -> None:
    """Write the resolved config as `config.json` into an output directory."""
    write_text(directory / CONFIG_NAME, config.model_dump_json(indent=2) + "\n")


def config_hash(config: Config) -> str:
    """Hex sha256 of the work a config describes: the same work has the same hash on every machine.

    Content checksums stand in for paths; fields marked `Unhashed` are left out.
    Raises ConfigError if an input path does not exist.
    """
    # With the class' name, since configs of two stages with equal values are different work.
    view = json.dumps({"config": _hash_view(config), "method": config.versions}, sort_keys=True)
    return hashlib.sha256(f"{type(config).__name__}\n{view}".encode()).hexdigest()


def files_of(paths: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    """The files of a key that takes one or several (`InputFiles`)."""
    return paths if isinstance(paths, tuple) else (paths,)


def names_of(paths: Path | tuple[Path, ...]) -> str:
    """The files of such a key as a message names them."""
    return ", ".join(map(str, files_of(paths)))


def input_checksums(**paths: Path | str | tuple[Path, ...] | None) -> dict[str, str]:
    """`inputs` of a manifest: name -> content checksum. A hub name stands for itself, and None is left out.

    Of several paths under one name, the first has the name itself, the others NAME_1, NAME_2, …
    """
    named = {
        f"{name}_{number}" if number else name: path
        for name, given in paths.items()
        for number, path in enumerate(given if isinstance(given, tuple) else (given,))
    }
    return {name: _checksum(path, name) for name, path in named.items() if path is not None}


def outputs_and_inputs(config: Config) -> tuple[dict[str, Path], list[Path]]:
    """The paths that a config names: the places that are written, by dotted key, and what is read. No hub names."""
    outputs: dict[str, Path] = {}
    inputs: list[Path] = []

    def collect(value: Any, marks: list[Any], key: str) -> None:
        if isinstance(value, Config):
            for name, field in type(value).model_fields.items():
                # Of `OutputPath | None` pydantic leaves the marks inside the union, out of `metadata`.
                inner = [*field.metadata, *_marks(field.annotation)]
                collect(getattr(value, name), inner, f"{key}.{name}".lstrip("."))
        elif isinstance(value, dict):
            for name, item in value.items():
                collect(item, marks, f"{key}.{name}")
        elif isinstance(value, tuple | list):
            for item in value:
                collect(item, marks, key)
        elif isinstance(value, str | Path) and Path(value).is_absolute():
            # The mark alone says that a path is an output: the hash leaves it out.
            validators = [mark.func for mark in marks if isinstance(mark, AfterValidator)]
            if _local_or_hub in validators or (_absolute in validators and not _is_unhashed(marks)):
                inputs.append(Path(value))
            elif _absolute in validators:
                outputs[key] = Path(value)

    collect(config, [], "")
    return outputs, inputs


def _is_unhashed(marks: Iterable[Any]) -> bool:
    return any(isinstance(mark, Unhashed) for mark in marks)


def _marks(annotation: Any) -> Iterator[Any]:
    """All that `Annotated` says in a type, of its members too."""
    yield from getattr(annotation, "__metadata__", ())
    for member in get_args(annotation):
        yield from _marks(member)


def _over_default(default: Any, given: Any) -> Any:
    """What is given for a group, over the default of the group in its place; anything else as it is given."""
    if not isinstance(default, Config) or not isinstance(given, dict):
        return given
    known = {name: getattr(default, name) for name in type(default).model_fields}
    if _is_other_kind(type(default), known, given):
        return given
    merged = {name: _over_default(known.get(name), value) for name, value in given.items()}
    return {**known, **_replaced(type(default), given), **merged}


def _replaced(model: type[Config], given: Mapping[str, Any]) -> dict[str, None]:
    """The fields, each as null, in whose place others are given (`InsteadOf`)."""
    return {
        mark.other: None
        for name, field in model.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, InsteadOf) and given.get(name) is not None and mark.other not in given
    }


def _is_other_kind(model: type[Config], known: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether two groups are of different kinds: their tag, such as `method` or `family`, differs."""
    # A field that can hold one word only names the member of a union; one of several words is a setting.
    tags = [name for name, field in model.model_fields.items() if len(_literals(field.annotation)) == 1]
    return any(name in known and name in given and known[name] != given[name] for name in tags)


def _literals(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


def _types_at(model: type[Config], key: str) -> list[Any]:
    """The types that a dotted key may hold, members of unions one by one; none for an unknown key."""
    types: list[Any] = [model]
    for part in key.split("."):
        inner: list[Any] = []
        for kind in types:
            if _is_config(kind) and part in kind.model_fields:
                field = kind.model_fields[part]
                marked = [mark.model for mark in field.metadata if isinstance(mark, KeysOf)]
                inner += marked or _members(field.annotation)
            elif get_origin(kind) is dict:
                inner += _members(get_args(kind)[1])
        types = inner
    return types


def _members(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *metadata = get_args(annotation)
        marks = [mark.model for mark in metadata if isinstance(mark, KeysOf)]
        yield from marks or _members(kind)
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _value_of(text: str, types: list[Any]) -> Any:
    """The value that `--set` gives a key of these types.

    Text and paths are taken whole, since `#`, `: ` or `1.10` mean something else to YAML. Raises Unreadable.
    """
    takes_text = str in types or Path in types
    if takes_text and not text.startswith("["):  # one of the files that could be a list
        types = [kind for kind in types if get_origin(kind) is not tuple]
    choices = [value for kind in types for value in _literals(kind)]
    if takes_text and set(types) <= {str, Path, NoneType}:
        # An empty value is no path. Where it is no value either, pydantic refuses it.
        return None if not text or (text == "null" and NoneType in types) else text
    try:
        value, has_comment = parse_yaml(text)
    except Unreadable:
        if takes_text:
            return text
        raise
    if isinstance(value, str):
        return value if value in choices else text
    if has_comment:
        raise Unreadable("YAML would drop what follows the # as a comment; leave it out")
    return value


def _hash_view(value: Any, key: str = "") -> Any:
    """What of a value goes into the hash. `key` is its dotted key, for errors."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        # Marks on the field itself alone: `OutputPath | None` is hashed unless `Unhashed` stands around the whole.
        return {
            name: _hash_view(_as_path(getattr(value, name), field.metadata), f"{key}.{name}".lstrip("."))
            for name, field in fields.items()
            if not any(isinstance(mark, Unhashed) for mark in field.metadata)
            and not (
                getattr(value, name) == field.default
                and any(isinstance(mark, HashedUnlessDefault) for mark in field.metadata)
            )
        }
    if isinstance(value, Path):
        return _checksum(value, key)
    if isinstance(value, dict):
        return {name: _hash_view(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_hash_view(item, key) for item in value]
    return value


def _as_path(value: Any, metadata: list[Any]) -> Any:
    """A model reference that is a local directory is hashed by content, like any input path."""
    is_reference = any(isinstance(mark, AfterValidator) and mark.func is _local_or_hub for mark in metadata)
    return Path(value) if is_reference and Path(value).is_absolute() else value


def _checksum(path: Path | str, key: str) -> str:
    if isinstance(path, str) and not Path(path).is_absolute():
        return path  # a hub name, whose content is not known before it is downloaded
    try:
        return content_checksum(Path(path))
    except ArtifactError as error:
        # The committed configs name RECCON's files, which do not come with kdecs.
        is_reccon = Path(path).name.startswith("dailydialog_")
        remedy = "; RECCON's files can be downloaded with: kdecs corpus fetch DIR" if is_reccon else ""
        raise ConfigError(f"{error}, which the config names as {key}{remedy}") from None


def _describe(error: ValidationError, model: type[Config]) -> str:
    # The first one alone: the others often follow from it, and the message is one line.
    errors = error.errors()
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in (_FILE_TAG, _FILES_TAG)]
    field = ".".join(place) or "config"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key; known here: {', '.join(_known_keys(model, first['loc'][:-1]))}"
    elif first["type"] != "missing" and not isinstance(first["input"], dict):
        found = repr(first["input"])
        message = f"found {found[:_SHOWN_CHARACTERS]}{'…' * (len(found) > _SHOWN_CHARACTERS)}: {message}"
        if first["type"] in ("string_type", "path_type") and isinstance(first["input"], bool | int | float):
            message += "; in a file, put it in quotes"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{field}: {message}{more}"


def _known_keys(model: type[Config], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the config group at a location (the tag of a union's member is part of the location)."""
    candidates = [model]
    for part in location:
        inner = [
            c for m in candidates if part in m.model_fields for c in _configs_in(m.model_fields[str(part)])
        ]
        tagged = [m for m in candidates if _has_tag(m, part)]
        candidates = inner or tagged or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _configs_in(field: FieldInfo) -> list[type[Config]]:
    annotation = field.annotation  # of a union, all members
    options = getattr(annotation, "__args__", (annotation,))
    return [option for option in options if isinstance(option, type) and issubclass(option, Config)]


def _has_tag(model: type[Config], tag: int | str) -> bool:
    family = model.model_fields.get("family")
    return family is not None and tag in getattr(family.annotation, "__args__", ())
