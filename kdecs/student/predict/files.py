"""Predict files of dialogues (`kdecs predict`, `kdecs predict-mrc`) in constant memory.

Input is a corpus file (kdecs.corpus.formats), or JSON lines on standard input ("-") or from a pipe. Output
is one line per pair (kdecs.evaluation.predictions); on request each line also has span_start and span_end, the span's
characters [start, end) in the candidate's text (null without a span), and score, in [0, 1]. The format semeval has the
submission files of SemEval-2024 Task 3 instead (kdecs.evaluation.semeval).
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from tqdm import tqdm

from kdecs.artifact import kind_of
from kdecs.corpus.reading import iter_dialogues, parse_dialogue
from kdecs.corpus.schema import Dialogue, Fault
from kdecs.errors import CorpusError, DialogueError, printable
from kdecs.evaluation.semeval import SUBMISSION_NAMES, Subtask, conversation_of
from kdecs.output import STANDARD_STREAM, is_standard_output, open_output, refuse_inputs
from kdecs.process import is_output_closed, standard_input
from kdecs.student.predict.page import PageWriter
from kdecs.student.predict.render import render_dialogue
from kdecs.student.predict.streaming import (
    DEFAULT_BATCH_TOKENS,
    PairPrediction,
    Predictor,
    num_candidates,
    offsets_of,
    stream,
    warn_of_long_dialogues,
)
from kdecs.tables import terminal

_STREAMS = ("a named pipe", "a device", "a socket")


@dataclass(frozen=True)
class FileRequest:
    """What to predict, with which model, and where to write it.

    `output` gets lines and `html` a page for people, where they are given; `shows` prints. In the format semeval
    `output` is a directory for both subtasks' files, or one of the files if its name ends with .json.
    """

    input: Path
    output: Path | None
    max_distance: int | None = None
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    has_offsets: bool = False
    shows: bool = False
    has_example: bool = True
    model: Path | None = None
    html: Path | None = None
    format: Literal["lines", "semeval"] = "lines"

    @property
    def submissions(self) -> dict[Subtask, Path]:
        """The submission files to write, by subtask."""
        if self.output is None or self.format == "lines":
            return {}
        if self.output == STANDARD_STREAM or self.output.suffix == ".json":
            return {2 if "subtask_2" in self.output.name.lower() else 1: self.output}
        return {subtask: self.output / name for subtask, name in SUBMISSION_NAMES.items()}

    @property
    def is_stream(self) -> bool:
        """True if the input can be read only once: standard input, or a pipe."""
        return self.input == STANDARD_STREAM or (self.input.exists() and kind_of(self.input) in _STREAMS)


def predict_file(request: FileRequest, load: Callable[[str], Predictor], *, device: str = "auto") -> None:
    """Predict the dialogues of a file with the predictor that `load` returns, and print a line that sums up.

    `load` is called with the device, once the file has been checked.

    The predictions appear complete or not at all. Raises CorpusError if a dialogue breaks the schema, and OutputError
    if the output is an input or cannot be written to. Valid dialogues that the model cannot read are named on standard
    error and left out; at the end, DialogueError says how many.
    """
    lines = request.output if request.format == "lines" else None
    if request.output is not None and request.output not in (lines, *request.submissions.values()):
        refuse_inputs(request.output, [], is_directory=True)
    for place in (lines, request.html, *request.submissions.values()):
        if place is not None:
            refuse_inputs(place, [request.input, request.model])
    # A first pass over the file, before the model is loaded: a fault in the last dialogue is reported at once.
    total = None if request.is_stream else _checked(request)
    # Predictions on standard output are read by a program: everything for people goes to standard error.
    has_reader = is_standard_output(request.output) or is_standard_output(request.html)
    console = terminal(stderr=has_reader or is_output_closed())
    num_dialogues = num_pairs = num_causes = 0
    faults: list[DialogueError] = []
    example: tuple[Dialogue, list[PairPrediction]] | None = None

    def leave_out(fault: DialogueError) -> None:
        faults.append(fault)
        with bar.external_write_mode():
            print(f"kdecs: warning: {printable(str(fault))}; left out", file=sys.stderr, flush=True)

    with (
        open_output(lines) if lines else contextlib.nullcontext() as file,
        open_output(request.html) if request.html else contextlib.nullcontext() as page_file,
        contextlib.ExitStack() as submission_files,
        tqdm(total=total, unit="pair", desc="predict", disable=None) as bar,
    ):
        submissions = [
            _Submission(subtask, submission_files.enter_context(open_output(path)))
            for subtask, path in request.submissions.items()
        ]
        # Only now: a place that cannot be written to is refused before the seconds that a model takes to load.
        predictor = load(device)
        if getattr(predictor, "candidates_after", 0):
            bar.total = None  # the file was counted without later candidates
        page = PageWriter(page_file.write) if page_file is not None else None
        for dialogue, found in stream(
            predictor,
            _dialogues(request),
            max_distance=request.max_distance,
            batch_tokens=request.batch_tokens,
            on_batch=bar.update,
            on_fault=leave_out,
        ):
            causes = sum(item.prediction.is_cause for item in found)
            num_dialogues += 1
            num_pairs += len(found)
            num_causes += causes
            if file is not None:
                file.writelines(_lines(found, has_offsets=request.has_offsets))
            for submission in submissions:
                submission.add(dialogue, found)
            if page is not None:
                page.add(dialogue, found)
            if request.shows:
                with bar.external_write_mode():
                    console.print(
                        render_dialogue(dialogue, found, limit=None, marks=_needs_marks(console)), ""
                    )
            # The first dialogue with a cause is the best example; until then, the first one.
            elif example is None or (causes and not any(p.prediction.is_cause for p in example[1])):
                example = dialogue, found
        if faults and not num_dialogues:
            raise DialogueError(
                f"{request.input}: the model can read no dialogue; the first one: {faults[0]}"
            )
        for submission in submissions:
            submission.close()
        if page is not None:
            page.close()
    places = (lines, *request.submissions.values(), request.html)
    written = [path for path in places if path not in (None, STANDARD_STREAM)]
    names = f"{printable(', '.join(map(str, written)))}: " if written else ""
    line = f"{names}{num_pairs} pairs of {num_dialogues} dialogues, {num_causes} causes"
    print(line, file=console.file, flush=True)
    if request.has_example and example is not None:
        console.print(render_dialogue(*example, marks=_needs_marks(console)))
    if faults:
        raise DialogueError(
            f"{request.input}: {len(faults)} of {len(faults) + num_dialogues} dialogues left out, which the model "
            f"cannot read; the predictions of the others are complete; the first one: {faults[0]}"
        )


class _Submission:
    """Writes one subtask's submission file, dialogue by dialogue."""

    def __init__(self, subtask: Subtask, file: IO[bytes]) -> None:
        self._subtask: Subtask = subtask
        self._file = file
        self._between = b"[\n"

    def add(self, dialogue: Dialogue, found: Iterable[PairPrediction]) -> None:
        conversation = conversation_of(dialogue, (item.prediction for item in found), self._subtask)
        self._file.write(self._between + json.dumps(conversation, ensure_ascii=False).encode())
        self._between = b",\n"

    def close(self) -> None:
        self._file.write((b"[" if self._between.startswith(b"[") else b"") + b"\n]\n")


def _checked(request: FileRequest) -> int:
    """Read the whole file and return the number of pairs to predict. Warns of very long dialogues."""
    watched = _watched(request, iter_dialogues(request.input, labelled=False), f"{request.input}: ")
    return sum(num_candidates(len(dialogue.utterances), request.max_distance) for dialogue in watched)


def _watched(request: FileRequest, dialogues: Iterable[Dialogue], place: str) -> Iterator[Dialogue]:
    """The same dialogues, with warnings of very long ones on standard error."""

    def warn(line: str) -> None:
        print(f"kdecs: warning: {printable(line)}", file=sys.stderr, flush=True)

    # As the user would type it: what to add, or the option that is in force.
    bound = "--max-distance N" if request.max_distance is None else "--max-distance"
    return warn_of_long_dialogues(dialogues, request.max_distance, warn, bound=bound, place=place)


def _dialogues(request: FileRequest) -> Iterator[Dialogue]:
    if not request.is_stream:
        return iter_dialogues(request.input, labelled=False)  # `_checked` has warned already
    if request.input == STANDARD_STREAM:
        return _watched(request, _from_lines(standard_input(), "standard input"), "standard input: ")
    return _watched(request, _from_pipe(request.input), f"{request.input}: ")


def _from_pipe(path: Path) -> Iterator[Dialogue]:
    with path.open("rb") as lines:
        yield from _from_lines(lines, str(path))


def _from_lines(lines: Iterable[bytes], source: str) -> Iterator[Dialogue]:
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{source}, line {number}"
            dialogue = parse_dialogue(line, place, default_id=f"line {number}")
            if dialogue.id in seen:
                fault = Fault(place, dialogue.id, None, "id", "a second dialogue of this id", "each id once")
                raise CorpusError(str(fault))
            seen.add(dialogue.id)
            yield dialogue


def _lines(found: Iterable[PairPrediction], *, has_offsets: bool) -> Iterator[bytes]:
    for item in found:
        record: dict[str, Any] = asdict(item.prediction)
        if has_offsets:
            record |= offsets_of(item)
        yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _needs_marks(console: Console) -> bool:
    """True if the console has no colours (a pipe, a file, NO_COLOR): brackets then mark the causes."""
    return console.color_system is None or console.no_color
