"""The files of a soft-label directory: how shards are written and read, and the record that stands for a shard.

A directory of kind `soft-labels` holds

    config.json                 the resolved ExportConfig
    shard-00000.parquet …       the shards, listed with rows and sha256 in manifest.json
    manifest.json               details: answer_words, lineage, pairs by split, agreement, dtype, devices
    .work/                      working files: the job, the plan, claims of shards, records of published shards
    quarantine/                 files that stood in the place of a shard and were not what a worker had published

A shard is a Parquet file (zstd, page checksums) with these columns, all without nulls:

    pair_id         string                      dialogue/target/candidate
    pair_hash       string                      32 hex characters: texts and speakers of u_1 … u_target
    split           string                      train, valid or test
    logits          fixed_size_list<float32>[A] raw logits of the answer words, temperature 1
    log_rest_mass   float32                     log probability mass of the rest of the vocabulary

An export with `top_k` K > 0 adds two columns for students that use the teacher's own tokenizer:

    top_ids         fixed_size_list<int32>[K]   token ids of the K largest logits, largest first
    top_logits      fixed_size_list<float32>[K] their raw logits

Rows are ordered by split, dialogue (as in the corpus file), target and candidate, in row groups of ROWS_PER_GROUP. The
schema's metadata holds `kdecs.format` (1) and `kdecs.answer_words` (JSON). The bytes depend on the labels alone: they
contain no date, rank or host.

Shapes: n rows, A answer words, K top logits.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdecs.artifact import MANIFEST_NAME, FileEntry, Manifest, sha256_of_file, write_json
from kdecs.corpus.checking import MAX_UTTERANCES, shorten
from kdecs.errors import ArtifactError, LabelError
from kdecs.evaluation.counts import PairCounts
from kdecs.soft_labels.config import MAX_TOP_K

SPLITS = ("train", "valid", "test")
SHARD_FORMAT = "1"
WORK_DIRECTORY = ".work"
QUARANTINE_DIRECTORY = "quarantine"
UNKNOWN_REST_MASS = -100.0
"""`log_rest_mass` of a label whose maker did not tell it: finite, and less than any model's."""
NO_REST_MASS = -30.0
"""`log_rest_mass` of next to nothing, in float32's precision: the format wants a finite number."""
ROWS_PER_GROUP = 65_536
"""Rows that a writer holds in memory, and that a reader decodes at once."""

# A reader refuses sizes that no export writes before it decodes anything, so that a forged file of a few bytes cannot
# fill its memory: distinct pair ids alone take more than a quarter of a byte each.
MAX_ROWS_PER_BYTE = 4
_MAX_ROW_GROUP_BYTES = 1 << 30


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
    """The Arrow schema of a shard with these answer words and this number of top logits."""
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
    """Writes one shard to an open file, a row group at a time; `sha256` and `bytes` count what was written."""

    def __init__(self, file: BinaryIO, answer_words: Sequence[str], top_k: int = 0) -> None:
        self.rows = 0
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._file = file
        self._schema = shard_schema(answer_words, top_k)
        self._held: list[pa.Table] = []
        self._num_held = 0
        self._writer = pq.ParquetWriter(
            pa.PythonFile(_CountedFile(self), mode="w"),
            self._schema,
            compression="zstd",
            # Without them pyarrow reads a flipped byte silently.
            write_page_checksum=True,
            # The pairs of a target share a hash, and a shard has three splits at most; every pair id is different.
            use_dictionary=["pair_hash", "split"],
        )

    @property
    def sha256(self) -> str:
        """Hex sha256 of all bytes written; that of the whole shard after `close`."""
        return self._digest.hexdigest()

    def append(self, table: ShardTable) -> None:
        """Add rows; they are written once a row group is full."""
        self._held.append(_to_arrow(table, self._schema))
        self._num_held += len(table)
        self.rows += len(table)
        while self._num_held >= ROWS_PER_GROUP:
            self._flush(ROWS_PER_GROUP)

    def close(self) -> None:
        """Write the rows still held, then the footer."""
        if self._num_held or not self.rows:  # a shard without rows has one empty row group
            self._flush(self._num_held)
        self._writer.close()

    def abandon(self) -> None:
        """Detach from a file that will not be finished; pyarrow would otherwise write a footer to it later."""
        self._file = BytesIO()  # takes the footer instead
        self._writer.close()

    def write_bytes(self, data: bytes) -> int:
        """Count and hash bytes, and write them to the file."""
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def _flush(self, num_rows: int) -> None:
        held = pa.concat_tables(self._held) if self._held else self._schema.empty_table()
        # One chunk per column: the pages must not show in which pieces the rows were appended.
        self._writer.write_table(held.slice(0, num_rows).combine_chunks(), row_group_size=ROWS_PER_GROUP)
        rest = held.slice(num_rows)
        self._held = [rest] if rest.num_rows else []
        self._num_held = rest.num_rows


class _CountedFile:
    """The file that pyarrow writes to; `ShardWriter.write_bytes` gets every byte. Its owner closes the real file."""

    closed = False  # pyarrow asks for it

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer

    def write(self, data: bytes) -> int:
        return self._writer.write_bytes(bytes(data))

    def tell(self) -> int:
        return self._writer.bytes

    def flush(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def shard_writer(path: Path, answer_words: Sequence[str], top_k: int = 0) -> Iterator[ShardWriter]:
    """A writer into a file, usually a temporary one; all bytes are on disk when the block ends.

    Raises OSError, with the file's name, where the disk is full; the caller removes the file.
    """
    try:
        with path.open("wb") as file:
            writer = ShardWriter(file, answer_words, top_k)
            try:
                yield writer
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file by itself
        raise


def encode_shard(table: ShardTable, answer_words: Sequence[str]) -> bytes:
    """The bytes of a small shard: the same rows and version of pyarrow give the same bytes."""
    sink = BytesIO()
    writer = ShardWriter(sink, answer_words, 0 if table.top_ids is None else table.top_ids.shape[1])
    writer.append(table)
    writer.close()
    return sink.getvalue()


def answer_words_of(directory: Path, manifest: Manifest) -> tuple[str, ...]:
    """The answer words that a manifest states. Raises ArtifactError where it states none."""
    words = manifest.details.get("answer_words")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ArtifactError(f"{directory / MANIFEST_NAME}: details.answer_words: expected a list of words")
    return tuple(words)


def reach_details(candidates_after: int) -> dict[str, int]:
    """What a manifest's details say of later candidates: nothing where there are none, as before there could be any."""
    return {"candidates_after": candidates_after} if candidates_after else {}


def candidates_after_of(directory: Path, manifest: Manifest) -> int:
    """How many turns past their target the labelled candidates reach. Raises ArtifactError for malformed details."""
    found = manifest.details.get("candidates_after", 0)
    if type(found) is not int or not 0 <= found <= MAX_UTTERANCES:
        raise ArtifactError(
            f"{directory / MANIFEST_NAME}: details.candidates_after: found {shorten(found)}, expected a number of turns"
        )
    return found


def top_k_of(directory: Path, manifest: Manifest) -> int:
    """The number of top logits per pair that a manifest states, 0 for none. Raises ArtifactError for no number."""
    top_k = manifest.details.get("top_k", 0)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= MAX_TOP_K:
        found = shorten(top_k)
        raise ArtifactError(
            f"{directory / MANIFEST_NAME}: details.top_k: found {found}, expected a number up to {MAX_TOP_K}"
        )
    return top_k


def shard_entries(manifest: Manifest) -> list[FileEntry]:
    """The files of a soft-label directory that hold rows."""
    return [entry for entry in manifest.files if entry.path.endswith(".parquet")]


def num_rows(manifest: Manifest) -> int:
    """Rows of a directory by its manifest; `iter_shard` holds each shard to its own number."""
    return sum(entry.rows or 0 for entry in shard_entries(manifest))


def iter_directory(
    directory: Path, manifest: Manifest, *, top: bool = False, batch_rows: int = ROWS_PER_GROUP
) -> Iterator[ShardTable]:
    """Every row of a directory, shard by shard, in batches; `top` adds the top logits where the export kept any.

    Raises ArtifactError for a shard that is damaged or is not as the manifest says, and LabelError for a label that
    is not finite, naming its pair.
    """
    words = answer_words_of(directory, manifest)
    top_k = top_k_of(directory, manifest) if top else 0
    for entry in shard_entries(manifest):
        yield from iter_shard(
            directory / entry.path, words, rows=entry.rows, top_k=top_k, batch_rows=batch_rows
        )


def iter_shard(
    path: Path,
    answer_words: Sequence[str],
    *,
    rows: int | None,
    top_k: int = 0,
    batch_rows: int = ROWS_PER_GROUP,
) -> Iterator[ShardTable]:
    """The checked rows of one shard in batches, page checksums included.

    `rows` is the number that the manifest states and `top_k` the number of top logits to read (0 skips them).
    Raises ArtifactError and LabelError as `iter_directory` does.
    """
    check_footer(path, rows)
    found = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            found_k = schema.field("top_ids").type.list_size if "top_ids" in schema.names else 0
            _check_schema(path, schema, shard_schema(answer_words, found_k))
            if top_k not in (0, found_k):
                raise ArtifactError(f"{path}: {found_k} top logits per pair, the manifest says {top_k}")
            # The top logits are most of a shard's bytes, so they are decoded only on request.
            columns = [name for name in schema.names if top_k or not name.startswith("top_")]
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns, use_threads=False):
                table = _from_arrow(path, batch, len(answer_words), top_k)
                _check_values(path, table)
                found += len(table)
                yield table
    # AttributeError, since in a file from elsewhere `top_ids` may be of any type, and only some have a `list_size`.
    except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from None
    if found != rows:
        raise ArtifactError(f"{path}: {found} rows, its footer and the manifest say {rows}")


def check_footer(path: Path, rows: int | None) -> None:
    """Hold the sizes that a shard's footer states to the manifest's rows and to what an export can have written.

    Decodes no row. Raises ArtifactError.
    """
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    size = path.stat().st_size
    if footer.num_rows != rows:
        raise ArtifactError(f"{path}: {footer.num_rows} rows, the manifest says {rows}")
    if footer.num_rows > MAX_ROWS_PER_BYTE * size:
        raise ArtifactError(f"{path}: {footer.num_rows} rows, more than its {size} bytes can hold")
    for index in range(footer.num_row_groups):
        if (decoded := footer.row_group(index).total_byte_size) > _MAX_ROW_GROUP_BYTES:
            raise ArtifactError(
                f"{path}: row group {index} of {decoded} bytes, more than {_MAX_ROW_GROUP_BYTES}"
            )


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    reason = " ".join(str(error).split())
    return ArtifactError(f"{path}: not a readable shard ({reason}); remove it and run the export again")


def _check_schema(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    metadata = found.metadata or {}
    words = metadata.get(b"kdecs.answer_words", b"none").decode(errors="replace")
    expected_words = expected.metadata[b"kdecs.answer_words"].decode()
    if words != expected_words:
        raise ArtifactError(f"{path}: answer words {words}, expected {expected_words}")
    # `equals` ignores metadata, which other writers of Parquet extend.
    if metadata.get(b"kdecs.format") != SHARD_FORMAT.encode() or not found.equals(expected):
        columns = ", ".join(f"{field.name} {field.type}" for field in found)
        raise ArtifactError(f"{path}: not a shard of format {SHARD_FORMAT}: its columns are {columns}")


def _check_values(path: Path, table: ShardTable) -> None:
    """Refuse unknown splits and values that are not finite, naming the pair."""
    if unknown := sorted(set(table.splits) - set(SPLITS)):
        raise ArtifactError(f"{path}: a row of the split {unknown[0]!r}, expected one of {', '.join(SPLITS)}")
    finite_n = np.isfinite(table.logits).all(axis=1) & np.isfinite(table.log_rest_mass)
    if table.top_logits is not None:
        finite_n &= np.isfinite(table.top_logits).all(axis=1)
    if not finite_n.all():
        pair_id = table.pair_ids[int(np.flatnonzero(~finite_n)[0])]
        raise LabelError(
            f"{path}: the pair {pair_id} has labels that are not finite; run the export again in float32"
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


def _from_arrow(path: Path, batch: pa.RecordBatch, num_words: int, top_k: int) -> ShardTable:
    if any(column.null_count for column in batch.columns):
        raise ArtifactError(f"{path}: holds nulls; remove it and run the export again")

    def matrix(name: str, width: int) -> np.ndarray:
        return batch.column(name).flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, width)

    return ShardTable(
        pair_ids=batch.column("pair_id").to_pylist(),
        pair_hashes=batch.column("pair_hash").to_pylist(),
        splits=batch.column("split").to_pylist(),
        logits=matrix("logits", num_words),
        log_rest_mass=batch.column("log_rest_mass").to_numpy(zero_copy_only=False),
        top_ids=matrix("top_ids", top_k) if top_k else None,
        top_logits=matrix("top_logits", top_k) if top_k else None,
    )


class ShardRecord(BaseModel):
    """The facts about a shard that the worker which labelled it wrote down; `agreement` is by split."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)
    plan: str = Field(description="sha256 of the plan's entries: a shard of another plan holds other pairs")
    device: str
    agreement: dict[str, PairCounts] = Field(default_factory=dict)


def record_path(shard: Path, record: ShardRecord) -> Path:
    """The file of a record: in the shard's own folder, so that a look at 100,000 shards lists no long folder.

    It is named by the shard's sha256: workers that label one shard on unlike hardware write two records, and only one
    fits the published bytes.
    """
    return shard.parent / WORK_DIRECTORY / shard.stem / f"{record.sha256[:16]}.json"


def write_record(shard: Path, record: ShardRecord) -> None:
    """Write a shard's record, atomically and durably."""
    write_checked(record_path(shard, record), record.model_dump(mode="json"))


def records_of(shard: Path) -> list[ShardRecord]:
    """The records of a shard that can be read and agree with their own checksums."""
    found = []
    for path in sorted((shard.parent / WORK_DIRECTORY / shard.stem).glob("*.json")):
        try:
            found.append(ShardRecord.model_validate(read_checked(path)))
        except ValidationError:
            continue  # damaged: a shard that only this record describes is labelled again
    return found


def published_record(shard: Path, *, read_bytes: bool = True) -> ShardRecord | None:
    """The record that fits a published shard; None if the shard is missing, damaged or without a record.

    `read_bytes=False` compares sizes and reads the shard only where two records have its size.
    """
    if not shard.is_file():
        return None
    size = shard.stat().st_size
    # A size that no record has spares the reading: a truncated shard of gigabytes is refused at once.
    records = [record for record in records_of(shard) if record.bytes == size]
    if len(records) == 1 and not read_bytes:
        return records[0]
    sha256 = sha256_of_file(shard) if records else ""
    return next((record for record in records if record.sha256 == sha256), None)


def write_checked(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON object by one with a checksum of itself, atomically and durably."""
    write_json(path, values | {"checksum": _checksum(values)})


def read_checked(path: Path) -> dict[str, Any] | None:
    """The object that `write_checked` wrote; None if the file is missing or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(values, dict):
        return None
    checksum = values.pop("checksum", None)
    return values if checksum == _checksum(values) else None


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
