"""A finished export of the bundled sample by a stand-in teacher."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # worker processes import fake_teacher by name

from fake_teacher import FakeScorer, make_config, make_teacher, worker

from kdecs.process import StopSignal
from kdecs.soft_labels.export import export_shards


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "fake")


@pytest.fixture(scope="session")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: copy it before damaging it."""
    output = tmp_path_factory.mktemp("labels") / "labels"
    export_shards(make_config(teacher, output), FakeScorer(teacher), worker(), StopSignal())
    return output
