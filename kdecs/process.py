"""The process of a stage: its arguments, launcher, progress, exit code, stop signal and children. No torch."""

import argparse
import atexit
import contextlib
import ctypes
import errno
import gc
import io
import logging
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn, Self, TextIO

from tqdm import tqdm

from kdecs.config import AnyConfig, find_config, load_config
from kdecs.errors import (
    EXIT_REFUSED,
    EXIT_STOPPED,
    CorpusError,
    KdecsError,
    ModelError,
    OutputError,
    Stopped,
    explain_library_error,
    explain_os_error,
    first_line,
    printable,
)
from kdecs.output import refuse_overlaps

ERROR_PREFIX = "kdecs: error: "
_LINE_EVERY_S = 60.0
_TRIAL_TEXT = "Anna: I'm so glad - 25 of us!\n" + 64 * "a" + "?"


def launched_rank() -> tuple[int, int, int]:
    """Rank, local rank and world size from RANK, LOCAL_RANK and WORLD_SIZE, or 0, 0, 1 without a launcher."""
    return (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def served_request_timeout_s() -> float | None:
    """The seconds after which MLflow's scoring server gives a request up, or None outside of such a server."""
    given = os.environ.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT")
    return float(given) if given else None


def served_token(path: Path | None) -> str | None:
    """The token of `kdecs serve`: the text of a file, else KDECS_SERVE_TOKEN, else None.

    Raises KdecsError if the file is empty or no text.
    """
    if path is None:
        return os.environ.get("KDECS_SERVE_TOKEN", "").strip() or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        token = ""
    if not token:
        raise KdecsError(f"{path}: found no text, expected a token on one line")
    return token


def endpoint_key(variable: str) -> str | None:
    """The key of a model's endpoint, from the environment variable of this name; None if it is unset or empty.

    Raises KdecsError for one that no request header can hold.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not (key + "x").isprintable():
        raise KdecsError(f"{variable}: holds characters that no key has; set it again")
    return key or None


def is_main_rank() -> bool:
    """True if this process prints for the whole job. It can be asked before torch is imported."""
    return launched_rank()[0] == 0


def stage_config(
    model: type[AnyConfig] | Callable[[Path, list[str]], type[AnyConfig]],
    stage: str,
    description: str,
    examples: str,
    prefix: str = "",
) -> AnyConfig:
    """The resolved config of an entry that takes `--config CONFIG [--set KEY=VALUE …]` alone.

    `model` may be a function that finds the type of the config by its file and the overrides. Names of committed
    configs may lack `prefix`.
    Raises ConfigError, and OutputError if the config would write over what it reads.
    """
    arguments = stage_parser(stage, description, examples).parse_args()
    path = find_config(stage, arguments.config, prefix)
    kind: type[AnyConfig] = model if isinstance(model, type) else model(path, arguments.overrides)
    config = load_config(kind, path, arguments.overrides)
    refuse_overlaps(config)
    return config


def stage_parser(
    stage: str, description: str, examples: str, *, is_positional: bool = False
) -> argparse.ArgumentParser:
    """A parser of a config (`--config`, or the first argument) and of `--set`."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = f"a YAML or JSON file, or the name of a config that comes with kdecs (kdecs configs {stage} lists them)"
    if is_positional:
        parser.add_argument("config", metavar="CONFIG", help=what)
    else:
        parser.add_argument("--config", required=True, metavar="CONFIG", help=what)
    # The deepspeed launcher adds it unless it is called with --no_local_rank, torch's old launcher adds the second
    # spelling. LOCAL_RANK says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one dotted key of the config; repeatable",
    )
    return parser


def say_skipped(line: str) -> None:
    """Print on rank 0 alone that there is nothing to do."""
    if is_main_rank():
        print(line, flush=True)


_RESUMABLE_FILE = "KDECS_RESUMABLE_FILE"


def note_resumable(reason: str) -> None:
    """Tell the job that started this rank that the same command resumes, if KDECS_RESUMABLE_FILE names a file for it.

    A job is queued again by that file (cluster/slurm/job.sh). Its exit code cannot say so, since a launcher that ends
    all ranks because one of them failed has the exit code of a stop.
    """
    path = os.environ.get(_RESUMABLE_FILE)
    if path:
        try:
            Path(path).write_text(f"{reason}\n", encoding="utf-8")
        except OSError as error:
            _print_line(f"{path}: cannot be written ({error.strerror}), so the job is not queued again")


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run an entry and end the process. A refusal prints one line on stderr; only a bug of kdecs prints a traceback."""
    open_standard_streams()
    code = exit_code_of(main)
    if launched_rank()[2] == 1:
        sys.exit(code)
    # A rank of several skips the interpreter's tear-down. DistributedDataParallel never lets go of its process group,
    # so gloo's threads are still alive then; one that frees a tensor during the tear-down aborts the process
    # ("terminate called without an active exception"), and the launcher takes a finished training for a failed one.
    # The two calls below are what `sys.exit` would have done first, and what multiprocessing does in its children:
    # join the threads that are not daemons, run the exit handlers. Python has no public name for either.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries inside this, in an entry: nothing is collected meanwhile, nor looked at later.

    PyTorch and Transformers leave a million objects behind. The collections that they set off while they are imported
    are a third of the time of the import.
    """
    gc.disable()
    try:
        yield
    finally:
        # Not in a library function: what its caller has left behind would stay for ever.
        gc.freeze()
        gc.enable()


def open_standard_streams(*, prints_result: bool = False) -> None:
    """Make the standard streams UTF-8, whatever the locale says, and open those that the caller has closed.

    A closed one would give its number to the next file that is opened, and all that any library prints would land in
    that file. What a stage prints may be lost then, also if its terminal, ssh connection or pipe ends before it does:
    its result is in files. A command that `prints_result` raises OutputError when it prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is the one that is missing, since those below it are open. A result that is sent to
            # /dev/stdout must not vanish either.
            is_for_reading = number == 0 or (number == 1 and prints_result)
            os.open(os.devnull, os.O_RDONLY if is_for_reading else os.O_WRONLY)
            os.set_inheritable(number, True)
    if sys.stdout is None:
        sys.stdout = _ClosedOutput() if prints_result else _null_stream()
    if sys.stderr is None:
        sys.stderr = _null_stream()
    if logging.lastResort is not None:  # prints the warnings of the loggers that nobody has set up
        logging.lastResort.setFormatter(_PrintableFormatter())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path may hold bytes that are no text. Printed as escapes they end no command.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if not prints_result:
        sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: Any) -> Any:
    """A standard stream that drops what is written to it once its reader has ended."""
    if not isinstance(stream, io.TextIOWrapper) or stream not in (sys.__stdout__, sys.__stderr__):
        return stream  # a test's
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_OutlivingFile(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


class _OutlivingFile(io.FileIO):
    """An open descriptor that becomes /dev/null when nobody can read it any more."""

    def write(self, data: Any, /) -> int:
        """Write as a file does, or drop the data if the pipe's reader or the terminal is gone."""
        try:
            return super().write(data)
        except OSError as error:
            # A terminal that was closed answers with EIO, as a broken disk does.
            is_device = stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
            if error.errno != errno.EPIPE and not (error.errno == errno.EIO and is_device):
                raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())
        os.close(nothing)
        if self.fileno() == 1:  # standard error may still have a reader
            print("kdecs: the reader of standard output has ended; going on without it", file=sys.stderr)
        return len(data)


def _null_stream() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 (as long as the process)


class _PrintableFormatter(logging.Formatter):
    """A warning may quote what a file holds, which must not steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines with control characters as escapes."""
        return "\n".join(map(printable, super().format(record).split("\n")))


class _ClosedOutput(io.TextIOBase):
    """Stands for a standard output that the caller has closed."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Raise OutputError, because the text would be lost."""
        del text
        raise OutputError(
            "standard output is closed, so the result would be lost; redirect it to a file or a pipe"
        )

    @property
    def buffer(self) -> BinaryIO:
        """Raise OutputError, as `write`."""
        self.write("")
        raise AssertionError


@contextlib.contextmanager
def refusing(message: str, reason: Callable[[BaseException], str] = first_line) -> Iterator[None]:
    """Raise ModelError, `message` and the reason in one line, for whatever a library raises inside the block.

    Memory that does not suffice says nothing about the files, so that error of torch passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, KdecsError) or type(error).__name__ == "OutOfMemoryError":
            raise
        # Files that others wrote make Transformers, PEFT, tokenizers and ONNX Runtime fail with errors of any type.
        raise ModelError(f"{message}: {reason(error)}") from error
    except BaseException as error:
        # How a panic of tokenizers' Rust code arrives, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{message}: {reason(error)}") from error


def try_tokenizer(encode: Callable[[str, str], object]) -> None:
    """Have a tokenizer read two short texts, and raise what it raises.

    A file may describe one that reads no text: with a regular expression that has no end, for example. The Rust code
    of tokenizers prints its panics on standard error by itself, whatever Python does with them, so that is silenced.
    """
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        encode(_TRIAL_TEXT, _TRIAL_TEXT)
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        encode(_TRIAL_TEXT, _TRIAL_TEXT)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def num_threads() -> int:
    """The threads that a CPU computation may use: OMP_NUM_THREADS, or as many as this process has cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


def is_output_closed() -> bool:
    """True if the caller has closed standard output and this command must not lose what it prints."""
    return isinstance(sys.stdout, _ClosedOutput)


def standard_input() -> BinaryIO:
    """The bytes of standard input. Raises CorpusError if the caller has closed it."""
    if sys.stdin is None:
        raise CorpusError("standard input is closed; expected one dialogue per line")
    return sys.stdin.buffer


def say(line: str) -> None:
    """Print a line about a result that is in a file: on standard error if standard output is closed."""
    print(line, file=sys.stderr if is_output_closed() else sys.stdout, flush=True)


class ProgressBar:
    """The progress of a long loop: a bar on a terminal, elsewhere a line per minute.

    In a log file a bar would be one endless line, and without any line a slow loop would look like a hang. A rank that
    shows nothing passes `is_shown=False`.
    """

    def __init__(
        self, total: int, *, desc: str, unit: str, initial: int = 0, leave: bool = True, is_shown: bool = True
    ) -> None:
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=desc,
            unit=unit,
            leave=leave,
            disable=None if is_shown else True,  # None: no bar if standard error is no terminal
        )
        self._prints_lines = is_shown and self._bar.disable
        self._done, self._line = initial, f"{desc}: {{:,}} of {total:,} {unit}s"
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, num: int = 1, **values: str) -> None:
        """Count `num` more as done; `values` stand beside the count."""
        self._done += num
        self._bar.update(num)
        if values and not self._bar.disable:
            self._bar.set_postfix(values)
        if self._prints_lines and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(", ".join([self._line.format(self._done), *map(" ".join, values.items())]), flush=True)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main` and return its exit code, 0 if it returned. Prints one line for an error that a user can act on."""
    try:
        try:
            main()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, because the interpreter would print a traceback where this fails
    except KdecsError as error:
        _print_line(str(error))
        if isinstance(error, Stopped):
            note_resumable(str(error))
        return error.exit_code
    except BrokenPipeError:
        if not _has_lost_reader():  # the pipe is a connection to another process
            raise
        _discard_output()  # `head` has seen enough of a table
        return EXIT_REFUSED
    except OSError as error:
        line = explain_os_error(error)
        if line is None:
            raise
        _discard_output()
        _print_line(line)
        return EXIT_REFUSED
    except Exception as error:
        line = explain_library_error(error)
        if line is None:
            raise
        _print_line(line)
        return EXIT_REFUSED
    except KeyboardInterrupt:  # before a StopSignal was installed, or the second Ctrl-C after it
        _print_line("interrupted; run the same command again to resume")
        return EXIT_STOPPED
    return 0


def _has_lost_reader() -> bool:
    """True if nobody can read what this process prints any more."""
    with contextlib.suppress(OSError, ValueError):  # no descriptor, as in a test
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _discard_output() -> None:
    """Drop what is still buffered for standard output if it cannot be written, or the interpreter would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, sys.stdout.fileno())
            os.close(handle)


def _print_line(message: str) -> None:
    print(f"{ERROR_PREFIX}{printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


@dataclass
class StopSignal:
    """Set by SIGTERM, SIGINT or SIGHUP. Loops look at it between steps and save their state."""

    requested: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def install(self) -> None:
        """Catch SIGTERM, SIGINT and SIGHUP. A second SIGINT has its usual effect; a second of the others has none.

        A terminal that is closed sends SIGHUP, which `nohup` has the process ignore.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._handle)
            if number == signal.SIGHUP and self._previous[number] == signal.SIG_IGN:
                signal.signal(number, signal.SIG_IGN)
        # What a stop would lose from here on is saved first, and only then does `note_resumable` say so.
        if path := os.environ.get(_RESUMABLE_FILE):
            Path(path).unlink(missing_ok=True)

    def raise_if_requested(self, message: str) -> None:
        """Raise Stopped once a stop was requested. For places that have no state to save first."""
        if self.requested:
            raise Stopped(message)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher repeats the SIGTERM that its ranks have received already; a repeat must not cut a checkpoint short.
        del frame
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])


def module_command(launcher: Sequence[str], module: str) -> list[str]:
    """The command by which a launcher starts a module. Without a launcher it is one process of this Python.

    `python`, `torchrun` and wrappers that end in one of them take `-m`, the deepspeed launcher `--module`.
    """
    if not launcher:
        return [sys.executable, "-m", module]
    # The `python` on PATH is another one if the virtual environment is not activated.
    parts = [sys.executable if part == "python" else part for part in launcher]
    is_deepspeed = any(Path(part).name == "deepspeed" for part in parts)
    return [*parts, "--module" if is_deepspeed else "-m", module]


_KILL_AFTER_S = 10.0  # after an error or a second Ctrl-C; a requested stop is waited for without a limit
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None)  # opened here: a child between fork and exec must not wait for the loader's lock


def run_child(
    command: Sequence[str],
    stop: StopSignal,
    *,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    on_stop: Callable[[], object] | None = None,
    on_poll: Callable[[], object] = lambda: None,
    poll_s: float = 0.5,
) -> int:
    """Run a command to its end in a session of its own, and return its exit code.

    The variables of `environment` are set over those of this process. Command and output are appended to `log` if
    there is one. Once `stop` is requested, SIGTERM goes to the whole process group of the child, since the deepspeed
    launcher does not pass the signal on to its ranks. If this process dies, Linux sends the child SIGTERM. On an
    exception, such as a second Ctrl-C, the group is ended first.

    If the child is stopped by other means, such as a file, `on_stop` asks it to end. Such a child watches its parent
    itself, and is waited for as long as it takes. `on_poll` is called about every `poll_s` seconds.
    """
    parent = os.getpid()

    # The kernel counts the thread that forks as the parent: call this from a thread that lives as long as the child.
    def die_with_parent() -> None:
        end_with_parent()
        if os.getppid() != parent:  # it died before the kernel was asked
            os._exit(EXIT_STOPPED)

    with contextlib.ExitStack() as stack:
        output = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(log.open("ab"))
            # On one line, whatever the arguments hold: `last_error` finds the last command's output by it.
            output.write(f"$ {' '.join(shlex.join(command).split())}\n".encode())
            output.flush()
        child = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            # Ctrl-C signals the whole group of the terminal. Children must get one SIGTERM, from here, and no SIGINT.
            start_new_session=True,
            preexec_fn=None if on_stop else die_with_parent,
        )
    is_asked = False
    try:
        while True:
            if stop.requested and not is_asked:
                is_asked = True
                if on_stop is not None:
                    on_stop()
                else:
                    _signal_group(child, signal.SIGTERM)
            on_poll()
            try:
                return child.wait(poll_s)
            except subprocess.TimeoutExpired:
                continue
    except BaseException:
        if on_stop is not None:
            on_stop()
            child.terminate()
            child.wait()
        else:
            # SIGKILL in any case: a launcher that has ended may have left ranks in its group.
            for number in (signal.SIGTERM, signal.SIGKILL):
                _signal_group(child, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_KILL_AFTER_S)
        raise


def _signal_group(child: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(child.pid, number)


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent of this process dies, however it dies. Linux only."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends first, such as a launcher's ranks. Linux only."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def wait_for_orphans() -> None:
    """Wait until every adopted process has ended. This process must have no other children."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def last_error(log: Path) -> str:
    """Why the last child that wrote to a log failed: its own error line, else the last line that it printed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.split(r"(?m)^\$ .*$", text)[-1].splitlines() if line.strip()]
    # A launcher prints lines of its own after the error of a rank, so the last line is only the second choice.
    errors = [line for line in lines if line.startswith(ERROR_PREFIX)]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix(ERROR_PREFIX)
