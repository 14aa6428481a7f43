"""The files of a soft-label directory.

A directory of kind `soft-labels` holds

    config.json                 the resolved ExportConfig
    shard-00000.parquet …       one table a shard, listed with rows and sha256 in manifest.json
    manifest.json               details: answer_words, lineage, pairs by split, agreement, dtype, devices
    .work/                      of the writers: plan, leases, and one record a finished shard
    quarantine/                 shards whose bytes were not those written, if there were any

A shard is Parquet (zstd, page checksums) with the columns, none of them null:

    pair_id         string                      dialogue/target/candidate
    pair_hash       string                      32 hex characters: texts and speakers of u_1 … u_target
    split           string                      train, valid or test
    logits          fixed_size_list<float32>[A] raw logits of the answer words, temperature 1
    log_rest_mass   float32                     log probability mass of the rest of the vocabulary

and, where the export's `top_k` is K > 0, for students of the teacher's own tokenizer,

    top_ids         fixed_size_list<int32>[K]   token ids of the K largest logits, largest first
    top_logits      fixed_size_list<float32>[K] their raw logits

Rows are ordered by split, dialogue (as in the corpus file), target, candidate, in row groups of ROWS_A_GROUP. The
schema's metadata holds `kdecs.format` (1) and `kdecs.answer_words` (JSON). The bytes depend on the labels alone: no
dates, no ranks.
Shapes: n rows, A answer words, K top logits.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdecs.artifact import atomic_path, sha256_of_file, write_json
from kdecs.errors import ArtifactError

WORK_DIRECTORY = ".work"


class Agreement(BaseModel):
    """Fold1 pairs by gold (cause or not) and by what the labels say: counts, so that shards add up."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    true_positive: int = Field(default=0, ge=0)
    false_positive: int = Field(default=0, ge=0)
    false_negative: int = Field(default=0, ge=0)
    true_negative: int = Field(default=0, ge=0)

    def __add__(self, other: "Agreement") -> "Agreement":
        names = type(self).model_fields
        return Agreement(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def num_pairs(self) -> int:
        """All pairs counted."""
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative


class ShardRecord(BaseModel):
    """The facts of one finished shard; `agreement` by split."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)
    plan: str = Field(description="sha256 of the plan's entries: a shard of another plan holds other pairs")
    device: str
    agreement: dict[str, Agreement] = Field(default_factory=dict)


def record_path(shard: Path) -> Path:
    """Where the record of a finished shard stands."""
    return shard.parent / WORK_DIRECTORY / f"{shard.stem}.json"


def write_record(shard: Path, record: ShardRecord) -> None:
    """Note a finished shard, atomically and durably."""
    write_checked(record_path(shard), record.model_dump(mode="json"))


def read_record(shard: Path) -> ShardRecord | None:
    """The record of a shard, or None where there is none that can be read and agrees with its own checksum."""
    values = read_checked(record_path(shard))
    try:
        return ShardRecord.model_validate(values)
    except ValidationError:
        return None


def write_checked(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON object by one with a checksum of itself, atomically and durably."""
    write_json(path, values | {"checksum": _checksum(values)})


def read_checked(path: Path) -> dict[str, Any] | None:
    """What `write_checked` wrote; None where the file is missing or is not that."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(values, dict):
        return None
    checksum = values.pop("checksum", None)
    return values if checksum == _checksum(values) else None


def is_as_recorded(shard: Path, record: ShardRecord) -> bool:
    """Whether the shard's bytes are those that its worker wrote (reads the file)."""
    return has_recorded_size(shard, record) and sha256_of_file(shard) == record.sha256


def has_recorded_size(shard: Path, record: ShardRecord) -> bool:
    """Whether the shard is there with as many bytes as its worker wrote (reads nothing)."""
    return shard.is_file() and shard.stat().st_size == record.bytes


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


SHARD_FORMAT = "1"
QUARANTINE_DIRECTORY = "quarantine"
SPLITS = ("train", "valid", "test")
ROWS_A_GROUP = 65_536
"""Rows held in memory by a writer, and by a reader that streams."""


@dataclass(frozen=True)
class ShardTable:
    """Rows of a shard; logits (n, A) float32, log_rest_mass (n,) float32, top_ids and top_logits (n, K) or None."""

    pair_ids: Sequence[str]
    pair_hashes: Sequence[str]
    splits: Sequence[str]
    logits: np.ndarray
    log_rest_mass: np.ndarray
    top_ids: np.ndarray | None = None
    top_logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pair_ids)


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.parquet"


def shard_schema(answer_words: Sequence[str], top_k: int = 0) -> pa.Schema:
    """The Arrow schema of every shard with these answer words and so many top logits."""
    fields = [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("pair_hash", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        _list_field("logits", pa.float32(), len(answer_words)),
        pa.field("log_rest_mass", pa.float32(), nullable=False),
    ]
    if top_k:
        fields += [_list_field("top_ids", pa.int32(), top_k), _list_field("top_logits", pa.float32(), top_k)]
    metadata = {"kdecs.format": SHARD_FORMAT, "kdecs.answer_words": json.dumps(list(answer_words))}
    return pa.schema(fields, metadata=metadata)


class ShardWriter:
    """Writes one shard to an open file, a row group at a time; `sha256` and `bytes` are of what was written."""

    def __init__(self, file: BinaryIO, answer_words: Sequence[str], top_k: int = 0) -> None:
        self.rows = 0
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._file = file
        self._schema = shard_schema(answer_words, top_k)
        self._held: list[pa.Table] = []
        self._num_held = 0
        self._writer = pq.ParquetWriter(
            pa.PythonFile(_Tee(self), mode="w"),
            self._schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=["pair_hash", "split"],
        )

    @property
    def sha256(self) -> str:
        """Of all bytes written, whole once the writer is closed."""
        return self._digest.hexdigest()

    def append(self, table: ShardTable) -> None:
        """Add rows; they are written once a row group is full."""
        self._held.append(_to_arrow(table, self._schema))
        self._num_held += len(table)
        self.rows += len(table)
        while self._num_held >= ROWS_A_GROUP:
            self._flush(ROWS_A_GROUP)

    def close(self) -> None:
        """Write what is held, and the footer."""
        if self._num_held or not self.rows:
            self._flush(self._num_held)
        self._writer.close()

    def abandon(self) -> None:
        """Let go of a file that will not be finished, so that no footer is written to it later."""
        self._file = BytesIO()
        self._writer.close()

    def take(self, data: bytes) -> int:
        """Bytes on their way to the file."""
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """The position in the file."""
        return self.bytes

    def _flush(self, num_rows: int) -> None:
        held = pa.concat_tables(self._held) if self._held else self._schema.empty_table()
        # One chunk a column: how the rows came in must not show in the pages.
        self._writer.write_table(held.slice(0, num_rows).combine_chunks(), row_group_size=ROWS_A_GROUP)
        rest = held.slice(num_rows)
        self._held = [rest] if rest.num_rows else []
        self._num_held = rest.num_rows


class _Tee:
    """The file that pyarrow sees: sequential writes, counted and hashed on their way."""

    closed = False

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer

    def write(self, data: bytes) -> int:
        return self._writer.take(bytes(data))

    def tell(self) -> int:
        return self._writer.tell()

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """The file belongs to who opened it."""


@contextmanager
def shard_file(
    path: Path,
    answer_words: Sequence[str],
    top_k: int = 0,
    *,
    before_rename: Callable[[], object] = lambda: None,
) -> Iterator[ShardWriter]:
    """A writer into a temporary sibling, renamed to `path` at the end; raises OSError with nothing left behind.

    `before_rename` is called once all bytes are on disk; what it raises leaves `path` as it was.
    """
    try:
        with atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                writer = ShardWriter(file, answer_words, top_k)
                try:
                    yield writer
                    writer.close()
                except BaseException:
                    writer.abandon()
                    raise
                file.flush()
                os.fsync(file.fileno())
            before_rename()
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file by itself
        raise


def encode_shard(table: ShardTable, answer_words: Sequence[str]) -> bytes:
    """The bytes of a shard of few rows: the same bytes for the same rows and version of pyarrow."""
    sink = BytesIO()
    writer = ShardWriter(sink, answer_words, 0 if table.top_ids is None else table.top_ids.shape[1])
    writer.append(table)
    writer.close()
    return sink.getvalue()


def write_shard(
    path: Path,
    tables: ShardTable | Iterable[ShardTable],
    answer_words: Sequence[str],
    *,
    device: str,
    plan: str = "",
    top_k: int = 0,
    agreement: dict[str, Agreement] | None = None,
    before_rename: Callable[[int], object] = lambda rows: None,
) -> ShardRecord:
    """Write a shard and, after it, its record; both by temporary file, fsync and rename.

    `plan` is what the record says of the plan. `agreement` is read after the last table was taken. `before_rename` is
    told the number of rows while the shard is not yet in place, and may refuse it. Raises OSError (a full disk, say)
    with nothing half-written left behind.
    """
    with shard_file(path, answer_words, top_k, before_rename=lambda: before_rename(writer.rows)) as writer:
        for table in [tables] if isinstance(tables, ShardTable) else tables:
            writer.append(table)
    record = ShardRecord(
        bytes=writer.bytes,
        sha256=writer.sha256,
        rows=writer.rows,
        plan=plan,
        device=device,
        agreement=dict(agreement or {}),
    )
    write_record(path, record)
    return record


def iter_shard(
    path: Path, answer_words: Sequence[str], *, rows: int = ROWS_A_GROUP, top: bool = True
) -> Iterator[ShardTable]:
    """The rows of a shard, at most so many at a time, page checksums verified; `top=False` skips the top logits.

    Raises ArtifactError where the file is damaged or its schema or answer words are not the expected ones.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            top_k = schema.field("top_ids").type.list_size if "top_ids" in schema.names else 0
            _check_schema(path, schema, shard_schema(answer_words, top_k))
            columns = [name for name in schema.names if top or not name.startswith("top_")]
            for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                yield _from_arrow(path, batch, len(answer_words))
    except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{path}: not a readable shard ({reason}); remove it and run the export again"
        ) from None


def read_shard(path: Path, answer_words: Sequence[str]) -> ShardTable:
    """All rows of a shard at once; raises ArtifactError as `iter_shard`."""
    parts = list(iter_shard(path, answer_words))
    if len(parts) == 1:
        return parts[0]
    has_top = bool(parts) and parts[0].top_ids is not None
    return ShardTable(
        pair_ids=[item for part in parts for item in part.pair_ids],
        pair_hashes=[item for part in parts for item in part.pair_hashes],
        splits=[item for part in parts for item in part.splits],
        logits=np.concatenate([np.empty((0, len(answer_words)), np.float32), *(p.logits for p in parts)]),
        log_rest_mass=np.concatenate([np.empty(0, np.float32), *(p.log_rest_mass for p in parts)]),
        top_ids=np.concatenate([p.top_ids for p in parts]) if has_top else None,
        top_logits=np.concatenate([p.top_logits for p in parts]) if has_top else None,
    )


def _list_field(name: str, of: pa.DataType, size: int) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("element", of, nullable=False), size), nullable=False)


def _to_arrow(table: ShardTable, schema: pa.Schema) -> pa.Table:
    def lists(name: str, values: np.ndarray | None, dtype: type) -> pa.Array:
        flat = pa.array(np.ascontiguousarray(values, dtype=dtype).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, type=schema.field(name).type)

    columns = [
        pa.array(table.pair_ids, pa.string()),
        pa.array(table.pair_hashes, pa.string()),
        pa.array(table.splits, pa.string()),
        lists("logits", table.logits, np.float32),
        pa.array(np.asarray(table.log_rest_mass, dtype=np.float32)),
    ]
    if "top_ids" in schema.names:
        columns += [
            lists("top_ids", table.top_ids, np.int32),
            lists("top_logits", table.top_logits, np.float32),
        ]
    return pa.Table.from_arrays(columns, schema=schema)


def _from_arrow(path: Path, batch: pa.RecordBatch, num_words: int) -> ShardTable:
    if any(column.null_count for column in batch.columns):
        raise ArtifactError(f"{path}: holds nulls; remove it and run the export again")

    def matrix(name: str, width: int) -> np.ndarray:
        return batch.column(name).flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, width)

    has_top = "top_ids" in batch.schema.names
    top_k = batch.schema.field("top_ids").type.list_size if has_top else 0
    return ShardTable(
        pair_ids=batch.column("pair_id").to_pylist(),
        pair_hashes=batch.column("pair_hash").to_pylist(),
        splits=batch.column("split").to_pylist(),
        logits=matrix("logits", num_words),
        log_rest_mass=batch.column("log_rest_mass").to_numpy(zero_copy_only=False),
        top_ids=matrix("top_ids", top_k) if has_top else None,
        top_logits=matrix("top_logits", top_k) if has_top else None,
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
