"""`kdecs baseline predict`. Torch is imported inside the function, so that `kdecs --help` stays fast."""

from pathlib import Path
from typing import Annotated

import typer

from kdecs.student.commands import BatchTokens, Device, Input, MaxDistance, Offsets

app = typer.Typer(no_args_is_help=True, help="Predict with the systems that a student is compared with.")


@app.command("predict")
def predict(
    baseline: Annotated[Path, typer.Option(metavar="DIR", help="Directory of a trained baseline.")],
    input: Input,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Where to write the predictions: JSON lines; - writes to standard output."
        ),
    ],
    knowledge: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Commonsense phrases for the input, for KEC if trained with them."),
    ] = None,
    max_distance: MaxDistance = None,
    device: Device = "auto",
    batch_tokens: BatchTokens = 8192,
    offsets: Offsets = False,
) -> None:
    """Predict emotions, causes and their spans with a trained ECPE-2D, KEC, MGSAG or UECA-Prompt.

    Example: kdecs baseline predict --baseline runs/ecpe-2d --input test.json --output ecpe-2d.jsonl
    """
    from kdecs.baselines.prediction import Baseline
    from kdecs.output import refuse_inputs
    from kdecs.runtime import start_runtime
    from kdecs.student.predict.files import FileRequest, predict_file

    refuse_inputs(output, [knowledge])
    predict_file(
        FileRequest(input, output, max_distance, batch_tokens, offsets, has_example=False, model=baseline),
        lambda device: Baseline.from_pretrained(
            baseline, device=start_runtime(device=device).device, knowledge=knowledge
        ),
        device=device,
    )
