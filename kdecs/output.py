"""Where a command or a stage writes what its user asked for: which places it refuses, and how it opens the others.

A file appears complete or not at all. Everything else that can be written to, such as a pipe or a device, is opened
once and written through. An output that is also an input would destroy it, so it is refused before any work.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from kdecs.artifact import MANIFEST_NAME, atomic_path, kind_of
from kdecs.config import Config, outputs_and_inputs
from kdecs.errors import OutputError

STANDARD_STREAM = Path("-")
"""As an input, standard input; as an output, standard output."""

_MOST_LINKS = 40  # as many as Linux follows
# What the stages write, move or remove below an output directory.
_WRITTEN = (
    MANIFEST_NAME,
    "*.safetensors",
    "adapter_config.json",
    "baseline.json",
    "baselines.json",
    "best-*/*",
    "checkpoint.pt",
    "checkpoints/*",
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "model.onnx",
    "model/*",
    "mrc.json",
    "onnx.json",
    "quarantine/*",
    "shard-*.parquet",
    "student.json",
    "system.jsonl",
    "tokenizer*.json",
    "trials.json",
    "trials/*",
    "valid-predictions.jsonl",
)


def refuse_inputs(
    output: Path, inputs: Iterable[Path | None], *, is_directory: bool = False, may_hold: bool = False
) -> None:
    """Raise OutputError if writing an output would change an input, under whatever path or link.

    The two may be the same, or the output may lie inside an input directory. An output that `is_directory` may not
    hold an input directory either, unless it `may_hold` some, nor an input file under a name that the stages write.
    """
    state, place = _state(output, 1), Path(os.path.realpath(output))
    if is_directory and state is not None and not stat.S_ISDIR(state.st_mode):
        raise OutputError(f"{output}: is {kind_of(output)}, expected a directory; choose another output")
    for source in inputs:
        found = None if source is None else _state(source, 0)
        if source is None or found is None:
            continue
        if state is not None and os.path.samestat(state, found):
            raise OutputError(
                f"{_name(output, 'output')}: is the input {_name(source, 'input')} itself, which would be lost; choose "
                "another output"
            )
        if STANDARD_STREAM in (output, source):
            continue
        root, is_input_directory = Path(os.path.realpath(source)), stat.S_ISDIR(found.st_mode)
        if is_input_directory and place.is_relative_to(root):
            raise OutputError(
                f"{output}: lies inside {source}, which is an input and must not change; choose another output"
            )
        if is_directory and root.is_relative_to(place):
            inside = root.relative_to(place).as_posix()
            if (is_input_directory and not may_hold) or any(fnmatch(inside, name) for name in _WRITTEN):
                raise OutputError(
                    f"{output}: holds {source}, which is an input and might be overwritten; choose another output"
                )


def refuse_overlaps(config: Config, *, may_hold: bool = False) -> None:
    """Raise OutputError if a place that a config writes is, holds or lies in one that it reads (`refuse_inputs`)."""
    outputs, inputs = outputs_and_inputs(config)
    for key, output in outputs.items():
        # Other places than the output, such as a cache, get files of names that nothing else has.
        refuse_inputs(output, inputs, is_directory=True, may_hold=may_hold or key != "output")


def _state(path: Path, descriptor: int) -> os.stat_result | None:
    """The state of a path, or of the standard stream that it stands for. None if it holds nothing that can be lost."""
    try:
        state = os.fstat(descriptor) if path == STANDARD_STREAM else path.stat()
    except OSError:  # no such path: whoever reads or writes it says so
        return None
    return None if stat.S_ISCHR(state.st_mode) or stat.S_ISSOCK(state.st_mode) else state


def _name(path: Path, stream: str) -> str:
    return f"standard {stream}" if path == STANDARD_STREAM else str(path)


@contextlib.contextmanager
def open_output(path: Path) -> Iterator[IO[bytes]]:
    """Yield the open output that a user named. Enter this before long work, so that a refusal comes early.

    `-` is standard output. A file is replaced when the block ends without an error; a link to it stays a link. A named
    pipe, a device or an open descriptor (`/dev/stdout`, `/dev/fd/63`) is written through.
    Raises OutputError for what cannot be written to, and for a pipe whose reader ends before the writer.
    """
    if path == STANDARD_STREAM:
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    descriptor = _descriptor(path)
    if descriptor is None and (path.is_file() or not path.exists()):
        with atomic_path(Path(os.path.realpath(path))) as temporary, temporary.open("wb") as file:
            yield file
        return
    through = os.fdopen(_opened(path) if descriptor is None else _copied(descriptor, path), "wb")
    try:
        yield through
        through.flush()
    except BrokenPipeError:
        raise OutputError(f"{path}: its reader ended before everything was written") from None
    finally:
        # Not `through.close()`, which would try once more to write what could not be written.
        through.raw.close()


def is_standard_output(path: Path | None) -> bool:
    """True if what is written to a path goes where the process prints."""
    return path is not None and (path == STANDARD_STREAM or _descriptor(path) == 1)


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path such as /dev/stdout or /dev/fd/63 names."""
    # Not by the path that it leads to: that of a shell's `>> log` would be the log, which must not be replaced.
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if re.fullmatch(rf"/proc/{os.getpid()}/(task/\d+/)?fd", folder) and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def _copied(descriptor: int, path: Path) -> int:
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            return os.dup(descriptor)
    except OSError:
        pass
    raise OutputError(f"{path}: is not open for writing; choose a file, or - for standard output") from None


def _opened(path: Path) -> int:
    """Open what is there and is no file."""
    mode = path.stat().st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        raise OutputError(f"{path}: is {kind_of(path)}, expected a file, a pipe or - for standard output")
    try:
        # A pipe without a reader cannot be opened like this.
        handle = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO or not stat.S_ISFIFO(mode):
            raise
        print(f"kdecs: waiting for a reader of the pipe {path}", file=sys.stderr, flush=True)
        return os.open(path, os.O_WRONLY)
    os.set_blocking(handle, True)
    return handle
