"""`kdecs plan`: memory and time of a teacher's training on given GPUs. Imports what is slow inside the function."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdecs.errors import ConfigError

EPILOG = (
    "Examples: kdecs plan --teacher llama-7b --gpus 4 --gpu-memory-gib 40 · "
    "kdecs plan --teacher llama-13b --gpus 8 --gpu a100-80g --corpus data/dailydialog_train.json · "
    "kdecs plan --teacher launch/configs/teacher/t5-large.yaml --gpu l4 --json"
)


class Precision(StrEnum):
    """Of frozen weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Batching(StrEnum):
    """tree shares the prompts' beginnings (decoders); auto: tree where the family can."""

    auto = "auto"
    tree = "tree"
    pairs = "pairs"


def plan(
    teacher: Annotated[
        str,
        typer.Option(
            metavar="NAME|YAML|DIR",
            help="a shipped architecture, a teacher's config, or a model directory with config.json",
        ),
    ],
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="number of GPUs, one rank each")] = 1,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="a known GPU, such as a100-80g: memory, peak and link")
    ] = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="memory of a GPU; default: that of --gpu")
    ] = None,
    host_memory_gib: Annotated[
        float | None,
        typer.Option(min=0.0, help="main memory for each GPU, which offload may fill; default: not limited"),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="training corpus; default: the bundled sample")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="pairs of an epoch, where it is not those of the corpus")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="default: the config's")] = None,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(min=16, help="this token budget alone; default: several are tried")
    ] = None,
    global_batch_pairs: Annotated[int | None, typer.Option(min=1, help="default: the config's")] = None,
    batching: Annotated[
        Batching | None, typer.Option(help="default: the config's, or auto, tree for decoders")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="rank of LoRA; default: the config's, or 16")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="full tuning in LoRA's place")] = False,
    in_4bit: Annotated[bool, typer.Option("--4bit", help="frozen weights in 4 bits (NF4)")] = False,
    dtype: Annotated[Precision | None, typer.Option(help="default: the config's, or bfloat16")] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="share of the peak that is assumed to be reached")
    ] = 0.4,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.01, help="of a GPU; default: that of --gpu")
    ] = None,
    link_gb_s: Annotated[
        float | None, typer.Option(min=0.01, help="GB/s of a GPU to the others, one direction")
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(min=0.0, help="what driver, NCCL and fragments take of each GPU")
    ] = 1.5,
    every_budget: Annotated[bool, typer.Option("--all", help="a row for every token budget too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Memory and time of a teacher by ZeRO stage, offload, checkpointing and micro-batch; the fastest that fits.

    Nothing is downloaded, no weights are needed, no GPU is touched. Exits with 1 where nothing fits.
    """
    if gpu is None and gpu_memory_gib is None:
        raise typer.BadParameter("give --gpu NAME, --gpu-memory-gib NUMBER, or both")
    if full and rank is not None:
        raise typer.BadParameter("--full tunes every parameter, so it has no --rank")
    try:
        from kdecs.teacher.plan.planning import PlanRequest, make_plan
    except ModuleNotFoundError as error:
        raise ConfigError(f"kdecs plan needs {error.name}: pip install 'kdecs[teacher]'") from None

    request = PlanRequest(
        teacher=teacher,
        gpus=gpus,
        gpu=gpu,
        gpu_memory_gib=gpu_memory_gib,
        host_memory_gib=host_memory_gib,
        corpus=corpus,
        pairs=pairs,
        epochs=epochs,
        micro_batch_tokens=micro_batch_tokens,
        global_batch_pairs=global_batch_pairs,
        batching=batching.value if batching else None,
        rank=rank,
        is_full=full,
        in_4bit=in_4bit,
        dtype=dtype.value if dtype else None,
        mfu=mfu,
        peak_tflops=peak_tflops,
        link_gb_s=link_gb_s,
        reserve_gib=reserve_gib,
    )
    made = make_plan(request)
    if as_json:
        print(json.dumps(made.as_record(), indent=2))
    else:
        made.show(every_budget=every_budget)
    if made.best is None:
        raise ConfigError(made.what_would_fit())
