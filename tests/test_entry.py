"""How an entry ends its process."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, os, sys, threading, time
from kdecs.entry import run_entry
from kdecs.errors import ConfigError

class Aborts:
    def __del__(self, abort=os.abort):
        abort()  # as gloo's threads do in a process that is torn down

held = Aborts()

def main():
    atexit.register(lambda: print("exit functions"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    if "refuse" in sys.argv:
        raise ConfigError("no such key")

run_entry(main)
"""


@pytest.mark.parametrize(("argument", "code"), [("run", 0), ("refuse", 1)])
def test_a_rank_of_several_ends_with_its_code_without_a_tear_down(argument, code):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument],
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split("\n")) == (code, ["thread", "exit functions", ""])
