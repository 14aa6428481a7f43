"""`kdecs predict-mrc`. Imports what is slow inside the function."""

from pathlib import Path
from typing import Annotated

import typer

from kdecs.student.commands import BatchTokens, Device, Input, MaxDistance, Offsets


def predict_mrc(
    model: Annotated[Path, typer.Option(metavar="DIR", help="directory of kind mrc (launch/train_mrc.py)")],
    input: Input,
    output: Annotated[Path, typer.Option(metavar="FILE", help="predictions: JSON lines; - for stdout")],
    max_distance: MaxDistance = None,
    device: Device = "auto",
    batch_tokens: BatchTokens = 8192,
    offsets: Offsets = False,
) -> None:
    """Predict causes and cause spans with the MRC baseline, for dialogues whose emotions are given.

    Its questions name the target's emotion, so the input must have emotions, and the predictions have none.

    Example: kdecs predict-mrc --model runs/mrc-minilm --input test.json --output mrc.jsonl
    """
    from kdecs.mrc.prediction import MrcBaseline
    from kdecs.student.predict.files import FileRequest, predict_file

    predict_file(
        FileRequest(input, output, max_distance, batch_tokens, offsets, has_example=False),
        lambda runtime: MrcBaseline.from_pretrained(model, device=runtime.device),
        device=device,
    )
