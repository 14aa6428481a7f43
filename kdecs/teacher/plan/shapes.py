"""A teacher's architecture by name or directory, and how many parameters it has, frozen and trained.

Architectures that teachers commonly use ship with the package as Transformers configs, so that planning one needs no
download.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from kdecs.errors import ModelError

_SUFFIXES = ("-instruct", "-hf")
# Several times those of any known model. A config from elsewhere needs no weights here, so nothing else bounds it.
_MAX_PARTS = 1_000
_MAX_SIZE = 100_000_000


@dataclass(frozen=True)
class Architecture:
    """A network's shapes: `config` is a Transformers config, `reference` is where its tokenizer is looked for."""

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
    """The shipped architecture that a hub name or a plain name stands for, or None."""
    name = reference.rsplit("/", 1)[-1].lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name if name in shipped_names() else None


def resolve_architecture(reference: str) -> Architecture:
    """The architecture of a name or a local directory; no weights are needed. Raises ModelError, one line."""
    if Path(reference, "config.json").is_file():
        return _from_directory(Path(reference))
    if Path(reference).is_absolute() or reference.startswith("."):
        raise ModelError(f"model {reference}: found no config.json, expected a Transformers model directory")
    name = shipped_name(reference)
    if name is None:
        raise ModelError(
            f"model {reference}: neither a directory nor one of the shipped architectures "
            f"({', '.join(shipped_names())}); give a directory that holds its config.json (no weights needed)"
        )
    text = (files("kdecs.teacher") / "architectures" / f"{name}.json").read_text(encoding="utf-8")
    return _architecture(name, json.loads(text), reference)


def _from_directory(directory: Path) -> Architecture:
    from kdecs.models import read_settings

    path = directory / "config.json"
    values = read_settings(path)
    if "model_type" not in values:
        raise ModelError(f"{path}: has no model_type, expected a Transformers model's config")
    return _architecture(directory.name, values, str(directory))


def _architecture(name: str, values: dict[str, Any], reference: str) -> Architecture:
    from transformers import AutoConfig

    from kdecs.models import REPEATED, plain_config
    from kdecs.process import refusing
    from kdecs.teacher.network import family_of

    for key, value in values.items():
        most = _MAX_PARTS if REPEATED.search(key) else _MAX_SIZE
        if isinstance(value, int) and value > most:
            raise ModelError(f"model {reference}: {key} is {value:,}, expected at most {most:,}")
    values = dict(values)
    model_type = values.pop("model_type")
    with refusing(f"model {reference}: its config cannot be read"):
        config = plain_config(AutoConfig.for_model(model_type, **values), reference)
    return Architecture(name, config, reference, family_of(config))


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 0.5 + 0.125 / 8
"""Bytes per weight of a 4-bit linear layer: NF4, and per block of 64 an absmax in 8 bits (double quantisation)."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, shared ones counted once. ZeRO-3 keeps the `small` ones whole on every rank."""

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
        """Bytes of what is not trained; a 4-bit base keeps its embeddings, norms and head in `dtype`."""
        size = DTYPE_BYTES[dtype]
        if not in_4bit:
            return self.frozen * size
        return self.frozen_linear * NF4_BYTES + (self.frozen - self.frozen_linear) * size


def count_parameters(network: nn.Module, *, persistence_threshold: int) -> ParameterCounts:
    """Count a network's parameters, on the meta device or any other."""
    parameters = list(network.parameters())  # tied ones come once
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    get_head = getattr(network, "get_output_embeddings", lambda: None)
    head = get_head()
    linear = sum(
        module.weight.numel()
        for module in network.modules()
        # bitsandbytes leaves the head in the dtype.
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module is not head
    )
    return ParameterCounts(
        frozen=frozen,
        trained=trained,
        frozen_linear=linear,
        small=sum(p.numel() for p in parameters if p.numel() < persistence_threshold),
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in network.modules()),
    )
