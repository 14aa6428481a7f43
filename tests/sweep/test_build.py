"""Building missing teachers: what is needed for it, and that nothing goes on behind an interrupted driver."""

import sys
import time

import psutil
import pytest

from kdecs.errors import ConfigError
from kdecs.process import StopSignal
from kdecs.sweep import teachers as build


def test_without_a_checkout_one_line_says_so(make_config, runs, monkeypatch):
    export = {"labels": str(runs / "later"), "export": {"config": "x.yaml"}}
    config = make_config(teachers={"later": export}, space={"teacher": {"grid": ["later"]}})
    monkeypatch.setattr(build, "_SCRIPTS", runs / "nowhere" / "launch")
    with pytest.raises(ConfigError, match="launch scripts of a checkout") as caught:
        build.build_commands(config, "later")
    assert "\n" not in str(caught.value)


def test_a_second_interrupt_ends_the_launcher(tmp_path, monkeypatch):
    class Interrupted(StopSignal):
        """The second Ctrl-C comes while the first one's stop is waited for."""

        @property
        def requested(self):
            if not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                return False
            raise KeyboardInterrupt

        @requested.setter
        def requested(self, value):
            pass

    program = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    )
    monkeypatch.setattr(build, "_GRACE_S", 0.3)
    monkeypatch.setattr(build, "_POLL_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        build._run([sys.executable, "-c", program], tmp_path / "log", "training", Interrupted())
    pid = int((tmp_path / "pid").read_text())
    ends = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)
