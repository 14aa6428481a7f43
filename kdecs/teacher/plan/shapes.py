"""How many parameters a teacher has, frozen and trained, and what they weigh."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

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

    from kdecs.teacher.network import family_of

    values = dict(values)
    model_type = values.pop("model_type")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise ModelError(f"model {reference}: {str(error).splitlines()[0]}") from None
    return Architecture(name, config, reference, family_of(config))


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NF4_BYTES = 0.5 + 0.125 / 8
"""A weight of a 4-bit linear layer: NF4, blocks of 64 with absmax in 8 bits (double quantisation)."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, shared ones once. `small` are those that ZeRO-3 keeps whole on every rank."""

    frozen: int
    trained: int
    frozen_linear: int
    small: int
    largest_module: int

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return self.frozen + self.trained

    def frozen_bytes(self, dtype: str, *, in_4bit: bool) -> float:
        """Weight of what is not trained; 4-bit bases keep embeddings, norms and heads in `dtype`."""
        size = DTYPE_BYTES[dtype]
        if not in_4bit:
            return self.frozen * size
        return self.frozen_linear * NF4_BYTES + (self.frozen - self.frozen_linear) * size


def count_parameters(network: nn.Module, *, persistence_threshold: int) -> ParameterCounts:
    """Count a network's parameters, on meta or anywhere else."""
    parameters = list(network.parameters())  # tied ones come once
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    heads = {id(module) for module in (_head(network),) if module is not None}
    linear = sum(
        module.weight.numel()
        for module in network.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module) not in heads
    )
    return ParameterCounts(
        frozen=frozen,
        trained=trained,
        frozen_linear=linear,
        small=sum(p.numel() for p in parameters if p.numel() < persistence_threshold),
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in network.modules()),
    )


def _head(network: nn.Module) -> nn.Module | None:
    get_head = getattr(network, "get_output_embeddings", None)
    return get_head() if get_head is not None else None
