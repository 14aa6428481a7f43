import errno
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdecs.errors import ArtifactError
from kdecs.soft_labels import format as shard_format
from kdecs.soft_labels.format import (
    ShardTable,
    encode_shard,
    is_as_recorded,
    read_record,
    read_shard,
    shard_schema,
    write_shard,
)

WORDS = ("because", "as", "since", "thus", "other")


def table(num_rows: int = 300, seed: int = 0) -> ShardTable:
    generator = np.random.default_rng(seed)
    return ShardTable(
        pair_ids=[f"d/{n}/1" for n in range(num_rows)],
        pair_hashes=[generator.bytes(16).hex() for _ in range(num_rows)],
        splits=["train"] * num_rows,
        logits=generator.normal(size=(num_rows, len(WORDS))).astype(np.float32),
        log_rest_mass=-generator.random(num_rows).astype(np.float32),
    )


@pytest.mark.parametrize("num_rows", [0, 1, 300])
def test_round_trip(tmp_path: Path, num_rows: int) -> None:
    path, written = tmp_path / "shard-00000.parquet", table(num_rows)
    record = write_shard(path, written, WORDS, device="cpu")
    found = read_shard(path, WORDS)
    assert list(found.pair_ids) == list(written.pair_ids)
    assert list(found.pair_hashes) == list(written.pair_hashes)
    assert list(found.splits) == list(written.splits)
    np.testing.assert_array_equal(found.logits, written.logits)
    np.testing.assert_array_equal(found.log_rest_mass, written.log_rest_mass)
    assert record == read_record(path)
    assert (record.rows, record.bytes) == (num_rows, path.stat().st_size)
    assert is_as_recorded(path, record)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_bytes_depend_on_the_rows_alone() -> None:
    assert encode_shard(table(), WORDS) == encode_shard(table(), WORDS)
    assert encode_shard(table(), WORDS) != encode_shard(table(seed=1), WORDS)


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    record = write_shard(path, table(), WORDS, device="cpu")
    whole = path.read_bytes()
    rng = random.Random(7)
    for position in rng.sample(range(len(whole)), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert not is_as_recorded(path, record)


def test_page_checksums_are_written_and_verified(tmp_path: Path) -> None:
    """A flip inside a data page is refused even by a reader that knows no sha256."""
    path, written = tmp_path / "shard-00000.parquet", table()
    write_shard(path, written, WORDS, device="cpu")
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(3)
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"not a readable shard .*; remove it and run the export again"):
        read_shard(path, WORDS)


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write_shard(path, table(), WORDS, device="cpu")
    data = path.read_bytes()
    for content in (b"", data[:100], data[:-1], b"PAR1" + b"x" * 50):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="not a readable shard"):
            read_shard(path, WORDS)
    with pytest.raises(ArtifactError, match="not a readable shard"):
        read_shard(tmp_path / "missing.parquet", WORDS)


def test_other_answer_words_and_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write_shard(path, table(), WORDS, device="cpu")
    with pytest.raises(ArtifactError, match=r'answer words \["because".*expected \["so"'):
        read_shard(path, ("so", *WORDS[1:]))
    pq.write_table(pa.table({"pair_id": ["d/1/1"]}), path)
    with pytest.raises(ArtifactError, match="answer words none"):
        read_shard(path, WORDS)
    metadata = shard_schema(WORDS).metadata
    pq.write_table(pa.table({"pair_id": ["d/1/1"]}).replace_schema_metadata(metadata), path)
    with pytest.raises(ArtifactError, match="not a shard of format 1: its columns are pair_id string"):
        read_shard(path, WORDS)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard-00000.parquet"

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(path, table(), WORDS, device="cpu")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_is_no_record_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write_shard(path, table(), WORDS, device="cpu")
    shard_format.record_path(path).write_text('{"bytes": -1}')
    assert read_record(path) is None
