import errno
import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_directories import WORDS, read_shard

from kdecs.artifact import sha256_of_file
from kdecs.errors import ArtifactError
from kdecs.evaluation.counts import PairCounts
from kdecs.soft_labels.format import (
    ROWS_PER_GROUP,
    ShardRecord,
    ShardTable,
    encode_shard,
    iter_shard,
    published_record,
    record_path,
    shard_schema,
    shard_writer,
    write_record,
)


def table(num_rows: int = 300, seed: int = 0) -> ShardTable:
    generator = np.random.default_rng(seed)
    return ShardTable(
        pair_ids=[f"d/{n}/1" for n in range(num_rows)],
        pair_hashes=[generator.bytes(16).hex() for _ in range(num_rows)],
        splits=["train"] * num_rows,
        logits=generator.normal(size=(num_rows, len(WORDS))).astype(np.float32),
        log_rest_mass=-generator.random(num_rows).astype(np.float32),
    )


def write(path: Path, *tables: ShardTable, top_k: int = 0, agreement: dict | None = None) -> ShardRecord:
    """A shard and its record, as an export writes them."""
    with shard_writer(path, WORDS, top_k) as writer:
        for part in tables:
            writer.append(part)
    facts = {"bytes": writer.bytes, "sha256": writer.sha256, "rows": writer.rows}
    record = ShardRecord(**facts, plan="", device="cpu", agreement=agreement or {})
    write_record(path, record)
    return record


@pytest.mark.parametrize("num_rows", [1, 300])
def test_round_trip(tmp_path: Path, num_rows: int) -> None:
    path, written = tmp_path / "shard-00000.parquet", table(num_rows)
    record = write(path, written)
    found = read_shard(path)
    assert list(found.pair_ids) == list(written.pair_ids)
    assert list(found.pair_hashes) == list(written.pair_hashes)
    assert list(found.splits) == list(written.splits)
    np.testing.assert_array_equal(found.logits, written.logits)
    np.testing.assert_array_equal(found.log_rest_mass, written.log_rest_mass)
    assert (record.rows, record.bytes) == (num_rows, path.stat().st_size)
    assert record.sha256 == sha256_of_file(path)
    assert record == published_record(path) == published_record(path, read_bytes=False)


def test_a_shard_without_rows_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write(path, table(0))
    assert list(iter_shard(path, WORDS, rows=0)) == []


def test_bytes_depend_on_the_rows_alone() -> None:
    assert encode_shard(table(), WORDS) == encode_shard(table(), WORDS)
    assert encode_shard(table(), WORDS) != encode_shard(table(seed=1), WORDS)


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write(path, table())
    whole = path.read_bytes()
    rng = random.Random(7)
    for position in rng.sample(range(len(whole)), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert published_record(path) is None


def test_page_checksums_are_written_and_verified(tmp_path: Path) -> None:
    """A flip inside a data page is refused even by a reader that knows no sha256."""
    path, written = tmp_path / "shard-00000.parquet", table()
    write(path, written)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(3)
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"not a readable shard .*; remove it and run the export again"):
        read_shard(path)


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write(path, table())
    data = path.read_bytes()
    for content in (b"", data[:100], data[:-1], b"PAR1" + b"x" * 50):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="not a readable shard"):
            list(iter_shard(path, WORDS, rows=300))
    with pytest.raises(ArtifactError, match="not a readable shard"):
        list(iter_shard(tmp_path / "missing.parquet", WORDS, rows=300))


def test_other_answer_words_and_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    write(path, table())
    with pytest.raises(ArtifactError, match=r'answer words \["because".*expected \["so"'):
        read_shard(path, ("so", *WORDS[1:]))
    pq.write_table(pa.table({"pair_id": ["d/1/1"]}), path)
    with pytest.raises(ArtifactError, match="answer words none"):
        read_shard(path)
    metadata = shard_schema(WORDS).metadata
    pq.write_table(pa.table({"pair_id": ["d/1/1"]}).replace_schema_metadata(metadata), path)
    with pytest.raises(ArtifactError, match="not a shard of format 1: its columns are pair_id string"):
        read_shard(path)


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard-00000.parquet"

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(path, table())
    assert caught.value.filename == str(path)


def test_every_flipped_byte_of_a_record_makes_it_none(tmp_path: Path) -> None:
    """A flip in white space or in the case of an escape says the same; any other is no record."""
    path = tmp_path / "shard-00000.parquet"
    record = write(path, table(), agreement={"valid": PairCounts(true_positive=3, true_negative=4)})
    assert published_record(path) == record
    whole = record_path(path, record).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        record_path(path, record).write_bytes(damaged)
        assert published_record(path) in (None, record)


def test_of_two_records_that_of_the_published_bytes_counts(tmp_path: Path) -> None:
    """Two workers on unlike devices recorded one shard, with as many bytes; one of them was first."""
    path = tmp_path / "shard-00000.parquet"
    record = write(path, table())
    write_record(path, record.model_copy(update={"sha256": "0" * 64, "device": "cuda"}))
    write_record(path, record.model_copy(update={"sha256": "f" * 64, "device": "cuda"}))
    assert published_record(path) == published_record(path, read_bytes=False) == record


def test_rows_stream_in_groups_whatever_way_they_came(tmp_path: Path) -> None:
    """Three appends of uneven size give the bytes of one, and are read back a few rows at a time."""
    num_rows = ROWS_PER_GROUP + 1000
    one = table(num_rows)
    cuts = [0, 17, ROWS_PER_GROUP - 3, num_rows]
    parts = [
        ShardTable(
            one.pair_ids[a:b], one.pair_hashes[a:b], one.splits[a:b], one.logits[a:b], one.log_rest_mass[a:b]
        )
        for a, b in pairwise(cuts)
    ]
    paths = [tmp_path / "shard-00000.parquet", tmp_path / "shard-00001.parquet"]
    records = [write(path, *tables) for path, tables in zip(paths, ([one], parts), strict=True)]
    assert records[0] == records[1]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert pq.ParquetFile(paths[0]).num_row_groups == 2
    pieces = list(iter_shard(paths[1], WORDS, rows=num_rows, batch_rows=5000))
    assert max(len(piece) for piece in pieces) <= 5000
    np.testing.assert_array_equal(np.concatenate([piece.logits for piece in pieces]), one.logits)
    assert [pair_id for piece in pieces for pair_id in piece.pair_ids] == one.pair_ids


def test_top_logits_round_trip_and_can_be_skipped(tmp_path: Path) -> None:
    path, plain = tmp_path / "shard-00000.parquet", table(9)
    generator = np.random.default_rng(1)
    top_ids = generator.integers(0, 32_000, size=(9, 4), dtype=np.int32)
    top_logits = generator.normal(size=(9, 4)).astype(np.float32)
    write(path, replace(plain, top_ids=top_ids, top_logits=top_logits), top_k=4)
    found = read_shard(path)
    np.testing.assert_array_equal(found.top_ids, top_ids)
    np.testing.assert_array_equal(found.top_logits, top_logits)
    np.testing.assert_array_equal(found.logits, plain.logits)
    (light,) = iter_shard(path, WORDS, rows=9)
    assert light.top_ids is None
    assert light.top_logits is None
