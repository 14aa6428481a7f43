"""`kdecs teacher import`. Imports what is slow inside the function."""

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


app = typer.Typer(help="Teachers made elsewhere.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """Teachers made elsewhere."""


class FamilyChoice(StrEnum):
    """How the base is asked for the connective."""

    causal = "causal"
    seq2seq = "seq2seq"
    masked = "masked"


class EmotionsShown(StrEnum):
    """Which emotions stand in the prompts that the adapter was trained on."""

    coarse = "coarse"
    fine = "fine"


class BasePrecision(StrEnum):
    """Of the base while the adapter is tried."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="what PEFT's save_pretrained wrote")]
Base = Annotated[
    str, typer.Option(metavar="MODEL", help="the adapter's base: a local directory or a hub name")
]
OtherCorpus = Annotated[
    bool,
    typer.Option(
        "--other-corpus", help="it was trained on something else; exports then need allow_other_corpus: true"
    ),
]
MaxTokens = Annotated[int, typer.Option(min=16, help="longer prompts lose their oldest history")]


@app.command("import")
def import_teacher(
    adapter: Adapter,
    base: Base,
    family: Annotated[FamilyChoice, typer.Option(help="decoder-only, encoder-decoder or encoder")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="where the teacher directory goes")],
    train: Annotated[Path, typer.Option(metavar="FILE", help="the corpus file that it was trained on")],
    valid: Annotated[Path, typer.Option(metavar="FILE", help="the validation file; it is tried on it now")],
    other_corpus: OtherCorpus = False,
    emotions_shown: Annotated[EmotionsShown, typer.Option(help="in its prompts")] = EmotionsShown.coarse,
    max_prompt_tokens: MaxTokens = 2048,
    dtype: Annotated[
        BasePrecision, typer.Option(help="of the base while it is tried")
    ] = BasePrecision.float32,
) -> None:
    """Make a teacher directory of a LoRA adapter trained elsewhere, after trying it on its base.

    The export takes it like a teacher trained here. Weights are read from safetensors alone.

    Example: kdecs teacher import my-adapter --base huggyllama/llama-7b --family causal --train train.json
    --valid valid.json --output runs/teachers/mine --dtype bfloat16
    """
    from kdecs.errors import DependencyError
    from kdecs.runtime import start_runtime

    try:
        from kdecs.teacher.importing import AdapterImport, import_adapter
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{error.name} is not installed, which teachers need; install it with: pip install 'kdecs[teacher]'"
        ) from None
    wanted = AdapterImport(
        adapter=adapter.absolute(),
        base=base,
        family=family.value,
        output=output.absolute(),
        train=train.absolute(),
        valid=valid.absolute(),
        emotions_shown=emotions_shown.value,
        max_prompt_tokens=max_prompt_tokens,
        is_of_corpus=not other_corpus,
    )
    manifest = import_adapter(wanted, start_runtime(threads=0), dtype=dtype.value)
    macro_f1 = manifest.details["valid"]["valid_macro_f1"]
    typer.echo(
        f"teacher {output.name}: {family.value}, scored by {manifest.details['batching']}, valid macro F1 "
        f"{macro_f1:.2f}; written to {output}"
    )
