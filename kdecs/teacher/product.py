"""Teacher directories: what a training writes, how it is read, and the lineage of the labels that it makes.

adapter_model.safetensors, adapter_config.json   LoRA: as PEFT writes and reads them
model/                                           full tuning: a Transformers model (safetensors) with its tokenizer
tokenizer files                                  as Transformers writes them
config.json                                      the resolved TeacherConfig
metrics.jsonl                                    training loss, throughput and validation scores
checkpoints/                                     training states (`kdecs.teacher.checkpoint`), not part of the product
manifest.json                                    names the base by checksum
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdecs.artifact import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    atomic_path,
    read_manifest,
    read_verified_manifest,
    sha256_of_file,
)
from kdecs.config import input_checksums, parse_config, read_yaml
from kdecs.corpus.answer_words import answer_words_digest
from kdecs.corpus.prompts import PROMPT_VERSION, teacher_prompt
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import ArtifactError, ModelError, TrainingError
from kdecs.models import read_settings, save_pretrained
from kdecs.process import refusing
from kdecs.runtime import Runtime
from kdecs.teacher.config import TREE_PROMPTS_VERSION, ModelConfig, TeacherConfig, TuningConfig
from kdecs.teacher.families import Family, make_family
from kdecs.teacher.network import DTYPES, load_base, trainable_parameters

_Family = TypeVar("_Family", bound=Family)
_WEIGHT_SUFFIXES = (".safetensors",)
_WEIGHT_FILES = ("adapter_config.json", "model.safetensors.index.json")
_OTHER_FILES = ("config.json", "generation_config.json", "metrics.jsonl", "README.md")


def lineage_of(
    directory: Path, manifest: Manifest, config: TeacherConfig, family: Family, *, dtype: str
) -> dict[str, str]:
    """What this teacher's labels depend on, by name and checksum. Exports refuse to mix labels of unequal lineage."""
    weights = [entry for entry in manifest.files if _is_weight(entry)]
    tokenizer = [e for e in manifest.files if not _is_weight(e) and Path(e.path).name not in _OTHER_FILES]
    return {
        "teacher": sha256_of_file(directory / MANIFEST_NAME),
        "adapter": _digest([entry.path, entry.sha256] for entry in weights),
        "tokenizer": _digest([entry.path, entry.sha256] for entry in tokenizer),
        "base": manifest.inputs["base"],
        # Shows any change of wording, even one without a new version.
        "prompt_template": template_digest(family),
        "prompt_version": str(PROMPT_VERSION),
        "answer_words": answer_words_digest(family.answer_ids),
        "emotions_shown": config.emotions_shown,
        "name": config.name,
        "dtype": dtype,
    }


def template_digest(family: Family) -> str:
    """Checksum of a family's prompts for a fixed dialogue of two turns, target 2, candidates 1 and 2.

    In the layout tree also of how over-long prompts are cut, which so short a dialogue does not show.
    """
    turns = tuple(Utterance(n, speaker, f"text {n}", "neutral", ()) for n, speaker in ((1, "A"), (2, "B")))
    dialogue = Dialogue("template", turns)
    texts = [
        teacher_prompt(dialogue, 2, candidate, emotion="joy", separator=family.separator).text
        for candidate in (1, 2)
    ]
    cut = [f"tree prompts {TREE_PROMPTS_VERSION}"] if family.layout == "tree" else []
    return _digest([family.name, family.answer_suffix, *texts, *cut])


SEPARATOR_KEY = "history_separator"
"""A manifest's detail, where the separator is not the one that teachers without this detail were trained with."""


def separator_details(family: Family) -> dict[str, str]:
    """What the manifest of a new teacher says about its history's separator."""
    return {} if family.separator == _first_separator(family) else {SEPARATOR_KEY: family.separator}


def trained_separator(details: Mapping[str, Any], family: Family) -> str:
    """The separator of a finished teacher's history. Raises ArtifactError if its manifest has none that is a text."""
    separator = details.get(SEPARATOR_KEY, _first_separator(family))
    if not isinstance(separator, str):
        raise ArtifactError(
            f"{MANIFEST_NAME}: {SEPARATOR_KEY} is {separator!r}, expected a text; train or import the teacher again"
        )
    return separator


def _first_separator(family: Family) -> str:
    # For every tokenizer without a separator it was a newline, even where the tokenizer reads that as a space.
    return family.tokenizer.sep_token or "\n"


def _is_weight(entry: FileEntry) -> bool:
    name = Path(entry.path).name
    return name.endswith(_WEIGHT_SUFFIXES) or name in _WEIGHT_FILES


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_FOLDER = "model"
# What an adapter's config says about other places and about modules to import. It may have been written by anybody, and
# the base is the one that our own config names.
_NOT_FOLLOWED: dict[str, Any] = {
    "base_model_name_or_path": None,
    "revision": None,
    "auto_mapping": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
}
# Kinds of LoRA that act on some tokens only, or that choose among several adapters. A teacher runs the parts of the
# model by themselves, where PEFT cannot tell the adapter which tokens those are.
_REFUSED = ("alora_invocation_tokens", "arrow_config")
# What PEFT puts between the name of a layer and those of its tensors, and the axes of LoRA's tensors that count tokens.
_WRAPPERS = ("base_layer", "token_adapter", "original_module", "modules_to_save")
_ROWS_OF_PRODUCTS = {"lora_embedding_A": 1, "lora_B.weight": 0}
# What is zero in a fresh adapter: its products are zero until these are trained.
_ZERO_AT_FIRST = ("lora_B", "lora_embedding_A")


def save_product(network: nn.Module, directory: Path, runtime: Runtime, *, zero_stage: int) -> None:
    """Write the whole adapter, or the whole model, from rank 0. Collective, since it gathers ZeRO-3's parts."""
    if isinstance(network, PeftModel):
        _save_adapter(network, directory, runtime, zero_stage=zero_stage)
    else:
        _save_model(network, directory / MODEL_FOLDER, runtime, zero_stage=zero_stage)


def install_product(source: Path, names: Sequence[str], family: Family, output: Path) -> list[str]:
    """Copy the named files of a checkpoint's product, and the tokenizer, into the teacher directory.

    Returns the relative paths of all that it wrote.
    """
    folder = output if ADAPTER_FILE in names else output / MODEL_FOLDER
    for name in names:
        # A copy: the checkpoint stays whole if this is interrupted.
        with atomic_path(output / name) as temporary:
            shutil.copyfile(source / name, temporary)
    tokenizer_files = save_pretrained([family.tokenizer], folder)
    return [*names, *((folder / name).relative_to(output).as_posix() for name in tokenizer_files)]


def check_adapter(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Raise TrainingError for an adapter that is empty, not finite, or was never trained (every B is zero)."""
    _check_tensors(tensors.items(), directory)
    # Whole layers, biases or rows of embeddings may be trained beside LoRA's products.
    has_more = any("lora_" not in name for name in tensors)
    products = (tensor for name, tensor in tensors.items() if any(part in name for part in _ZERO_AT_FIRST))
    if not has_more and not any(bool(tensor.any()) for tensor in products):
        raise TrainingError(
            f"{directory}: every lora_B of the adapter is zero, so it does nothing; train it again"
        )


def read_teacher_config(directory: Path) -> TeacherConfig:
    """The resolved config of a finished teacher. Raises ArtifactError or ConfigError, one line."""
    read_manifest(directory, "teacher")
    path = directory / "config.json"
    return parse_config(TeacherConfig, read_yaml(path), source=str(path))


def load_trained(
    directory: Path, config: TeacherConfig, *, dtype: str, device: torch.device, base: str | None = None
) -> tuple[Family, nn.Module]:
    """Family and trained network of a finished teacher, as `load_tuned` returns them."""

    def family_of(model: ModelConfig) -> Family:
        family = make_family(
            model,
            max_prompt_tokens=config.batches.max_prompt_tokens,
            emotions_shown=config.emotions_shown,
            tree_attention=config.batches.tree_attention,
        )
        # A teacher's prompts stay as they were in its training, and with them the lineage of its labels.
        family.separator = trained_separator(read_manifest(directory, "teacher").details, family)
        return family

    return load_tuned(directory, config, family_of, dtype=dtype, device=device, base=base)


def load_tuned(
    directory: Path,
    config: TuningConfig,
    family_of: Callable[[ModelConfig], _Family],
    *,
    dtype: str,
    device: torch.device,
    base: str | None = None,
) -> tuple[_Family, nn.Module]:
    """Family and trained network of a finished training: base with adapter, or the fully tuned model.

    `base` names an adapter's base if it has moved since the training. Raises ArtifactError if the base is a different
    one, ModelError if weights do not load.
    """
    tuned_whole = config.lora is None
    reference = str(directory / MODEL_FOLDER) if tuned_whole else base or config.model.base
    model = config.model.model_copy(update={"base": reference})
    if not tuned_whole:
        check_base(directory, reference)
    family = family_of(model)
    values = {} if tuned_whole else adapter_values(directory)  # before the base, which may take minutes
    network = load_base(model, family, dtype=DTYPES[dtype], device=device)
    return family, network if tuned_whole else load_adapter(network, directory, values, base=reference)


def adapter_values(directory: Path) -> dict[str, Any]:
    """The config of a directory's adapter. Raises ModelError if it holds no LoRA adapter in safetensors."""
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise ModelError(
            f"{directory}: no {ADAPTER_CONFIG}, expected a directory that PEFT's save_pretrained wrote"
        )
    if not (directory / ADAPTER_FILE).is_file():
        has_pickle = (directory / "adapter_model.bin").exists()
        hint = (
            "a pickled adapter_model.bin is never opened; save the adapter with safe_serialization=True"
            if has_pickle
            else "save the adapter with PEFT's save_pretrained"
        )
        raise ModelError(f"{directory}: no {ADAPTER_FILE}; {hint}")
    values = read_settings(path)
    if values.get("peft_type") != "LORA":
        raise ModelError(
            f"{path}: peft_type is {values.get('peft_type')!r}, expected 'LORA'; a teacher's adapter is made by PEFT's "
            "LoraConfig"
        )
    if refused := [key for key in _REFUSED if values.get(key) is not None]:
        raise ModelError(
            f"{path}: {refused[0]} is set, so the adapter does not act on all tokens alike, which a teacher's adapter "
            f"has to; train it without {refused[0]}"
        )
    return {**values, **_NOT_FOLLOWED}


def load_adapter(network: nn.Module, directory: Path, values: Mapping[str, Any], *, base: str) -> PeftModel:
    """The network with a directory's adapter, whose config is `values`. Raises ModelError if it does not load.

    If tokens were added for the adapter's training, the network's vocabulary grows by their rows, which the adapter has
    to hold.
    """
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in network.parameters())
    way = " partitioned over the ranks (engine=replica loads it whole)" if is_partitioned else ""
    with refusing(f"{directory}: the adapter does not load onto {base}{way}"):
        _check_sizes(directory, values)
        _fit_vocabulary(network, directory, values, base=base)
        config = PeftLoraConfig.from_peft_type(**values)
        embeddings = {module.weight for module in _embeddings(network)}
        # PEFT cannot load rows of embeddings into the parts of a partitioned one.
        with _gathered(list(embeddings), 3 if is_partitioned else 0, are_changed=True):
            return PeftModel.from_pretrained(network, str(directory), config=config)


def _embeddings(network: Any) -> tuple[nn.Module, nn.Module]:
    return network.get_input_embeddings(), network.get_output_embeddings()


def _check_sizes(directory: Path, values: Mapping[str, Any]) -> None:
    """Raise ModelError if the config asks for more than the weights hold, which PEFT would make before it looks."""
    with safe_open(directory / ADAPTER_FILE, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    rank = max(values.get("r", 0), *(values.get("rank_pattern") or {}).values(), 0)
    num_layers = sum(end - start for start, end in values.get("layer_replication") or ())
    if rank > max(itertools.chain.from_iterable(shapes)) or num_layers > len(shapes):
        raise ModelError(
            f"{directory / ADAPTER_CONFIG}: asks for rank {rank} and {num_layers} repeated layers, more than "
            f"{ADAPTER_FILE} holds; save the adapter again"
        )


def _fit_vocabulary(network: Any, directory: Path, values: Mapping[str, Any], *, base: str) -> None:
    """Give the embeddings as many rows as the adapter's have. Raises ModelError if the adapter lacks one's rows."""
    with safe_open(directory / ADAPTER_FILE, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    rows: dict[str, int] = {}  # of weights, by their names in the base
    of_base: set[str] = set()  # those that PEFT loads into the base, not into a copy beside it
    for name, shape in shapes.items():
        *path, last = name.removeprefix("base_model.model.").split(".")
        kept = [part for part in path if part not in _WRAPPERS]
        if last != "weight" or len(shape) != 2 or not kept or any("lora_" in part for part in path):
            continue
        weight = ".".join([*kept, last])
        rows[weight] = shape[0]
        is_plain = kept == path and kept[-1] not in (values.get("modules_to_save") or ())
        if is_plain or (kept != path and "modules_to_save" not in path):
            of_base.add(weight)
    held: list[int | None] = []
    wanted: set[int] = set()
    for module in _embeddings(network):
        own = {name for name, other in network.named_modules(remove_duplicate=False) if other is module}
        # Tied embeddings are one weight under two names.
        shared = {n for n, p in network.named_parameters(remove_duplicate=False) if p is module.weight}
        names = {f"{name}.weight" for name in own} | (shared & of_base)
        held.append(next((rows[name] for name in sorted(names) if name in rows), None))
        for name, (part, axis) in itertools.product(own, _ROWS_OF_PRODUCTS.items()):
            if shape := shapes.get(f"base_model.model.{name}.{part}"):
                wanted.add(shape[axis])
    num_rows = network.config.get_text_config().vocab_size
    wanted = (wanted | {number for number in held if number is not None}) - {num_rows}
    if not wanted:
        return
    if None in held or len(wanted) > 1:
        raise ModelError(
            f"{directory}: was trained with {max(wanted)} rows of embeddings, whereas {base} has {num_rows}, and does "
            "not hold these rows for both embeddings; save the adapter with save_embedding_layers=True, or add the "
            "tokens to the base, save it, and name that as the base"
        )
    # The new rows are the adapter's, so their first values do not matter.
    network.resize_token_embeddings(wanted.pop(), mean_resizing=False)


def check_base(directory: Path, base: str) -> None:
    """Raise ArtifactError if the base model is not the one that the adapter was trained on."""
    expected = read_manifest(directory).inputs["base"]
    if (Path(base) / MANIFEST_NAME).is_file():
        # The checksum of such a base is that of its manifest, so the files have to agree with the manifest.
        read_verified_manifest(Path(base), "base-model")
    if (found := input_checksums(base=base)["base"]) != expected:
        raise ArtifactError(
            f"{directory}: its adapter was trained on a base with checksum {expected[:12]}…, but {base} has "
            f"{found[:12]}…; restore the original base, or train the teacher again"
        )


def _gathered(
    parameters: list[nn.Parameter], zero_stage: int, *, are_changed: bool = False
) -> AbstractContextManager[Any]:
    """Parameters as whole tensors: outside such a block, ZeRO-3 leaves empty ones, which would be saved as such.

    Changes are lost at the end of the block unless `are_changed`, which keeps those of rank 0.
    """
    if zero_stage != 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if are_changed else None)


def _save_adapter(model: PeftModel, directory: Path, runtime: Runtime, *, zero_stage: int) -> None:
    with _gathered(trainable_parameters(model), zero_stage):
        if not runtime.is_main:
            return
        tensors = {
            # A copy, since ZeRO-3 frees the gathered tensors when the block ends.
            name: tensor.detach().to("cpu", copy=True).contiguous()
            # Without the frozen embeddings, which PEFT would add if their layers have adapters.
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
    check_adapter(tensors, directory)
    with atomic_path(directory / ADAPTER_FILE) as temporary:
        save_file(tensors, temporary)
    # Read back, so that an adapter that cannot be loaded fails here, not in an export hours later.
    check_adapter(load_file(directory / ADAPTER_FILE), directory)
    peft_config = model.peft_config["default"]
    # In the file it makes an adapter load frozen; in memory it is reset, since the training may continue.
    peft_config.inference_mode = True
    save_pretrained([peft_config], directory)
    peft_config.inference_mode = False


def _save_model(model: nn.Module, directory: Path, runtime: Runtime, *, zero_stage: int) -> None:
    # Not every buffer: rotary frequencies, for one, are computed anew at each load.
    stored = set(model.state_dict())
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        # One at a time, so that only rank 0's main memory ever holds the whole model.
        with _gathered([parameter], zero_stage):
            if runtime.is_main:
                tensors[name] = parameter.detach().to("cpu", copy=True).contiguous()
    if not runtime.is_main:
        return
    tensors |= {name: b.detach().to("cpu", copy=True) for name, b in model.named_buffers() if name in stored}
    _check_tensors(tensors.items(), directory)
    # The training switched it off (`start_engine`), but a saved model should generate at full speed.
    use_cache, model.config.use_cache = model.config.use_cache, True
    # Keep the names: a model that was loaded partitioned would undo the renaming of old checkpoints (LayerNorm.gamma).
    save_pretrained([model], directory, state_dict=tensors, save_original_format=False)
    model.config.use_cache = use_cache
    _check_written(tensors, directory)


def _check_written(tensors: Mapping[str, Tensor], directory: Path) -> None:
    written: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                written.add(name)
                _check_tensors([(name, file.get_tensor(name))], directory)
    if missing := set(tensors) - written:
        raise TrainingError(
            f"{directory}: {len(missing)} tensors were not written, among them {min(missing)}"
        )


def _check_tensors(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    tensors = list(tensors)
    if not tensors or any(tensor.numel() == 0 for _, tensor in tensors):
        raise TrainingError(
            f"{directory}: some weights are empty tensors, because their parts were not gathered"
        )
    if any(tensor.is_floating_point() and not torch.isfinite(tensor).all() for _, tensor in tensors):
        raise TrainingError(f"{directory}: some weights are not finite; lower optimization.learning_rate")
