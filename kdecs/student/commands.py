"""`kdecs predict`. Imports what is slow inside the function."""

from pathlib import Path
from typing import Annotated

import typer

Input = Annotated[
    Path,
    typer.Option(metavar="FILE", help="dialogues: RECCON JSON or JSON lines; - reads JSON lines from stdin"),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="predictions: JSON lines, one a pair; - writes them to stdout"),
]
MaxDistance = Annotated[
    int | None, typer.Option(min=0, help="only candidates at most this many turns before the target")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
BatchTokens = Annotated[int, typer.Option(min=32, help="padded tokens a batch")]
Offsets = Annotated[
    bool,
    typer.Option(
        "--offsets", help="add span_start and span_end, characters in the candidate's text, and score"
    ),
]
Show = Annotated[bool, typer.Option("--show", help="print every dialogue with its emotions and causes")]
Example = Annotated[bool, typer.Option(help="print one dialogue with its causes at the end")]


def predict(
    student: Annotated[Path, typer.Option(metavar="DIR", help="student directory")],
    input: Input,
    output: Output = None,
    max_distance: MaxDistance = None,
    device: Device = "auto",
    batch_tokens: BatchTokens = 8192,
    offsets: Offsets = False,
    show: Show = False,
    example: Example = True,
) -> None:
    """Predict emotions, their causes and the cause spans for every pair of a file's dialogues.

    Examples:

    kdecs predict --student runs/demo/student --input dialogues.json --output predictions.jsonl

    kdecs predict --student runs/demo/student --input dialogues.json --show

    cat dialogues.jsonl | kdecs predict --student runs/demo/student --input - --output - --offsets
    """
    if output is None and not show:
        raise typer.BadParameter("nothing to do: give --output FILE, or --show to print the dialogues")
    from kdecs.student.predict.files import FileRequest, predict_file
    from kdecs.student.predict.predictor import Student

    predict_file(
        FileRequest(input, output, max_distance, batch_tokens, offsets, show, example and not show),
        lambda runtime: Student.from_pretrained(student, device=runtime.device),
        device=device,
    )
