"""The files of a soft-label directory.

A directory of kind `soft-labels` holds

    config.json                 the resolved ExportConfig
    shard-00000.parquet …       one table a shard, listed with rows and sha256 in manifest.json
    manifest.json               details: answer_words, lineage, pairs by split, agreement, dtype, devices
    .work/                      of the writers: locks, and one record a finished shard
    quarantine/                 shards whose bytes were not those written, if there were any

A shard is Parquet (zstd, page checksums) with the columns, none of them null:

    pair_id         string                      dialogue/target/candidate
    pair_hash       string                      32 hex characters: texts and speakers of u_1 … u_target
    split           string                      train, valid or test
    logits          fixed_size_list<float32>[A] raw logits of the answer words, temperature 1
    log_rest_mass   float32                     log probability mass of the rest of the vocabulary

Rows are ordered by split, dialogue (as in the corpus file), target, candidate. The schema's metadata holds
`kdecs.format` (1) and `kdecs.answer_words` (JSON). The bytes depend on the labels alone: no dates, no ranks.
Shapes: n rows, A answer words.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdecs.artifact import atomic_path, sha256_of_file, write_json
from kdecs.errors import ArtifactError

SHARD_FORMAT = "1"
WORK_DIRECTORY = ".work"
QUARANTINE_DIRECTORY = "quarantine"
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class ShardTable:
    """The rows of one shard; logits (n, A) float32, log_rest_mass (n,) float32."""

    pair_ids: Sequence[str]
    pair_hashes: Sequence[str]
    splits: Sequence[str]
    logits: np.ndarray
    log_rest_mass: np.ndarray


class ShardRecord(BaseModel):
    """What a worker notes beside a shard that it finished: a resume trusts a shard only if this agrees."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)
    device: str


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.parquet"


def shard_schema(answer_words: Sequence[str]) -> pa.Schema:
    """The Arrow schema of every shard with these answer words."""
    fields = [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("pair_hash", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field(
            "logits",
            pa.list_(pa.field("element", pa.float32(), nullable=False), len(answer_words)),
            nullable=False,
        ),
        pa.field("log_rest_mass", pa.float32(), nullable=False),
    ]
    metadata = {"kdecs.format": SHARD_FORMAT, "kdecs.answer_words": json.dumps(list(answer_words))}
    return pa.schema(fields, metadata=metadata)


def encode_shard(table: ShardTable, answer_words: Sequence[str]) -> bytes:
    """The Parquet bytes of a shard: the same bytes for the same rows and version of pyarrow."""
    schema = shard_schema(answer_words)
    flat = pa.array(np.ascontiguousarray(table.logits, dtype=np.float32).reshape(-1))
    columns = [
        pa.array(table.pair_ids, pa.string()),
        pa.array(table.pair_hashes, pa.string()),
        pa.array(table.splits, pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field("logits").type),
        pa.array(np.asarray(table.log_rest_mass, dtype=np.float32)),
    ]
    sink = pa.BufferOutputStream()
    arrow_table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(
        arrow_table, sink, compression="zstd", write_page_checksum=True, use_dictionary=["pair_hash", "split"]
    )
    return sink.getvalue().to_pybytes()


def write_shard(path: Path, table: ShardTable, answer_words: Sequence[str], *, device: str) -> ShardRecord:
    """Write a shard and, after it, its record; both by temporary file, fsync and rename.

    Raises OSError (a full disk, say) with nothing half-written left behind.
    """
    data = encode_shard(table, answer_words)
    record = ShardRecord(
        bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=len(table.pair_ids), device=device
    )
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
        write_json(record_path(path), record.model_dump())
    except OSError as error:
        error.filename = str(path)  # a failed write names no file by itself
        raise
    return record


def record_path(shard: Path) -> Path:
    """Where the record of a finished shard stands."""
    return shard.parent / WORK_DIRECTORY / f"{shard.stem}.json"


def read_record(shard: Path) -> ShardRecord | None:
    """The record of a shard, or None where there is none that can be read."""
    path = record_path(shard)
    if not path.is_file():
        return None
    try:
        return ShardRecord.model_validate_json(path.read_bytes())
    except ValidationError:
        return None


def is_as_recorded(shard: Path, record: ShardRecord) -> bool:
    """Whether the shard's bytes are those that its worker wrote (reads the file)."""
    if not shard.is_file() or shard.stat().st_size != record.bytes:
        return False
    return sha256_of_file(shard) == record.sha256


def read_shard(path: Path, answer_words: Sequence[str]) -> ShardTable:
    """The rows of a shard, page checksums verified.

    Raises ArtifactError where the file is damaged or its schema or answer words are not the expected ones.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            _check_schema(path, schema, shard_schema(answer_words))
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{path}: not a readable shard ({reason}); remove it and run the export again"
        ) from None
    if any(column.null_count for column in table.columns):
        raise ArtifactError(f"{path}: holds nulls; remove it and run the export again")
    logits = table.column("logits").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return ShardTable(
        pair_ids=table.column("pair_id").to_pylist(),
        pair_hashes=table.column("pair_hash").to_pylist(),
        splits=table.column("split").to_pylist(),
        logits=logits.reshape(table.num_rows, len(answer_words)),
        log_rest_mass=table.column("log_rest_mass").to_numpy(),
    )


def _check_schema(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    metadata = found.metadata or {}
    words = metadata.get(b"kdecs.answer_words", b"none").decode(errors="replace")
    expected_words = expected.metadata[b"kdecs.answer_words"].decode()
    if words != expected_words:
        raise ArtifactError(f"{path}: answer words {words}, expected {expected_words}")
    if metadata.get(b"kdecs.format") != SHARD_FORMAT.encode() or not found.equals(expected):
        columns = ", ".join(f"{field.name} {field.type}" for field in found)
        raise ArtifactError(f"{path}: not a shard of format {SHARD_FORMAT}: its columns are {columns}")
