"""`kdecs teacher import`. Imports what is slow inside the function."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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


class Precision(StrEnum):
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
    dtype: Annotated[Precision, typer.Option(help="of the base while it is tried")] = Precision.float32,
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
