"""Several workers on one directory: killed, suspended, of another config; the bytes are those of one quiet worker."""

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from fake_teacher import FakeScorer, files_of, make_config, start_worker, worker
from stand_in import run_command

from kdecs.artifact import host_identity, read_manifest, verify_artifact
from kdecs.corpus.pairs import Pair
from kdecs.errors import ArtifactError
from kdecs.process import StopSignal
from kdecs.soft_labels.claims import Claims
from kdecs.soft_labels.export import ExportResult, Progress, export_shards
from kdecs.soft_labels.format import published_record, write_record


def export(teacher: Path, output: Path, **changes: object) -> ExportResult:
    return export_shards(make_config(teacher, output, **changes), FakeScorer(teacher), worker(), StopSignal())


def test_two_processes_give_the_bytes_of_one(finished: Path, teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    processes = [start_worker(teacher, output, rank, 2, 0.02) for rank in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert files_of(output) == files_of(finished)


def test_a_worker_killed_again_and_again_gives_the_same_bytes(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    """A second worker, never killed, takes the dead one's shards over while it still runs."""
    output = tmp_path / "labels"
    rng = random.Random(3)
    for _ in range(2):
        victim = start_worker(teacher, output, 0, 2, 0.3)
        _wait_for(lambda: (output / ".work" / "job.json").is_file())
        time.sleep(rng.uniform(0.05, 0.4))
        survivor = start_worker(teacher, output, 1, 2, 0.05) if _ else None
        victim.kill()
        victim.join(60)
        assert victim.exitcode == -9
        if survivor:
            survivor.join(60)
            assert survivor.exitcode == 0
    assert files_of(output) == files_of(finished)
    assert list(output.glob(".*.tmp")) == []


def test_another_config_that_began_at_the_same_moment_takes_no_plan_away(
    finished: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second exporter looked while the directory was empty, and comes to its claim when the first is at work."""
    output = tmp_path / "labels"
    refused: list[str] = []

    def intrude() -> None:
        if refused:
            return
        with monkeypatch.context() as patch:
            patch.setattr("kdecs.soft_labels.export.check_export_output", lambda *_: None)
            with pytest.raises(ArtifactError, match="unfinished soft labels of other work") as caught:
                export(teacher, output, num_shards=3)
        refused.append(str(caught.value))

    export_shards(make_config(teacher, output), FakeScorer(teacher, on_batch=intrude), worker(), StopSignal())
    assert refused
    assert files_of(output) == files_of(finished)


def test_a_plan_that_changes_underneath_changes_no_shard(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    """A worker keeps to the plan that it has read."""
    output, other = tmp_path / "labels", tmp_path / "other"
    export(teacher, other, num_shards=3)

    def swap() -> None:
        shutil.copytree(other / ".work" / "plan", output / ".work" / "plan", dirs_exist_ok=True)

    export_shards(make_config(teacher, output), FakeScorer(teacher, on_batch=swap), worker(), StopSignal())
    assert files_of(output) == files_of(finished)


def test_shards_of_another_plan_are_labelled_again(finished: Path, teacher: Path, tmp_path: Path) -> None:
    """Also where they have as many rows: a record names its plan."""
    output = tmp_path / "labels"
    shutil.copytree(finished, output)
    (output / "manifest.json").unlink()
    for path in output.glob("shard-*.parquet"):
        record = published_record(path)
        assert record is not None
        write_record(path, record.model_copy(update={"plan": "0" * 64}))
    result = export(teacher, output)
    assert result.num_new_pairs == sum(entry.rows or 0 for entry in result.manifest.files)
    assert files_of(output) == files_of(finished)


def _wait_for(condition: object, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_shard_of_a_dead_worker_of_another_host_is_taken_over(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    """Its claim names a host whose kernel locks tell nothing here: the file system's time decides."""
    output = tmp_path / "labels"
    elsewhere = Claims(output / ".work" / "leases", lease_s=60, host="elsewhere")
    started = time.monotonic()
    assert elsewhere.take("shard-00002") is not None  # it died: nobody renews the claim
    config = make_config(teacher, output, lease_s=1.0)
    export_shards(config, FakeScorer(teacher), worker(), StopSignal(), poll_s=0.05)
    assert time.monotonic() - started > 0.5
    assert files_of(output) == files_of(finished)


def test_a_worker_that_lost_its_claim_leaves_the_shard_to_the_other(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    """In the middle of its second shard it finds another's claim in the place of its own."""
    output = tmp_path / "labels"
    lines: list[str] = []

    def report(progress: Progress) -> None:
        lines.extend([progress.line] if progress.line else [])

    def steal() -> None:
        path = output / ".work" / "leases" / "shard-00001.lease"
        if path.exists() and not lines_about("took it over"):
            path.write_text('{"token": "another", "host": "elsewhere"}')
            time.sleep(0.5)  # a renewal of the owner finds it

    def lines_about(text: str) -> list[str]:
        return [line for line in lines if text in line]

    config = make_config(teacher, output, lease_s=1.0)
    scorer = FakeScorer(teacher, on_batch=steal)
    export_shards(config, scorer, worker(), StopSignal(), report=report, poll_s=0.05)
    assert lines_about("took it over") == [
        "shard-00001.parquet: another worker took it over while this one was silent"
    ]
    assert files_of(output) == files_of(finished)


def test_a_worker_suspended_in_its_last_chunk_leaves_a_finished_shard_alone(
    teacher: Path, tmp_path: Path
) -> None:
    """Another device finished the shard meanwhile, with other last bits: those are what the manifest lists."""
    output = tmp_path / "labels"
    lines: list[str] = []
    finals: list[bytes] = []
    config = make_config(teacher, output, num_shards=1)
    other_device = worker(device="cuda")
    chunks = len(list(_batches_of(teacher, tmp_path / "counted", num_shards=1)))

    def suspend() -> None:
        seen.append(1)
        if len(seen) == chunks:
            lease = output / ".work" / "leases" / "shard-00000.lease"
            then = lease.stat().st_mtime - 600
            os.utime(lease, (then, then))
            lease.write_text(lease.read_text().replace(host_identity(), "elsewhere"))
            os.utime(lease, (then, then))
            export_shards(config, NudgedScorer(teacher), other_device, StopSignal())
            finals.append((output / "shard-00000.parquet").read_bytes())

    seen: list[int] = []

    def report(progress: Progress) -> None:
        lines.extend([progress.line] if progress.line else [])

    result = export_shards(
        config, FakeScorer(teacher, on_batch=suspend), worker(), StopSignal(), report=report, poll_s=0.05
    )
    assert any("another worker took it over" in line for line in lines)
    assert [(output / "shard-00000.parquet").read_bytes()] == finals
    assert result.manifest == read_manifest(output)
    assert result.manifest.details["devices"] == ["cuda"]
    assert verify_artifact(output) == []


def test_nothing_is_left_of_killed_workers(finished: Path, teacher: Path, tmp_path: Path) -> None:
    """By whoever finishes, and by the command that finds all finished; a live worker's claim stays."""
    output = tmp_path / "labels"
    written = (".work/shard-00001/.0f.json", ".work/.job.json", ".work/plan/.entries.bin")
    written += (".shard-00001.parquet", ".config.json")
    names = tuple(f"{name}.0123456789abcde{number}.tmp" for number, name in enumerate(written))
    names += (".work/leases/.now-d4", ".work/leases/shard-00003.lease")

    def leave_temporaries() -> None:
        for name in names:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).touch()
        claim = output / ".work" / "leases" / "shard-00003.lease"
        os.utime(claim, (claim.stat().st_mtime - 600,) * 2)

    leave_temporaries()
    (output / ".notes.tmp").touch()  # somebody else's
    export(teacher, output)
    assert (output / ".notes.tmp").exists()
    assert not [name for name in names if (output / name).exists()]
    assert list((output / ".work" / "leases").iterdir()) == []
    leave_temporaries()
    alive = Claims(output / ".work" / "leases", lease_s=60, host="elsewhere")
    with alive.holding("shard-00004") as claim:
        assert claim is not None
        assert run_command(make_config(teacher, output), tmp_path) == 0
        assert [path.name for path in (output / ".work" / "leases").iterdir()] == ["shard-00004.lease"]
    assert not [name for name in names if (output / name).exists()]
    assert files_of(output) == files_of(finished)


class NudgedScorer(FakeScorer):
    """The same teacher on another kind of device."""

    def score(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        logits, rest = super().score(pairs)
        return np.nextafter(logits, np.float32(9)), rest


def _batches_of(teacher: Path, output: Path, **changes: object) -> list[int]:
    """One item for each batch of a quiet run."""
    batches: list[int] = []
    scorer = FakeScorer(teacher, on_batch=lambda: batches.append(1))
    export_shards(make_config(teacher, output, **changes), scorer, worker(), StopSignal())
    return batches
