"""What tests of several folders share: where the sample corpus and the real data are, and a small disk."""

import functools
import gc
import os
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

SLOW_TIMEOUT_S = 1800
ROOT = Path(__file__).resolve().parent.parent
# The files with the most seconds, so that no worker begins with one of them while the other has nothing left to do: of
# the long tests first, then of the default ones. `--durations 0` shows the seconds; only the order of size matters.
LONGEST = (
    "tests/test_end_to_end.py",
    "tests/sweep/test_real_ray.py",
    "tests/soft_labels/test_interleavings.py",
    "tests/campaign/test_sweep_faults.py",
    "tests/student/test_modes.py",
    "tests/teacher/test_plan_command.py",
    "tests/student/test_onnx.py",
    "tests/sweep/test_driver.py",
    "tests/teacher/test_plan_memory.py",
    "tests/sweep/test_report.py",
    "tests/sweep/test_selection.py",
    "tests/sweep/test_endings.py",
    "tests/teacher/test_adapter_kinds.py",
    "tests/student/test_trees.py",
    "tests/teacher/test_load_checks.py",
    "tests/teacher/test_tree_attention.py",
)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tiny networks gain nothing from threads, and two workers would fight for the cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts its background jobs with SIGINT ignored, and what is ignored stays so in every child: a test that
# presses Ctrl-C on one would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# No garbage is collected while the libraries are imported, by conftest files or tests. Nearly all that they make lives
# until the end, and looking through it takes half of the processor time of an import, again and again.
gc.disable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect garbage again once all tests are imported, but not in what they made, for the same reason."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and give slow tests their time limit."""
    places = {ROOT / path: place for place, path in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.hookimpl(optionalhook=True)  # a hook of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep the tests of a file in one worker, so that its fixtures are made once.

    All files that start several ranks go to the same worker: ranks wait for each other busily, so two such tests at a
    time would take far longer than one after the other.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # by the number of tests, which says nothing of their length

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return "ranks" if _starts_ranks(path) else path

    return ByFile(config, log)


@functools.cache
def _starts_ranks(path: str) -> bool:
    return "mark.dist" in (ROOT / path).read_text(encoding="utf-8")


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
