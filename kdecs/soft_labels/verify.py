"""Whether the shards of a directory hold what their format says: the part of `kdecs verify` behind the sha256."""

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kdecs.artifact import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    has_valid_checksum,
    is_complete,
    read_manifest,
    verify_artifact,
)
from kdecs.errors import ArtifactError, KdecsError, LabelError
from kdecs.soft_labels.format import SPLITS, ShardTable
from kdecs.soft_labels.labels import (
    Buckets,
    answer_words_of,
    iter_shard,
    num_rows,
    refuse_twins,
    shard_entries,
    top_k_of,
)

__all__ = ["content_faults", "num_rows"]
_MAX_THREADS = 16


def content_faults(
    directory: Path, manifest: Manifest, *, on_rows: Callable[[int], object] = lambda _: None
) -> list[str]:
    """The first fault of each shard, one line each: page checksums, columns, answer words, rows, splits, values.

    Before these the manifest is checked against its own checksum; after them, where there is no fault, the rows of each
    split against the manifest's `num_pairs`, and every pair against all others of its split: none may stand twice.
    Shards are decoded side by side; `on_rows` is told of rows one call at a time. Memory does not grow with the rows:
    16 bytes a pair are kept in a scratch file. Raises ArtifactError for a manifest without answer words.
    """
    if not has_valid_checksum(manifest):
        return [
            f"{directory / MANIFEST_NAME}: its own checksum is missing or does not match: it was changed or damaged; "
            f"run the command that writes {directory} again"
        ]
    words, top_k = answer_words_of(directory, manifest), top_k_of(directory, manifest)
    with tempfile.TemporaryDirectory(prefix="kdecs-verify-") as scratch:
        pairs = _Pairs(Buckets(Path(scratch), num_rows(manifest), columns=()), on_rows)

        def fault_of(entry: FileEntry) -> str | None:
            try:
                for table in iter_shard(directory / entry.path, words, rows=entry.rows, top_k=top_k):
                    pairs.add(table)
            except KdecsError as error:
                return str(error)
            return None

        entries = shard_entries(manifest)
        num_threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(entries)))
        with ThreadPoolExecutor(num_threads) as pool:
            faults = [fault for fault in pool.map(fault_of, entries) if fault]
        return faults or pairs.faults(directory, manifest)


class _Pairs:
    """The pairs of all shards: their number by split, and their keys in scratch files."""

    def __init__(self, buckets: Buckets, on_rows: Callable[[int], object]) -> None:
        self._buckets, self._on_rows = buckets, on_rows
        self._by_split: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, table: ShardTable) -> None:
        """Take note of a batch of rows; threads may call it at once."""
        with self._lock:
            self._by_split.update(table.splits)
            self._buckets.deal(table)
            self._on_rows(len(table))

    def faults(self, directory: Path, manifest: Manifest) -> list[str]:
        """One line for each split with another number of rows than the manifest says, or one for a twin."""
        expected = _num_pairs_of(directory, manifest)
        wrong = [
            f"{directory}: {self._by_split[split]} pairs of the split {split}, the manifest says "
            f"{expected.get(split, 0)}; run the command that writes it again"
            for split in SPLITS
            if self._by_split[split] != expected.get(split, 0)
        ]
        if wrong:
            return wrong
        for _, rows_n in self._buckets.in_order():
            twins = np.flatnonzero(rows_n["key"][1:] == rows_n["key"][:-1])
            if len(twins):
                try:
                    refuse_twins(directory, manifest, bytes(rows_n["key"][twins[0]]))
                except LabelError as error:
                    return [str(error)]
        return []


def _num_pairs_of(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Pairs by split as the manifest states them. Raises ArtifactError where it states none."""
    found = manifest.details.get("num_pairs")
    if not isinstance(found, dict) or not all(isinstance(count, int) for count in found.values()):
        raise ArtifactError(f"{directory / MANIFEST_NAME}: details.num_pairs: expected numbers by split")
    return found


def whole_labels(directory: Path, work_hash: str, *, show_progress: bool = False) -> Manifest | None:
    """The manifest of the finished labels of this very work, every byte read and as it was written; else None.

    None also where the manifest cannot be read: whoever writes the directory says what stands in its way.
    """
    try:
        if not is_complete(directory, "soft-labels", work_hash):
            return None
        manifest = read_manifest(directory, "soft-labels")
        total = sum(entry.bytes for entry in manifest.files)
        disabled = None if show_progress else True
        with tqdm(
            total=total, desc="check labels", unit="B", unit_scale=True, disable=disabled, delay=1
        ) as bar:
            is_whole = has_valid_checksum(manifest) and not verify_artifact(directory, on_bytes=bar.update)
    except ArtifactError:
        return None
    return manifest if is_whole else None
