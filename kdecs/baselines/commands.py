"""`kdecs baseline predict`, also called `kdecs predict-mrc`. Torch is imported inside: `kdecs --help` stays fast."""

from pathlib import Path
from typing import Annotated

import typer

from kdecs.student.commands import BatchTokens, Device, Input, MaxDistance, Offsets

app = typer.Typer(no_args_is_help=True, help="Predict with the systems that a student is compared with.")


@app.command("predict")
def predict(
    baseline: Annotated[
        Path, typer.Option("--baseline", "--model", metavar="DIR", help="Directory of a trained baseline.")
    ],
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
    emotions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For MRC: predictions of another system whose emotions the questions name, instead of those of the "
            "input.",
        ),
    ] = None,
    max_distance: MaxDistance = None,
    device: Device = "auto",
    batch_tokens: BatchTokens = 8192,
    offsets: Offsets = False,
) -> None:
    """Predict causes and their spans with a trained MRC, ECPE-2D, KEC, MGSAG or UECA-Prompt.

    All but MRC predict emotions as well. MRC's questions name the target's emotion: each utterance of the input needs
    one, or --emotions gives those of another system, which are then part of the predictions.

    Example: kdecs baseline predict --baseline runs/ecpe-2d --input test.json --output ecpe-2d.jsonl
    """
    from kdecs.baselines.prediction import open_baseline
    from kdecs.evaluation.predictions import read_emotions
    from kdecs.output import refuse_inputs
    from kdecs.runtime import start_runtime
    from kdecs.student.predict.files import FileRequest, predict_file

    refuse_inputs(output, [knowledge, emotions])
    found = None if emotions is None else read_emotions(emotions)
    predict_file(
        FileRequest(input, output, max_distance, batch_tokens, offsets, has_example=False, model=baseline),
        lambda device: open_baseline(
            baseline, device=start_runtime(device=device).device, knowledge=knowledge, emotions=found
        ),
        device=device,
    )
