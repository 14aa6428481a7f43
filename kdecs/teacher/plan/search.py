"""All the ways in which a teacher could be trained on given GPUs, each with its memory and time, the fastest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from kdecs.corpus.pairs import Pair
from kdecs.teacher.config import LoraConfig, TeacherConfig
from kdecs.teacher.families import EncodedPrompt
from kdecs.teacher.metering import NetworkFlops, network_flops
from kdecs.teacher.network import meta_network
from kdecs.teacher.plan.activations import Activations, ActivationTracer, Shape, TreeKind, between
from kdecs.teacher.plan.memory import PERSISTENCE_THRESHOLD, PeakMemory, ZeroChoice, peak_memory, state_bytes
from kdecs.teacher.plan.shapes import (
    DTYPE_BYTES,
    TORCH_DTYPES,
    Architecture,
    ParameterCounts,
    count_parameters,
)
from kdecs.teacher.plan.workload import Workload, measure_workload
from kdecs.teacher.tree.prefix_tree import PackedTree

LAUNCH_S = 6e-6


@dataclass(frozen=True)
class Speed:
    """What a GPU and its links do: FLOP/s as assumed to be reached, bytes a second between ranks and to the host."""

    flops_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float = 20e9


@dataclass(frozen=True)
class EpochTime:
    """Seconds of an epoch, by what they are spent on."""

    compute_s: float
    communication_s: float
    offload_s: float

    @property
    def total_s(self) -> float:
        """Nothing overlaps."""
        return self.compute_s + self.communication_s + self.offload_s


def epoch_time(
    work: Workload,
    flops: NetworkFlops,
    counts: ParameterCounts,
    choice: ZeroChoice,
    speed: Speed,
    *,
    launches: int,
    skips_hidden: bool,
) -> EpochTime:
    """Time of the busiest ranks. `skips_hidden`: attention computes ancestors alone, not what its mask hides."""
    attended = work.rank_ancestors if skips_hidden else work.rank_attended
    operations = flops.of(tokens=work.rank_tokens, attended_pairs=attended, answers=work.rank_answers).total
    compute = max(operations / speed.flops_per_s, work.micro_steps * launches * LAUNCH_S)
    size = DTYPE_BYTES[choice.dtype]
    others = (choice.ranks - 1) / choice.ranks
    gradients = counts.trained * size * others
    reductions = work.micro_steps if choice.stage >= 2 else work.steps
    sent = gradients * (reductions + work.steps)
    if choice.stage == 3:
        sent = gradients * work.micro_steps + 2 * counts.total * size * others * work.micro_steps
    moved = 0.0
    if choice.offload_optimizer:
        share = counts.trained / (choice.ranks if choice.stage >= 1 else 1)
        moved += 2 * share * size * work.steps
    if choice.offload_parameters:
        moved += 2 * counts.total * size / choice.ranks * work.micro_steps
    return EpochTime(compute, sent / speed.link_bytes_per_s, moved / speed.host_bytes_per_s)


_LINE_TOKENS = 512
MICRO_BATCH_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Training:
    """What is trained, on how many GPUs, and over what: all that the candidates have in common.

    `scale` is the number of times that the pairs given here are what an epoch holds. The mean of `epochs` epochs is
    counted, as `seed` deals them.
    """

    architecture: Architecture
    lora: LoraConfig | None
    gpus: int
    dtype: str
    in_4bit: bool
    global_batch_pairs: int
    pairs: Sequence[Pair]
    prompts: Sequence[EncodedPrompt]
    speed: Speed
    reserve_bytes: float
    scale: float = 1.0
    tree_attention: TreeKind = "flex"
    is_gpu: bool = True
    seed: int = 0
    epochs: int = 1


@dataclass(frozen=True)
class Candidate:
    """One layout with its peak and the time of an epoch."""

    choice: ZeroChoice
    checkpointing: bool
    batching: Literal["tree", "pairs"]
    micro_batch_tokens: int
    memory: PeakMemory
    time: EpochTime
    work: Workload

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of a teacher's config that make this layout."""
        return {
            "zero.stage": self.choice.stage,
            "zero.dtype": self.choice.dtype,
            "zero.offload_optimizer": self.choice.offload_optimizer,
            "zero.offload_parameters": self.choice.offload_parameters,
            "zero.activation_checkpointing": self.checkpointing,
            "batches.batching": self.batching,
            "batches.micro_batch_tokens": self.micro_batch_tokens,
        }


@dataclass
class Planner:
    """Works out candidates of one training; traces and counts are shared between them."""

    training: Training
    _workloads: dict[tuple[str, int], Workload] = field(default_factory=dict)
    _activations: dict[tuple[str, int, bool], Activations] = field(default_factory=dict)
    _line: dict[tuple[int, int, int, bool], Activations] = field(default_factory=dict)
    _flops: dict[bool, NetworkFlops] = field(default_factory=dict)

    def __post_init__(self) -> None:
        network = meta_network(self.training.architecture.config, self.training.lora)
        self._tracer = ActivationTracer(
            self.training.architecture.config,
            self.training.lora,
            dtype=TORCH_DTYPES[self.training.dtype],
            attention=self.training.tree_attention,
        )
        self.counts: ParameterCounts = count_parameters(network, persistence_threshold=PERSISTENCE_THRESHOLD)
        for checkpointing in (False, True):
            self._flops[checkpointing] = network_flops(network, checkpointing=checkpointing)

    def candidate(
        self,
        choice: ZeroChoice,
        *,
        checkpointing: bool,
        batching: Literal["tree", "pairs"],
        micro_batch_tokens: int,
    ) -> Candidate:
        """Peak and time of one layout."""
        training = self.training
        work = self.workload(batching, micro_batch_tokens)
        activations = self.activations(batching, micro_batch_tokens, checkpointing)
        time = epoch_time(
            work,
            self._flops[checkpointing],
            self.counts,
            choice,
            training.speed,
            launches=activations.launches,
            skips_hidden=batching == "tree" and training.tree_attention != "mask",
        )
        memory = self.memory(choice, activations, in_4bit=training.in_4bit)
        return Candidate(choice, checkpointing, batching, micro_batch_tokens, memory, time, work)

    def memory(self, choice: ZeroChoice, activations: Activations, *, in_4bit: bool) -> PeakMemory:
        """The peak of a layout, on any number of ranks."""
        states = state_bytes(self.counts, choice, in_4bit=in_4bit, is_gpu=self.training.is_gpu)
        return peak_memory(states, activations, reserve=self.training.reserve_bytes)

    def peaks(
        self, batching: str, micro_batch_tokens: int, *, ranks: int, in_4bit: bool
    ) -> Iterator[PeakMemory]:
        """Of all layouts on so many ranks."""
        for choice in zero_choices(ranks, self.training.dtype, stages=(0, 1, 2) if in_4bit else (0, 1, 2, 3)):
            for checkpointing in (False, True):
                activations = self.activations(batching, micro_batch_tokens, checkpointing)
                yield self.memory(choice, activations, in_4bit=in_4bit)

    def workload(self, batching: str, micro_batch_tokens: int) -> Workload:
        """An epoch under a batching and a budget."""
        key = (batching, micro_batch_tokens)
        if key not in self._workloads:
            self._workloads[key] = measure_workload(
                self.training.pairs,
                self.training.prompts,
                use_tree=batching == "tree",
                ranks=self.training.gpus,
                micro_batch_tokens=micro_batch_tokens,
                global_batch_pairs=self.training.global_batch_pairs,
                seed=self.training.seed,
                epochs=self.training.epochs,
            ).scaled(self.training.scale)
        return self._workloads[key]

    def activations(self, batching: str, micro_batch_tokens: int, checkpointing: bool) -> Activations:
        """Of a micro-batch that fills its budget (or of a larger one, where the corpus has it)."""
        key = (batching, micro_batch_tokens, checkpointing)
        if key not in self._activations:
            self._activations[key] = self._traced(self._shape(batching, micro_batch_tokens), checkpointing)
        return self._activations[key]

    def _traced(self, shape: Shape, checkpointing: bool) -> Activations:
        """Where no mask grows with the square of a row, memory lies on a line: two traces serve all sizes."""
        if shape.tree is not None and self.training.tree_attention != "flex":
            return self._tracer.memory(shape, checkpointing=checkpointing)
        per_row = shape.answers / (shape.rows if shape.tree is None else shape.tokens)
        small, large = (self._on_line(shape, factor, per_row, checkpointing) for factor in (1, 3))
        size = shape.rows if shape.tree is None else shape.tokens / _LINE_TOKENS
        return between(small, large, (size - 1) / 2)

    def _on_line(self, shape: Shape, factor: int, answers_each: float, checkpointing: bool) -> Activations:
        if shape.tree is None:
            on_line = Shape(factor, shape.tokens, factor)
        else:
            tokens = factor * _LINE_TOKENS
            answers = max(1, round(tokens * answers_each))
            on_line = Shape(1, tokens, answers, full_tree(tokens, tokens))
        key = (on_line.rows, on_line.tokens, on_line.answers, checkpointing)
        if key not in self._line:
            self._line[key] = self._tracer.memory(on_line, checkpointing=checkpointing)
        return self._line[key]

    def _shape(self, batching: str, micro_batch_tokens: int) -> Shape:
        work = self.workload(batching, micro_batch_tokens)
        longest = max(len(prompt.tokens) for prompt in self.training.prompts)
        if batching == "pairs":
            rows = max(1, micro_batch_tokens // longest)
            return Shape(rows, longest, rows)
        tokens = max(micro_batch_tokens, work.largest_tokens)
        answers = max(work.largest_answers, round(tokens * work.pairs / work.tokens))
        return Shape(1, tokens, answers, tree=full_tree(tokens, longest))


def full_tree(tokens: int, depth: int) -> PackedTree:
    """A walk of `tokens` tokens, its paths as long as the longest prompt: a trunk with leaves beside it."""
    trunk = min(depth, tokens)
    ends = np.arange(1, tokens + 1)
    ends[:trunk] = tokens
    positions = np.minimum(np.arange(tokens), trunk)
    return PackedTree(np.zeros(tokens, dtype=np.int64), positions, ends, np.zeros(1, dtype=np.int64))


def zero_choices(gpus: int, dtype: str, *, stages: Sequence[int] = (0, 1, 2, 3)) -> Iterator[ZeroChoice]:
    """Every stage that the training takes at this dtype, plain and with what it can offload."""
    for stage in stages:
        if stage == 0 and dtype == "float16":
            continue
        yield ZeroChoice(stage, gpus, dtype)
        if stage >= 1:
            yield ZeroChoice(stage, gpus, dtype, offload_optimizer=True)
        if stage == 3:
            yield ZeroChoice(stage, gpus, dtype, offload_optimizer=True, offload_parameters=True)


def planned_attention(config: TeacherConfig) -> TreeKind:
    """The attention over trees that a config means on the GPUs that a plan is for."""
    wanted = config.batches.tree_attention
    return "flex" if wanted == "auto" else wanted


def config_candidate(planner: Planner, config: TeacherConfig) -> Candidate:
    """The layout that a teacher's config asks for."""
    wants_tree = config.batches.batching != "pairs" and config.model.family == "causal"
    return planner.candidate(
        ZeroChoice(
            config.zero.stage,
            planner.training.gpus,
            config.zero.dtype,
            offload_optimizer=config.zero.offload_optimizer,
            offload_parameters=config.zero.offload_parameters,
        ),
        checkpointing=config.zero.activation_checkpointing,
        batching="tree" if wants_tree else "pairs",
        micro_batch_tokens=config.batches.micro_batch_tokens,
    )


def by_speed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Fastest first; of equally fast ones the leanest, of equally lean ones the simplest."""
    return sorted(candidates, key=lambda c: (round(c.time.total_s, 3), c.memory.total, c.choice.stage))
