"""A label directory from a stranger: nothing in it runs code, leaves the directory or fills memory or disk."""

import contextlib
import json
import pickle
import re
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from label_directories import WORDS, make_labels, make_table
from support import Bomb
from typer.testing import CliRunner

from kdecs.artifact import Manifest, read_manifest, sha256_of_file, with_checksum, write_json
from kdecs.cli import app
from kdecs.errors import ArtifactError, KdecsError, LabelError
from kdecs.soft_labels import format as shard_format
from kdecs.soft_labels.format import encode_shard, shard_schema
from kdecs.soft_labels.labels import SoftLabels
from kdecs.soft_labels.verify import content_faults

SHARD = "shard-00000.parquet"
OUTSIDE = st.one_of(
    st.sampled_from(
        [
            "../secret.parquet",
            "..",
            "a/../../secret.parquet",
            "/etc/passwd",
            "//etc/passwd",
            "..\\secret.parquet",
            "C:\\secret.parquet",
            "",
            "shard\0.parquet",
        ]
    ),
    st.lists(st.sampled_from(["..", ".", "a", "", "secret.parquet"]), min_size=1, max_size=5)
    .filter(lambda parts: ".." in parts)
    .map("/".join),
)


def alter_manifest(directory: Path, **changes: object) -> None:
    """Change the one file's entry of a manifest, and its checksum with it, as a forger can."""
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    values["files"][0] |= changes
    write_json(path, with_checksum(Manifest.model_validate(values)).model_dump(mode="json"))


def relist(directory: Path, rows: int | None) -> None:
    """As a forger would: the manifest agrees with the file that lies there."""
    shard = directory / SHARD
    alter_manifest(directory, bytes=shard.stat().st_size, sha256=sha256_of_file(shard), rows=rows)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=OUTSIDE)
def test_no_listed_path_leaves_the_directory(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("paths")
    directory = make_labels(root / "labels", make_table(["d/1/1"]))
    (root / "secret.parquet").write_bytes((directory / SHARD).read_bytes())
    alter_manifest(directory, path=name)
    with pytest.raises(ArtifactError, match="outside the directory"):
        SoftLabels.open(directory, root / "cache")
    assert not (root / "cache").exists()


def test_no_link_leaves_the_directory(tmp_path: Path) -> None:
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]))
    (directory / SHARD).rename(tmp_path / "outside.parquet")
    (directory / SHARD).symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(ArtifactError, match="is a link that leaves the directory"):
        SoftLabels.open(directory, tmp_path / "cache")
    (directory / SHARD).unlink()
    (directory / "sub").symlink_to(tmp_path)
    alter_manifest(directory, path="sub/outside.parquet")
    with pytest.raises(ArtifactError, match="is a link that leaves the directory"):
        SoftLabels.open(directory, tmp_path / "cache")


def opened(directory: Path, cache: Path) -> SoftLabels | None:
    """The labels, or None where they are refused in one line that names the directory; nothing else is caught."""
    with contextlib.suppress(KdecsError):
        return SoftLabels.open(directory, cache)
    with pytest.raises(KdecsError, match=re.escape(str(directory))) as refusal:
        SoftLabels.open(directory, cache)
    assert "\n" not in str(refusal.value)
    return None


@pytest.mark.parametrize("kind", ["arrow.py_extension_type", "arrow.opaque", "kdecs.unknown"])
@pytest.mark.parametrize("column", ["logits", "pair_id", "extra"])
def test_extension_types_run_nothing(tmp_path: Path, kind: str, column: str) -> None:
    """A pickle in the schema, as old Arrow loaded it by itself (CVE-2023-47248)."""
    mark = tmp_path / "ran"
    payload = pickle.dumps(Bomb(mark))
    plain = shard_schema(WORDS)
    metadata = {"ARROW:extension:name": kind, "ARROW:extension:metadata": payload}
    fields = [f.with_metadata(metadata) if f.name == column else f for f in plain]
    if column == "extra":
        fields.append(pa.field("extra", pa.binary(), metadata=metadata))
    table = make_table(["d/1/1"])
    columns = [
        pa.array(table.pair_ids),
        pa.array(table.pair_hashes),
        pa.array(table.splits),
        pa.FixedSizeListArray.from_arrays(
            pa.array(table.logits.reshape(-1)), type=plain.field("logits").type
        ),
        pa.array(table.log_rest_mass),
    ] + ([pa.array([payload])] if column == "extra" else [])
    directory = make_labels(tmp_path / "labels", table)
    schema = pa.schema(fields, metadata=plain.metadata | {b"pickle": payload})
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), directory / SHARD)
    relist(directory, 1)
    labels = opened(directory, tmp_path / "cache")
    if labels is not None:  # as plain data
        assert labels.logits(labels.rows_of(["d/1/1"], ["0" * 32])).tolist() == [[0.5] * 5]
    assert not mark.exists()


def test_pickles_and_other_files_are_no_shards(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for index, data in enumerate((pickle.dumps(Bomb(mark)), b"", b"PAR1", b"PAR1" * 100, b"ARROW1\0\0")):
        directory = make_labels(tmp_path / f"labels-{index}", make_table(["d/1/1"]))
        (directory / SHARD).write_bytes(data)
        relist(directory, 1)
        with pytest.raises(ArtifactError, match="not a readable shard"):
            SoftLabels.open(directory, tmp_path / "cache")
    assert not mark.exists()


@pytest.mark.parametrize("rows", [0, 2, 10**6, 2**62, -1, None])
def test_made_up_row_numbers_are_refused(tmp_path: Path, rows: int | None) -> None:
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]))
    alter_manifest(directory, rows=rows)
    with pytest.raises(ArtifactError, match="1 rows, the manifest says"):
        SoftLabels.open(directory, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.arrow")) == []


def test_a_small_file_of_many_rows_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Run-length encoding holds a million equal rows in some kilobytes."""
    rows = 1_000_000
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]))
    with pq.ParquetWriter(directory / SHARD, shard_schema(WORDS), compression="zstd") as writer:
        part = pq.ParquetFile(pa.BufferReader(encode_shard(make_table(["d/1/1"]), WORDS))).read()
        writer.write_table(part.take(pa.array(np.zeros(rows, np.int64))), row_group_size=rows)
    relist(directory, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"more than its \d+ bytes can hold"):
        SoftLabels.open(directory, tmp_path / "cache")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_a_huge_row_group_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "_MAX_ROW_GROUP_BYTES", 100)
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]))
    with pytest.raises(ArtifactError, match=r"row group 0 of \d+ bytes, more than 100"):
        SoftLabels.open(directory, tmp_path / "cache")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_bytes_are_refused_or_read_as_labels(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Damage with a manifest forged to agree with it: one line, or labels of the right shape; never anything else."""
    root = tmp_path_factory.mktemp("forged")
    directory = make_labels(root / "labels", make_table([f"d/{n}/1" for n in range(40)]))
    content = bytearray((directory / SHARD).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (directory / SHARD).write_bytes(content)
    relist(directory, 40)
    labels = opened(directory, root / "cache")
    if labels is not None:
        assert labels.logits(np.arange(40)).shape == (40, 5)
        assert np.isfinite(labels.logits(np.arange(40))).all()


def test_a_manifest_s_details_are_checked(tmp_path: Path) -> None:
    for index, words in enumerate((None, [], "because", [1, 2], {"a": 1}, ["x"] * 10)):
        directory = make_labels(tmp_path / f"labels-{index}", make_table(["d/1/1"]))
        manifest = read_manifest(directory)
        values = manifest.model_dump(mode="json")
        values["details"]["answer_words"] = words
        write_json(
            directory / "manifest.json",
            with_checksum(Manifest.model_validate(values)).model_dump(mode="json"),
        )
        with pytest.raises((ArtifactError, LabelError), match=r"answer.words"):
            SoftLabels.open(directory, tmp_path / "cache")


def test_a_flipped_byte_of_the_manifest_is_refused(tmp_path: Path) -> None:
    """Every single one, but those of the name "seal" itself: `kdecs verify` asks for one."""
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]))
    path = directory / "manifest.json"
    whole = path.read_bytes()
    name = whole.index(b'"seal"')
    for place in range(0, len(whole), 7):
        if name <= place < name + 6 or whole[place : place + 1].isspace():
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(KdecsError):
            SoftLabels.open(directory, tmp_path / "cache")


def test_verify_names_every_bad_shard(tmp_path: Path) -> None:
    tables = [make_table([f"d/{n}/1"], value=np.nan if n in (1, 3) else 0.0) for n in range(5)]
    directory = make_labels(tmp_path / "labels", *tables)
    faults = content_faults(directory, read_manifest(directory))
    assert [fault.split("shard-")[1][:5] for fault in faults] == ["00001", "00003"]
    result = CliRunner().invoke(app, ["verify", str(directory)])
    assert "(2 faults in all)" in str(result.exception)
