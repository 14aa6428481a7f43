"""Loading pretrained models and tokenizers with Transformers: fast tokenizers, safetensors, one-line errors, no noise.

`reference` is a local directory or a hub name. Transformers' progress bars and tables of missing weights are silenced:
loading takes milliseconds for most of our models, the bars tear ours apart, and every caller checks the weights itself.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from kdecs.errors import KdecsError, ModelError

_MAX_SETTINGS_BYTES = 256 << 20  # the largest tokenizer.json has some 40 MB


def load_tokenizer(reference: str | Path) -> Any:
    """A fast tokenizer. Raises ModelError, one line, if it cannot be loaded or has no fast version."""
    with refusing(f"tokenizer {reference}: cannot be loaded", reference):
        tokenizer = AutoTokenizer.from_pretrained(str(reference), use_fast=True)
    if not tokenizer.is_fast:
        raise ModelError(f"tokenizer {reference}: has no fast version, which character offsets need")
    return tokenizer


def load_pretrained(
    auto_model: Any, reference: str | Path, what: str, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, list[str]]:
    """A model of one of Transformers' auto classes, and the sorted names of the weights that it lacks.

    `what` names the wanted model in the error; `options` go to Transformers as they are.
    Raises ModelError, one line, if it cannot be loaded.
    """
    with refusing(f"model {reference}: cannot be loaded as {what}", reference), _quiet():
        model, report = auto_model.from_pretrained(
            # Safetensors alone, because opening a pickle runs the code in it.
            str(reference),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    return model, sorted(report["missing_keys"])


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a file that describes a model. Raises ModelError, one line, if it holds anything else."""
    try:
        if (size := path.stat().st_size) > _MAX_SETTINGS_BYTES:
            raise ModelError(
                f"{path}: {size} bytes, more than the {_MAX_SETTINGS_BYTES} that any model needs"
            )
        # NaN is no JSON, and could not be written again.
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_json)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ModelError(f"{path}: cannot be read as JSON: {reason}; fetch or save the model again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: found {type(values).__name__}, expected a JSON object")
    return values


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


@contextlib.contextmanager
def refusing(message: str, reference: str | Path) -> Iterator[None]:
    """Raise ModelError, one line, for whatever a library raises about the files of `reference` inside the block."""
    try:
        yield
    except (KdecsError, torch.OutOfMemoryError):  # the latter says nothing about the files
        raise
    except Exception as error:
        # Files that others wrote make Transformers, PEFT and tokenizers fail with errors of any type.
        raise ModelError(f"{message}: {why_not_loaded(reference, error)}") from error
    except BaseException as error:
        # How a panic of tokenizers' Rust code arrives, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{message}: {first_line(error)}") from error


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights, config and tokenizer into a folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    bars_enabled, verbosity = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_enabled:
            transformers_logging.enable_progress_bar()


def why_not_loaded(reference: str | Path, error: BaseException) -> str:
    """What a user can act on when a model or its tokenizer did not load, in one line."""
    if HF_HUB_OFFLINE and not Path(reference).exists():
        return (
            "HF_HUB_OFFLINE is set and the hub's cache does not hold all of its files; download it once with a "
            "network, or give a local directory"
        )
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for one-line errors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
