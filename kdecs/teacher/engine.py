"""From a teacher's config to a DeepSpeed engine: ZeRO settings, loading, adapters, optimizer."""

from typing import Any

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from kdecs.runtime import Runtime
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import Family
from kdecs.teacher.network import DTYPES, TeacherNetwork, add_lora, trainable_parameters


def deepspeed_config(config: TeacherConfig, *, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """DeepSpeed's settings. A micro-batch counts as one sample: our own loss scaling knows the pairs."""
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": world_size * accumulation_steps,
        "gradient_clipping": config.optimization.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.zero.dtype == "bfloat16"},
        "fp16": {"enabled": config.zero.dtype == "float16"},
        # torch's AdamW is used at every stage: nothing has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
        "wall_clock_breakdown": False,
    }


def start_engine(config: TeacherConfig, family: Family, runtime: Runtime, accumulation_steps: int) -> Any:
    """Load the base, add LoRA, and wrap both in a DeepSpeed engine that computes pair by pair. Collective.

    Under ZeRO-3 the base is loaded partitioned: no rank ever holds all of it.
    """
    settings = deepspeed_config(config, world_size=runtime.world_size, accumulation_steps=accumulation_steps)
    # The partitioned load below asks DeepSpeed for the number of ranks, before there is an engine.
    deepspeed.init_distributed(dist_backend="nccl" if runtime.device.type == "cuda" else "gloo")
    # Transformers looks for a live HfDeepSpeedConfig while it loads; only a weak reference is kept there.
    partitioned = HfDeepSpeedConfig(settings) if config.zero.stage == 3 else None
    base = family.load_network(config.model.base, dtype=DTYPES[config.zero.dtype])
    del partitioned
    base.config.use_cache = False
    if config.zero.activation_checkpointing:
        base.activation_checkpointing_enable()
        base.enable_input_require_grads()
    adapted = add_lora(base, config.lora, family.lora_task)
    network = TeacherNetwork(family, adapted, use_tree=False, device=runtime.device)
    optimizer = torch.optim.AdamW(
        trainable_parameters(network),
        lr=config.optimization.learning_rate,
        weight_decay=config.optimization.weight_decay,
    )
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    return engine
