"""Which network a plan is about: a shipped architecture by name, a local model directory, or a teacher's config.

Nothing is downloaded. The architectures of the paper's teachers are package data: the values of their published
configs that decide shapes. A hub name is matched with them by its last part (`huggyllama/llama-7b` is llama-7b).
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kdecs.config import load_config
from kdecs.errors import ModelError
from kdecs.teacher.config import TeacherConfig

_SUFFIXES = ("-instruct", "-hf")


@dataclass(frozen=True)
class Architecture:
    """A network's shapes: `config` is a Transformers config, `reference` what its tokenizer is looked for at."""

    name: str
    config: Any
    reference: str
    family: str


@cache
def shipped_names() -> tuple[str, ...]:
    """Names of the architectures that come with the package."""
    folder = files("kdecs.teacher") / "architectures"
    return tuple(sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json")))


def shipped_name(reference: str) -> str | None:
    """The shipped architecture that a hub name or a plain name means, or None."""
    name = reference.rsplit("/", 1)[-1].lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name if name in shipped_names() else None


def resolve_architecture(reference: str) -> Architecture:
    """The architecture of a name or a local directory, whatever its weights. Raises ModelError, one line."""
    if Path(reference, "config.json").is_file():
        return _from_directory(Path(reference))
    if Path(reference).is_absolute() or reference.startswith("."):
        raise ModelError(f"model {reference}: found no config.json, expected a Transformers model directory")
    name = shipped_name(reference)
    if name is None:
        raise ModelError(
            f"model {reference}: no directory and none of the shipped architectures ({', '.join(shipped_names())}); "
            "give a directory with its config.json (no weights needed)"
        )
    text = (files("kdecs.teacher") / "architectures" / f"{name}.json").read_text(encoding="utf-8")
    return _architecture(name, json.loads(text), reference)


def read_teacher(reference: str) -> TeacherConfig | None:
    """The teacher config that a path to a YAML or JSON file holds; None for other references."""
    path = Path(reference)
    return load_config(TeacherConfig, path) if path.suffix in (".yaml", ".yml", ".json") else None


def _from_directory(directory: Path) -> Architecture:
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a model's config: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"{path}: has no model_type, expected a Transformers model's config")
    return _architecture(directory.name, values, str(directory))


def _architecture(name: str, values: dict[str, Any], reference: str) -> Architecture:
    from transformers import AutoConfig

    from kdecs.teacher.plan.meta_network import family_of

    values = dict(values)
    model_type = values.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise ModelError(f"model {reference}: {str(error).splitlines()[0]}") from None
    return Architecture(name, config, reference, family_of(config))
