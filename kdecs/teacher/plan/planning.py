"""`launch/train_teacher.py --dry-run`: what a config would train, its memory and time; starts and writes nothing."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.splits import read_split, training_split
from kdecs.errors import ConfigError
from kdecs.hardware import GPUS, Gpu, find_gpu, gpu_of_device
from kdecs.teacher.config import LoraConfig, TeacherConfig
from kdecs.teacher.network import check_family, check_positions
from kdecs.teacher.plan import report
from kdecs.teacher.plan.memory import GIB, Limits
from kdecs.teacher.plan.search import (
    MICRO_BATCH_TOKENS,
    Candidate,
    Planner,
    Speed,
    Training,
    by_speed,
    config_candidate,
    planned_attention,
    zero_choices,
)
from kdecs.teacher.plan.shapes import Architecture, read_teacher, resolve_architecture
from kdecs.teacher.plan.workload import CountedPrompts, count_prompts

MAX_DIALOGUES = 100
"""Of a larger corpus so many, evenly drawn, are counted and scaled up: a plan should answer in seconds."""
DEFAULT_GPU = "a100-40g"


@dataclass(frozen=True)
class PlanRequest:
    """The options of `kdecs plan`; None is "as the config, or the default"."""

    teacher: str
    gpus: int = 1
    gpu: str | None = None
    gpu_memory_gib: float | None = None
    host_memory_gib: float | None = None
    corpus: Path | None = None
    pairs: int | None = None
    epochs: int | None = None
    micro_batch_tokens: int | None = None
    global_batch_pairs: int | None = None
    batching: str | None = None
    rank: int | None = None
    is_full: bool = False
    in_4bit: bool = False
    dtype: str | None = None
    mfu: float = 0.4
    peak_tflops: float | None = None
    link_gb_s: float | None = None
    reserve_gib: float = 1.5


@dataclass(frozen=True)
class Plan:
    """All layouts of a training, and the fastest of those that fit."""

    config: TeacherConfig
    architecture: Architecture
    planner: Planner
    candidates: list[Candidate]
    limits: Limits
    counted: CountedPrompts
    corpus: str
    assumptions: dict[str, Any]

    @property
    def best(self) -> Candidate | None:
        """The fastest layout that fits, None where none does."""
        return next((c for c in self.candidates if self.limits.allow(c.memory)), None)

    def show(self, *, every_budget: bool) -> None:
        """Print what was counted, the layouts, and the lines of the best."""
        console = report.make_console()
        counts = self.planner.counts
        tuned = "all" if self.config.lora is None else f"LoRA rank {self.config.lora.rank}"
        console.print(
            f"{self.architecture.name}: {counts.total:,} parameters, {counts.trained:,} trained ({tuned}), "
            f"{self.config.zero.dtype}{', base in 4 bits' if self.config.model.load_in_4bit else ''}"
        )
        work = self.candidates[0].work
        tokens = "tokens estimated (no tokenizer here)" if self.counted.are_estimated else "its own tokenizer"
        console.print(
            f"{self.corpus}: {work.pairs:,.0f} pairs an epoch, {work.tokens:,.0f} tokens as "
            f"{self.candidates[0].batching}, {tokens}"
        )
        rows = self.candidates if every_budget else best_budgets(self.candidates, self.limits)
        console.print(report.layout_table(rows, self.limits, self.best, self.config.optimization.epochs))
        console.print("Assumed: " + ", ".join(f"{name} {value}" for name, value in self.assumptions.items()))
        if self.best is not None:
            console.print(
                f"\nFastest that fits:\n{report.yaml_lines(self.best)}\n\n{report.set_options(self.best)}"
            )

    def as_record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        counts = self.planner.counts
        best = self.best
        return {
            "teacher": self.architecture.name,
            "family": self.architecture.family,
            "parameters": {"total": counts.total, "trained": counts.trained, "frozen": counts.frozen},
            "corpus": self.corpus,
            "tokens_are_estimated": self.counted.are_estimated,
            "gpu_memory_gib": self.limits.device / GIB,
            "assumptions": self.assumptions,
            "best": None if best is None else report.as_record(best, self.limits),
            "candidates": [report.as_record(c, self.limits) for c in self.candidates],
        }

    def what_would_fit(self) -> str:
        """One line: the leanest layout, and what to change."""
        leanest = min(self.candidates, key=lambda c: c.memory.total)
        needs = f"{leanest.memory.total / GIB:.1f} GiB of {self.limits.device / GIB:.1f}"
        host = "" if self.limits.host is None else f" and {leanest.memory.host / GIB:.1f} GiB of main memory"
        return (
            f"{self.architecture.name} on {leanest.choice.ranks} GPUs: nothing fits; the leanest layout "
            f"(ZeRO-{leanest.choice.stage}, offload {report.offload_name(leanest)}, "
            f"{leanest.micro_batch_tokens} tokens) needs {needs}{host}; {self._advice()}"
        )

    def _advice(self) -> str:
        smallest = min(self.candidates, key=lambda c: c.micro_batch_tokens)
        training = self.planner.training

        def fits(ranks: int, in_4bit: bool) -> bool:
            peaks = self.planner.peaks(
                smallest.batching, smallest.micro_batch_tokens, ranks=ranks, in_4bit=in_4bit
            )
            return any(self.limits.allow(peak) for peak in peaks)

        for ranks in (training.gpus * factor for factor in (2, 4, 8, 16, 32, 64)):
            if fits(ranks, training.in_4bit):
                return f"{ranks} GPUs would do"
        if not training.in_4bit and self.config.lora is not None and fits(training.gpus, True):
            return "a base in 4 bits (--4bit) would do"
        return "take GPUs with more memory, a smaller teacher, or fewer --micro-batch-tokens"


def make_plan(request: PlanRequest) -> Plan:
    """Work out every layout of a request. Raises ConfigError, CorpusError or ModelError, one line."""
    config, corpus_file, corpus_name = _resolve(request)
    architecture = resolve_architecture(config.model.base)
    gpu = find_gpu(request.gpu) if request.gpu else None
    dtype = config.zero.dtype
    if gpu is not None and dtype == "bfloat16" and gpu.name.startswith(("v100", "t4")):
        raise ConfigError(f"--gpu {gpu.name}: has no bfloat16; use --dtype float16 or float32")
    counted = count_prompts(
        read_corpus(corpus_file).dialogues, config, max_dialogues=MAX_DIALOGUES, show_progress=True
    )
    scale = counted.scale if request.pairs is None else request.pairs / len(counted.pairs)
    speed, assumptions = _speed(request, gpu, dtype)
    planner = Planner(
        Training(
            architecture=architecture,
            lora=config.lora,
            gpus=request.gpus,
            dtype=dtype,
            in_4bit=config.model.load_in_4bit,
            global_batch_pairs=config.batches.global_batch_pairs,
            pairs=counted.pairs,
            prompts=counted.prompts,
            speed=speed,
            reserve_bytes=request.reserve_gib * GIB,
            scale=scale,
            tree_attention=planned_attention(config),
            seed=config.optimization.seed,
        )
    )
    budgets = [request.micro_batch_tokens] if request.micro_batch_tokens else list(MICRO_BATCH_TOKENS)
    memory_gib = request.gpu_memory_gib or (gpu.memory_gib if gpu else 0.0)
    assumptions["reserve GiB"] = request.reserve_gib
    return Plan(
        config=config,
        architecture=architecture,
        planner=planner,
        candidates=by_speed(layouts(planner, config, budgets)),
        limits=Limits(memory_gib * GIB, request.host_memory_gib and request.host_memory_gib * GIB),
        counted=counted,
        corpus=corpus_name,
        assumptions=assumptions,
    )


def layouts(planner: Planner, config: TeacherConfig, budgets: list[int]) -> list[Candidate]:
    """Every stage with what it can offload, with and without checkpointing, at every budget."""
    batching: Literal["tree", "pairs"] = (
        "tree"
        if config.batches.batching != "pairs" and planner.training.architecture.family == "causal"
        else "pairs"
    )
    stages = (0, 1, 2) if planner.training.in_4bit else (0, 1, 2, 3)
    return [
        planner.candidate(choice, checkpointing=checkpointing, batching=batching, micro_batch_tokens=budget)
        for choice in zero_choices(planner.training.gpus, planner.training.dtype, stages=stages)
        for checkpointing in (False, True)
        for budget in budgets
    ]


def best_budgets(candidates: list[Candidate], limits: Limits) -> list[Candidate]:
    """Of each layout one row: its fastest budget that fits, or its leanest; in order of stage."""
    groups: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.choice, candidate.checkpointing), []).append(candidate)
    rows = []
    for group in groups.values():
        fitting = [c for c in group if limits.allow(c.memory)]
        rows.append(fitting[0] if fitting else min(group, key=lambda c: c.memory.total))
    return sorted(
        rows,
        key=lambda c: (
            c.choice.stage,
            c.choice.offload_optimizer,
            c.choice.offload_parameters,
            c.checkpointing,
        ),
    )


def _resolve(request: PlanRequest) -> tuple[TeacherConfig, Path, str]:
    """The teacher's config with the request's options laid over it, and the corpus to count."""
    config = read_teacher(request.teacher)
    if config is None:
        architecture = resolve_architecture(request.teacher)
        placeholder = {
            "name": "plan",
            "output": "plan",
            "corpus": {"train": "train.json", "valid": "valid.json"},
            "model": {"family": architecture.family, "base": request.teacher},
        }
        config = parse_config(TeacherConfig, placeholder, source="--teacher")
    values: dict[str, Any] = config.model_dump(mode="json")
    overlay: dict[tuple[str, str], Any] = {
        ("zero", "dtype"): request.dtype,
        ("batches", "batching"): request.batching,
        ("batches", "global_batch_pairs"): request.global_batch_pairs,
        ("optimization", "epochs"): request.epochs,
        ("model", "load_in_4bit"): request.in_4bit or None,
    }
    for (group, key), value in overlay.items():
        if value is not None:
            values[group][key] = value
    # The stage is what the plan finds: that of the config must only not exclude what the options ask for.
    if request.in_4bit:
        values["zero"]["stage"] = min(2, values["zero"]["stage"])
    if request.dtype == "float16":
        values["zero"]["stage"] = max(1, values["zero"]["stage"])
    if request.is_full:
        values["lora"] = None
    elif request.rank is not None:
        values["lora"] = {**(values["lora"] or LoraConfig().model_dump(mode="json")), "rank": request.rank}
    config = parse_config(TeacherConfig, values, source=request.teacher)
    if request.corpus is not None:
        return config, request.corpus, str(request.corpus)
    if config.corpus.train.is_file():
        return config, config.corpus.train, str(config.corpus.train)
    return config, bundled_sample("train"), "bundled sample"


def _speed(request: PlanRequest, gpu: Gpu | None, dtype: str) -> tuple[Speed, dict[str, Any]]:
    known = gpu or find_gpu(DEFAULT_GPU)
    peak = request.peak_tflops or known.peak_at(dtype)
    link = request.link_gb_s or known.link_gb_s
    named = known.name if gpu or request.peak_tflops else f"{known.name} (no --gpu given)"
    assumptions = {"GPU": named, "peak TFLOP/s": peak, "share of it": request.mfu, "link GB/s": link}
    return Speed(peak * 1e12 * request.mfu, link * 1e9), assumptions


ASSUMED_MFU = 0.4


def dry_run(config: TeacherConfig, *, world_size: int) -> Candidate:
    """Print the resolved config, the network, the work and the peak of a rank; the layout that they belong to.

    Reads the corpus whole, as the training does. Raises CorpusError, ConfigError or ModelError, one line.
    """
    base = config.model.base
    architecture = resolve_architecture(base)
    check_family(architecture.config, base, config.model.family)
    counted = count_prompts(training_split(config.corpus), config, show_progress=True)
    if not (
        counted.are_estimated and config.model.family == "masked"
    ):  # whose tokenizer may set a lower limit
        check_positions(architecture.config, base, counted.max_prompt_tokens)
    num_valid = len(read_split(config.corpus, config.corpus.valid).dialogues)
    gpu, said_of_gpu = _gpu_here()
    peak = config.device_peak_tflops or gpu.peak_at(config.zero.dtype)
    planner = Planner(
        Training(
            architecture=architecture,
            lora=config.lora,
            gpus=world_size,
            dtype=config.zero.dtype,
            in_4bit=config.model.load_in_4bit,
            global_batch_pairs=config.batches.global_batch_pairs,
            pairs=counted.pairs,
            prompts=counted.prompts,
            speed=Speed(peak * 1e12 * ASSUMED_MFU, gpu.link_gb_s * 1e9),
            reserve_bytes=1.5 * GIB,
            tree_attention=planned_attention(config),
            seed=config.optimization.seed,
            epochs=config.optimization.epochs,
        )
    )
    candidate = config_candidate(planner, config)
    _show(config, planner, candidate, num_valid, counted.are_estimated)
    device = f"{gpu.name} ({said_of_gpu})"
    memory = (
        f"{gpu.memory_gib:g} GiB, {'fits' if candidate.memory.total <= gpu.memory_gib * GIB else 'too big'}"
    )
    total = config.optimization.epochs * candidate.time.total_s
    print(
        f"time: about {report.duration(total)} on {world_size} × {device} at {100 * ASSUMED_MFU:.0f}% of "
        f"{peak:g} TFLOP/s, validations not counted; memory: {memory}"
    )
    print("dry run: nothing was started, nothing was written")
    return candidate


def _show(
    config: TeacherConfig, planner: Planner, candidate: Candidate, num_valid: int, are_estimated: bool
) -> None:
    console = report.make_console()
    counts, work = planner.counts, candidate.work
    console.print_json(config.model_dump_json())
    tuned = "all parameters" if config.lora is None else f"LoRA rank {config.lora.rank}"
    console.print(
        f"network: {planner.training.architecture.name} ({config.model.base}), {counts.total:,} parameters, "
        f"{counts.trained:,} trained ({tuned})"
    )
    steps = round(work.steps * config.optimization.epochs)
    tokens = "estimated, since the tokenizer is not on this machine" if are_estimated else "by its tokenizer"
    console.print(
        f"work: {round(work.pairs):,} pairs as {candidate.batching}; {round(work.steps):,} steps an epoch, "
        f"{steps:,} in {config.optimization.epochs} epochs; up to {work.accumulation} "
        f"micro-batches a step and rank; {round(work.tokens):,} tokens an epoch ({tokens}); "
        f"{num_valid:,} dialogues to validate on"
    )
    console.print(report.memory_table(candidate))


def _gpu_here() -> tuple[Gpu, str]:
    """The GPU of this machine with the table's peak and link, and what of it is assumed."""
    if not torch.cuda.is_available():
        return GPUS[DEFAULT_GPU], "assumed: no GPU here"
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / GIB
    known = gpu_of_device(properties.name, memory_gib)
    said = (
        "this machine"
        if known
        else f"this machine; peak and link of {DEFAULT_GPU} assumed, its own not known"
    )
    return replace(known or GPUS[DEFAULT_GPU], name=properties.name, memory_gib=memory_gib), said
