"""The DeepSpeed engine that trains a teacher: its settings, and the network wrapped in it.

This module and `checkpoint` alone import DeepSpeed at the top: scoring and planning work without it.
"""

import importlib.util
from typing import Any

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from kdecs.errors import DependencyError, DeviceError
from kdecs.runtime import Runtime
from kdecs.teacher.config import TuningConfig
from kdecs.teacher.families import Family
from kdecs.teacher.network import DTYPES, TeacherNetwork, add_lora, load_base, trainable_parameters


def deepspeed_config(config: TuningConfig, *, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """DeepSpeed's settings. A micro-batch counts as one sample, since our own loss scaling counts the pairs.

    `accumulation_steps` is the most that any step needs: DeepSpeed sizes its buffers by it, and each step then takes
    as many micro-batches as its own batch fills.
    """
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        # DeepSpeed insists that these three agree.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": world_size * accumulation_steps,
        "gradient_clipping": config.optimization.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.zero.dtype == "bfloat16"},
        "fp16": {"enabled": config.zero.dtype == "float16"},
        # torch's AdamW serves every stage, so that nothing has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # In effect never: the training prints its own lines.
        "steps_per_print": 1_000_000,
        "wall_clock_breakdown": False,
    }


def check_device(config: TuningConfig, device: torch.device) -> None:
    """Raise DeviceError or DependencyError if this device cannot train at the config's precision."""
    if device.type != "cuda" and config.zero.dtype == "float16":
        raise DeviceError(
            "zero.dtype float16 needs a GPU, but this rank has none; set zero.dtype to bfloat16 or float32"
        )
    if not config.model.load_in_4bit:
        return
    if device.type != "cuda":
        raise DeviceError(
            "model.load_in_4bit needs a GPU, but this rank has none; set model.load_in_4bit=false"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError(
            "model.load_in_4bit needs bitsandbytes, which is not installed; run: pip install bitsandbytes"
        )


def join_deepspeed(runtime: Runtime) -> None:
    """Start DeepSpeed's communication over the process group, with nothing to compile. Collective."""
    # For CPU ranks DeepSpeed would compile a helper of its tensor-parallel inference: minutes of g++ in the first job
    # on a machine, a lock that later jobs wait for if that one is killed, and 66 MiB of /dev/shm per rank until the
    # machine restarts. No training or export uses it, and DeepSpeed does without an op that is not in this mapping.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if runtime.device.type == "cuda" else "gloo")


def start_engine(
    config: TuningConfig,
    family: Family,
    runtime: Runtime,
    accumulation_steps: int,
    network_class: type[TeacherNetwork] = TeacherNetwork,
) -> Any:
    """Load the base, add LoRA, and wrap both in a DeepSpeed engine, which computes single prompts at first. Collective.

    Under ZeRO-3 the base is loaded partitioned: no rank ever holds all of it.
    """
    settings = deepspeed_config(config, world_size=runtime.world_size, accumulation_steps=accumulation_steps)
    # Before there is an engine, the partitioned load below asks DeepSpeed for the number of ranks.
    join_deepspeed(runtime)
    # Transformers loads partitioned while an HfDeepSpeedConfig is alive, and holds only a weak reference to it.
    partitioned = HfDeepSpeedConfig(settings) if config.zero.stage == 3 else None
    base = load_base(
        config.model,
        family,
        dtype=DTYPES[config.zero.dtype],
        device=runtime.device,
        new_head=config.lora is None,
    )
    del partitioned
    # Keys and values are kept for generation only, which a training never does.
    base.config.use_cache = False
    if config.zero.activation_checkpointing:
        base.activation_checkpointing_enable()
        # A recomputed layer needs an input with a gradient, and the embeddings of a frozen base give none.
        base.enable_input_require_grads()
    tuned = base if config.lora is None else add_lora(base, config.lora, family.lora_task)
    network = network_class(family, tuned, use_tree=False, device=runtime.device)
    optimizer = torch.optim.AdamW(
        trainable_parameters(network),
        lr=config.optimization.learning_rate,
        weight_decay=config.optimization.weight_decay,
        # On a GPU torch's own choice is fast; on a CPU it would pass over all weights once per operation.
        fused=True if runtime.device.type == "cpu" else None,
    )
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    return engine
