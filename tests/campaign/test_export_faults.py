"""The export under faults: whatever is killed, flipped, cut or swapped, the end is the bytes of a quiet run.

The real export with a stand-in teacher that costs nothing, so that many faults fit into seconds; the real command with
a real teacher is killed in test_export_command_faults.py.
"""

import contextlib
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from export_campaign import SETTINGS, Record, assert_same, fork, rerun, run
from fake_teacher import files_of, make_config

from kdecs.artifact import has_valid_checksum, read_manifest, verify_artifact
from kdecs.errors import ArtifactError, KdecsError
from kdecs.soft_labels.export import is_finished
from kdecs.soft_labels.format import published_record

pytestmark = pytest.mark.slow

WATCHED = ("fsync", "replace", "rename", "chmod", "link", "open", "unlink")


def run_and_die(teacher: Path, output: Path, fatal: int) -> None:
    """The export, killed by its own hand right before its n-th batch or operation on files."""
    left = fatal

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **keywords: object) -> object:
            count()
            return call(*arguments, **keywords)

        return wrapper

    for name in WATCHED:
        setattr(os, name, counted(getattr(os, name)))
    run(teacher, output, on_batch=count)


def flip(path: Path, rng: random.Random) -> bytes:
    """Flip one bit of a file; the bytes as they were."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    return whole


def is_noticed(output: Path) -> bool:
    """Whether reading the manifest, its own checksum, or every listed file says that something is wrong."""
    try:
        return not has_valid_checksum(read_manifest(output, "soft-labels")) or bool(verify_artifact(output))
    except ArtifactError:
        return True


def test_killed_at_random_operations(
    teacher: Path,
    quiet: Path,
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Record,
) -> None:
    """Killed right before a random write, rename, lease or batch; up to ten times a directory, then finished."""
    wanted, kills, directories = num_faults(200), 0, 0
    while kills < wanted:
        output = tmp_path / f"labels{directories}"
        directories += 1
        for _ in range(min(10, wanted - kills)):
            child = fork(run_and_die, teacher, output, rng.randrange(1, 45))
            child.join(60)
            assert child.exitcode in (0, -signal.SIGKILL)
            kills += child.exitcode == -signal.SIGKILL
            if child.exitcode == 0:
                break
        finished = [path for path in output.glob("shard-*.parquet") if published_record(path)]
        before = {path: path.stat().st_ino for path in finished}
        run(teacher, output)
        assert {path: path.stat().st_ino for path in finished} == before, (
            "a finished shard was labelled again"
        )
        assert not (output / "quarantine").exists()
        assert_same(output, quiet)
        shutil.rmtree(output)
    assert kills >= wanted
    record_campaign("export_kills", {"kills": kills, "directories": directories, "wrong": 0})


def test_flipped_bytes(
    teacher: Path,
    quiet: Path,
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Record,
) -> None:
    """A flipped bit in a shard or the manifest is noticed; one in a shard, its record or the plan is mended."""
    output = tmp_path / "labels"
    shutil.copytree(quiet, output)
    expected = files_of(quiet)
    counts: Counter[str] = Counter()
    shards = sorted(output.glob("shard-*.parquet"))
    for number in range(num_faults(1000)):
        path = output / "manifest.json" if number % 5 == 4 else rng.choice(shards)
        whole = flip(path, rng)
        assert is_noticed(output), f"{path.name}: a flip went unnoticed"
        counts["manifest" if path.name == "manifest.json" else "shard"] += 1
        path.write_bytes(whole)
    work = output / ".work"
    manifest = output / "manifest.json"
    for number in range(num_faults(100)):
        if number % 2:  # the others are of a finished export
            manifest.unlink()
        files = [*shards, *work.glob("shard-*/*.json"), *(work / "plan").iterdir()]
        path = rng.choice([*files, *([manifest] if manifest.exists() else [])])
        flip(path, rng)
        rerun(teacher, output)
        assert files_of(output) == expected
        counts["resumed"] += 1
    quarantined = len(list((output / "quarantine").iterdir()))
    assert quarantined > 0
    assert_same(output, quiet)
    record_campaign(
        "export_flips",
        {
            "flipped_shards": counts["shard"],
            "flipped_manifests": counts["manifest"],
            "flipped_then_resumed": counts["resumed"],
            "quarantined": quarantined,
            "unnoticed": 0,
        },
    )


def damages(quiet: Path, rng: random.Random) -> dict[str, Callable[[Path], None]]:
    """What may happen to a shard beside a flipped bit."""

    def truncate(path: Path) -> None:
        os.truncate(path, rng.randrange(path.stat().st_size))

    def lengthen(path: Path) -> None:
        with path.open("ab") as file:
            file.write(rng.randbytes(rng.randrange(1, 200)))

    def swap(path: Path) -> None:
        others = [p for p in quiet.glob("shard-*.parquet") if p.name != path.name]
        shutil.copy(rng.choice(others), path)

    def zeros(path: Path) -> None:
        path.write_bytes(bytes(path.stat().st_size))

    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(quiet.parent / "elsewhere.parquet")

    return {
        "truncated": truncate,
        "lengthened": lengthen,
        "foreign": swap,
        "zeroed": zeros,
        "missing": lambda path: path.unlink(),
        "dangling_link": link,
    }


def test_truncated_missing_and_foreign_shards(
    teacher: Path,
    quiet: Path,
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Record,
) -> None:
    """Noticed by the check, and mended by the same command; a shard of no manifest is read by nobody."""
    output = tmp_path / "labels"
    shutil.copytree(quiet, output)
    shutil.copy(quiet / "shard-00000.parquet", output / "shard-00099.parquet")
    counts: Counter[str] = Counter()
    kinds = damages(quiet, rng)
    for number in range(num_faults(90)):
        name = list(kinds)[number % len(kinds)]
        path = output / f"shard-{rng.randrange(5):05d}.parquet"
        kinds[name](path)
        assert is_noticed(output)
        rerun(teacher, output)
        (output / "shard-00099.parquet").rename(tmp_path / "foreign")
        assert files_of(output) == files_of(quiet)
        (tmp_path / "foreign").rename(output / "shard-00099.parquet")
        counts[name] += 1
    assert all(entry.path != "shard-00099.parquet" for entry in read_manifest(output).files)
    record_campaign("export_damage", {**counts, "unnoticed": 0, "wrong": 0})


def test_is_finished_only_when_it_is(teacher: Path, quiet: Path, tmp_path: Path, rng: random.Random) -> None:
    """A copy that lacks or shortens any one file is never taken for a finished export."""
    output = tmp_path / "labels"
    config = make_config(teacher, output, **SETTINGS)
    for name in sorted(files_of(quiet)):
        shutil.copytree(quiet, output)
        assert is_finished(config)
        (output / name).unlink() if rng.random() < 0.5 else os.truncate(output / name, 3)
        with contextlib.suppress(KdecsError):
            assert not is_finished(config)
        shutil.rmtree(output)
