"""When a shard is called too long, and by how much."""

from pathlib import Path

import pytest
from fake_teacher import FakeScorer, make_config, worker

from kdecs.process import StopSignal
from kdecs.soft_labels import export as pace
from kdecs.soft_labels.export import Progress, export_shards, long_shard_warning


def test_figures_worked_by_hand() -> None:
    """At 5 pairs a second 36,000 pairs take two hours: twelve times ten minutes."""
    line = long_shard_warning(8, num_pairs=36_000, num_scored=500, seconds=100)
    assert line == (
        "warning: at 5.0 pairs a second a shard takes 2.0 hours, and a worker that is stopped loses the shard in hand; "
        "with num_shards: 96 (in another output) it is 10 minutes"
    )
    assert long_shard_warning(8, num_pairs=18_000, num_scored=500, seconds=100) is None  # an hour, not longer
    assert long_shard_warning(8, num_pairs=36_000, num_scored=256, seconds=59) is None  # too early to tell
    assert long_shard_warning(8, num_pairs=36_000, num_scored=0, seconds=100) is None
    assert "num_shards: 100000 " in str(
        long_shard_warning(60_000, num_pairs=36_000, num_scored=500, seconds=100)
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_an_export_warns_once_a_launch(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(pace, "MEASURED_AFTER_S", 0.0)
    monkeypatch.setattr(pace, "LONG_SHARD_S", 1e-9)
    lines: list[str] = []

    def report(progress: Progress) -> None:
        lines.extend([progress.line] if progress.line else [])

    config = make_config(teacher, tmp_path / "labels", num_shards=2)
    export_shards(config, FakeScorer(teacher), worker(rank, 2), StopSignal(), report=report)
    assert sum(line.startswith("warning: at ") for line in lines) == (rank == 0)
