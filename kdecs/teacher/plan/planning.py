"""What a teacher's training would take, before it starts: `kdecs plan` and `launch/train_teacher.py --dry-run`.

`make_plan` compares every layout of a teacher on given GPUs; `dry_run` works out the one layout that a config asks for.
Both count the corpus, trace the network on the meta device, and write nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from kdecs.config import Config, files_of, load_config, names_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.splits import read_split, training_split
from kdecs.errors import ConfigError
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.network import check_family, check_positions
from kdecs.teacher.plan import report
from kdecs.teacher.plan.hardware import GPUS, Gpu, find_gpu, gpu_of_device
from kdecs.teacher.plan.memory import GIB, Limits
from kdecs.teacher.plan.search import MICRO_BATCH_TOKENS, Layout, Planner, Speed, Training
from kdecs.teacher.plan.shapes import resolve_architecture
from kdecs.teacher.plan.workload import count_prompts

MAX_DIALOGUES = 100
"""Of a larger corpus this many, evenly drawn, are counted and scaled up, so that a plan answers in seconds."""
DEFAULT_GPU = "a100-40g"


class Assumptions(Config):
    """What a plan assumes besides the teacher's config. Null: the GPU's or the corpus's own, or no limit."""

    pairs: int | None = Field(default=None, ge=1, description="pairs of an epoch, if not those of the corpus")
    mfu: float = Field(default=0.4, gt=0, le=1, description="share of the GPU's peak that is reached")
    peak_tflops: float | None = Field(default=None, gt=0, description="peak of one GPU")
    link_gb_s: float | None = Field(default=None, gt=0, description="GB/s between GPUs, one direction")
    reserve_gib: float = Field(
        default=1.5, ge=0, description="what the driver, NCCL and fragments take of a GPU"
    )
    host_memory_gib: float | None = Field(
        default=None, ge=0, description="main memory per GPU, which offload may fill"
    )


@dataclass(frozen=True)
class PlanRequest:
    """A teacher on some GPUs. `settings` are KEY=VALUE, of a teacher's config or of `Assumptions`."""

    teacher: str
    gpus: int = 1
    gpu: str | None = None
    gpu_memory_gib: float | None = None
    corpus: Path | None = None
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class LayoutPlan:
    """All layouts of a training, fastest first, and what they were worked out from."""

    planner: Planner
    layouts: list[Layout]
    limits: Limits
    corpus: str
    assumptions: dict[str, Any]

    @property
    def best(self) -> Layout | None:
        """The fastest layout that fits, None if none does."""
        return next((layout for layout in self.layouts if self.limits.allow(layout.memory)), None)

    def show(self, *, every_budget: bool) -> None:
        """Print what was counted, the layouts, and the config lines of the best."""
        console = report.make_console()
        training, counts = self.planner.training, self.planner.counts
        config = training.config
        tuned = "all" if config.lora is None else f"LoRA rank {config.lora.rank}"
        console.print(
            f"{training.architecture.name}: {counts.total:,} parameters, {counts.trained:,} trained ({tuned}), "
            f"{config.zero.dtype}{', base in 4 bits' if config.model.load_in_4bit else ''}"
        )
        work = self.layouts[0].work
        are_estimated = training.counted.are_estimated
        tokens = "tokens estimated (no tokenizer here)" if are_estimated else "its own tokenizer"
        console.print(
            f"{self.corpus}: {work.pairs:,.0f} pairs per epoch, {work.tokens:,.0f} tokens as {training.batching}, "
            f"{tokens}"
        )
        rows = self.layouts if every_budget else report.best_budgets(self.layouts, self.limits)
        console.print(report.layout_table(rows, self.limits, self.best, config.optimization.epochs))
        console.print("Assumed: " + ", ".join(f"{name} {value}" for name, value in self.assumptions.items()))
        if self.best is not None:
            console.print(
                f"\nFastest that fits:\n{report.yaml_lines(self.best)}\n\n{report.set_options(self.best)}"
            )

    def as_record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        training, counts, best = self.planner.training, self.planner.counts, self.best
        return {
            "teacher": training.architecture.name,
            "family": training.architecture.family,
            "parameters": {"total": counts.total, "trained": counts.trained, "frozen": counts.frozen},
            "corpus": self.corpus,
            "tokens_are_estimated": training.counted.are_estimated,
            "gpu_memory_gib": self.limits.device / GIB,
            "assumptions": self.assumptions,
            "best": None if best is None else report.as_record(best, self.limits),
            "candidates": [report.as_record(layout, self.limits) for layout in self.layouts],
        }

    def what_would_fit(self) -> str:
        """One line: the leanest layout, and what to change."""
        leanest = min(self.layouts, key=lambda layout: layout.memory.total)
        needs = f"{leanest.memory.total / GIB:.1f} GiB of {self.limits.device / GIB:.1f}"
        host = "" if self.limits.host is None else f" and {leanest.memory.host / GIB:.1f} GiB of main memory"
        return (
            f"{self.planner.training.architecture.name} on {leanest.choice.ranks} GPUs: nothing fits; the leanest "
            f"layout (ZeRO-{leanest.choice.stage}, offload {report.offload_name(leanest)}, "
            f"{leanest.micro_batch_tokens} tokens) needs {needs}{host}; {self._advice()}"
        )

    def _advice(self) -> str:
        training = self.planner.training
        in_4bit = training.config.model.load_in_4bit
        budget = min(layout.micro_batch_tokens for layout in self.layouts)
        # More GPUs first, since a base in 4 bits makes another teacher.
        for ranks in (training.gpus * factor for factor in (2, 4, 8, 16, 32, 64)):
            if self.planner.fits(self.limits, budget, ranks=ranks, in_4bit=in_4bit):
                return f"{ranks} GPUs would do"
        may_be_4bit = training.config.lora is not None and not in_4bit
        if may_be_4bit and self.planner.fits(self.limits, budget, ranks=training.gpus, in_4bit=True):
            return "a base in 4 bits (--set model.load_in_4bit=true) would do"
        return "take GPUs with more memory, a smaller teacher, or a smaller batches.micro_batch_tokens"


def make_plan(request: PlanRequest) -> LayoutPlan:
    """Work out every layout of a request. Raises ConfigError, CorpusError or ModelError, one line."""
    # One --set serves both: the names of assumptions are none of a teacher's top-level keys.
    of_config = [s for s in request.settings if s.partition("=")[0] not in Assumptions.model_fields]
    assumed = load_config(Assumptions, None, [s for s in request.settings if s not in of_config])
    config = _config_to_plan(request.teacher, of_config)
    architecture = resolve_architecture(config.model.base)
    gpu = find_gpu(request.gpu) if request.gpu else None
    dtype = config.zero.dtype
    if gpu is not None and dtype == "bfloat16" and gpu.name.startswith(("v100", "t4")):
        raise ConfigError(
            f"--gpu {gpu.name}: has no bfloat16; add --set zero.dtype=float16 or zero.dtype=float32"
        )
    files, corpus_name = (request.corpus,) if request.corpus else files_of(config.corpus.train), ""
    # A config may name a corpus that is only on the cluster.
    if request.corpus is None and not all(file.is_file() for file in files):
        files, corpus_name = (bundled_sample("train"),), "bundled sample"
    counted = count_prompts(
        [dialogue for file in files for dialogue in read_corpus(file).dialogues],
        config,
        max_dialogues=MAX_DIALOGUES,
        show_progress=True,
    )
    # Memory alone does not say how fast a GPU is.
    known = gpu or GPUS[DEFAULT_GPU]
    peak = assumed.peak_tflops or known.peak_at(dtype)
    link = assumed.link_gb_s or known.link_gb_s
    planner = Planner(
        Training(
            config=config,
            architecture=architecture,
            counted=counted,
            gpus=request.gpus,
            speed=Speed(peak * 1e12 * assumed.mfu, link * 1e9),
            reserve_bytes=assumed.reserve_gib * GIB,
            scale=counted.scale if assumed.pairs is None else assumed.pairs / len(counted.pairs),
        )
    )
    # Only an explicit budget narrows the search: the config's own is often just the default.
    sets_budget = any(s.startswith("batches.micro_batch_tokens=") for s in of_config)
    budgets = [config.batches.micro_batch_tokens] if sets_budget else MICRO_BATCH_TOKENS
    memory_gib = request.gpu_memory_gib or (gpu.memory_gib if gpu else 0.0)
    return LayoutPlan(
        planner=planner,
        layouts=planner.all_layouts(budgets),
        limits=Limits(memory_gib * GIB, assumed.host_memory_gib and assumed.host_memory_gib * GIB),
        corpus=corpus_name or names_of(files),
        assumptions={
            "GPU": known.name if gpu or assumed.peak_tflops else f"{known.name} (no --gpu given)",
            "peak TFLOP/s": peak,
            "share of it": assumed.mfu,
            "link GB/s": link,
            "reserve GiB": assumed.reserve_gib,
        },
    )


def _config_to_plan(teacher: str, settings: Sequence[str]) -> TeacherConfig:
    """The teacher's config with the settings laid over it; `teacher` is a YAML file, a directory or a name."""
    # The plan finds the stage: that of the config must not exclude other settings (4 bits, float16).
    free_stage = ["zero.stage=1", "zero.offload_optimizer=false", "zero.offload_parameters=false"]
    if Path(teacher).suffix in (".yaml", ".yml", ".json"):
        return load_config(TeacherConfig, Path(teacher), [*free_stage, *settings])
    family = resolve_architecture(teacher).family
    required = ["name=plan", "output=plan", "corpus.train=train.json", "corpus.valid=valid.json"]
    required += [f"model.family={family}", f"model.base={teacher}"]
    return load_config(TeacherConfig, None, [*required, *free_stage, *settings])


def dry_run(config: TeacherConfig, *, world_size: int) -> Layout:
    """Print the resolved config, the network, the work and a rank's peak; return the config's layout.

    Reads the whole corpus, as the training does. Raises CorpusError, ConfigError or ModelError, one line.
    """
    base = config.model.base
    architecture = resolve_architecture(base)
    check_family(architecture.config, base, config.model.family)
    counted = count_prompts(training_split(config.corpus), config, show_progress=True)
    # A masked teacher's tokenizer may set a lower limit, which is unknown if its tokens are estimated.
    if not (counted.are_estimated and config.model.family == "masked"):
        check_positions(architecture.config, base, counted.max_prompt_tokens)
    num_valid = len(read_split(config.corpus, config.corpus.valid).dialogues)
    gpu, origin = gpu_here()
    assumed = Assumptions()
    peak = config.device_peak_tflops or gpu.peak_at(config.zero.dtype)
    planner = Planner(
        Training(
            config=config,
            architecture=architecture,
            counted=counted,
            gpus=world_size,
            speed=Speed(peak * 1e12 * assumed.mfu, gpu.link_gb_s * 1e9),
            reserve_bytes=assumed.reserve_gib * GIB,
            epochs=config.optimization.epochs,
        )
    )
    layout = planner.layout_of_config()
    _show(config, planner, layout, num_valid)
    fits = "fits" if layout.memory.total <= gpu.memory_gib * GIB else "too big"
    total = config.optimization.epochs * layout.time.total_s
    print(
        f"time: about {report.duration(total)} on {world_size} × {gpu.name} ({origin}) at {100 * assumed.mfu:.0f}% of "
        f"{peak:g} TFLOP/s, validations not counted; memory: {gpu.memory_gib:g} GiB, {fits}"
    )
    print("dry run: nothing was started, nothing was written")
    return layout


def _show(config: TeacherConfig, planner: Planner, layout: Layout, num_valid: int) -> None:
    console = report.make_console()
    counts, work, epochs = planner.counts, layout.work, config.optimization.epochs
    console.print_json(config.model_dump_json())
    tuned = "all parameters" if config.lora is None else f"LoRA rank {config.lora.rank}"
    console.print(
        f"network: {planner.training.architecture.name} ({config.model.base}), {counts.total:,} parameters, "
        f"{counts.trained:,} trained ({tuned})"
    )
    are_estimated = planner.training.counted.are_estimated
    tokens = "estimated, since the tokenizer is not on this machine" if are_estimated else "by its tokenizer"
    console.print(
        f"work: {round(work.pairs):,} pairs as {layout.batching}; {round(work.steps):,} steps per epoch, "
        f"{round(work.steps * epochs):,} in {epochs} epochs; up to {work.accumulation} "
        f"micro-batches per step and rank; {round(work.tokens):,} tokens per epoch ({tokens}); "
        f"{num_valid:,} dialogues to validate on"
    )
    console.print(report.memory_table(layout))


def gpu_here() -> tuple[Gpu, str]:
    """This machine's GPU with the table's peak and link, and which of them are assumed."""
    if not torch.cuda.is_available():
        return GPUS[DEFAULT_GPU], "assumed: no GPU here"
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / GIB
    known = gpu_of_device(properties.name, memory_gib)
    origin = (
        "this machine" if known else f"this machine; peak and link unknown, those of {DEFAULT_GPU} assumed"
    )
    return replace(known or GPUS[DEFAULT_GPU], name=properties.name, memory_gib=memory_gib), origin
