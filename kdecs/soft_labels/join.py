"""The file of a node that students read: all shards of a directory joined, sorted by key, uncompressed, mapped.

    soft-labels-<16 hex of the manifest's sha256>.arrow   columns key (16 bytes), logits, log_rest_mass, and the
                                                          top logits where the export kept some; one record
                                                          batch, by split, then key
    soft-labels-<…>.json                                  size, mtime and sha256 of the .arrow file, and the
                                                          first row of each split; written after it

key = blake2b(pair id, pair hash), 16 bytes. The build streams: rows are dealt into bucket files by split and the
key's first bits, then each bucket is sorted and written to its place. Memory is that of one batch and one bucket,
whatever the number of rows; the disk holds the file twice for a while.
Shapes: n rows of a batch or bucket, N rows of the directory, A answer words.
"""

import hashlib
import itertools
import mmap
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from kdecs.artifact import Manifest, atomic_path, check_whole, sha256_of_file, write_json
from kdecs.errors import LabelError
from kdecs.soft_labels.format import SPLITS, ShardTable
from kdecs.soft_labels.shard_rows import answer_words_of, iter_directory, num_rows, top_k_of

KEY_BYTES = 16
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")
CACHE_FORMAT = 3
ROWS_A_BUCKET = 1 << 18
_MAX_BUCKET_BITS = 12


@dataclass(frozen=True)
class Column:
    """A column of numbers in the joined file: `width` a row, 0 for a plain one."""

    name: str
    dtype: str
    width: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * max(1, self.width)


class JoinRecord(BaseModel):
    """What is known of a finished .arrow file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    bytes: int
    mtime_ns: int
    sha256: str
    split_starts: tuple[int, ...]


def columns_of(num_words: int, top_k: int) -> tuple[Column, ...]:
    """The columns of a joined file beside the key."""
    plain = (Column("logits", "<f4", num_words), Column("log_rest_mass", "<f4"))
    top = (Column("top_ids", "<i4", top_k), Column("top_logits", "<f4", top_k))
    return plain + (top if top_k else ())


def pair_key(pair_id: str, pair_hash: str) -> bytes:
    """The 16-byte key of a pair id and hash."""
    return hashlib.blake2b(f"{pair_id}\0{pair_hash}".encode(), digest_size=KEY_BYTES).digest()


def pair_keys(ids: Sequence[str], hashes: Sequence[str]) -> np.ndarray:
    """The keys of pairs, (n,) S16."""
    joined = b"".join(pair_key(*item) for item in zip(ids, hashes, strict=True))
    return np.frombuffer(joined, dtype=KEY_DTYPE)


def usable_record(path: Path, *, verify: bool) -> JoinRecord | None:
    """The record of a finished .arrow file that is as it was left, else None: build it again."""
    try:
        record = JoinRecord.model_validate_json(path.with_suffix(".json").read_bytes())
        stat = path.stat()
    except (FileNotFoundError, ValidationError):
        return None
    same = (record.format, record.bytes, record.mtime_ns) == (CACHE_FORMAT, stat.st_size, stat.st_mtime_ns)
    if not same or (verify and sha256_of_file(path) != record.sha256):
        return None
    return record


def build_joined(path: Path, directory: Path) -> JoinRecord:
    """Verify every shard, join them into the .arrow file, then note what it is; both replaced atomically.

    Call it under the file's lock. Raises ArtifactError for a damaged directory, LabelError for a pair that stands
    twice in one split or is not finite.
    """
    manifest = check_whole(directory, "soft-labels")
    path.with_suffix(".json").unlink(missing_ok=True)
    for leftover in path.parent.glob(f".{path.stem}.*"):  # of a builder that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    try:
        starts = _build(path, directory, manifest)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file by itself
        raise
    stat = path.stat()
    record = JoinRecord(
        format=CACHE_FORMAT,
        bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        sha256=sha256_of_file(path),
        split_starts=starts,
    )
    write_json(path.with_suffix(".json"), record.model_dump(mode="json"))
    return record


def _build(path: Path, directory: Path, manifest: Manifest) -> tuple[int, ...]:
    """The joined file in its place; returns the first row of each split."""
    columns = columns_of(len(answer_words_of(directory, manifest)), top_k_of(directory, manifest))
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".buckets", dir=path.parent) as scratch:
        buckets = Buckets(Path(scratch), num_rows(manifest), columns)
        with tqdm(
            total=buckets.num_rows, desc="join labels", unit="pair", unit_scale=True, disable=None, delay=1
        ) as bar:
            for table in iter_directory(directory, manifest, top=True):
                buckets.deal(table)
                bar.update(len(table.pair_ids))
        with atomic_path(path) as temporary:
            _write_empty(temporary, buckets.num_rows, columns)
            return _fill(temporary, buckets, directory, manifest)


class Buckets:
    """Scratch files of rows, one for each split and range of keys: 16 bytes a row, and its `columns`."""

    def __init__(self, scratch: Path, rows: int, columns: Sequence[Column]) -> None:
        self.scratch, self.num_rows, self.columns = scratch, rows, columns
        self.bits = min(_MAX_BUCKET_BITS, (max(0, rows - 1) // ROWS_A_BUCKET).bit_length())
        fields = [(c.name, c.dtype, (c.width,)) if c.width else (c.name, c.dtype) for c in columns]
        self.dtype = np.dtype([("key", KEY_DTYPE), *fields])

    def deal(self, table: ShardTable) -> None:
        """Append each row of a batch to its bucket."""
        rows_n = np.empty(len(table.pair_ids), dtype=self.dtype)
        rows_n["key"] = pair_keys(table.pair_ids, table.pair_hashes)
        for column in self.columns:
            rows_n[column.name] = getattr(table, column.name)
        split_n = np.array([SPLITS.index(name) for name in table.splits], dtype=np.int64)
        bucket_n = (split_n << self.bits) + (_halves(rows_n["key"])[0] >> np.uint64(64 - self.bits)).astype(
            np.int64
        )
        order_n = np.argsort(bucket_n, kind="stable")
        rows_n, bucket_n = rows_n[order_n], bucket_n[order_n]
        bounds = np.flatnonzero(np.diff(bucket_n, prepend=-1, append=-1))
        for start, end in itertools.pairwise(bounds):
            with self._path(int(bucket_n[start])).open("ab") as file:
                file.write(rows_n[start:end].tobytes())

    def in_order(self) -> Iterator[tuple[int, np.ndarray]]:
        """(split, rows sorted by key) of each bucket that is not empty, in the order of the joined file."""
        for bucket in range(len(SPLITS) << self.bits):
            path = self._path(bucket)
            if path.is_file():
                rows_n = np.fromfile(path, dtype=self.dtype)
                path.unlink()
                high_n, low_n = _halves(rows_n["key"])
                yield bucket >> self.bits, rows_n[np.lexsort((low_n, high_n))]

    def _path(self, bucket: int) -> Path:
        return self.scratch / str(bucket)


def _halves(keys_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and last 8 bytes of keys as numbers that sort as the bytes do."""
    words_n2 = np.ascontiguousarray(keys_n).view(">u8").reshape(-1, 2).astype(np.uint64)
    return words_n2[:, 0], words_n2[:, 1]


def _write_empty(path: Path, rows: int, columns: Sequence[Column]) -> None:
    """An Arrow IPC file of zeros in its final size: the buffers' places are Arrow's own, and rows are filled in.

    The zeros are a private mapping that is only read: the kernel's one zero page, no memory.
    """
    size = max(1, rows * max(KEY_BYTES, *(column.row_bytes for column in columns)))
    # Closed when the last array over it goes: an error on the way still holds some.
    zeros = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    buffer = pa.py_buffer(zeros)
    keys = pa.Array.from_buffers(pa.binary(KEY_BYTES), rows, [None, buffer.slice(0, rows * KEY_BYTES)])
    batch = pa.record_batch(
        [keys, *(_zeros(buffer, rows, column) for column in columns)],
        names=["key", *(column.name for column in columns)],
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _zeros(buffer: pa.Buffer, rows: int, column: Column) -> pa.Array:
    values = pa.Array.from_buffers(
        pa.from_numpy_dtype(np.dtype(column.dtype)),
        rows * max(1, column.width),
        [None, buffer.slice(0, rows * column.row_bytes)],
    )
    return pa.FixedSizeListArray.from_arrays(values, column.width) if column.width else values


def _fill(path: Path, buckets: Buckets, directory: Path, manifest: Manifest) -> tuple[int, ...]:
    """Write the sorted rows to their places; returns the first row of each split."""
    key_place, *places = _places(path)
    counts = [0] * len(SPLITS)
    row = 0
    with path.open("r+b") as file:
        for split, rows_n in buckets.in_order():
            twins = np.flatnonzero(rows_n["key"][1:] == rows_n["key"][:-1])
            if len(twins):
                refuse_twins(directory, manifest, bytes(rows_n["key"][twins[0]]))
            _write_at(file, key_place + row * KEY_BYTES, rows_n["key"])
            for place, column in zip(places, buckets.columns, strict=True):
                _write_at(file, place + row * column.row_bytes, rows_n[column.name])
            row += len(rows_n)
            counts[split] += len(rows_n)
    assert row == buckets.num_rows
    return tuple(sum(counts[:split]) for split in range(len(SPLITS)))


def _places(path: Path) -> list[int]:
    """Byte offsets of the columns in an IPC file of one record batch, the key's first."""
    with pa.memory_map(str(path)) as source:
        whole = source.read_buffer()
        columns = pa.ipc.open_file(whole).get_batch(0).columns
        values = [c.flatten() if pa.types.is_fixed_size_list(c.type) else c for c in columns]
        return [column.buffers()[1].address - whole.address for column in values]


def _write_at(file: BinaryIO, place: int, values: np.ndarray) -> None:
    file.seek(place)
    file.write(np.ascontiguousarray(values).tobytes())


def refuse_twins(directory: Path, manifest: Manifest, key: bytes) -> NoReturn:
    """Find the name of a pair that stands twice (a key cannot be turned back) and raise LabelError."""
    wanted = key.ljust(KEY_BYTES, b"\0")  # numpy drops zeros at the end
    for table in iter_directory(directory, manifest):
        for pair_id, pair_hash in zip(table.pair_ids, table.pair_hashes, strict=True):
            if pair_key(pair_id, pair_hash) == wanted:
                raise LabelError(
                    f"{directory}: the pair {pair_id} stands twice in one split; "
                    "the shards are not those of one export"
                )
    raise AssertionError("a key of no row")
