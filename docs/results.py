"""Write the tables of a page that come from sweeps: `make results RUNS=dir`.

A table stands between two comments, which a reader of the page does not see:

    <!-- kdecs sweep compare runs/sweeps/low-gold --minus 'w/o KD' -->
    <!-- end -->

The command runs in RUNS, the folder whose `runs` the command names, with `--markdown`, and what it prints takes the
place of what stands between the comments. A block whose sweep is not there stays as it is.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from kdecs.artifact import write_text

BLOCK = re.compile(r"(?ms)^<!-- kdecs (sweep compare [^\n]*) -->\n(.*?)^<!-- end -->$")


def renewed(text: str, runs: Path) -> tuple[str, list[str]]:
    """The page with its blocks written anew, and the commands whose sweeps are not there.

    Raises SystemExit with the command's own message if it fails.
    """
    absent: list[str] = []

    def block(match: re.Match[str]) -> str:
        arguments = shlex.split(match[1])
        sweeps = [runs / word for word in arguments[2:] if word.startswith("runs/")]
        if not all(sweep.is_dir() for sweep in sweeps):
            absent.append(match[1])
            return match[0]
        command = [sys.executable, "-m", "kdecs.cli", *arguments, "--markdown"]
        done = subprocess.run(command, cwd=runs, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"kdecs {match[1]}: {done.stderr.strip()}")
        return f"<!-- kdecs {match[1]} -->\n\n{done.stdout.strip()}\n\n<!-- end -->"

    return BLOCK.sub(block, text), absent


def main() -> None:
    """Renew the page that the first argument names from the folder that the second one names."""
    page, runs = Path(sys.argv[1]), Path(sys.argv[2]).absolute()
    before = page.read_text("utf-8")
    after, absent = renewed(before, runs)
    if after != before:
        write_text(page, after)
    print(f"{page}: {len(BLOCK.findall(before)) - len(absent)} tables written")
    for command in absent:
        print(f"kept, since {runs} has no such sweep: kdecs {command}")


if __name__ == "__main__":
    main()
