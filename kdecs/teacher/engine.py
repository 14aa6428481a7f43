"""What is seen of a model before it is trained or believed: is it what the config says, does it compute what we ask.

A tree, and the answer words' rows of the head, are short ways to a model's own logits. Not every architecture allows
them: each model in hand is asked both ways once.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig

from kdecs.corpus.pairs import Pair
from kdecs.errors import ConfigError, DependencyError, DeviceError, ModelError
from kdecs.models import first_line, why_not_loaded
from kdecs.runtime import Runtime, any_rank
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import EncodedPrompt, Family
from kdecs.teacher.network import DTYPES, TeacherNetwork, add_lora, family_of, load_base, trainable_parameters
from kdecs.teacher.tree.prefix_tree import tree_size


def deepspeed_config(config: TeacherConfig, *, world_size: int, accumulation_steps: int) -> dict[str, Any]:
    """DeepSpeed's settings. A micro-batch counts as one sample: our own loss scaling knows the pairs.

    `accumulation_steps` is the most that any step needs: buffers are laid out for it, each step then takes as many
    as its own batch fills.
    """
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


def check_device(config: TeacherConfig, device: torch.device) -> None:
    """Raise DeviceError or DependencyError, one line, for what this device cannot do."""
    if device.type != "cuda" and config.zero.dtype == "float16":
        raise DeviceError("zero.dtype float16 needs a GPU, this rank has none; use bfloat16 or float32")
    if not config.model.load_in_4bit:
        return
    if device.type != "cuda":
        raise DeviceError("model.load_in_4bit needs a GPU, this rank has none; leave it out, or use bfloat16")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError(
            "model.load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes"
        )


def join_deepspeed(runtime: Runtime) -> None:
    """DeepSpeed's communication over the process group, with nothing left in shared memory. Collective.

    On CPUs each rank of DeepSpeed's launcher maps a file of 66 MiB in /dev/shm for all-reduces and never unlinks it: it
    would take memory until the machine restarts. Once every rank has mapped all of them the names are not needed.
    """
    deepspeed.init_distributed(dist_backend="nccl" if runtime.device.type == "cuda" else "gloo")
    if dist.get_world_size() > 1:
        dist.barrier()
    place = f"{os.getuid()}_{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{place}_{dist.get_rank()}").unlink(missing_ok=True)


def start_engine(config: TeacherConfig, family: Family, runtime: Runtime, accumulation_steps: int) -> Any:
    """Load the base, add LoRA, and wrap both in a DeepSpeed engine that computes pair by pair. Collective.

    Under ZeRO-3 the base is loaded partitioned: no rank ever holds all of it.
    """
    settings = deepspeed_config(config, world_size=runtime.world_size, accumulation_steps=accumulation_steps)
    # The partitioned load below asks DeepSpeed for the number of ranks, before there is an engine.
    join_deepspeed(runtime)
    # Transformers looks for a live HfDeepSpeedConfig while it loads; only a weak reference is kept there.
    partitioned = HfDeepSpeedConfig(settings) if config.zero.stage == 3 else None
    base = load_base(
        config.model,
        family,
        dtype=DTYPES[config.zero.dtype],
        device=runtime.device,
        new_head=config.lora is None,
    )
    del partitioned
    base.config.use_cache = False
    if config.zero.activation_checkpointing:
        base.activation_checkpointing_enable()
        base.enable_input_require_grads()
    tuned = base if config.lora is None else add_lora(base, config.lora, family.lora_task)
    network = TeacherNetwork(family, tuned, use_tree=False, device=runtime.device)
    optimizer = torch.optim.AdamW(
        trainable_parameters(network),
        lr=config.optimization.learning_rate,
        weight_decay=config.optimization.weight_decay,
    )
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    return engine


OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet"}
"""Model types whose first position is the padding token's id + 1."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Two ways to one logit, as a share of the largest. bfloat16 keeps 8 bits and sums of other orders differ by 1 or 2%
after some dozen layers; a wrong mask moves logits by a fifth and more."""
LOGIT_KEYS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")
NUM_PROBES = 8


def check_config(base: str, family: str, max_prompt_tokens: int) -> None:
    """Raise ModelError for a base of another family, ConfigError where prompts may outgrow its positions.

    Reads the base's config alone.
    """
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {base}: its config cannot be read: {why_not_loaded(base, error)}") from None
    check_family(config, base, family)
    check_positions(config, base, max_prompt_tokens)


def check_family(config: Any, base: str, family: str) -> None:
    """Raise ModelError where a Transformers config is not of the family that a teacher's config names."""
    if (found := family_of(config)) != family:
        raise ModelError(f"model {base}: is {found}, the config says model.family={family}")


def check_positions(config: Any, base: str, max_prompt_tokens: int) -> None:
    """Raise ConfigError where prompts may be longer than the model has positions for.

    Models with relative positions alone (T5) name no limit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type in OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    if max_prompt_tokens > positions:
        raise ConfigError(
            f"batches.max_prompt_tokens: prompts of up to {max_prompt_tokens} tokens, but model {base} has "
            f"{positions} positions; set batches.max_prompt_tokens={positions}"
        )


def tree_probes(
    pairs: Sequence[Pair], prompts: Sequence[EncodedPrompt], *, max_tokens: int
) -> list[EncodedPrompt]:
    """The longest prompt of all, and others of its dialogue, from the first target to the last: a tree that branches.

    Their tree is of at most `max_tokens`, or the longest prompt alone.
    """
    longest = max(range(len(prompts)), key=lambda n: len(prompts[n].tokens))
    dialogue = pairs[longest].dialogue.id
    others = [n for n in range(len(pairs)) if pairs[n].dialogue.id == dialogue and n != longest]
    places = np.linspace(0, len(others) - 1, min(NUM_PROBES - 1, len(others))).round().astype(int)
    probes = [prompts[longest]]
    for place in places:
        more = [*probes, prompts[others[place]]]
        if tree_size([prompt.tokens for prompt in more]) <= max_tokens:
            probes = more
    return probes


@torch.no_grad()
def tree_is_exact(
    ask: Callable[[Sequence[EncodedPrompt]], Tensor],
    teacher: TeacherNetwork,
    prompts: Sequence[EncodedPrompt],
    runtime: Runtime,
) -> bool:
    """Whether a tree gives the logits of its prompts one by one, for the model in hand; the same on every rank.

    Not every decoder takes a 4-D mask and explicit positions (ALiBi, sliding windows shorter than the prompts).
    `ask` runs the teacher (its engine's forward, where parameters are partitioned). Collective. A device without
    memory for the tree is no verdict: torch.OutOfMemoryError is raised.
    """
    teacher.use_tree = True
    packed_PA: Tensor | None = None
    try:
        packed_PA = ask(prompts).float()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError):
        pass
    finally:
        teacher.use_tree = False
    if any_rank(packed_PA is None, runtime) or packed_PA is None:
        return False
    single_PA = torch.cat([ask([prompt]) for prompt in prompts]).float()
    return not any_rank(not _are_close(packed_PA, single_PA, teacher), runtime)


@torch.no_grad()
def check_head(ask: Callable[..., Tensor], teacher: TeacherNetwork, prompt: EncodedPrompt, base: str) -> None:
    """Raise ModelError where a model's own logits are not those of its output embedding's rows.

    One prompt through the whole model: Granite and Cohere scale logits after the head, Gemma 2 caps them, which
    rows of the head alone would miss. Collective where `ask` is (its engine's forward, under ZeRO-3 too).
    """
    try:
        own_V, raw_V = ask([prompt], by_model=True).float()
        ours_A = ask([prompt]).float()[0]
    except (ValueError, TypeError) as error:
        raise ModelError(f"model {base}: does not run as a teacher: {first_line(error)}") from None
    # The head's output as it left the head: equal to the bit, whatever the precision.
    is_same = bool(torch.isclose(own_V, raw_V, rtol=0, atol=0, equal_nan=True).all())
    if is_same and _are_close(ours_A, own_V[teacher.family.answer_ids], teacher):
        return
    config = getattr(teacher.network, "config", None)
    keys = [key for key in LOGIT_KEYS if getattr(config, key, None) not in (None, 1, 1.0)]
    raise ModelError(
        f"model {base}: changes its logits after the output embedding ({', '.join(keys) or 'by an unknown setting'}), "
        "which a teacher reads directly; choose another model"
    )


def _are_close(ours: Tensor, expected: Tensor, teacher: TeacherNetwork) -> bool:
    dtype = next(teacher.network.parameters()).dtype
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])  # 4 bits are stored as bytes
    difference = (ours - expected).abs().max()
    return bool(difference <= tolerance * expected.abs().max())
