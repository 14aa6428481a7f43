"""The fault campaigns: many seeded random faults against one invariant, counted.

`make campaign` runs each whole (KDECS_CAMPAIGN=1); otherwise a seeded fifth runs, as in CI. Each campaign writes what
it counted, with its seed, the day and the machine, to KDECS_CAMPAIGN_RESULTS, where set (`make campaign` sets
benchmarks/results/campaign).
"""

import json
import math
import os
import platform
import random
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # also for processes that import a helper by name
sys.path.insert(0, str(Path(__file__).parent.parent / "soft_labels"))

from export_campaign import run
from fake_teacher import make_teacher

SEED = 20_231


@pytest.fixture
def num_faults() -> Callable[[int], int]:
    """How many of a campaign's faults are to be run now: all, or a fifth (at least one)."""
    whole = os.environ.get("KDECS_CAMPAIGN") == "1"
    return lambda full: full if whole else max(1, math.ceil(full / 5))


def seed_of(request: pytest.FixtureRequest) -> str:
    """What a campaign's faults are drawn from."""
    return f"{SEED}/{request.node.name}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A generator of its own for each campaign, the same in every run."""
    return random.Random(seed_of(request))


def machine() -> str:
    """The processor and its cores in words."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    processor = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{processor}, {len(os.sched_getaffinity(0))} cores"


@pytest.fixture
def record_campaign(request: pytest.FixtureRequest) -> Callable[[str, dict[str, float | int | str]], None]:
    """Write a campaign's counts as NAME.json, with its seed, the day and the machine."""

    def write(name: str, counts: dict[str, float | int | str]) -> None:
        print(f"campaign {name}: {counts}")
        where = {
            "seed": seed_of(request),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
        }
        folder = os.environ.get("KDECS_CAMPAIGN_RESULTS")
        if folder:
            path = Path(folder) / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(counts | where, indent=2) + "\n", encoding="utf-8")

    return write


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "fake")


@pytest.fixture(scope="module")
def quiet(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run without faults. Read-only."""
    output = tmp_path_factory.mktemp("quiet") / "labels"
    run(teacher, output)
    return output
