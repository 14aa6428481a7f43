"""`launch/demo.sh` as a script: what a stop, a kill and a second start do. A stand-in plays the first stage."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT, child_environment

SAVES = """#!/usr/bin/env bash
# A launcher that ends at once, and a rank that takes a moment to save its state.
(trap 'sleep 0.7; echo saved; exit 143' TERM; echo ready; sleep 60 & wait) &
wait
"""
REFUSES = """#!/usr/bin/env bash
echo "kdecs: error: no such dialogue" >&2; echo "the launcher has more to say"; exit 1
"""


class Demo:
    """Starts of the script on one run directory, with a `kdecs` of ours on the path."""

    def __init__(self, directory: Path) -> None:
        self.run, self.commands = directory / "run", directory / "bin"
        self.commands.mkdir()
        self.log = self.run / "logs" / "corpus-verify.log"

    def start(self, stage: str) -> "subprocess.Popen[str]":
        (self.commands / "kdecs").unlink(missing_ok=True)
        (self.commands / "kdecs").write_text(stage)
        (self.commands / "kdecs").chmod(0o755)
        environment = child_environment()
        return subprocess.Popen(
            [str(ROOT / "launch" / "demo.sh"), str(self.run)],
            env=environment | {"PATH": f"{self.commands}{os.pathsep}{environment['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.log.is_file() and f"\n{word}" in self.log.read_text()):
            assert time.monotonic() < deadline, word
            time.sleep(0.05)


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


def to_the_script(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)


def to_the_whole_group(process: "subprocess.Popen[str]") -> None:
    """As a terminal does on Ctrl-C."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("stop", [to_the_script, to_the_whole_group])
def test_a_stop_lets_the_stage_save_and_is_one_line(
    demo: Demo, stop: Callable[["subprocess.Popen[str]"], None]
) -> None:
    process = demo.start(SAVES)
    demo.wait_for("ready")
    stop(process)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "kdecs: error: demo stopped; run the same command again to resume\n"
    assert "\nsaved" in demo.log.read_text()


def test_a_killed_demo_takes_its_stage_along_and_the_next_one_waits_for_it(demo: Demo) -> None:
    process = demo.start(SAVES)
    demo.wait_for("ready")
    process.kill()
    process.wait()
    again = demo.start(REFUSES)
    _, err = again.communicate(timeout=30)
    assert (again.returncode, err.count("\n")) == (1, 1)
    assert f"corpus-verify: no such dialogue (log: {demo.log})" in err
    assert demo.log.read_text().index("\nsaved") < demo.log.read_text().index("no such dialogue")


def test_a_second_demo_beside_the_first_is_refused(demo: Demo) -> None:
    first = demo.start(SAVES)
    try:
        demo.wait_for("ready")
        second = demo.start(SAVES)
        _, err = second.communicate(timeout=30)
        assert (second.returncode, err.count("\n")) == (1, 1)
        assert "another demo runs here" in err
    finally:
        first.terminate()
        first.communicate(timeout=30)
