"""What tests of several folders share: where the sample corpus and the real data are."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
