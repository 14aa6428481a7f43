"""`kdecs verify`: files side by side, progress, and the content of soft labels behind their checksums."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from label_directories import WORDS, make_labels, make_table, write_label_manifest
from typer.testing import CliRunner

from kdecs.artifact import verify_artifact, write_manifest
from kdecs.cli import app
from kdecs.errors import KdecsError
from kdecs.soft_labels.format import encode_shard


def test_progress_counts_every_byte_and_faults_keep_the_manifest_s_order(tmp_path: Path) -> None:
    sizes = {f"{n:02d}.bin": 700_000 * n + 1 for n in range(12)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(hashlib.shake_128(name.encode()).digest(size))
    write_manifest(tmp_path, "report", config_hash="0", inputs={}, files=sizes)
    seen: list[int] = []
    assert verify_artifact(tmp_path, on_bytes=seen.append) == []
    assert sum(seen) == sum(sizes.values())
    damaged = ["03.bin", "07.bin", "11.bin"]
    for name in reversed(damaged):
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data)
    faults = verify_artifact(tmp_path)
    assert [Path(fault.split(": sha256")[0]).name for fault in faults] == damaged


def test_labels_are_decoded(tmp_path: Path) -> None:
    make_labels(tmp_path / "good", make_table(["d/1/1", "d/2/1"]), make_table(["e/1/1"]))
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "good")])
    assert result.exit_code == 0
    assert "soft-labels, 2 files" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": np.nan}, "the pair d/1/1 has labels that are not finite"),
        ({"split": "dev"}, "a row of the split 'dev', expected one of train, valid, test"),
    ],
)
def test_content_that_no_export_writes_is_a_fault(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    make_labels(tmp_path / "bad", make_table(["e/1/1"]), make_table(["d/1/1"], **change))
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "bad")])
    assert isinstance(result.exception, KdecsError)
    assert message in str(result.exception)


def test_rows_and_words_are_held_against_the_manifest(tmp_path: Path) -> None:
    for name, changes, message in (
        ("rows", {"rows": {"shard-00000.parquet": 2}}, "1 rows, the manifest says 2"),
        ("words", {"details": {"answer_words": ["so", *WORDS[1:]]}}, 'answer words ["because"'),
    ):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "shard-00000.parquet").write_bytes(encode_shard(make_table(["d/1/1"]), WORDS))
        details = {"answer_words": list(WORDS), "num_pairs": {"train": 1}}
        values = {"rows": {"shard-00000.parquet": 1}, "details": details} | changes
        write_label_manifest(directory, **values)
        result = CliRunner().invoke(app, ["verify", str(directory)])
        assert message in str(result.exception)


@pytest.mark.parametrize(
    ("num_pairs", "message"),
    [
        ({"train": 3, "valid": 0}, "2 pairs of the split train, the manifest says 3"),
        ({"train": 2}, "1 pairs of the split valid, the manifest says 0"),
        (None, "details.num_pairs: expected numbers by split"),
    ],
)
def test_rows_are_held_against_the_manifest_split_by_split(
    tmp_path: Path, num_pairs: dict[str, int] | None, message: str
) -> None:
    tables = [make_table(["d/1/1", "d/2/1"]), make_table(["e/1/1"], split="valid")]
    directory = make_labels(tmp_path / "labels", *tables)
    rows = {"shard-00000.parquet": 2, "shard-00001.parquet": 1}
    write_label_manifest(directory, rows, {"answer_words": list(WORDS), "num_pairs": num_pairs})
    result = CliRunner().invoke(app, ["verify", str(directory)])
    assert isinstance(result.exception, KdecsError)
    assert message in str(result.exception)


def test_a_pair_that_stands_twice_in_a_split_is_a_fault(tmp_path: Path) -> None:
    """Found across shards; the same pair in two splits is fine."""
    ids = [f"d{n}/1/1" for n in range(100)]
    twice = make_labels(tmp_path / "twice", make_table(ids), make_table(["e/1/1", "d57/1/1"]))
    result = CliRunner().invoke(app, ["verify", str(twice)])
    assert "the pair d57/1/1 occurs twice in one split" in str(result.exception)
    both = make_labels(tmp_path / "both", make_table(ids), make_table(ids, split="test"))
    assert CliRunner().invoke(app, ["verify", str(both)]).exit_code == 0


def test_a_changed_manifest_breaks_its_own_checksum(tmp_path: Path) -> None:
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]))
    manifest = directory / "manifest.json"
    text = manifest.read_text()
    for old, new in (('"teacher": "labels"', '"teacher": "others"'), ('"seal"', '"sea1"')):
        assert old in text
        manifest.write_text(text.replace(old, new))
        result = CliRunner().invoke(app, ["verify", str(directory)])
        assert "its own checksum is missing or does not match" in str(result.exception)
    manifest.write_text(text)
    assert CliRunner().invoke(app, ["verify", str(directory)]).exit_code == 0
