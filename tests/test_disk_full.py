"""A disk that is really full (a small tmpfs): one line, exit 1, nothing half-written counts as done."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT, run_forked

from kdecs.process import exit_code_of

SAMPLE = ROOT / "kdecs" / "corpus" / "sample"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("kib", [8, 120, 700])
def test_full_disk_is_one_line_at_every_point_of_writing(small_disk: Callable[[int], Path], kib: int) -> None:
    """8 KiB: no room for the tokenizer; 120: for the weights; 700: for the second of two files."""
    output = small_disk(kib) / "base"
    values = {
        "output": output, "corpus.train": SAMPLE / "valid.json", "corpus.valid": SAMPLE / "test.json",
        "max_steps": 2, "hidden_size": 128, "batch_size": 2,
    }  # fmt: skip
    arguments = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    done = run_forked("launch/pretrain_base.py", "--config", "demo/base_llama", *arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kdecs: error: the disk is full")
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "labels/shard"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_behind_a_library_is_one_line(error: Exception, capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise error

    assert exit_code_of(fail) == 1
    assert capsys.readouterr().err.startswith("kdecs: error: the disk is full")


def test_a_fault_of_our_own_keeps_its_traceback() -> None:
    def fail() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        exit_code_of(fail)
