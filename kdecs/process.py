"""What every entry script shares: arguments, one-line errors, exit codes. No torch."""

import argparse
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kdecs.config import AnyConfig, load_config
from kdecs.errors import (
    EXIT_REFUSED,
    EXIT_STOPPED,
    KdecsError,
    Stopped,
    explain_disk_full,
    explain_os_error,
)


def launched_rank() -> tuple[int, int, int]:
    """Rank, local rank and world size from RANK, LOCAL_RANK and WORLD_SIZE; 0, 0, 1 without a launcher."""
    return (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def is_main_rank() -> bool:
    """Whether this process speaks for the job, for what is said before torch is imported."""
    return launched_rank()[0] == 0


def stage_config(
    model: type[AnyConfig], description: str, examples: str, *, argv: list[str] | None = None
) -> AnyConfig:
    """Parse `--config FILE [--set KEY=VALUE …]` of a stage's script into its resolved config."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML (or JSON) config")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one dotted key of the config; repeatable",
    )
    arguments = parser.parse_args(argv)
    return load_config(model, arguments.config, arguments.overrides)


def say_skipped(line: str) -> None:
    """Say once a job, on rank 0, that there is nothing to do."""
    if is_main_rank():
        print(line, flush=True)


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run an entry: refusals become one line on stderr and their exit code, faults of ours a traceback."""
    leave(exit_code_of(main))


def leave(code: int) -> NoReturn:
    """End this process with a code; a rank of several without the interpreter's tear-down.

    PyTorch's DistributedDataParallel keeps its process group, and so gloo's threads, for good. One that lets go of a
    tensor while the interpreter is torn down aborts the process ("terminate called without an active exception"), and
    a launcher would take a training that is complete for one that failed.
    """
    if launched_rank()[2] == 1:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as multiprocessing does at a child's end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main` and return its exit code, 0 if it returned; prints one line for what a user can act on."""
    try:
        main()
    except KdecsError as error:
        _print_line(str(error))
        return error.exit_code
    except OSError as error:
        line = explain_os_error(error)
        if line is None:
            raise
        _print_line(line)
        return EXIT_REFUSED
    except Exception as error:
        line = explain_disk_full(error)
        if line is None:
            raise
        _print_line(line)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        _print_line("interrupted; the same command goes on from what is complete")
        return EXIT_STOPPED
    return 0


def _print_line(message: str) -> None:
    print(f"kdecs: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


@dataclass
class StopSignal:
    """Set by SIGTERM or SIGINT; training loops look at it between steps."""

    requested: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def install(self) -> None:
        """Catch SIGTERM and SIGINT; a second SIGINT has its usual effect, more SIGTERMs have none."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)

    def raise_if_requested(self, message: str) -> None:
        """Raise Stopped where no state has to be saved first."""
        if self.requested:
            raise Stopped(message)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes on the SIGTERM that its ranks got themselves: repeats must not end a checkpoint.
        del frame
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
