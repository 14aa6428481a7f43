"""The real export command with a real tiny teacher, killed with SIGKILL: alone, and as a rank of a launch."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from export_campaign import Record
from fake_teacher import files_of
from real_teacher import ROOT, make_real_teacher, start_export, write_config
from support import ForkedPython, made_once, run_forked_ranks

from kdecs.artifact import verify_artifact
from kdecs.corpus.reading import bundled_sample

pytestmark = [pytest.mark.slow, pytest.mark.dist]

# All of the sample, in small shards: a run lasts long enough to be killed anywhere.
SETTINGS = {
    "corpus": {split: str(bundled_sample(split)) for split in ("train", "valid", "test")},
    "allow_other_corpus": True,
    "num_shards": 12,
}
KILLS_A_DIRECTORY = 4


@pytest.fixture(scope="module")
def real_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "real-teacher", make_real_teacher) / "teacher"


@pytest.fixture(scope="module")
def undisturbed(real_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The labels of a run without faults (read-only), and the seconds from its claim to its end."""
    directory = tmp_path_factory.mktemp("undisturbed")
    process = start_export(write_config(directory / "e.yaml", real_teacher, directory / "labels", **SETTINGS))
    wait_for_claim(directory / "labels", process)
    claimed = time.monotonic()
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return directory / "labels", time.monotonic() - claimed


def wait_for_claim(output: Path, process: subprocess.Popen[str] | ForkedPython) -> None:
    deadline = time.monotonic() + 600
    while not (output / ".work" / "job.json").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_the_command_is_killed_at_random_times(
    real_teacher: Path,
    undisturbed: tuple[Path, float],
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Record,
) -> None:
    """Up to four kills a directory, anywhere between claim and manifest; then the same command to its end."""
    quiet, seconds = undisturbed
    wanted, kills, directories = num_faults(15), 0, 0
    while kills < wanted:
        output = tmp_path / f"labels{directories}"
        config = write_config(tmp_path / f"{directories}.yaml", real_teacher, output, **SETTINGS)
        directories += 1
        for _ in range(min(KILLS_A_DIRECTORY, wanted - kills)):
            process = start_export(config)
            wait_for_claim(output, process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, seconds))
            process.kill()
            process.communicate(timeout=60)
            assert process.returncode in (0, -signal.SIGKILL)
            kills += process.returncode == -signal.SIGKILL
        process = start_export(config)
        _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        assert files_of(output) == files_of(quiet)
        assert verify_artifact(output) == []
    record_campaign("export_command_kills", {"kills": kills, "directories": directories, "wrong": 0})


@pytest.fixture
def launch() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts the export on two ranks under the deepspeed launcher; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(config: Path) -> subprocess.Popen[str]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
        script = ["--no_local_rank", "--master_port", port, str(ROOT / "launch" / "export_soft_labels.py")]
        own = {
            "PYTHONPATH": str(ROOT),
            "KDECS_DEVICE": "cpu",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        started.append(
            subprocess.Popen(
                [*launcher, *script, "--config", str(config)],
                env=os.environ | own,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def pid_of_rank(config: Path, rank: int) -> int | None:
    """The process of a rank of the export of a config."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
            is_export = any(argument.endswith(b"export_soft_labels.py") for argument in arguments)
            if is_export and str(config).encode() in arguments and f"RANK={rank}".encode() in variables:
                return int(process.name)
    return None


def has_pending(process: int, number: int) -> bool:
    """Whether a signal waits for a stopped process."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:")]
    return any(mask >> (number - 1) & 1 for mask in pending)


def test_a_killed_rank_ends_the_launch_and_the_same_command_resumes(
    real_teacher: Path,
    undisturbed: tuple[Path, float],
    tmp_path: Path,
    launch: Callable[[Path], subprocess.Popen[str]],
) -> None:
    output = tmp_path / "labels"
    config = write_config(tmp_path / "e.yaml", real_teacher, output, **SETTINGS)
    first = launch(config)
    wait_for_claim(output, first)
    survivor, victim = pid_of_rank(config, 0), pid_of_rank(config, 1)
    assert survivor is not None
    assert victim is not None
    # Held until the launcher, which looks about once a second, ends it: a fast machine would label all meanwhile.
    os.kill(survivor, signal.SIGSTOP)
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 25  # after 30 s the launcher kills it
    while not has_pending(survivor, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.kill(survivor, signal.SIGCONT)
    out, _ = first.communicate(timeout=600)
    assert first.returncode != 0, out
    assert pid_of_rank(config, 0) is None, "a rank outlived its launch"
    assert not (output / "manifest.json").exists()
    second = run_forked_ranks("launch/export_soft_labels.py", "--config", config)
    assert second.returncode == 0, second.stderr
    assert "in 12 shards" in second.stdout
    assert files_of(output) == files_of(undisturbed[0])
    assert verify_artifact(output) == []
