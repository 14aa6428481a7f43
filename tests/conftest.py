"""What tests of several folders share: where the sample corpus and the real data are, and a small disk."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SLOW_TIMEOUT_S = 1800
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test may take its time on a slow or busy machine, unless it says how long it may take."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A directory on a file system of so many KiB; the test is skipped where none may be mounted."""
    mounted: list[Path] = []

    def make(kib: int) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(directory)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = " ".join(str(getattr(error, "stderr", "") or error).split())
            pytest.skip(f"a full disk needs a small tmpfs, which may not be mounted here: {reason}")
        mounted.append(directory)
        return directory

    yield make
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)
