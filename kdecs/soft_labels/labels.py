"""Soft labels for training: joined by pair id and hash, memory-mapped, one copy of the pages for all trials.

`kdecs.soft_labels.labels` makes the mapped file in a cache directory of the node, once, under a lock, after every
shard's sha256 was verified; after that a reader looks at its size and mtime only (`verify_cache=True` hashes it).
The index is part of the file: a lookup is a binary search over sorted 16-byte keys, so that a reader of its own
needs no memory but that of the pairs it asks for.
Shapes: n pairs asked for, N rows of the directory, A answer words.
"""

import hashlib
import itertools
import math
import mmap
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from kdecs.artifact import (
    CHECKSUM_KEY,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    atomic_path,
    check_sizes,
    file_lock,
    has_valid_checksum,
    read_manifest,
    read_verified_manifest,
    sha256_of_file,
    write_json,
)
from kdecs.corpus.pairs import Pair
from kdecs.errors import ArtifactError, LabelError
from kdecs.soft_labels import format as shard_format
from kdecs.soft_labels.format import SPLITS, ShardTable

ROWS_A_BATCH = 1 << 16
_MAX_ROWS_A_BYTE = 4  # ids alone, all different, take more than a quarter of a byte
_MAX_ROW_GROUP_BYTES = 1 << 30


def answer_words_of(directory: Path, manifest: Manifest) -> tuple[str, ...]:
    """The answer words that a manifest states. Raises ArtifactError where it states none."""
    words = manifest.details.get("answer_words")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ArtifactError(f"{directory / MANIFEST_NAME}: details.answer_words: expected a list of words")
    return tuple(words)


def top_k_of(directory: Path, manifest: Manifest) -> int:
    """How many top logits a pair has by the manifest, 0 for none. Raises ArtifactError where it is no number."""
    top_k = manifest.details.get("top_k", 0)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
        raise ArtifactError(f"{directory / MANIFEST_NAME}: details.top_k: found {top_k!r}, expected a number")
    return top_k


def shard_entries(manifest: Manifest) -> list[FileEntry]:
    """The files of a soft-label directory that hold rows."""
    return [entry for entry in manifest.files if entry.path.endswith(".parquet")]


def num_rows(manifest: Manifest) -> int:
    """Rows of a directory as its manifest states them (each shard is held to its own number when read)."""
    return sum(entry.rows or 0 for entry in shard_entries(manifest))


def iter_directory(
    directory: Path, manifest: Manifest, *, rows_a_batch: int = ROWS_A_BATCH, top: bool = False
) -> Iterator[ShardTable]:
    """Every row of a directory, shard by shard, in batches; with `top` their top logits too, where there are any.

    Raises ArtifactError for a shard that is damaged or not as the manifest says, LabelError for a label that is
    not finite, naming its pair.
    """
    words = answer_words_of(directory, manifest)
    top_k = top_k_of(directory, manifest) if top else 0
    for entry in shard_entries(manifest):
        path = directory / entry.path
        yield from iter_shard(path, words, rows=entry.rows, rows_a_batch=rows_a_batch, top_k=top_k)


def iter_shard(
    path: Path,
    answer_words: Sequence[str],
    *,
    rows: int | None,
    rows_a_batch: int = ROWS_A_BATCH,
    top_k: int = 0,
) -> Iterator[ShardTable]:
    """The rows of one shard in batches; `rows` is their number by the manifest, `top_k` the top logits expected.

    Raises ArtifactError and LabelError as `iter_directory`.
    """
    _check_numbers(path, rows)
    found = 0
    for table in shard_format.iter_shard(path, answer_words, rows=rows_a_batch, top=top_k > 0):
        found += len(table)
        if (found_k := 0 if table.top_ids is None else table.top_ids.shape[1]) != top_k:
            raise ArtifactError(f"{path}: {found_k} top logits a pair, the manifest says {top_k}")
        _check_values(path, table)
        yield table
    if found != rows:
        raise ArtifactError(f"{path}: {found} rows, its footer and the manifest say {rows}")


def _check_numbers(path: Path, rows: int | None) -> None:
    """Refuse made-up sizes before anything is decoded: nobody's memory or disk is filled by a few bytes."""
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path}: not a readable shard ({reason}); run the export again") from None
    size = path.stat().st_size
    if footer.num_rows != rows:
        raise ArtifactError(f"{path}: {footer.num_rows} rows, the manifest says {rows}")
    if footer.num_rows > _MAX_ROWS_A_BYTE * size:
        raise ArtifactError(f"{path}: {footer.num_rows} rows, more than its {size} bytes can hold")
    for index in range(footer.num_row_groups):
        if (decoded := footer.row_group(index).total_byte_size) > _MAX_ROW_GROUP_BYTES:
            raise ArtifactError(
                f"{path}: row group {index} of {decoded} bytes, more than {_MAX_ROW_GROUP_BYTES}"
            )


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
    manifest = read_verified_manifest(directory, "soft-labels")
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


class SoftLabels:
    """The soft labels of one directory; rows are looked up by pair id and hash, never by position."""

    def __init__(self, directory: Path, manifest: Manifest, table: pa.Table, starts: tuple[int, ...]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.answer_words: tuple[str, ...] = answer_words_of(directory, manifest)
        self._keys_N = _mapped(table, "key", KEY_DTYPE)
        self._logits_NA = _mapped(table, "logits", np.dtype("<f4"), len(self.answer_words))
        self._log_rest_mass_N = _mapped(table, "log_rest_mass", np.dtype("<f4"))
        self.top_k = top_k_of(directory, manifest)
        top = (("top_ids", "<i4"), ("top_logits", "<f4")) if self.top_k else ()
        self._top = tuple(_mapped(table, name, np.dtype(dtype), self.top_k) for name, dtype in top)
        self._bounds = (*starts, table.num_rows)
        self._table = table  # keeps the mapping alive

    @classmethod
    def open(cls, directory: Path, cache_dir: Path, *, verify_cache: bool = False) -> "SoftLabels":
        """Map the labels of a complete soft-label directory, building the node's file if need be.

        Raises ArtifactError for a directory of another kind, unfinished or damaged, LabelError for labels
        that are not finite or stand twice.
        """
        manifest = read_manifest(directory, "soft-labels")
        if CHECKSUM_KEY in manifest.details and not has_valid_checksum(manifest):
            raise ArtifactError(
                f"{directory / MANIFEST_NAME}: its own checksum does not match: it was changed or damaged; "
                f"run the command that writes {directory} again"
            )
        check_sizes(directory, manifest)
        answer_words_of(directory, manifest)
        name = f"soft-labels-{sha256_of_file(directory / MANIFEST_NAME)[:16]}"
        path = cache_dir / f"{name}.arrow"
        with file_lock(cache_dir / f"{name}.lock"):
            record = usable_record(path, verify=verify_cache) or build_joined(path, directory)
            # Mapped under the lock: a later rebuild renames a new file over it and leaves this mapping alone.
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return cls(directory, manifest, table, record.split_starts)

    def __len__(self) -> int:
        return len(self._keys_N)

    def require_answer_words(self, expected: Sequence[str]) -> None:
        """Raise LabelError where the labels are over other answer words, or in another order."""
        if tuple(expected) != self.answer_words:
            raise LabelError(
                f"{self.directory}: labels over the answer words {', '.join(self.answer_words)}, "
                f"expected {', '.join(expected)}; export them again with the words of this student"
            )

    def rows_of(
        self, pairs: Sequence[Pair] | tuple[Sequence[str], Sequence[str]], *, split: str | None = None
    ) -> np.ndarray:
        """The row of each pair, (n,) int64; pairs, or their (ids, hashes).

        `split` looks in one split only; without, the first of train, valid, test that has the pair.
        Raises LabelError naming the first missing pair and how many are missing.
        """
        ids, hashes = _ids_and_hashes(pairs)
        rows_n = self.find(ids, hashes, split=split)
        missing = np.flatnonzero(rows_n < 0)
        if len(missing):
            first = int(missing[0])
            where = f" in the split {split}" if split else ""
            raise LabelError(
                f"{self.directory}: no soft label for the pair {ids[first]} (hash {hashes[first][:12]}…)"
                f"{where}, {len(missing)} of {len(ids)} pairs are missing; "
                "export labels of this very corpus: ids and texts must agree"
            )
        return rows_n

    def find(self, ids: Sequence[str], hashes: Sequence[str], *, split: str | None = None) -> np.ndarray:
        """As `rows_of`, with -1 for a pair that has no label, (n,) int64."""
        needles_n = pair_keys(ids, hashes)
        rows_n = np.full(len(ids), -1, dtype=np.int64)
        for index, name in enumerate(SPLITS):
            if split in (None, name):
                self._look_up(needles_n, rows_n, self._bounds[index], self._bounds[index + 1])
        return rows_n

    def logits(self, rows_n: np.ndarray) -> np.ndarray:
        """A writable copy of the raw logits of rows, (n, A) float32, temperature 1."""
        return self._logits_NA[rows_n]

    def log_rest_mass(self, rows_n: np.ndarray) -> np.ndarray:
        """A copy of the log probability mass of the rest of the vocabulary, (n,) float32."""
        return self._log_rest_mass_N[rows_n]

    def top(self, rows_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of token ids (n, K) int32 and raw logits (n, K) float32 of the K largest logits, largest first.

        They are the teacher's own tokens. Raises LabelError where the export kept none.
        """
        if not self._top:
            raise LabelError(f"{self.directory}: holds no top logits; export with top_k above 0")
        ids_NK, logits_NK = self._top
        return ids_NK[rows_n], logits_NK[rows_n]

    def _look_up(self, needles_n: np.ndarray, rows_n: np.ndarray, start: int, end: int) -> None:
        """Fill the rows, still -1, of the keys that stand in [start, end)."""
        if start == end:
            return
        keys = self._keys_N[start:end]
        wanted = np.flatnonzero(rows_n < 0)
        places = np.minimum(np.searchsorted(keys, needles_n[wanted]), len(keys) - 1)
        found = keys[places] == needles_n[wanted]
        rows_n[wanted[found]] = start + places[found]


def _ids_and_hashes(
    pairs: Sequence[Pair] | tuple[Sequence[str], Sequence[str]],
) -> tuple[Sequence[str], Sequence[str]]:
    if isinstance(pairs, tuple) and len(pairs) == 2 and not isinstance(pairs[0], Pair):
        return pairs
    return [pair.id for pair in pairs], [pair.hash for pair in pairs]


def _mapped(table: pa.Table, name: str, dtype: np.dtype, width: int = 0) -> np.ndarray:
    """A column as an array over the mapped pages, (N,) or (N, width); the file holds one record batch.

    Not by Arrow's `to_numpy`, which imports pandas: 29 MB in every reader.
    """
    shape = (table.num_rows, width) if width else (table.num_rows,)
    if not table.num_rows:
        return np.empty(shape, dtype)
    column = table.column(name).chunk(0)
    values = np.frombuffer((column.flatten() if width else column).buffers()[1], dtype=dtype)
    return values[: math.prod(shape)].reshape(shape)
