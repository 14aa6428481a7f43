"""Soft labels for training: every shard of a directory joined into one memory-mapped file, found by pair id and hash.

The first reader on a node checks every shard's sha256, sorts the rows by split and key in memory and writes one Arrow
IPC file of a single record batch into a cache directory, under a lock. Later readers compare its size and mtime with
the record beside it (`verify_cache=True` also hashes it) and map it, so that all trials share one copy of its pages:

    soft-labels-<manifest>.arrow   key (16 bytes), logits, log_rest_mass and, where exported, top_ids, top_logits
    soft-labels-<manifest>.json    JoinRecord: size, mtime and sha256 of that file, first row of each split
    soft-labels-<manifest>.lock    held while the file is checked or written

A lookup is a binary search over the sorted keys, so a reader needs memory only for the pairs that it asks for. The join
itself holds all rows: about 85 bytes per pair and 8 more per top logit, 0.8 GiB for ten million pairs.

Shapes: n pairs asked for, N rows of the directory, A answer words.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from kdecs.artifact import (
    CHECKSUM_KEY,
    MANIFEST_NAME,
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
from kdecs.errors import ArtifactError, LabelError
from kdecs.soft_labels.format import (
    SPLITS,
    answer_words_of,
    check_footer,
    iter_directory,
    num_rows,
    shard_entries,
    top_k_of,
)

CACHE_FORMAT = 3
KEY_BYTES = 16
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")


class JoinRecord(BaseModel):
    """Size, time and checksum of a joined file when its writer finished it, and the first row of each split."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    bytes: int
    mtime_ns: int
    sha256: str
    split_starts: tuple[int, ...]


class KeyIndex:
    """The rows of pairs, found by a binary search for their key in the split that `bounds` delimit."""

    def __init__(self, keys_N: np.ndarray, bounds: Sequence[int]) -> None:
        self._keys_N = keys_N
        self._bounds = bounds

    def find(self, ids: Sequence[str], hashes: Sequence[str], *, split: str | None = None) -> np.ndarray:
        """The row of each pair, -1 where there is none, (n,) int64.

        With `split` only that split is searched, without it the first of train, valid and test that has the pair.
        """
        wanted_n = pair_keys(ids, hashes)
        rows_n = np.full(len(ids), -1, dtype=np.int64)
        for index, name in enumerate(SPLITS):
            start, end = self._bounds[index : index + 2]
            if start == end or split not in (None, name):
                continue
            keys = self._keys_N[start:end]
            open_n = np.flatnonzero(rows_n < 0)
            # `searchsorted` places a key beyond all others behind the last row; clamped, it fails the comparison.
            places = np.minimum(np.searchsorted(keys, wanted_n[open_n]), len(keys) - 1)
            is_found = keys[places] == wanted_n[open_n]
            rows_n[open_n[is_found]] = start + places[is_found]
        return rows_n


class SoftLabels:
    """The soft labels of one directory; rows are looked up by pair id and hash, never by position."""

    def __init__(self, directory: Path, manifest: Manifest, table: pa.Table, starts: tuple[int, ...]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.answer_words: tuple[str, ...] = answer_words_of(directory, manifest)
        self.top_k = top_k_of(directory, manifest)
        self._logits_NA = _mapped(table, "logits", np.dtype("<f4"), len(self.answer_words))
        self._log_rest_mass_N = _mapped(table, "log_rest_mass", np.dtype("<f4"))
        top = (("top_ids", "<i4"), ("top_logits", "<f4")) if self.top_k else ()
        self._top = tuple(_mapped(table, name, np.dtype(dtype), self.top_k) for name, dtype in top)
        self.find = KeyIndex(_mapped(table, "key", KEY_DTYPE), (*starts, table.num_rows)).find
        self._table = table  # keeps the mapping alive

    @classmethod
    def open(cls, directory: Path, cache_dir: Path, *, verify_cache: bool = False) -> "SoftLabels":
        """Map the labels of a complete soft-label directory, and join them first where no reader has done so.

        Raises ArtifactError for a directory that is unfinished, damaged or of another kind, and LabelError for labels
        that are not finite or for a pair that occurs twice in one split.
        """
        manifest = read_manifest(directory, "soft-labels")
        # A directory written by other tools may lack the checksum; one that is there must agree.
        if CHECKSUM_KEY in manifest.details and not has_valid_checksum(manifest):
            raise ArtifactError(
                f"{directory / MANIFEST_NAME}: its own checksum does not match: it was changed or damaged; "
                f"run the command that writes {directory} again"
            )
        check_sizes(directory, manifest)
        answer_words_of(directory, manifest)  # refused here, before minutes of joining
        # Named by the manifest's checksum: labels that were exported again get another file, and never this one.
        name = f"soft-labels-{sha256_of_file(directory / MANIFEST_NAME)[:16]}"
        path = cache_dir / f"{name}.arrow"
        with file_lock(cache_dir / f"{name}.lock"):
            record = _usable_record(path, verify=verify_cache) or join_shards(path, directory)
            # Mapped under the lock: a later join renames a new file over this one and leaves the mapping alone.
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return cls(directory, manifest, table, record.split_starts)

    def __len__(self) -> int:
        return self._table.num_rows

    def require_answer_words(self, expected: Sequence[str]) -> None:
        """Raise LabelError where the labels are over other answer words, or in another order."""
        if tuple(expected) != self.answer_words:
            raise LabelError(
                f"{self.directory}: labels over the answer words {', '.join(self.answer_words)}, "
                f"expected {', '.join(expected)}; export them again with the words of this student"
            )

    def rows_of(self, ids: Sequence[str], hashes: Sequence[str], *, split: str | None = None) -> np.ndarray:
        """The row of each pair, as `KeyIndex.find`.

        Raises LabelError naming the first missing pair and the number of missing ones.
        """
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

    def logits(self, rows_n: np.ndarray) -> np.ndarray:
        """A writable copy of the raw logits of rows, (n, A) float32, temperature 1."""
        return self._logits_NA[rows_n]

    def log_rest_mass(self, rows_n: np.ndarray) -> np.ndarray:
        """A copy of the log probability mass of the rest of the vocabulary, (n,) float32."""
        return self._log_rest_mass_N[rows_n]

    def top(self, rows_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of token ids (n, K) int32 and raw logits (n, K) float32 of the K largest logits, largest first.

        The ids are those of the teacher's tokenizer. Raises LabelError where the export kept no top logits.
        """
        if not self._top:
            raise LabelError(f"{self.directory}: holds no top logits; export with top_k above 0")
        ids_NK, logits_NK = self._top
        return ids_NK[rows_n], logits_NK[rows_n]


def pair_keys(ids: Sequence[str], hashes: Sequence[str]) -> np.ndarray:
    """The 16-byte key of each pair, (n,) S16: blake2b of pair id and hash."""
    joined = b"".join(
        hashlib.blake2b(f"{pair_id}\0{pair_hash}".encode(), digest_size=KEY_BYTES).digest()
        for pair_id, pair_hash in zip(ids, hashes, strict=True)
    )
    # numpy's S16 drops zeros at the end when it compares, on both sides alike, so the keys still match.
    return np.frombuffer(joined, dtype=KEY_DTYPE)


def split_numbers(splits: Sequence[str]) -> np.ndarray:
    """The place of each split in SPLITS, (n,) uint8."""
    return np.array([SPLITS.index(name) for name in splits], dtype=np.uint8)


def sort_by_key(keys_N: np.ndarray, splits_N: np.ndarray) -> tuple[np.ndarray, int | None]:
    """The order of rows by split and key, (N,) int64, and a row whose pair occurs twice in its split, if one does."""
    # Numbers sort ten times as fast as bytes; big-endian halves sort as the bytes do.
    halves_N2 = keys_N.view(">u8").reshape(-1, 2).astype(np.uint64)
    # lexsort sorts by its last key first: by split, then by the two halves of the key.
    order_N = np.lexsort((halves_N2[:, 1], halves_N2[:, 0], splits_N))
    is_repeated_N = splits_N[order_N[1:]] == splits_N[order_N[:-1]]
    for half in (0, 1):
        sorted_N = halves_N2[order_N, half]
        is_repeated_N &= sorted_N[1:] == sorted_N[:-1]
    return order_N, int(order_N[1:][is_repeated_N.argmax()]) if is_repeated_N.any() else None


def bounds_of(splits_N: np.ndarray) -> tuple[int, ...]:
    """The first row of each split after sorting by split, and the number of rows."""
    return (0, *np.cumsum(np.bincount(splits_N, minlength=len(SPLITS))).tolist())


def repeated_pair(directory: Path, manifest: Manifest, row: int) -> LabelError:
    """The refusal of a directory in which the pair of a row occurs twice (a key cannot be turned back into an id)."""
    for table in iter_directory(directory, manifest):
        if row < len(table):
            return LabelError(
                f"{directory}: the pair {table.pair_ids[row]} occurs twice in one split; "
                "the shards are not those of one export"
            )
        row -= len(table)
    raise AssertionError("no such row")


def join_shards(path: Path, directory: Path) -> JoinRecord:
    """Check every shard, join them into the .arrow file and write its record; call it under the file's lock.

    Raises ArtifactError for a damaged directory, and LabelError for a pair that occurs twice in one split or a label
    that is not finite.
    """
    manifest = read_verified_manifest(directory, "soft-labels")
    # The old record goes before the file that it describes, so that no kill leaves it beside another file.
    path.with_suffix(".json").unlink(missing_ok=True)
    columns, starts = _sorted_columns(directory, manifest)
    try:
        with atomic_path(path) as temporary:
            _write_batch(temporary, columns)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file by itself
        raise
    del columns  # the checksum needs no more than a block
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


def _usable_record(path: Path, *, verify: bool) -> JoinRecord | None:
    """The record of a joined file that is as its writer left it; None if the file must be written again."""
    try:
        record = JoinRecord.model_validate_json(path.with_suffix(".json").read_bytes())
        stat = path.stat()
    except (FileNotFoundError, ValidationError):
        return None
    # Reading the whole file for its checksum would cost every trial of a sweep seconds; size and time do not.
    same = (record.format, record.bytes, record.mtime_ns) == (CACHE_FORMAT, stat.st_size, stat.st_mtime_ns)
    return record if same and not (verify and sha256_of_file(path) != record.sha256) else None


def _sorted_columns(directory: Path, manifest: Manifest) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Every column of a directory's rows, sorted by split and key, and the first row of each split."""
    num_words, top_k = len(answer_words_of(directory, manifest)), top_k_of(directory, manifest)
    for entry in shard_entries(manifest):  # before memory is taken for the rows that a manifest states
        check_footer(directory / entry.path, entry.rows)
    total = num_rows(manifest)
    # Allocated whole: the arrays of the shards would be held a second time while they are joined.
    splits_N = np.empty(total, np.uint8)
    columns = {
        "key": np.empty(total, KEY_DTYPE),
        "logits": np.empty((total, num_words), "<f4"),
        "log_rest_mass": np.empty(total, "<f4"),
    }
    if top_k:
        columns |= {"top_ids": np.empty((total, top_k), "<i4"), "top_logits": np.empty((total, top_k), "<f4")}
    row = 0
    with tqdm(total=total, desc="join labels", unit="pair", unit_scale=True, disable=None, delay=1) as bar:
        for table in iter_directory(directory, manifest, top=True):
            rows = slice(row, row + len(table))
            columns["key"][rows] = pair_keys(table.pair_ids, table.pair_hashes)
            splits_N[rows] = split_numbers(table.splits)
            for name in columns.keys() - {"key"}:
                columns[name][rows] = getattr(table, name)
            row += len(table)
            bar.update(len(table))
    order_N, repeated = sort_by_key(columns["key"], splits_N)
    if repeated is not None:
        raise repeated_pair(directory, manifest, repeated)
    for name in columns:  # one after the other, so that at most one column is held twice
        columns[name] = columns[name][order_N]
    return columns, bounds_of(splits_N)[:-1]


def _write_batch(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write columns as an Arrow IPC file of one record batch without copying them."""
    arrays = []
    for name, values in columns.items():
        buffer = pa.py_buffer(values)
        if name == "key":
            arrays.append(pa.Array.from_buffers(pa.binary(KEY_BYTES), len(values), [None, buffer]))
            continue
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, buffer])
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if values.ndim == 2 else flat)
    batch = pa.record_batch(arrays, names=list(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _mapped(table: pa.Table, name: str, dtype: np.dtype, width: int = 0) -> np.ndarray:
    """A column as an array over the mapped pages, (N,) or (N, width); the file holds one record batch.

    Arrow's own `to_numpy` imports pandas, which would cost every reader 29 MB.
    """
    shape = (table.num_rows, width) if width else (table.num_rows,)
    if not table.num_rows:  # an empty column has no buffer to view
        return np.empty(shape, dtype)
    column = table.column(name).chunk(0)
    values = np.frombuffer((column.flatten() if width else column).buffers()[1], dtype=dtype)
    return values[: math.prod(shape)].reshape(shape)
