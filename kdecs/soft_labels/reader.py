"""Soft labels for training: joined by pair id and hash, memory-mapped, one copy of the pages for all trials.

From the shards of a directory one Arrow IPC file (uncompressed) is built in a cache directory of the node:

    soft-labels-<16 hex of the manifest's sha256>.arrow   columns key (16 bytes), logits, log_rest_mass; one
                                                          record batch, by split, then key
    soft-labels-<…>.json                                  size, mtime and sha256 of the .arrow file, and the
                                                          first row of each split; written after it

key = blake2b(pair id, pair hash), 16 bytes. Building verifies each shard's sha256 and happens once, under a
lock; after that a reader looks at size and mtime only (`verify_cache=True` hashes the file).
Shapes: n pairs asked for, N rows of the directory, A answer words.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from kdecs.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_path,
    check_sizes,
    file_lock,
    read_manifest,
    sha256_of_file,
    write_json,
)
from kdecs.corpus.pairs import Pair
from kdecs.errors import ArtifactError, LabelError
from kdecs.soft_labels.format import SPLITS, ShardTable, read_shard

_KEY_BYTES = 16
_KEY_DTYPE = np.dtype(f"S{_KEY_BYTES}")
CACHE_FORMAT = 1


class _CacheRecord(BaseModel):
    """What is known of a finished .arrow file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    bytes: int
    mtime_ns: int
    sha256: str
    split_starts: tuple[int, ...]


class SoftLabels:
    """The soft labels of one directory; rows are looked up by pair id and hash, never by position."""

    def __init__(self, directory: Path, manifest: Manifest, table: pa.Table, starts: tuple[int, ...]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.answer_words: tuple[str, ...] = answer_words_of(directory, manifest)
        self._keys_N = np.frombuffer(_flat(table, "key").buffers()[1], dtype=_KEY_DTYPE)[: table.num_rows]
        flat = _flat(table, "logits").flatten().to_numpy(zero_copy_only=True)
        self._logits_NA = flat.reshape(table.num_rows, len(self.answer_words))
        self._log_rest_mass_N = _flat(table, "log_rest_mass").to_numpy(zero_copy_only=True)
        self._bounds = (*starts, table.num_rows)
        self._table = table  # keeps the mapping alive

    @classmethod
    def open(cls, directory: Path, cache_dir: Path, *, verify_cache: bool = False) -> "SoftLabels":
        """Map the labels of a complete soft-label directory, building the node's file if need be.

        Raises ArtifactError for a directory of another kind, unfinished or damaged, LabelError for labels
        that are not finite or stand twice.
        """
        manifest = read_manifest(directory, "soft-labels")
        check_sizes(directory, manifest)
        name = f"soft-labels-{sha256_of_file(directory / MANIFEST_NAME)[:16]}"
        path = cache_dir / f"{name}.arrow"
        with file_lock(cache_dir / f"{name}.lock"):
            record = _usable(path, verify=verify_cache) or _build(path, directory, manifest)
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
        needles_n = np.array([pair_key(*item) for item in zip(ids, hashes, strict=True)], dtype=_KEY_DTYPE)
        rows_n = np.full(len(ids), -1, dtype=np.int64)
        for index, name in enumerate(SPLITS):
            if split in (None, name):
                self._look_up(needles_n, rows_n, self._bounds[index], self._bounds[index + 1])
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

    def logits(self, rows_n: np.ndarray) -> np.ndarray:
        """A writable copy of the raw logits of rows, (n, A) float32, temperature 1."""
        return self._logits_NA[rows_n]

    def log_rest_mass(self, rows_n: np.ndarray) -> np.ndarray:
        """A copy of the log probability mass of the rest of the vocabulary, (n,) float32."""
        return self._log_rest_mass_N[rows_n]

    def _look_up(self, needles_n: np.ndarray, rows_n: np.ndarray, start: int, end: int) -> None:
        """Fill the rows, still -1, of the keys that stand in [start, end)."""
        if start == end:
            return
        keys = self._keys_N[start:end]
        wanted = np.flatnonzero(rows_n < 0)
        places = np.minimum(np.searchsorted(keys, needles_n[wanted]), len(keys) - 1)
        found = keys[places] == needles_n[wanted]
        rows_n[wanted[found]] = start + places[found]


def pair_key(pair_id: str, pair_hash: str) -> bytes:
    """The 16-byte key of a pair id and hash."""
    return hashlib.blake2b(f"{pair_id}\0{pair_hash}".encode(), digest_size=_KEY_BYTES).digest()


def answer_words_of(directory: Path, manifest: Manifest) -> tuple[str, ...]:
    """The answer words that a manifest states. Raises ArtifactError where it states none."""
    words = manifest.details.get("answer_words")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ArtifactError(f"{directory / MANIFEST_NAME}: details.answer_words: expected a list of words")
    return tuple(words)


def read_tables(directory: Path, manifest: Manifest) -> list[ShardTable]:
    """Every shard of a directory, its sha256 verified first. Raises ArtifactError for a damaged one."""
    words = answer_words_of(directory, manifest)
    tables = []
    for entry in manifest.files:
        path = directory / entry.path
        if sha256_of_file(path) != entry.sha256:
            raise ArtifactError(
                f"{path}: damaged, its sha256 is not the manifest's; remove it and run the export again"
            )
        table = read_shard(path, words)
        if entry.rows != len(table.pair_ids):
            raise ArtifactError(f"{path}: {len(table.pair_ids)} rows, the manifest says {entry.rows}")
        tables.append(table)
    return tables


def _ids_and_hashes(
    pairs: Sequence[Pair] | tuple[Sequence[str], Sequence[str]],
) -> tuple[Sequence[str], Sequence[str]]:
    if isinstance(pairs, tuple) and len(pairs) == 2 and not isinstance(pairs[0], Pair):
        return pairs
    return [pair.id for pair in pairs], [pair.hash for pair in pairs]


def _flat(table: pa.Table, name: str) -> Any:
    """A column as one array, without a copy (the file holds one record batch, or none)."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _usable(path: Path, *, verify: bool) -> _CacheRecord | None:
    """The record of a finished .arrow file that is as it was left, else None: build it again."""
    try:
        record = _CacheRecord.model_validate_json(path.with_suffix(".json").read_bytes())
        stat = path.stat()
    except (FileNotFoundError, ValidationError):
        return None
    same = (record.format, record.bytes, record.mtime_ns) == (CACHE_FORMAT, stat.st_size, stat.st_mtime_ns)
    if not same or (verify and sha256_of_file(path) != record.sha256):
        return None
    return record


def _build(path: Path, directory: Path, manifest: Manifest) -> _CacheRecord:
    """Join the shards into the .arrow file, then note what it is; both replaced atomically."""
    tables = read_tables(directory, manifest)
    num_words = len(answer_words_of(directory, manifest))
    keys_N = np.array(
        [pair_key(*item) for t in tables for item in zip(t.pair_ids, t.pair_hashes, strict=True)],
        dtype=_KEY_DTYPE,
    )
    splits_N = np.array([_split_rank(directory, name) for t in tables for name in t.splits], dtype=np.int8)
    logits_NA = np.concatenate([np.empty((0, num_words), np.float32), *(t.logits for t in tables)])
    log_rest_mass_N = np.concatenate([np.empty(0, np.float32), *(t.log_rest_mass for t in tables)])
    order = np.lexsort((keys_N, splits_N))
    keys_N, splits_N = keys_N[order], splits_N[order]
    _check_unique(directory, tables, keys_N, splits_N, order)
    if not (np.isfinite(logits_NA).all() and np.isfinite(log_rest_mass_N).all()):
        raise LabelError(f"{directory}: holds labels that are not finite; run the export again in float32")
    path.with_suffix(".json").unlink(missing_ok=True)
    key_array = pa.Array.from_buffers(
        pa.binary(_KEY_BYTES), len(keys_N), [None, pa.py_buffer(np.ascontiguousarray(keys_N))]
    )
    logits_array = pa.FixedSizeListArray.from_arrays(pa.array(logits_NA[order].reshape(-1)), num_words)
    batch = pa.record_batch(
        [key_array, logits_array, pa.array(log_rest_mass_N[order])], names=["key", "logits", "log_rest_mass"]
    )
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    stat = path.stat()
    starts = tuple(int(np.searchsorted(splits_N, rank)) for rank in range(len(SPLITS)))
    record = _CacheRecord(
        format=CACHE_FORMAT,
        bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        sha256=sha256_of_file(path),
        split_starts=starts,
    )
    write_json(path.with_suffix(".json"), record.model_dump(mode="json"))
    return record


def _split_rank(directory: Path, name: str) -> int:
    if name not in SPLITS:
        raise ArtifactError(f"{directory}: a row of the split {name!r}, expected one of {', '.join(SPLITS)}")
    return SPLITS.index(name)


def _check_unique(
    directory: Path,
    tables: Sequence[ShardTable],
    keys_N: np.ndarray,
    splits_N: np.ndarray,
    order: np.ndarray,
) -> None:
    twins = np.flatnonzero((keys_N[1:] == keys_N[:-1]) & (splits_N[1:] == splits_N[:-1]))
    if len(twins):
        ids = [pair_id for table in tables for pair_id in table.pair_ids]
        raise LabelError(
            f"{directory}: the pair {ids[int(order[twins[0]])]} stands twice in one split "
            f"({len(twins)} such pairs); the shards are not those of one export"
        )
