"""The plan's memory: traces against real CPU runs, states against DeepSpeed, counts against published ones."""

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoConfig, BertConfig, LlamaConfig, RobertaConfig, T5Config

from kdecs.corpus.pairs import Pair
from kdecs.errors import ModelError
from kdecs.runtime import Runtime
from kdecs.teacher.config import LoraConfig
from kdecs.teacher.families import Family
from kdecs.teacher.network import TeacherNetwork, add_lora, connective_loss, meta_network
from kdecs.teacher.plan.activations import Activations, ActivationTracer, Shape, TensorMemory, TreeKind
from kdecs.teacher.plan.memory import PERSISTENCE_THRESHOLD, ZeroChoice, peak_memory, state_bytes
from kdecs.teacher.plan.search import full_tree
from kdecs.teacher.plan.shapes import (
    ParameterCounts,
    count_parameters,
    resolve_architecture,
    shipped_name,
    shipped_names,
)
from kdecs.teacher.tree.prefix_tree import pack

MIB = 2**20
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "t5-large": 737_668_096,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "smollm2-135m": 134_515_008,
}


def test_storages_are_counted_while_they_live() -> None:
    kept = torch.zeros(MIB // 4)
    with TensorMemory([kept]) as memory:
        a = kept + 1
        assert memory.live_bytes == MIB
        b = a.view(2, -1)  # a view of the same storage
        assert memory.live_bytes == MIB
        c = b * 2
        del a, b
        assert memory.live_bytes == MIB
        del c
    assert (memory.live_bytes, memory.peak_bytes) == (0, 2 * MIB)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_architectures_have_the_published_size(name: str) -> None:
    network = meta_network(resolve_architecture(name).config, None)
    counts = count_parameters(network, persistence_threshold=0)
    assert counts.total == network.num_parameters() == PUBLISHED[name]
    assert counts.trained == counts.total
    assert all(parameter.is_meta for parameter in network.parameters())


def test_every_shipped_architecture_is_checked() -> None:
    assert set(PUBLISHED) == set(shipped_names())


def test_names_are_matched() -> None:
    assert shipped_name("huggyllama/llama-7b") == "llama-7b"
    assert shipped_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "smollm2-135m"
    with pytest.raises(ModelError, match="nor one of the shipped architectures"):
        resolve_architecture("someone/something")


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 2_000_000), ("hidden_size", 10**12), ("vocab_size", 10**15)]
)
def test_a_config_that_no_model_has_is_refused(tmp_path: Path, key: str, value: int) -> None:
    """A plan needs no weights, whose number would bound the network."""
    values = json.loads((files("kdecs.teacher") / "architectures" / "llama-7b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, key: value}))
    with pytest.raises(ModelError, match=f"{key} is {value:,}, expected at most"):
        resolve_architecture(str(tmp_path))


def test_lora_counts_are_pefts() -> None:
    counts = count_parameters(
        meta_network(resolve_architecture("llama-7b").config, LoraConfig(rank=16)), persistence_threshold=0
    )
    # Hu et al.: rank × (inputs + outputs) of q, k, v, o (4096, 4096) and gate, up, down (4096, 11008).
    assert counts.trained == 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert counts.frozen == PUBLISHED["llama-7b"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "use_tree"), [("causal", True), ("causal", False), ("seq2seq", False), ("masked", False)]
)
def test_a_trace_on_meta_is_what_a_real_forward_holds(
    name: str,
    use_tree: bool,
    checkpointing: bool,
    families: Callable[[str], Family],
    bases: Callable[[str], Any],
    some_pairs: list[Pair],
    runtime: Runtime,
) -> None:
    """The family's own forward and backward on the CPU, tensors counted alike."""
    family = families(name)
    base = family.load_network(str(bases(name)), dtype=torch.float32)
    base.config.use_cache = False
    if checkpointing:
        base.activation_checkpointing_enable()
        base.enable_input_require_grads()
    teacher = TeacherNetwork(
        family, add_lora(base, LoraConfig(rank=4), family.lora_task), use_tree=use_tree, device=runtime.device
    ).train()
    prompts = [family.encode(pair) for pair in some_pairs[:12]]
    with TensorMemory([*teacher.parameters(), *teacher.buffers()]) as memory:
        for parameter in teacher.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: memory.release(p.grad))
        connective_loss(teacher(prompts), torch.zeros(len(prompts), dtype=torch.bool)).backward()

    tree = pack([prompt.tokens for prompt in prompts])
    longest = max(len(prompt.tokens) for prompt in prompts)
    shape = (
        Shape(1, tree.num_tokens, len(prompts), tree)
        if use_tree
        else Shape(len(prompts), longest, len(prompts))
    )
    config = AutoConfig.from_pretrained(bases(name))
    tracer = ActivationTracer(config, LoraConfig(rank=4), dtype=torch.float32, attention="blocks")
    deep, deeper = (tracer.memory_at_depth(shape, depth, checkpointing=checkpointing) for depth in (3, 4))
    planned = deep.peak_bytes - (deeper.peak_bytes - deep.peak_bytes)  # the base has two layers
    assert memory.peak_bytes == pytest.approx(planned, rel=0.02)


CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=3,
    ),
    "roberta": RobertaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=7, num_attention_heads=6
    ),
    "bert": BertConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=7, num_attention_heads=6),
    "t5": T5Config(d_model=96, d_kv=16, d_ff=256, num_layers=7, num_heads=6),
}
# Each case traces a network: two of the four architectures run with the long tests.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in ("bert", "t5") else name for name in CONFIGS]


@cache
def tracer_of(name: str, *, full: bool = False, attention: TreeKind = "flex") -> ActivationTracer:
    """A tracer, whose networks serve every test."""
    lora = None if full else LoraConfig()
    return ActivationTracer(CONFIGS[name], lora, dtype=torch.bfloat16, attention=attention)


TREE = Shape(1, 1024, 40, full_tree(1024, 256))


@cache
def memory_of_tree(*, full: bool, attention: TreeKind, checkpointing: bool) -> Activations:
    """The traced memory of TREE in the LLaMA network."""
    return tracer_of("llama", full=full, attention=attention).memory(TREE, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_depth_lies_on_the_line_of_two(name: str, full: bool, checkpointing: bool) -> None:
    tracer = tracer_of(name, full=full)
    shape = TREE if name == "llama" else Shape(8, 256, 8)
    whole = tracer.memory_at_depth(shape, tracer.config.num_hidden_layers, checkpointing=checkpointing)
    if name == "llama":
        line = memory_of_tree(full=full, attention="flex", checkpointing=checkpointing)
    else:
        line = tracer.memory(shape, checkpointing=checkpointing)
    assert line.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    assert line.backward_end_bytes == pytest.approx(whole.backward_end_bytes, rel=0.01)
    assert line.launches == pytest.approx(whole.launches, rel=0.01)


@pytest.mark.parametrize("kind", ["flex", "mask", "blocks"])
def test_only_flex_grows_with_the_tokens_alone(kind: TreeKind) -> None:
    tracer = tracer_of("llama", attention=kind)
    small, large = (
        tracer.memory(Shape(1, n, n // 16, full_tree(n, n // 2)), checkpointing=False) for n in (1024, 4096)
    )
    ratio = large.peak_bytes / small.peak_bytes
    if kind == "flex":
        assert ratio == pytest.approx(4.0, rel=0.01)
    else:
        assert ratio > 4.5


def test_checkpointing_holds_less_and_flex_less_than_a_mask() -> None:
    peaks = {
        (kind, checkpointing): memory_of_tree(
            full=False, attention=kind, checkpointing=checkpointing
        ).peak_bytes
        for kind in ("flex", "mask")
        for checkpointing in (False, True)
    }
    assert peaks["flex", True] < peaks["flex", False] < peaks["mask", False]
    assert peaks["mask", True] < peaks["mask", False]


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_full_tuning_states_are_deepspeeds_estimate(ranks: int) -> None:
    """bfloat16: 2 weights, 2 gradients, 4 master, 8 moments, and 4 for the step's fp32 gradients, a parameter."""
    network = meta_network(resolve_architecture("roberta-large").config, None)
    counts = count_parameters(network, persistence_threshold=PERSISTENCE_THRESHOLD)
    states = {stage: state_bytes(counts, ZeroChoice(stage, ranks, "bfloat16")) for stage in (2, 3)}
    fp32_gradients = 4 * counts.trained / ranks
    _, zero2 = estimate_zero2_model_states_mem_needs(counts.total, num_gpus_per_node=ranks, cpu_offload=False)
    assert states[2].held + fp32_gradients == pytest.approx(zero2, rel=1e-6)
    _, zero3, _ = estimate_zero3_model_states_mem_needs(
        counts.total, counts.largest_module, num_gpus_per_node=ranks, cpu_offload=False
    )
    # Its 18 bytes a parameter are our 16 that stand and half of the step's 4; its largest layer is live beside them.
    zero3 -= 4 * counts.largest_module
    assert states[3].held < zero3 < states[3].held + fp32_gradients
    assert states[3].held + fp32_gradients / 2 == pytest.approx(zero3, rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 4])
def test_offloaded_states_leave_the_device_as_deepspeed_estimates(ranks: int) -> None:
    network = meta_network(resolve_architecture("roberta-base").config, None)
    counts = count_parameters(network, persistence_threshold=PERSISTENCE_THRESHOLD)
    offloaded = state_bytes(counts, ZeroChoice(2, ranks, "bfloat16", offload_optimizer=True))
    _, zero2 = estimate_zero2_model_states_mem_needs(counts.total, num_gpus_per_node=ranks, cpu_offload=True)
    assert offloaded.held == pytest.approx(zero2, rel=1e-6)
    everything = state_bytes(
        counts, ZeroChoice(3, ranks, "bfloat16", offload_optimizer=True, offload_parameters=True)
    )
    assert everything.held == 0
    assert everything.host >= 16 * counts.total / ranks


def test_a_frozen_base_has_no_states() -> None:
    counts = count_parameters(
        meta_network(resolve_architecture("llama-7b").config, LoraConfig()), persistence_threshold=0
    )
    by_stage = [state_bytes(counts, ZeroChoice(stage, 4, "bfloat16")) for stage in range(4)]
    assert [states.weights for states in by_stage[:3]] == [2 * counts.frozen] * 3
    assert by_stage[3].weights == pytest.approx(counts.frozen / 2)
    assert [states.optimizer for states in by_stage] == [12 * counts.trained] + [3 * counts.trained] * 3
    in_4bit = state_bytes(counts, ZeroChoice(2, 4, "bfloat16"), in_4bit=True)
    assert 0.25 < in_4bit.weights / by_stage[2].weights < 0.3


def test_what_zero3_fetches_ahead_stands_twice() -> None:
    small_model = ParameterCounts(
        frozen=47_000_000, trained=1_200_000, frozen_linear=0, small=200_000, largest_module=19_000_000
    )
    large_model = ParameterCounts(
        frozen=6_700_000_000, trained=40_000_000, frozen_linear=0, small=300_000, largest_module=131_000_000
    )
    for counts, whole, twice in (
        (small_model, 48_200_000, 48_000_000),  # one batch takes all but the small ones
        (large_model, 1_000_300_000, 181_000_000),
    ):
        gathered = state_bytes(counts, ZeroChoice(3, 2, "bfloat16")).gathered
        assert gathered == 2 * (whole + twice)
        assert state_bytes(counts, ZeroChoice(3, 1, "bfloat16")).gathered == 0
        assert state_bytes(counts, ZeroChoice(2, 2, "bfloat16")).gathered == 0


@pytest.mark.parametrize(
    ("stage", "is_gpu", "activations", "expected"),
    [
        (2, True, (300, 120), 300 + 2_000_000_000),  # the whole bucket at any time
        (2, False, (300, 120), 300),  # nothing of it at the start
        (2, False, (300, 220), 220 + 4 * 25),  # all gradients at the end
        (3, False, (300, 220), 300 + 4 * 25),  # filled by the step before
    ],
)
def test_a_bucket_costs_a_cpu_what_was_written_to_it(
    stage: int, is_gpu: bool, activations: tuple[int, int], expected: int
) -> None:
    counts = ParameterCounts(frozen=0, trained=25, frozen_linear=0, small=0, largest_module=25)
    states = state_bytes(counts, ZeroChoice(stage, 1, "float32"), is_gpu=is_gpu)
    memory = peak_memory(states, Activations(*activations, launches=0))
    assert memory.total - states.held == expected
