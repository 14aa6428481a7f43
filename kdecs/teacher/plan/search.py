"""Every way to lay out a teacher's training over given GPUs, each with its memory and time, the fastest first.

A layout is a ZeRO stage with what it offloads, activation checkpointing or not, and a token budget for a micro-batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.metering import NetworkFlops, network_flops
from kdecs.teacher.network import DTYPES, meta_network
from kdecs.teacher.plan.activations import Activations, ActivationTracer, Shape, TreeKind, between
from kdecs.teacher.plan.memory import (
    PERSISTENCE_THRESHOLD,
    Limits,
    PeakMemory,
    ZeroChoice,
    peak_memory,
    state_bytes,
)
from kdecs.teacher.plan.shapes import DTYPE_BYTES, Architecture, ParameterCounts, count_parameters
from kdecs.teacher.plan.workload import CountedPrompts, Workload, measure_workload
from kdecs.teacher.tree.prefix_tree import PackedTree

Batching = Literal["tree", "pairs"]

MICRO_BATCH_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
"""Token budgets that are tried unless one is given."""
EXPORT_MICRO_BATCH_TOKENS = 4096
"""As in the export's config, by default; this package may not import it."""
LAUNCH_S = 6e-6
"""Seconds that a GPU operator takes at least, however small it is: the reason why small micro-batches are not free."""
# Memory is traced at this and at three times this many tokens; every other size lies on the line between them.
_LINE_TOKENS = 512


@dataclass(frozen=True)
class Speed:
    """FLOP/s that a GPU is assumed to reach, and bytes per second between ranks and to main memory."""

    flops_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float = 20e9


@dataclass(frozen=True)
class Training:
    """What all layouts have in common: the teacher's config, its network, the prompts of an epoch, and the GPUs.

    An epoch holds `scale` times the counted pairs. Times are means over `epochs` epochs, dealt by the config's seed.
    """

    config: TeacherConfig
    architecture: Architecture
    counted: CountedPrompts
    gpus: int
    speed: Speed
    reserve_bytes: float
    scale: float = 1.0
    epochs: int = 1

    @property
    def batching(self) -> Batching:
        """Trees if the family takes them, unless the config asks for pairs."""
        wants_tree = self.config.batches.batching != "pairs" and self.architecture.family == "causal"
        return "tree" if wants_tree else "pairs"

    @property
    def tree_attention(self) -> TreeKind:
        """The attention over trees that the config means on a GPU."""
        wanted = self.config.batches.tree_attention
        return "flex" if wanted == "auto" else wanted


@dataclass(frozen=True)
class EpochTime:
    """Seconds of an epoch by what they are spent on."""

    compute_s: float
    communication_s: float
    offload_s: float

    @property
    def total_s(self) -> float:
        """The sum, as if nothing overlapped."""
        return self.compute_s + self.communication_s + self.offload_s


@dataclass(frozen=True)
class Layout:
    """One layout with its peak memory and the time of an epoch."""

    choice: ZeroChoice
    checkpointing: bool
    batching: Batching
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


class Planner:
    """Works out layouts of one training. They share traces of the network and counts of the corpus."""

    def __init__(self, training: Training) -> None:
        self.training = training
        config = training.config
        self._tracer = ActivationTracer(
            training.architecture.config,
            config.lora,
            dtype=DTYPES[config.zero.dtype],
            attention=training.tree_attention,
        )
        network = meta_network(training.architecture.config, config.lora)
        self.counts: ParameterCounts = count_parameters(network, persistence_threshold=PERSISTENCE_THRESHOLD)
        self._flops = {
            checkpointing: network_flops(network, checkpointing=checkpointing)
            for checkpointing in (False, True)
        }
        self._workloads: dict[int, Workload] = {}
        self._activations: dict[tuple[int, bool], Activations] = {}
        self._line: dict[tuple[int, int, int, bool], Activations] = {}

    def all_layouts(self, budgets: Sequence[int] = MICRO_BATCH_TOKENS) -> list[Layout]:
        """Every layout at every budget: fastest first, of equally fast ones the leanest, then the simplest."""
        training = self.training
        choices = zero_choices(
            training.gpus, training.config.zero.dtype, in_4bit=training.config.model.load_in_4bit
        )
        layouts = [
            self.layout(choice, checkpointing=checkpointing, micro_batch_tokens=budget)
            for choice in choices
            for checkpointing in (False, True)
            for budget in budgets
        ]
        return sorted(
            # Times are rounded, so that a difference far below the plan's accuracy does not outrank the leaner layout.
            layouts,
            key=lambda each: (round(each.time.total_s, 3), each.memory.total, each.choice.stage),
        )

    def layout_of_config(self) -> Layout:
        """The layout that the training's config asks for."""
        zero = self.training.config.zero
        choice = ZeroChoice(
            zero.stage,
            self.training.gpus,
            zero.dtype,
            offload_optimizer=zero.offload_optimizer,
            offload_parameters=zero.offload_parameters,
        )
        return self.layout(
            choice,
            checkpointing=zero.activation_checkpointing,
            micro_batch_tokens=self.training.config.batches.micro_batch_tokens,
        )

    def layout(self, choice: ZeroChoice, *, checkpointing: bool, micro_batch_tokens: int) -> Layout:
        """Peak memory and time of one layout."""
        training = self.training
        work = self.workload(micro_batch_tokens)
        activations = self._full_micro_batch(micro_batch_tokens, checkpointing)
        time = epoch_time(
            work,
            self._flops[checkpointing],
            self.counts,
            choice,
            training.speed,
            launches=activations.launches,
            skips_hidden=training.batching == "tree" and training.tree_attention != "mask",
        )
        memory = self._memory(choice, activations, in_4bit=training.config.model.load_in_4bit)
        return Layout(choice, checkpointing, training.batching, micro_batch_tokens, memory, time, work)

    def labelling_s(self) -> float:
        """Seconds that one GPU takes to label the pairs of an epoch: the forwards alone, in full micro-batches."""
        work = self.workload(EXPORT_MICRO_BATCH_TOKENS)
        flops = self._flops[False].of(tokens=work.tokens, attended_pairs=work.ancestors, answers=work.pairs)
        # A forward runs about a third of the operators of a forward and a backward.
        launches = self._full_micro_batch(EXPORT_MICRO_BATCH_TOKENS, False).launches / 3
        forwards = work.tokens / EXPORT_MICRO_BATCH_TOKENS
        return max(flops.forward / self.training.speed.flops_per_s, forwards * launches * LAUNCH_S)

    def fits(self, limits: Limits, micro_batch_tokens: int, *, ranks: int, in_4bit: bool) -> bool:
        """Whether any layout with this budget would fit on another number of ranks, or with a base in 4 bits."""
        return any(
            limits.allow(
                self._memory(
                    choice, self._full_micro_batch(micro_batch_tokens, checkpointing), in_4bit=in_4bit
                )
            )
            for choice in zero_choices(ranks, self.training.config.zero.dtype, in_4bit=in_4bit)
            for checkpointing in (False, True)
        )

    def workload(self, micro_batch_tokens: int) -> Workload:
        """An epoch under a token budget."""
        if micro_batch_tokens not in self._workloads:
            self._workloads[micro_batch_tokens] = self._measure(micro_batch_tokens)
        return self._workloads[micro_batch_tokens]

    def _measure(self, micro_batch_tokens: int) -> Workload:
        training = self.training
        counted, batch = len(training.counted.pairs), training.config.batches.global_batch_pairs
        # A sample that is smaller than a global batch stands for a part of one, on as small a part of the ranks.
        parts = math.ceil(min(batch, counted * training.scale) / counted) if training.scale > 1 else 1
        ranks = max(1, round(training.gpus / parts))
        work = measure_workload(
            training.counted.pairs,
            training.counted.prompts,
            use_tree=training.batching == "tree",
            ranks=ranks,
            micro_batch_tokens=micro_batch_tokens,
            global_batch_pairs=math.ceil(batch / parts),
            seed=training.config.optimization.seed,
            epochs=training.epochs,
        ).scaled(training.scale)
        return work if parts == 1 else work.of_whole_batches(parts, ranks / training.gpus)

    def activations(self, shape: Shape, *, checkpointing: bool) -> Activations:
        """Memory of a micro-batch of this shape.

        Without a mask that grows with the square of a row, memory lies on a line: two traces serve all sizes.
        """
        # A dense mask, or the keys that blocks gather, grow faster than the walk: such a shape is traced itself.
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

    def _full_micro_batch(self, micro_batch_tokens: int, checkpointing: bool) -> Activations:
        """Memory of a micro-batch that fills its budget, or of the corpus's largest if that exceeds the budget."""
        key = (micro_batch_tokens, checkpointing)
        if key not in self._activations:
            work = self.workload(micro_batch_tokens)
            longest = max(len(prompt.tokens) for prompt in self.training.counted.prompts)
            if self.training.counted.prompts[0].num_trunk:
                longest = max(
                    longest, work.largest_tokens
                )  # a target's tree is longer than its longest prompt
            if self.training.batching == "pairs":
                rows = max(1, micro_batch_tokens // longest)
                shape = Shape(rows, longest, rows)
            else:
                tokens = max(micro_batch_tokens, work.largest_tokens)
                # As many answers per token as the corpus has on average, unless its largest micro-batch has more.
                answers = max(work.largest_answers, round(tokens * work.pairs / work.tokens))
                shape = Shape(1, tokens, answers, tree=full_tree(tokens, longest))
            self._activations[key] = self.activations(shape, checkpointing=checkpointing)
        return self._activations[key]

    def _memory(self, choice: ZeroChoice, activations: Activations, *, in_4bit: bool) -> PeakMemory:
        states = state_bytes(self.counts, choice, in_4bit=in_4bit)
        return peak_memory(states, activations, reserve=self.training.reserve_bytes)


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
    """Time of the busiest ranks. `skips_hidden`: attention computes ancestors only, not what its mask hides."""
    attended = work.rank_ancestors if skips_hidden else work.rank_attended
    operations = flops.of(tokens=work.rank_tokens, attended_pairs=attended, answers=work.rank_answers).total
    compute = max(operations / speed.flops_per_s, work.micro_steps * launches * LAUNCH_S)
    size = DTYPE_BYTES[choice.dtype]
    others = (choice.ranks - 1) / choice.ranks
    # A ring sends and receives all but the own part. Sums are not overlapped with compute, so this is an upper bound.
    gradients = counts.trained * size * others
    reductions = work.micro_steps if choice.stage >= 2 else work.steps
    # Stages 0 to 2 reduce the gradients (stage 2 after every micro-step), then gather as much to share the update.
    sent = gradients * (reductions + work.steps)
    if choice.stage == 3:
        # Stage 3 gathers all weights in the forward, and again in the backward.
        sent = gradients * work.micro_steps + 2 * counts.total * size * others * work.micro_steps
    moved = 0.0
    if choice.offload_optimizer:
        share = counts.trained / (choice.ranks if choice.stage >= 1 else 1)
        # Gradients down to main memory, updated weights back up.
        moved += 2 * share * size * work.steps
    if choice.offload_parameters:
        moved += 2 * counts.total * size / choice.ranks * work.micro_steps
    return EpochTime(compute, sent / speed.link_bytes_per_s, moved / speed.host_bytes_per_s)


def full_tree(tokens: int, depth: int) -> PackedTree:
    """A walk of `tokens` tokens, its paths as long as the longest prompt: a trunk with leaves beside it."""
    trunk = min(depth, tokens)
    ends = np.arange(1, tokens + 1)
    ends[:trunk] = tokens
    positions = np.minimum(np.arange(tokens), trunk)
    return PackedTree(np.zeros(tokens, dtype=np.int64), positions, ends, np.zeros(1, dtype=np.int64))


def zero_choices(gpus: int, dtype: str, *, in_4bit: bool) -> Iterator[ZeroChoice]:
    """Every stage that can train at this dtype, with each offload that it allows; ZeRO-3 cannot partition 4 bits."""
    for stage in (0, 1, 2) if in_4bit else (0, 1, 2, 3):
        # DeepSpeed does not scale the loss there, and the config refuses it.
        if stage == 0 and dtype == "float16":
            continue
        yield ZeroChoice(stage, gpus, dtype)
        if stage >= 1:
            yield ZeroChoice(stage, gpus, dtype, offload_optimizer=True)
        if stage == 3:
            yield ZeroChoice(stage, gpus, dtype, offload_optimizer=True, offload_parameters=True)
