"""What a training takes of a device: the plan's own figure, and DeepSpeed's engine over the same micro-batches."""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor

from kdecs.config import parse_config
from kdecs.runtime import Runtime, process_group
from kdecs.teacher.config import LoraConfig, TeacherConfig
from kdecs.teacher.engine import deepspeed_config
from kdecs.teacher.families import EncodedPrompt
from kdecs.teacher.network import TeacherNetwork, connective_loss, meta_network, trainable_parameters
from kdecs.teacher.plan.activations import ActivationTracer, Shape
from kdecs.teacher.plan.memory import PERSISTENCE_THRESHOLD, PeakMemory, ZeroChoice, peak_memory, state_bytes
from kdecs.teacher.plan.shapes import count_parameters
from kdecs.teacher.tree.attention import resolve
from kdecs.teacher.tree.prefix_tree import pack

STAGE = 2
TOLERANCE = 0.10


def planned_peak(
    teacher: TeacherNetwork, batches: Sequence[tuple[list[EncodedPrompt], Tensor]], *, checkpointing: bool
) -> PeakMemory:
    """What `kdecs plan` counts for LoRA in bfloat16 on one rank, for the largest of these micro-batches."""
    base: Any = teacher.network
    model = base.get_base_model()
    trees = [(pack([prompt.tokens for prompt in prompts]), len(prompts)) for prompts, _ in batches]
    tree, answers = max(trees, key=lambda entry: entry[0].num_tokens)
    attention = resolve("auto", model, teacher.device)
    tracer = ActivationTracer(model.config, LoraConfig(), dtype=torch.bfloat16, attention=attention)
    shape = Shape(rows=1, tokens=tree.num_tokens, answers=answers, tree=tree)
    activations = tracer.memory(shape, checkpointing=checkpointing)
    counts = count_parameters(
        meta_network(model.config, LoraConfig()), persistence_threshold=PERSISTENCE_THRESHOLD
    )
    is_gpu = teacher.device.type == "cuda"
    return peak_memory(
        state_bytes(counts, ZeroChoice(STAGE, 1, "bfloat16"), is_gpu=is_gpu),
        activations,
    )


def measured_peak(
    teacher: TeacherNetwork, batches: Sequence[tuple[list[EncodedPrompt], Tensor]]
) -> tuple[int, float]:
    """Bytes that two steps of the teacher's engine have allocated at most (0 where the device does not count
    them), and the last step's loss. The network's trained parameters belong to the engine from then on."""
    is_gpu = teacher.device.type == "cuda"
    values = {
        "name": "peak",
        "output": "peak",
        "corpus": {"train": "none.json", "valid": "none.json"},
        "model": {"family": "causal", "base": "none"},
        "zero": {"stage": STAGE, "dtype": "bfloat16"},
    }
    config = parse_config(TeacherConfig, values, source="gpu_teacher")
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=teacher.device)
    with process_group(runtime, single=True):
        engine, *_ = deepspeed.initialize(
            model=teacher.train(),
            optimizer=torch.optim.AdamW(trainable_parameters(teacher), lr=0.0),
            config=deepspeed_config(config, world_size=1, accumulation_steps=len(batches)),
        )
        if is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        num_pairs = sum(len(prompts) for prompts, _ in batches)
        for _ in range(2):  # the first step makes the optimizer's states
            total = 0.0
            for number, (prompts, is_cause_P) in enumerate(batches):
                engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
                loss = connective_loss(engine(prompts), is_cause_P)
                total += float(loss.detach())
                engine.backward(loss / num_pairs, scale_wrt_gas=False)
            engine.step()
        peak = int(torch.cuda.max_memory_allocated()) if is_gpu else 0
        engine.destroy()
    return peak, total / num_pairs


def check_peak(shape: str, planned: PeakMemory, measured: float) -> None:
    """Exit with a line that cannot be overlooked where the plan is more than a tenth beside the measured peak."""
    if abs(planned.total / measured - 1) > TOLERANCE:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(planned).items() if value)
        raise SystemExit(
            f"{shape}: the plan says {planned.total / 2**30:.2f} GiB, the engine took {measured / 2**30:.2f}: "
            f"{planned.total / measured:.3f} of it, allowed are {1 - TOLERANCE:g} to {1 + TOLERANCE:g} ({parts})"
        )
