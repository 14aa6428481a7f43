"""Run one stage of a shell script: output into a log, its main lines onto the terminal, one line if it fails.

    python -m kdecs.launch.stage [--all] LOG COMMAND…

The stage runs in a session of its own, so Ctrl-C reaches it only through its script. SIGTERM, and the death of the
script, stop the stage: it saves its state and ends.
"""

import argparse
import re
import sys
from pathlib import Path

from kdecs.errors import EXIT_STOPPED, KdecsError
from kdecs.process import (
    ERROR_PREFIX,
    StopSignal,
    adopt_orphans,
    end_with_parent,
    last_error,
    run_child,
    run_entry,
    wait_for_orphans,
)

MAIN_LINES = re.compile(
    r"(base model|teacher|prompts|soft labels|student|sweep|trial|selection|report|predict|kdecs: )"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="show every line, not only those of the stages")
    parser.add_argument("log", type=Path, metavar="LOG")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND…")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("expected a command after LOG")
    # A shell that is killed passes no signal on to what it has started.
    end_with_parent()
    # The deepspeed launcher ends on SIGTERM before its ranks have saved their state. Adopted ranks can be waited for.
    adopt_orphans()
    stop = StopSignal()
    stop.install()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    arguments.log.touch()
    with arguments.log.open("rb") as log:
        log.seek(0, 2)  # the log keeps all starts; only what this one appends is shown
        rest = b""

        def show() -> None:
            nonlocal rest  # a line that is not complete yet
            *lines, rest = re.split(rb"[\r\n]+", rest + log.read())
            for line in (line.decode(errors="replace") for line in lines):
                is_shown = not line.startswith("$ ") if arguments.all else MAIN_LINES.match(line)
                if is_shown and "%|" not in line and not line.startswith(ERROR_PREFIX):  # nor progress bars
                    print(f"  {line}", flush=True)

        code = run_child(arguments.command, stop, log=arguments.log, on_poll=show, poll_s=0.2)
        if stop.requested:
            wait_for_orphans()
        show()
    if stop.requested:
        sys.exit(EXIT_STOPPED)  # the script says so, once for all of its stages
    if code != 0:
        raise KdecsError(f"{arguments.log.stem}: {last_error(arguments.log)} (log: {arguments.log})")


if __name__ == "__main__":
    run_entry(main)
