"""`kdecs plan` and `kdecs teacher import`. Slow imports happen inside the functions."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from kdecs.errors import ConfigError, DependencyError
from kdecs.process import quick_imports, say

EPILOG = (
    "Examples:\n\nkdecs plan --teacher llama-7b --gpus 4 --gpu-memory-gib 40\n\n"
    "kdecs plan --teacher llama-13b --gpus 8 --gpu a100-80g --corpus data/dailydialog_train.json\n\n"
    "kdecs plan --scale --teacher llama-7b --gpus 64 --gpu a100-80g --set pairs=1e8 --set price_per_gpu_hour=2\n\n"
    "kdecs plan --teacher kdecs/configs/teacher/t5-large.yaml --gpu l4 --set zero.dtype=float32 --set mfu=0.3"
)


def plan(
    teacher: Annotated[
        str,
        typer.Option(
            metavar="NAME|YAML|DIR",
            help="A shipped architecture, a teacher's config file, or a model directory with a config.json.",
        ),
    ],
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="Number of GPUs, with one rank each.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A known GPU, such as a100-80g: sets its memory, peak and link speed."
        ),
    ] = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of each GPU. Default: that of --gpu.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Training corpus. Default: the config's, or the bundled sample.",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all parameters instead of LoRA.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A key of the teacher's config (zero.dtype=float16, lora.rank=8, optimization.epochs=5, "
            "batches.micro_batch_tokens=4096, model.load_in_4bit=true), or an assumption: pairs, mfu, peak_tflops, "
            "link_gb_s, reserve_gib, host_memory_gib. With --scale also price_per_gpu_hour, mtbf_hours, start_s, "
            "storage_gb_s, storage_calls_s, checkpoint_s, num_shards, lease_s, node_memory_gib, gpus_per_node, "
            "trial_minutes. Repeatable.",
        ),
    ] = None,
    scale: Annotated[
        bool,
        typer.Option(
            "--scale",
            help="Simulate the training and the export with failing GPUs: time, work lost, storage, network, price, "
            "and which part of kdecs breaks first.",
        ),
    ] = False,
    every_budget: Annotated[bool, typer.Option("--all", help="Show a row for every token budget.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate a teacher's memory and time by ZeRO stage, offload, checkpointing and micro-batch; name the fastest.

    Nothing is downloaded, and neither weights nor a GPU are needed. Exits with 1 if nothing fits.
    """
    if gpu is None and gpu_memory_gib is None:
        raise typer.BadParameter("give --gpu NAME, --gpu-memory-gib NUMBER, or both")
    try:
        with quick_imports():
            from kdecs.teacher.plan.planning import PlanRequest, make_plan
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{error.name} is not installed, but kdecs plan needs it; run: pip install 'kdecs[teacher]'"
        ) from None

    request = PlanRequest(
        teacher=teacher,
        gpus=gpus,
        gpu=gpu,
        gpu_memory_gib=gpu_memory_gib,
        corpus=corpus,
        settings=[*(["lora=null"] if full else []), *(settings or [])],
    )
    if scale:
        from kdecs.teacher.plan.scale import plan_at_scale

        at_scale = plan_at_scale(request)
        if as_json:
            print(json.dumps(at_scale.as_record(), indent=2))
        else:
            at_scale.show()
        return
    made = make_plan(request)
    if as_json:
        print(json.dumps(made.as_record(), indent=2))
    else:
        made.show(every_budget=every_budget)
    # After the table, which shows by how much each layout misses.
    if made.best is None:
        raise ConfigError(made.what_would_fit())


app = typer.Typer(help="Import teachers that were trained elsewhere.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """Import teachers that were trained elsewhere."""


@app.command("import")
def import_teacher(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER_DIR", help="A directory written by PEFT's save_pretrained.")
    ],
    base: Annotated[
        str, typer.Option(metavar="MODEL", help="The adapter's base: a local directory or a hub name.")
    ],
    family: Annotated[
        Literal["causal", "seq2seq", "masked"],
        typer.Option(help="The base's kind: decoder-only, encoder-decoder or encoder."),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The teacher directory to write.")],
    train: Annotated[
        Path, typer.Option(metavar="FILE", help="The corpus file that the adapter was trained on.")
    ],
    valid: Annotated[
        Path, typer.Option(metavar="FILE", help="The validation file; the adapter is tried on it now.")
    ],
    other_corpus: Annotated[
        bool,
        typer.Option(
            "--other-corpus",
            help="The adapter was trained on another corpus; exports then need allow_other_corpus: true.",
        ),
    ] = False,
    emotions_shown: Annotated[
        Literal["coarse", "fine"], typer.Option(help="Which emotions the adapter's prompts showed.")
    ] = "coarse",
    max_prompt_tokens: Annotated[
        int, typer.Option(min=16, help="Longer prompts lose their oldest history.")
    ] = 2048,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Precision of the base while the adapter is tried."),
    ] = "float32",
) -> None:
    """Turn a LoRA adapter that was trained elsewhere into a teacher directory, after trying it on its base.

    The export then takes it like any other teacher. Weights are read from safetensors only.

    Example: kdecs teacher import my-adapter --base huggyllama/llama-7b --family causal --train train.json
    --valid valid.json --output runs/teachers/mine --dtype bfloat16
    """
    try:
        from kdecs.runtime import start_runtime
        from kdecs.teacher.importing import AdapterImport, import_adapter
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{error.name} is not installed, but teachers need it; run: pip install 'kdecs[teacher]'"
        ) from None
    wanted = AdapterImport(
        adapter=adapter.absolute(),
        base=base,
        family=family,
        output=output.absolute(),
        train=train.absolute(),
        valid=valid.absolute(),
        emotions_shown=emotions_shown,
        max_prompt_tokens=max_prompt_tokens,
        is_of_corpus=not other_corpus,
    )
    manifest = import_adapter(wanted, start_runtime(threads=0), dtype=dtype)
    macro_f1 = manifest.details["valid"]["valid_macro_f1"]
    say(
        f"teacher {output.name}: {family}, scored by {manifest.details['batching']}, valid macro F1 "
        f"{macro_f1:.2f}; written to {output}"
    )
