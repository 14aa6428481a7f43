"""The joined file of a node under faults: builders killed, bytes flipped, files cut, a full disk; readers never notice.

The invariant: whoever opens the labels next gets every logit as the shards hold it, and nothing is left lying about.
"""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "soft_labels"))

from label_directories import WORDS, make_labels

from kdecs.errors import explain_os_error
from kdecs.soft_labels.format import ShardTable
from kdecs.soft_labels.labels import SoftLabels

pytestmark = pytest.mark.slow

Record = Callable[[str, dict[str, float | int | str]], None]
NUM_PAIRS = 60_000


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards; every logit tells its pair's number."""
    tables = []
    for numbers in np.array_split(np.arange(NUM_PAIRS), 3):
        values = numbers[:, None] + np.arange(5)[None] / 8
        ids = [f"d/{n}/1" for n in numbers]
        rest = np.full(len(ids), -1, np.float32)
        tables.append(
            ShardTable(ids, ["0" * 32] * len(ids), ["train"] * len(ids), values.astype(np.float32), rest)
        )
    return make_labels(tmp_path_factory.mktemp("labels") / "labels", *tables, words=WORDS)


def build(directory: Path, cache: Path) -> None:
    SoftLabels.open(directory, cache)


def check(directory: Path, cache: Path, *, verify: bool = False) -> None:
    """Every pair has its own number; one joined file, its record, its lock and nothing else."""
    found = SoftLabels.open(directory, cache, verify_cache=verify)
    numbers = np.random.default_rng(0).permutation(NUM_PAIRS)[:5000]
    rows = found.rows_of([f"d/{n}/1" for n in numbers], ["0" * 32] * len(numbers), split="train")
    np.testing.assert_array_equal(found.logits(rows)[:, 0], numbers.astype(np.float32))
    assert sorted(path.suffix for path in cache.iterdir()) == [".arrow", ".json", ".lock"]


def test_killed_builders(
    labels: Path,
    tmp_path: Path,
    num_faults: Callable[[int], int],
    rng: random.Random,
    record_campaign: Record,
) -> None:
    """One of one or two builders is killed at a random moment; the other one, or the next, finishes."""
    context = multiprocessing.get_context("fork")
    # The time of a process, so that the moments reach to its end.
    undisturbed = context.Process(target=build, args=(labels, tmp_path / "quiet"))
    started = time.monotonic()
    undisturbed.start()
    undisturbed.join(120)
    build_s = time.monotonic() - started
    kills = finished = half_done = read_right = 0
    for number in range(num_faults(50)):
        cache = tmp_path / f"cache-{number}"
        builders = [context.Process(target=build, args=(labels, cache)) for _ in range(1 + number % 2)]
        for builder in builders:
            builder.start()
        if number % 4 < 2:
            time.sleep(rng.uniform(0, 1.2 * build_s))
        else:  # a random moment seldom falls into the few milliseconds in which the files are written
            while builders[0].is_alive() and not any(cache.glob(".*.tmp")):
                time.sleep(0.0002)
        if builders[0].is_alive():
            os.kill(builders[0].pid or 0, signal.SIGKILL)
            kills += 1
        half_done += any(path.name.startswith(".") for path in cache.glob("*")) if cache.exists() else 0
        for builder in builders:
            builder.join(120)
            finished += builder.exitcode == 0
        check(labels, cache)
        read_right += 1
    assert kills > 0
    counts = {"rounds": num_faults(50), "killed": kills, "left_half_done": half_done}
    record_campaign("label_join_kills", counts | {"builders_finished": finished, "read_right": read_right})


def test_damaged_joined_files(
    labels: Path,
    tmp_path: Path,
    num_faults: Callable[[int], int],
    rng: random.Random,
    record_campaign: Record,
) -> None:
    """A flip that changes the file's time is seen by every reader; a silent one by a reader that verifies."""
    build(labels, tmp_path)
    (arrow,) = tmp_path.glob("*.arrow")
    whole = arrow.read_bytes()
    counts = {"flips": 0, "silent_flips": 0, "cuts": 0, "read_right": 0}
    for number in range(num_faults(100)):
        stat = arrow.stat()
        data = bytearray(whole)
        kind = ("flips", "silent_flips", "cuts")[number % 3]
        if kind == "cuts":
            arrow.write_bytes(data[: rng.randrange(len(data))])
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            arrow.write_bytes(data)
        if kind == "silent_flips":
            os.utime(arrow, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        check(labels, tmp_path, verify=kind == "silent_flips")
        assert arrow.read_bytes() == whole
        counts[kind] += 1
        counts["read_right"] += 1
    record_campaign("label_join_damage", counts)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disks(
    labels: Path,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    num_faults: Callable[[int], int],
    rng: random.Random,
    record_campaign: Record,
) -> None:
    """The disk runs full at a random point of the build: it says so, and leaves the room that it took."""
    build(labels, tmp_path / "quiet")
    needed_kib = next((tmp_path / "quiet").glob("*.arrow")).stat().st_size // 1024
    read_right = 0
    for _ in range(num_faults(15)):
        disk = small_disk(rng.randrange(8, needed_kib))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as refusal:
            build(labels, disk)
        assert str(disk) in str(explain_os_error(refusal.value))
        assert [path.suffix for path in disk.iterdir()] == [".lock"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        check(labels, disk)
        read_right += 1
    record_campaign("label_join_full_disk", {"disks": num_faults(15), "read_right_after": read_right})
