"""How an entry ends its process, and how it runs and ends its children."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kdecs import process
from kdecs.launch import stage
from kdecs.process import ProgressBar, StopSignal, exit_code_of, last_error, module_command, run_child

SCRIPT = """
import atexit, os, sys, threading, time
from kdecs.process import run_entry
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


STREAMS = r"""
import logging, os, sys
from pathlib import Path
from kdecs.errors import ConfigError
from kdecs.output import open_output
from kdecs.process import exit_code_of, open_standard_streams, say, standard_input

def main():
    with open(sys.argv[1], "w") as file:
        assert file.fileno() > 2
        if "input" in sys.argv[2:]:
            standard_input().read()
        if "print" in sys.argv[2:]:
            print("rés\udcff", flush=True)
        if "warn" in sys.argv[2:]:
            logging.getLogger("kdecs").warning("two\nlines\x1b[2J")
        if "through" in sys.argv[2:]:
            with open_output(Path("/dev/stdout")) as output:
                output.write(b"result")
        if "fail" in sys.argv[2:]:
            raise ConfigError("é\x1b[2J\x9b31m")
        file.write("done")
    say("saved")

open_standard_streams(prints_result="stage" not in sys.argv[2:])
sys.exit(exit_code_of(main))
"""


@pytest.mark.parametrize(
    ("shell", "code", "out", "err"),
    [
        ("print", 0, "rés\\udcff\nsaved\n", ""),
        ("fail", 1, "", "kdecs: error: é\\x1b[2J\\x9b31m\n"),
        ("warn", 0, "saved\n", "two\nlines\\x1b[2J\n"),
        ("through >&-", 1, "", "kdecs: error: /dev/stdout: is not open for writing"),
        ("print >&-", 1, "", "kdecs: error: standard output is closed, so the result would be lost"),
        (">&-", 0, "", "saved\n"),
        ("stage print <&- >&- 2>&-", 0, "", ""),
        ("fail <&- >&- 2>&-", 1, "", ""),
        ("input <&-", 1, "", "kdecs: error: standard input is closed"),
        ("print > /dev/full", 1, "", "kdecs: error: the disk is full"),
    ],
)
def test_standard_streams_are_utf8_and_never_lose_a_result(tmp_path, shell, code, out, err):
    """Under a Latin-1 locale; `shell` is the rest of the command line."""
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "$2" {shell}', sys.executable, STREAMS, str(tmp_path / "file")],
        env={**os.environ, "PYTHONIOENCODING": "latin-1:strict", "PYTHONUTF8": "0"},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.decode("utf-8")) == (code, out)
    shown = done.stderr.decode("utf-8")
    assert shown.startswith(err) and bool(shown) == bool(err) and "Traceback" not in shown
    assert (tmp_path / "file").read_text() == ("done" if not code else "")


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.EFBIG, "ulimit -f"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.ELOOP, "circle"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_a_limit_of_the_system_is_one_line(capsys, number, word):
    def fail() -> None:
        raise OSError(number, os.strerror(number), "runs/out")

    assert exit_code_of(fail) == 1
    line = capsys.readouterr().err
    assert line.startswith("kdecs: error: ") and line.count("\n") == 1 and word in line and "runs/out" in line


def break_pipe() -> None:
    raise BrokenPipeError


def test_a_reader_that_has_seen_enough_ends_the_command():
    program = (
        "import sys\nfrom kdecs.process import exit_code_of\n"
        "sys.exit(exit_code_of(lambda: [print('x' * 1000) for _ in range(1000)] and None))"
    )
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -c 5; exit ${PIPESTATUS[0]}', sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "xxxxx", "")
    with pytest.raises(BrokenPipeError):  # of a connection, which is no reader of this output
        exit_code_of(break_pipe)


# A stage that prints more than a pipe holds, by each of the streams that a launcher's rank has.
PRINTS = """
import sys
from kdecs.process import run_entry

def main():
    for _ in range(200):
        print("x" * 1000)
        print("y" * 1000, file=sys.stderr)
    open(sys.argv[1], "w").write("whole")

run_entry(main)
"""


@pytest.mark.parametrize(
    ("shell", "out", "err"),
    [
        ('"$0" -u -c "$1" "$2" 2>/dev/null | head -c 5', "xxxxx", ""),
        ('"$0" -c "$1" "$2" 2>/dev/null | head -c 5', "xxxxx", ""),
        # Standard error is read to its end, and one line there says what became of the other.
        ('"$0" -c "$1" "$2" 2>&1 >&3 3>&- | grep -v yyy', "", "xxxxx"),
        ('"$0" -u -c "$1" "$2" 2>&1 | head -c 5', "xxxxx", ""),
    ],
)
def test_a_stage_outlives_whoever_reads_what_it_prints(tmp_path, shell, out, err):
    script = f"{{ {shell}; exit ${{PIPESTATUS[0]}}; }} 3> >(head -c 5 >&2)"
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, PRINTS, str(tmp_path / "result")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "result").read_text() == "whole"
    assert (done.stdout.replace(GOING_ON, ""), done.stderr) == (out, err)
    assert (GOING_ON in done.stdout) == bool(err)


GOING_ON = "kdecs: the reader of standard output has ended; going on without it\n"


def test_a_stage_outlives_its_terminal(tmp_path):
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", PRINTS, str(tmp_path / "result")]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        assert os.read(ours, 1)
        os.close(ours)
        assert child.wait(60) == 0
    assert (tmp_path / "result").read_text() == "whole"


@pytest.mark.parametrize(("action", "code"), [("default", 143), ("ignore", 0)])
def test_a_closed_terminal_stops_a_stage_unless_nohup_started_it(action, code):
    program = (
        "import os, signal\nfrom kdecs.process import StopSignal, run_entry\n"
        "def main():\n    stop = StopSignal()\n    stop.install()\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    stop.raise_if_requested('saved')\n"
        "run_entry(main)"
    )
    # Whoever runs the tests under nohup hands that on, and no shell can undo it.
    command = ["env", f"--{action}-signal=HUP", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == code


# Prints "ready"; on SIGTERM it takes a moment, as a checkpoint does, and says so.
SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
IGNORES = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_ready(log: Path) -> bool:
    return log.exists() and "\nready" in log.read_text()


def test_a_childs_code_and_output_are_kept(tmp_path):
    log = tmp_path / "logs" / "stage.log"
    program = "import sys; print('one'); print(); sys.exit('kdecs: error: no such teacher')"
    assert run_child([sys.executable, "-c", program], StopSignal(), log=log) == 1
    command, *lines = log.read_text().splitlines()
    assert command.startswith(f"$ {sys.executable} -c 'import sys")
    assert lines[0] == "one"
    assert last_error(log) == "no such teacher"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("$ a\n", "it printed nothing"),
        ("$ a\none\n\ntwo\n", "two"),
        ("$ a\nkdecs: error: no such teacher\nrank 0 exits with return code = 1\n", "no such teacher"),
        ("$ a\nkdecs: error: no such teacher\n$ b\nterminate called\n", "terminate called"),
    ],
)
def test_the_error_in_a_log_is_that_of_its_last_command(tmp_path, text, found):
    (tmp_path / "log").write_text(text)
    assert last_error(tmp_path / "log") == found


def test_a_stop_reaches_the_childs_children_too(tmp_path):
    """The child starts another process, as a launcher does, which alone saves."""
    stop, log = StopSignal(), tmp_path / "log"
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {SAVES!r}]))"
    program = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {launcher}"

    def look() -> None:
        stop.requested = is_ready(log)

    assert run_child([sys.executable, "-c", program], stop, log=log, on_poll=look, poll_s=0.05) == 143
    assert last_error(log) == "saved"


def test_a_stop_that_came_before_the_child_reaches_it():
    stop = StopSignal(requested=True)
    started = time.monotonic()
    assert run_child([sys.executable, "-c", "import time; time.sleep(60)"], stop) == -signal.SIGTERM
    assert time.monotonic() - started < 20


def test_a_child_with_its_own_way_to_stop_gets_no_signal(tmp_path):
    stop, stop_file = StopSignal(requested=True), tmp_path / "stop"
    program = f"import os, time\nwhile not os.path.exists({str(stop_file)!r}): time.sleep(0.02)"
    assert run_child([sys.executable, "-c", program], stop, on_stop=stop_file.touch) == 0


def test_an_exception_ends_a_child_that_does_not_listen(tmp_path, monkeypatch):
    """A second Ctrl-C while the first one's stop is waited for: nothing may go on behind it."""
    monkeypatch.setattr(process, "_KILL_AFTER_S", 0.3)
    log, seen = tmp_path / "log", []
    others = psutil.Process().children()  # such as the server from which other tests fork

    def interrupt() -> None:
        if is_ready(log):
            seen.extend(child for child in psutil.Process().children() if child not in others)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", IGNORES], StopSignal(), log=log, on_poll=interrupt, poll_s=0.05)
    assert seen and not any(child.is_running() for child in seen)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_child_saves_when_its_parent_is_killed(tmp_path):
    log = tmp_path / "log"
    program = (
        "import sys; from pathlib import Path; from kdecs.process import ProgressBar, StopSignal, run_child\n"
        f"run_child([sys.executable, '-c', {SAVES!r}], StopSignal(), log=Path({str(log)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_for(lambda: is_ready(log))
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: last_error(log) == "saved")


def test_a_stage_without_a_command_is_a_wrong_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stage", str(tmp_path / "log")])
    with pytest.raises(SystemExit) as ended:
        stage.main()
    assert ended.value.code == 2 and "expected a command after LOG" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--local_rank=3", "--local_rank 3", "--local-rank=3", "--local-rank 3"])
@pytest.mark.parametrize("is_positional", [True, False])
def test_the_flag_that_launchers_add_is_accepted_before_all_others(given, is_positional):
    parser = process.stage_parser("student", "", "", is_positional=is_positional)
    config = ["kd"] if is_positional else ["--config", "kd"]
    arguments = parser.parse_args([*given.split(), *config, "--set", "optimization.seed=1"])
    assert (arguments.config, arguments.overrides) == ("kd", ["optimization.seed=1"])


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ([], [sys.executable, "-m", "kdecs.x"]),
        (["python"], [sys.executable, "-m", "kdecs.x"]),
        (["torchrun", "--nproc_per_node", "2"], ["torchrun", "--nproc_per_node", "2", "-m", "kdecs.x"]),
        (
            ["/opt/bin/deepspeed", "--no_local_rank"],
            ["/opt/bin/deepspeed", "--no_local_rank", "--module", "kdecs.x"],
        ),
        (["srun", "python"], ["srun", sys.executable, "-m", "kdecs.x"]),
    ],
)
def test_each_launcher_is_told_of_a_module_in_its_own_way(launcher, command):
    assert module_command(launcher, "kdecs.x") == command


def test_progress_in_a_log_is_a_line_per_minute_and_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(process.time, "monotonic", lambda: now)
    with ProgressBar(3_000, desc="teacher t", unit="step", initial=1_000) as bar:
        for now in (30.0, 61.0, 90.0, 130.0):
            bar.update(500, loss=f"{now / 100:.2f}")
    out, err = capsys.readouterr()
    assert out == ("teacher t: 2,000 of 3,000 steps, loss 0.61\nteacher t: 3,000 of 3,000 steps, loss 1.30\n")
    assert err == ""
    with ProgressBar(2, desc="rank 1", unit="step", is_shown=False) as bar:
        now += 100
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar(2, desc="teacher t", unit="step") as bar:
        bar.update(loss="0.50")
        bar.update(loss="0.25")
    out, err = capsys.readouterr()
    assert out == ""
    assert "teacher t: 100%" in err and "2/2" in err and "loss=0.25" in err
