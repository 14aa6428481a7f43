"""`kdecs predict`. Imports what is slow inside the functions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kdecs.corpus.schema import Dialogue
    from kdecs.student.prediction import PairPrediction, Student

_PAIRS_A_GROUP = 1024
_MANY_UTTERANCES = 100


def predict(
    student: Annotated[Path, typer.Option(metavar="DIR", help="student directory")],
    input: Annotated[Path, typer.Option(metavar="FILE", help="dialogues: RECCON JSON or JSON lines")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="predictions: JSON lines, one a pair")],
    max_distance: Annotated[
        int | None, typer.Option(min=0, help="only candidates at most this many turns before the target")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=32, help="padded tokens a batch")] = 8192,
    example: Annotated[bool, typer.Option(help="print one dialogue with its causes at the end")] = True,
) -> None:
    """Predict emotions, their causes and the cause spans for every pair of a file's dialogues."""
    from rich.console import Console
    from tqdm import tqdm

    from kdecs.corpus.pairs import candidate_pairs
    from kdecs.corpus.reading import iter_dialogues
    from kdecs.evaluation.predictions import Prediction, write_predictions
    from kdecs.runtime import start_runtime
    from kdecs.student.prediction import Student
    from kdecs.student.rendering import render_dialogue

    # One pass over the whole file first: a fault in its last dialogue is told before the work, not after.
    num_dialogues = num_pairs = 0
    for dialogue in iter_dialogues(input, labelled=False):
        num_dialogues += 1
        num_pairs += len(candidate_pairs(dialogue, max_distance=max_distance))
        if len(dialogue.utterances) > _MANY_UTTERANCES and max_distance is None:
            typer.echo(
                f"{input}: dialogue {dialogue.id} has {len(dialogue.utterances)} utterances, all pairs are predicted; "
                "--max-distance bounds them",
                err=True,
            )
    runtime = start_runtime(device=device)
    model = Student.from_pretrained(student, device=runtime.device)
    shown: list[tuple[Dialogue, list[PairPrediction]]] = []
    num_causes = 0

    def predictions() -> Iterator[Prediction]:
        nonlocal num_causes
        with tqdm(total=num_pairs, unit="pair", desc="predict", disable=None) as bar:
            for group in _groups(iter_dialogues(input, labelled=False), max_distance):
                for dialogue, found in _predict_group(model, group, max_distance, batch_tokens, bar.update):
                    causes = sum(item.prediction.is_cause for item in found)
                    num_causes += causes
                    if not shown or (causes and not any(i.prediction.is_cause for i in shown[0][1])):
                        shown[:] = [(dialogue, found)]
                    yield from (item.prediction for item in found)

    written = write_predictions(output, predictions())
    typer.echo(f"{output}: {written} pairs of {num_dialogues} dialogues, {num_causes} causes")
    if example and shown:
        Console().print(render_dialogue(*shown[0]))


def _groups(dialogues: "Iterator[Dialogue]", max_distance: int | None) -> "Iterator[list[Dialogue]]":
    """Dialogues in groups of about a thousand pairs: enough to fill batches of like length."""
    from kdecs.corpus.pairs import candidate_pairs

    group: list[Dialogue] = []
    num_pairs = 0
    for dialogue in dialogues:
        group.append(dialogue)
        num_pairs += len(candidate_pairs(dialogue, max_distance=max_distance))
        if num_pairs >= _PAIRS_A_GROUP:
            yield group
            group, num_pairs = [], 0
    if group:
        yield group


def _predict_group(
    model: "Student",
    group: "list[Dialogue]",
    max_distance: int | None,
    batch_tokens: int,
    on_batch: Callable[[int], object],
) -> "Iterator[tuple[Dialogue, list[PairPrediction]]]":
    from kdecs.corpus.pairs import candidate_pairs

    by_dialogue = [candidate_pairs(dialogue, max_distance=max_distance) for dialogue in group]
    pairs = [pair for found in by_dialogue for pair in found]
    details = iter(model.detail(pairs, batch_tokens=batch_tokens, on_batch=on_batch))
    for dialogue, own in zip(group, by_dialogue, strict=True):
        yield dialogue, [next(details) for _ in own]
