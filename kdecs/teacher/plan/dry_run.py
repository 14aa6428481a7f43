"""`launch/train_teacher.py --dry-run`: what a config would train, its memory and time; starts and writes nothing."""

from dataclasses import replace

import torch

from kdecs.corpus.splits import read_split, training_dialogues
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.load_checks import check_family, check_positions
from kdecs.teacher.plan import report
from kdecs.teacher.plan.architectures import resolve_architecture
from kdecs.teacher.plan.gpus import GPUS, Gpu, gpu_of_device
from kdecs.teacher.plan.memory import GIB
from kdecs.teacher.plan.planning import DEFAULT_GPU
from kdecs.teacher.plan.prompts import count_prompts
from kdecs.teacher.plan.search import Candidate, Planner, Training, config_candidate, planned_attention
from kdecs.teacher.plan.timing import Speed

ASSUMED_MFU = 0.4


def dry_run(config: TeacherConfig, *, world_size: int) -> Candidate:
    """Print the resolved config, the network, the work and the peak of a rank; the layout that they belong to.

    Reads the corpus whole, as the training does. Raises CorpusError, ConfigError or ModelError, one line.
    """
    base = config.model.base
    architecture = resolve_architecture(base)
    check_family(architecture.config, base, config.model.family)
    counted = count_prompts(training_dialogues(config.corpus), config, show_progress=True)
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
