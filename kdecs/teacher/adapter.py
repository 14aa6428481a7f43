"""Teacher directories: a PEFT adapter, its tokenizer, and the manifest that names the base by checksum.

adapter_model.safetensors, adapter_config.json   as PEFT writes and reads them
tokenizer files                                  as Transformers writes them
config.json                                      the resolved TeacherConfig
metrics.jsonl                                    training loss and validation scores
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdecs.artifact import MANIFEST_NAME, atomic_path, check_whole, read_manifest
from kdecs.config import input_checksums, parse_config, read_yaml
from kdecs.errors import ArtifactError, TrainingError
from kdecs.runtime import Runtime
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.network import trainable_parameters

ADAPTER_FILE = "adapter_model.safetensors"


def save_adapter(model: PeftModel, directory: Path, runtime: Runtime, *, zero_stage: int) -> None:
    """Write the whole adapter from rank 0. Collective: ZeRO-3's parts are gathered on every rank."""
    parameters = trainable_parameters(model)
    gathered = deepspeed.zero.GatheredParameters(parameters) if zero_stage == 3 else nullcontext()
    with gathered:
        if not runtime.is_main:
            return
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in get_peft_model_state_dict(model).items()
        }
    check_adapter(tensors, directory)
    with atomic_path(directory / ADAPTER_FILE) as temporary:
        save_file(tensors, temporary)
    check_adapter(load_file(directory / ADAPTER_FILE), directory)
    peft_config = model.peft_config["default"]
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(directory))
    peft_config.inference_mode = False


def check_adapter(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Raise TrainingError for an adapter that is empty, not finite, or was never moved (every B is zero)."""
    if not tensors or any(tensor.numel() == 0 for tensor in tensors.values()):
        raise TrainingError(f"{directory}: the adapter holds empty tensors, its parts were not gathered")
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise TrainingError(f"{directory}: the adapter holds values that are not finite")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name):
        raise TrainingError(f"{directory}: every lora_B is zero, so the adapter does nothing")


def read_teacher_config(directory: Path) -> TeacherConfig:
    """The resolved config of a finished teacher. Raises ArtifactError or ConfigError, one line."""
    read_manifest(directory, "teacher")
    path = directory / "config.json"
    return parse_config(TeacherConfig, read_yaml(path), source=str(path))


def check_base(directory: Path, base: str) -> None:
    """Raise ArtifactError where the base model is not the one that the adapter was trained on."""
    expected = read_manifest(directory, "teacher").inputs["base"]
    if (Path(base) / MANIFEST_NAME).is_file():
        check_whole(Path(base), "base-model")  # its manifest stands for it, so the files must agree with that
    if (found := input_checksums(base=base)["base"]) != expected:
        raise ArtifactError(
            f"{directory}: its adapter was trained on a base with checksum {expected[:12]}…, "
            f"{base} has {found[:12]}…; put the original base back or train the teacher again"
        )
