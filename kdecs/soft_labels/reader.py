"""Soft labels for training: joined by pair id and hash, memory-mapped, one copy of the pages for all trials.

`kdecs.soft_labels.join` makes the mapped file in a cache directory of the node, once, under a lock, after every
shard's sha256 was verified; after that a reader looks at its size and mtime only (`verify_cache=True` hashes it).
The index is part of the file: a lookup is a binary search over sorted 16-byte keys, so that a reader of its own
needs no memory but that of the pairs it asks for.
Shapes: n pairs asked for, N rows of the directory, A answer words.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdecs.artifact import MANIFEST_NAME, Manifest, check_sizes, file_lock, read_manifest, sha256_of_file
from kdecs.corpus.pairs import Pair
from kdecs.errors import ArtifactError, LabelError
from kdecs.soft_labels.format import SPLITS
from kdecs.soft_labels.join import KEY_DTYPE, build_joined, pair_keys, usable_record
from kdecs.soft_labels.seal import SEAL_KEY, is_sealed
from kdecs.soft_labels.shard_rows import answer_words_of, top_k_of


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
        if SEAL_KEY in manifest.details and not is_sealed(manifest):
            raise ArtifactError(
                f"{directory / MANIFEST_NAME}: not as its writer sealed it (changed or damaged); "
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
