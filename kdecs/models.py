"""Loading pretrained models and tokenizers with Transformers: the one door for directories and hub names, of any stage.

`reference` is a local directory or a hub name. Both may be somebody else's work, so that loading

- runs no code that comes with a model, asks nothing, and unpickles nothing: weights are safetensors;
- reads a directory from that directory alone, and what a manifest covers only as the manifest says;
- follows no adapter to its base, and lets no config choose the attention, the quantisation or the files of weights;
- ends in one line (ModelError) whatever the files hold.

Transformers' progress bars and tables of missing weights are silenced: loading takes milliseconds for most of our
models, the bars tear ours apart, and every caller checks the weights itself.
"""

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from kdecs.artifact import MANIFEST_NAME, install_files, read_verified_manifest, temporary_folder
from kdecs.errors import ModelError, first_line
from kdecs.process import refusing, try_tokenizer

_MAX_SETTINGS_BYTES = 256 << 20  # the largest tokenizer.json has some 40 MB
REPEATED = re.compile(r"(layers?|experts|blocks|groups|group_num|num_labels)$")
"""Keys of a model's config that give a number of parts, each of which takes time to make."""
_MAX_REPEATED = 10_000


def load_tokenizer(reference: str | Path) -> Any:
    """A fast tokenizer. Raises ModelError, one line, if it cannot be loaded or has no fast version."""
    options = _options(reference)
    folder = Path(reference)
    if options["local_files_only"]:
        path = folder / "tokenizer_config.json"
        settings = read_settings(path) if path.is_file() else {}
        # Files are found by their usual names. A path in the settings is at best one of its author's machine.
        options |= {key: None for key in settings if key.endswith("_file")}
        names = settings.get("fast_tokenizer_files") or []
        if not isinstance(names, list) or any(not _is_plain_name(name) for name in names):
            raise ModelError(f"{path}: fast_tokenizer_files names a file elsewhere; remove this key")
    with _loading(f"tokenizer {reference}: cannot be loaded", reference):
        tokenizer = AutoTokenizer.from_pretrained(str(reference), **options)
        # They would be saved with the tokenizer, and say nothing about it.
        tokenizer.init_kwargs["local_files_only"] = False
        tokenizer.init_kwargs.pop("auto_map", None)
        try_tokenizer(tokenizer)
    if not tokenizer.is_fast:
        raise ModelError(f"tokenizer {reference}: has no fast version, which character offsets need")
    return tokenizer


def load_config(reference: str | Path) -> Any:
    """A model's config, without what would lead elsewhere. Raises ModelError, one line."""
    options = _options(reference)
    with _loading(f"model {reference}: its config cannot be read", reference):
        return _config(reference, options)


def _config(reference: str | Path, options: dict[str, Any]) -> Any:
    return plain_config(AutoConfig.from_pretrained(str(reference), **options), reference)


def plain_config(config: Any, reference: str | Path) -> Any:
    """The config after taking out what its author may have chosen of how the model is run, rather than what it is.

    Raises ModelError for weights that are quantised in a way whose code Transformers would fetch.
    """
    # By default Transformers takes what torch has. Other names, such as a kernel on the hub, are fetched and run.
    config._attn_implementation = None
    config._experts_implementation = None
    for key in ("auto_map", "transformers_weights", "fusion_config", "distributed_config"):
        if key in vars(config):
            delattr(config, key)
    if not getattr(config, "quantization_config", True):
        del config.quantization_config
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method not in (None, "bitsandbytes"):
        raise ModelError(
            f"model {reference}: its weights are quantised ({method}), expected plain or bitsandbytes weights; choose "
            "the unquantised model (model.load_in_4bit quantises a teacher's base)"
        )
    return config


def load_pretrained(
    auto_model: Any, reference: str | Path, what: str, *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, list[str]]:
    """A model of one of Transformers' auto classes, and the sorted names of the weights that it lacks.

    `what` names the wanted model in the error; `options` go to Transformers as they are.
    Raises ModelError, one line, if it cannot be loaded.
    """
    safe = _options(reference)
    with _loading(f"model {reference}: cannot be loaded as {what}", reference), _quiet():
        if find_adapter_config_file(str(reference), local_files_only=safe["local_files_only"]):
            raise ModelError(
                f"model {reference}: holds an adapter (adapter_config.json), expected a whole model; "
                "give the adapter's base instead (kdecs teacher import makes a teacher of an adapter)"
            )
        config = _config(reference, safe)
        # Not where a GPU cluster partitions its user's own base while it is made, nor for weights in 4 bits.
        if not is_deepspeed_zero3_enabled() and not hasattr(config, "quantization_config"):
            _check_size(auto_model, Path(reference), config)
        model, report = auto_model.from_pretrained(
            str(reference),
            config=config,
            dtype=dtype,
            # Never a pickle, whatever else the directory offers.
            use_safetensors=True,
            output_loading_info=True,
            **safe,
            **options,
        )
    return model, sorted(report["missing_keys"])


def _options(reference: str | Path) -> dict[str, Any]:
    """What every call of Transformers gets, after a look into the directory if `reference` is one."""
    folder = Path(reference)
    if folder.is_dir():
        with _loading(f"model {reference}: cannot be read", reference):
            _check_directory(folder)
    # An absolute path that does not exist is no hub name.
    return {"trust_remote_code": False, "local_files_only": folder.is_dir() or folder.is_absolute()}


def _check_directory(folder: Path) -> None:
    """Raise ModelError or ArtifactError for a directory that would lead a loader out of it, or to code."""
    if (folder / MANIFEST_NAME).is_file():
        _verify_once(folder, _state_of(folder))
    # A base has its manifest inside; a student, a teacher or a baseline has it above the folder of its model.
    above = folder.parent if folder.name == "model" else folder
    is_ours = any((place / MANIFEST_NAME).is_file() for place in (folder, above))
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not _stays_inside(path, folder):
            raise ModelError(
                f"{path}: is a link that leaves the directory; put a copy of the file in its place"
            )
        if is_ours and path.suffix == ".py":
            raise ModelError(
                f"{path}: Python code, which kdecs never writes and never runs; get the directory again from its author"
            )
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        settings = read_settings(path) if path.is_file() else {}
        _check_counts(settings, path)
        is_known = str(settings.get("model_type")) in CONFIG_MAPPING or path.name != "config.json"
        # What Transformers knows by itself is loaded without the code that its author published with it.
        if "auto_map" in settings and (is_ours or not is_known):
            raise ModelError(
                f"{path}: auto_map asks for Python code of the model's author, which is never run; choose a model "
                "that Transformers has code for"
            )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_settings(index).get("weight_map")
        if not isinstance(files, dict) or any(
            not _is_plain_name(name) or not name.endswith(".safetensors") for name in files.values()
        ):
            raise ModelError(
                f"{index}: weight_map must name *.safetensors files of this directory; fetch or save the model again"
            )


def _check_size(auto_model: Any, folder: Path, config: Any) -> None:
    """Raise ModelError if a config asks for a network far larger than the weights beside it.

    Transformers makes what is missing before it says so, which takes hours or the whole memory if the config wants it.
    """
    index = folder / "model.safetensors.index.json"
    names = set(read_settings(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    num_tensors = num_stored = 0
    for path in (folder / name for name in names):
        if not path.is_file():
            return  # a hub name, or a fault that Transformers explains
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
        num_tensors += len(shapes)
        num_stored += sum(map(math.prod, shapes))
    _check_counts(config.to_dict(), folder / "config.json", num_tensors)
    with torch.device("meta"):  # shapes alone
        wanted = sum(parameter.numel() for parameter in auto_model.from_config(config).parameters())
    # A head may be new, and tied or 4-bit weights are stored once or packed: no honest model has more than twice.
    if wanted > 4 * num_stored + 1_000_000:
        raise ModelError(
            f"{folder / 'config.json'}: describes a network of {wanted} parameters, but the weights hold {num_stored}; "
            "fetch or save the model again"
        )


def _check_counts(settings: dict[str, Any], path: Path, num_tensors: int | None = None) -> None:
    """Raise ModelError if a config asks for more layers, experts or labels than its weights have tensors.

    Each of them takes time to make, even without memory, and has a tensor or shares one.
    """
    most = _MAX_REPEATED if num_tensors is None else max(num_tensors, 256)
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_counts(value, path, num_tensors)
        elif REPEATED.search(str(key)) and isinstance(value, int) and value > most:
            expected = (
                f"at most {most}"
                if num_tensors is None
                else f"no more than the weights' {num_tensors} tensors"
            )
            raise ModelError(f"{path}: {key} is {value}, expected {expected}; fetch or save the model again")


@functools.lru_cache(maxsize=64)
def _verify_once(folder: Path, state: tuple[Any, ...]) -> None:
    """Check a base, or a teacher whose tokenizer is wanted, once per process and state of its files."""
    del state  # part of the cache's key alone: a sweep loads its base often
    read_verified_manifest(folder)


def _state_of(folder: Path) -> tuple[Any, ...]:
    """What changes whenever a file of the folder changes."""
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.exists()]
    return tuple((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in found)


def _stays_inside(link: Path, folder: Path) -> bool:
    target = link.resolve()
    # The hub's cache keeps contents under blobs, and its snapshots are folders of links to them.
    is_cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return is_cached or target.is_relative_to(folder.resolve())


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")


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


def _loading(message: str, reference: str | Path) -> AbstractContextManager[None]:
    """`refusing`, with an explanation where the reason has to do with the hub."""
    return refusing(message, functools.partial(_why_not_loaded, reference))


def first_position(encoder: Any) -> int:
    """The row of the position table for the first token: RoBERTa and its kin count from padding_idx + 1."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def save_pretrained(parts: Sequence[Any], folder: Path, **options: Any) -> list[str]:
    """Write models, tokenizers and configs into a folder as Transformers does; returns the names of the files.

    The folder is made if missing. Each file appears complete, with the mode that the umask gives.
    """
    # In a private folder first: Transformers writes its files in place, one by one, under their final names.
    with temporary_folder(folder / "saved") as made:
        with _quiet():
            for part in parts:
                part.save_pretrained(str(made), **options)
        return install_files(made, folder)


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


def _why_not_loaded(reference: str | Path, error: BaseException) -> str:
    """What a user can act on when a model or its tokenizer did not load, in one line."""
    if HF_HUB_OFFLINE and not Path(reference).exists():
        return (
            "HF_HUB_OFFLINE is set and the hub's cache does not hold all of its files; download it once with a "
            "network, or give a local directory"
        )
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "it needs Python code of its author, which is never run; choose a model that Transformers has code for"
    if not Path(reference).exists() and not Path(reference).is_absolute():
        remedy = (
            "; make models fetches the models of this folder" if str(reference).startswith("models/") else ""
        )
        return f"there is no such directory here, and the hub did not provide it either ({first_line(error)}){remedy}"
    return first_line(error)
