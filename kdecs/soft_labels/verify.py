"""Whether a soft-label directory holds what its manifest and format say, beyond the sha256 of its files."""

import os
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
from kdecs.errors import ArtifactError, KdecsError
from kdecs.soft_labels.format import SPLITS, answer_words_of, iter_shard, shard_entries, top_k_of
from kdecs.soft_labels.labels import KEY_DTYPE, pair_keys, repeated_pair, sort_by_key, split_numbers

_MAX_THREADS = 16


def verified_labels(directory: Path, work_hash: str, *, show_progress: bool = False) -> Manifest | None:
    """The manifest of the finished labels of this very work, after every byte was read and agreed; else None.

    An unreadable manifest also gives None: the command that writes the directory reports the reason.
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
            is_verified = has_valid_checksum(manifest) and not verify_artifact(directory, on_bytes=bar.update)
    except ArtifactError:
        return None
    return manifest if is_verified else None


def content_faults(
    directory: Path, manifest: Manifest, *, on_rows: Callable[[int], object] = lambda _: None
) -> list[str]:
    """The first fault of each shard, one line each: page checksums, columns, answer words, rows, splits, values.

    The manifest's own checksum is compared first. Where no shard has a fault, the rows of each split are compared with
    the manifest's `num_pairs`, and a pair that occurs twice in one split is a fault. Shards are decoded side by side in
    threads; `on_rows` gets the number of rows of each batch, one call at a time. The keys of all pairs are held, about
    80 bytes per pair at the peak. Raises ArtifactError for a manifest without answer words.
    """
    if not has_valid_checksum(manifest):
        return [
            f"{directory / MANIFEST_NAME}: its own checksum is missing or does not match: it was changed or damaged; "
            f"run the command that writes {directory} again"
        ]
    words, top_k = answer_words_of(directory, manifest), top_k_of(directory, manifest)
    lock = threading.Lock()

    def keys_or_fault(entry: FileEntry) -> tuple[np.ndarray, np.ndarray] | str:
        keys, splits = [np.empty(0, KEY_DTYPE)], [np.empty(0, np.uint8)]
        try:
            for table in iter_shard(directory / entry.path, words, rows=entry.rows, top_k=top_k):
                keys.append(pair_keys(table.pair_ids, table.pair_hashes))
                splits.append(split_numbers(table.splits))
                with lock:  # progress bars are not thread-safe
                    on_rows(len(table))
        except KdecsError as error:
            return str(error)
        return np.concatenate(keys), np.concatenate(splits)

    entries = shard_entries(manifest)
    num_threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(entries)))
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(keys_or_fault, entries))
    # The rows of a damaged shard are missing here: the counts below would only report the same fault again.
    if faults := [item for item in found if isinstance(item, str)]:
        return faults
    shards = [item for item in found if not isinstance(item, str)]
    splits_N = np.concatenate([np.empty(0, np.uint8), *(splits for _, splits in shards)])
    if faults := _count_faults(directory, manifest, splits_N):
        return faults
    # In the manifest's order of shards, by which `repeated_pair` finds the pair of a row.
    keys_N = np.concatenate([np.empty(0, KEY_DTYPE), *(keys for keys, _ in shards)])
    del found, shards  # the sort needs as much memory again
    _, repeated = sort_by_key(keys_N, splits_N)
    return [] if repeated is None else [str(repeated_pair(directory, manifest, repeated))]


def _count_faults(directory: Path, manifest: Manifest, splits_N: np.ndarray) -> list[str]:
    """One line for each split whose number of rows is not the manifest's. Raises ArtifactError where it has none."""
    expected = manifest.details.get("num_pairs")
    if not isinstance(expected, dict) or not all(isinstance(count, int) for count in expected.values()):
        raise ArtifactError(f"{directory / MANIFEST_NAME}: details.num_pairs: expected numbers by split")
    found = Counter(dict(zip(SPLITS, np.bincount(splits_N, minlength=len(SPLITS)).tolist(), strict=True)))
    return [
        f"{directory}: {found[split]} pairs of the split {split}, the manifest says {expected.get(split, 0)}; "
        "run the command that writes it again"
        for split in SPLITS
        if found[split] != expected.get(split, 0)
    ]
