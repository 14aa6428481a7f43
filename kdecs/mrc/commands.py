"""`kdecs predict-mrc`. Torch is imported inside the function, so that `kdecs --help` stays fast."""

from pathlib import Path
from typing import Annotated

import typer

from kdecs.student.commands import BatchTokens, Device, Input, MaxDistance, Offsets


def predict_mrc(
    model: Annotated[Path, typer.Option(metavar="DIR", help="Directory of a trained MRC baseline.")],
    input: Input,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Where to write the predictions: JSON lines; - writes to standard output."
        ),
    ],
    emotions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Predictions of another system whose emotions the questions name, instead of those of the input.",
        ),
    ] = None,
    max_distance: MaxDistance = None,
    device: Device = "auto",
    batch_tokens: BatchTokens = 8192,
    offsets: Offsets = False,
) -> None:
    """Predict causes and their spans with the MRC baseline, for dialogues whose emotions are given.

    The baseline's questions name the emotion of the target. So every utterance of the input needs an emotion, and the
    predictions have none. With --emotions they come from another system's predictions and are part of these.

    Example: kdecs predict-mrc --model runs/mrc-minilm --input test.json --output mrc.jsonl
    """
    from kdecs.evaluation.predictions import read_emotions
    from kdecs.mrc.prediction import MrcBaseline
    from kdecs.output import refuse_inputs
    from kdecs.runtime import start_runtime
    from kdecs.student.predict.files import FileRequest, predict_file

    refuse_inputs(output, [emotions])
    found = None if emotions is None else read_emotions(emotions)
    predict_file(
        FileRequest(input, output, max_distance, batch_tokens, offsets, has_example=False, model=model),
        lambda device: MrcBaseline.from_pretrained(
            model, device=start_runtime(device=device).device, emotions=found
        ),
        device=device,
    )
