"""Streams the rows of finished shards: bounded memory, whatever their number, nothing trusted that is not checked.

Beside page checksums and schema (`kdecs.soft_labels.format`), sizes are held against the manifest before anything is
decoded, and values checked. Shapes: n rows of a batch, A answer words.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdecs.artifact import MANIFEST_NAME, FileEntry, Manifest
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
