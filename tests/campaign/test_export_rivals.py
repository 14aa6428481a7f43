"""The export among others: workers killed beside it, exporters that ignore each other, a disk that fills."""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from export_campaign import Record, assert_same, fork, rerun, run, run_slowly
from fake_teacher import files_of

from kdecs.soft_labels.claims import Claims
from kdecs.soft_labels.format import published_record

pytestmark = pytest.mark.slow


def run_without_claims(teacher: Path, output: Path, batch_s: float) -> None:
    """A worker that takes every claim, as if all its judgements of the others were wrong."""
    honest = Claims.take

    def grab(self: Claims, name: str) -> object:
        (self.directory / f"{name}.lease").unlink(missing_ok=True)
        return honest(self, name)

    Claims.take = grab  # type: ignore[method-assign]
    run_slowly(teacher, output, batch_s)


def test_killed_at_random_times_among_others(
    teacher: Path,
    quiet: Path,
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Record,
) -> None:
    """Two or three workers, one of which is killed at a random time: the others take its shard over and finish."""
    wanted, kills, takeovers = num_faults(50), 0, 0
    while kills < wanted:
        output = tmp_path / "labels"
        workers = [fork(run_slowly, teacher, output, 0.03) for _ in range(rng.choice((2, 3)))]
        time.sleep(rng.uniform(0.0, 0.6))
        victim = workers[0]
        victim.kill()
        for process in workers:
            process.join(60)
        assert [process.exitcode for process in workers[1:]] == [0] * (len(workers) - 1)
        kills += victim.exitcode == -signal.SIGKILL
        takeovers += victim.exitcode == -signal.SIGKILL and len(workers) > 1
        rerun(teacher, output)  # the victim may have outlived the others' last step
        assert_same(output, quiet)
        shutil.rmtree(output)
    record_campaign("export_takeovers", {"kills": kills, "finished_by_the_others": takeovers, "wrong": 0})


def test_disk_full(
    teacher: Path,
    quiet: Path,
    small_disk: Callable[[int], Path],
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Record,
) -> None:
    """The disk fills at every point of writing; with room again the same command finishes, losing no shard."""
    needed = sum(len(data) for data in files_of(quiet).values()) // 1024 + 40
    full = kept = 0
    disk = small_disk(64)
    for _ in range(num_faults(40)):
        output = disk / "labels"
        for kib in sorted(rng.sample(range(4, needed), 3)):
            _resize(disk, kib)
            with contextlib.suppress(OSError):
                run(teacher, output)
                continue
            full += 1
            finished = {path for path in output.glob("shard-*.parquet") if published_record(path)}
            kept += len(finished)
            assert not (output / "manifest.json").exists()
            assert list(output.glob(".*.tmp")) == [], "a full disk left a temporary file"
        _resize(disk, 8 * needed)
        run(teacher, output)
        assert not (output / "quarantine").exists()
        assert_same(output, quiet)
        shutil.rmtree(output)
    assert full > 0
    record_campaign("export_disk_full", {"full": full, "shards_kept": kept, "wrong": 0})


def _resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


@pytest.mark.parametrize("exporter", [run_slowly, run_without_claims])
def test_two_exporters_at_once(
    teacher: Path,
    quiet: Path,
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Record,
    exporter: Callable[..., None],
) -> None:
    """Started by mistake on one directory: they share the work, or take shards away; no harm either way."""
    rounds = num_faults(25)
    for _ in range(rounds):
        output = tmp_path / "labels"
        first = fork(exporter, teacher, output, 0.01)
        time.sleep(rng.uniform(0, 0.3))
        second = fork(exporter, teacher, output, 0.01)
        for process in (first, second):
            process.join(60)
            assert process.exitcode == 0
        assert_same(output, quiet)
        shutil.rmtree(output)
    record_campaign(f"export_two_{exporter.__name__}", {"rounds": rounds, "wrong": 0})
