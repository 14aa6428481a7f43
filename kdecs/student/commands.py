"""`kdecs predict`, with the options that `kdecs predict-mrc` shares, and `kdecs student export`.

Torch is imported inside the function, so that `kdecs --help` stays fast.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

Input = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="A corpus file of any format, labelled or not; - reads JSON lines from standard input.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where to write the predictions: JSON lines, one per pair; - writes to standard output.",
    ),
]
MaxDistance = Annotated[
    int | None, typer.Option(min=0, help="Predict only candidates at most this many turns before the target.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BatchTokens = Annotated[int, typer.Option(min=32, help="Padded tokens per batch.")]
Offsets = Annotated[
    bool,
    typer.Option(
        "--offsets",
        help="Add the keys span_start and span_end (characters in the candidate's text) and score.",
    ),
]
Show = Annotated[bool, typer.Option("--show", help="Print every dialogue with its emotions and causes.")]
Example = Annotated[bool, typer.Option(help="Print one dialogue with its causes at the end.")]


app = typer.Typer(no_args_is_help=True, help="Export a student to run without PyTorch.")


@app.command("export")
def export(
    student: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a trained student.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the export.")],
    format: Annotated[Literal["onnx"], typer.Option(help="The format of the export.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the weights, and measure what that costs and gains.")
    ] = False,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled dialogues that --int8 is measured on; by default the student's validation file.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Export int8 even if it loses too much or is slower.")
    ] = False,
) -> None:
    """Write a student as an ONNX graph with its tokenizer: kdecs predict and servers take it as they take a student.

    An export needs neither PyTorch nor Transformers to predict. Its graph is compared with PyTorch before it is
    written. With --int8 it is measured, too: if it loses more than 0.5 points of macro F1 or is slower than float32,
    nothing is written and the exit code is 1.

    Examples:

    kdecs student export runs/student-tiny --format onnx --output runs/student-onnx

    kdecs student export runs/student-tiny --format onnx --int8 --output runs/student-int8 --corpus valid.json
    """
    del format  # there is one
    from kdecs.config import parse_config
    from kdecs.process import say
    from kdecs.student.onnx.export import OnnxExport, export_student

    values = {
        "student": str(student),
        "output": str(output),
        "precision": "int8" if int8 else "float32",
    }
    config = parse_config(OnnxExport, values, source="the command")
    say(f"{export_student(config, corpus_file=corpus, force=force)}: exported")


def predict(
    student: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of a trained student, or of its export.")
    ],
    input: Input,
    output: Output = None,
    max_distance: MaxDistance = None,
    device: Device = "auto",
    batch_tokens: BatchTokens = 8192,
    offsets: Offsets = False,
    format: Annotated[
        Literal["lines", "semeval"],
        typer.Option(
            help="lines: JSON lines, one per pair; semeval: the files Subtask_1_pred.json and Subtask_2_pred.json of "
            "SemEval-2024 Task 3, in the directory that --output names."
        ),
    ] = "lines",
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write a page for people, one file to be opened in a browser or sent on.",
        ),
    ] = None,
    show: Show = False,
    example: Example = True,
) -> None:
    """Predict who feels what in a file's dialogues, which utterances are the causes, and their spans.

    Examples:

    kdecs predict --student runs/student-tiny --input dialogues.json --output predictions.jsonl

    kdecs predict --student runs/student-tiny --input dialogues.json --show

    kdecs predict --student runs/student-tiny --input dialogues.json --html dialogues.html

    kdecs predict --student runs/student-tiny --input Subtask_1_test.json --format semeval --output submission

    cat dialogues.jsonl | kdecs predict --student runs/student-tiny --input - --output - --offsets
    """
    if output is None and html is None and not show:
        raise typer.BadParameter(
            "nothing to do: give --output FILE, --html FILE, or --show to print the dialogues"
        )
    if format == "semeval" and (output is None or offsets):
        raise typer.BadParameter(
            "--format semeval writes submission files: give --output DIR, and leave out --offsets"
        )
    # Each is written to a temporary file, so the second one to end would silently replace the first.
    if html is not None and output is not None and html.resolve() == output.resolve():
        raise typer.BadParameter("--html and --output name the same file; give each its own")
    from kdecs.student.predict.files import FileRequest, predict_file
    from kdecs.student.predict.predictor import Student

    predict_file(
        FileRequest(
            input,
            output,
            max_distance,
            batch_tokens,
            offsets,
            show,
            example and not show,
            student,
            html,
            format,
        ),
        lambda device: Student.from_pretrained(student, device=device),
        device=device,
    )
