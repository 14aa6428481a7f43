"""Writes label directories that no teacher scores anew: combined, imported and cross-fitted ones.

Rows come as a stream and go into shards of ROWS_A_SHARD rows by their number alone, so that the same rows give the
same bytes. Temp, fsync and rename a file; the manifest last.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from kdecs.artifact import MANIFEST_NAME, Kind, Manifest, claim, write_manifest
from kdecs.config import CONFIG_NAME, Config, config_hash, read_yaml, write_config
from kdecs.soft_labels.format import WORK_DIRECTORY, ShardTable, shard_file, shard_name

KIND: Kind = "soft-labels"
ROWS_A_SHARD = 1 << 20


def claim_output(config: Config, output: Path) -> None:
    """Refuse an output that holds anything but this work, finished or not (ArtifactError).

    Damaged labels of this very work and an unfinished attempt of the same kind may be written over; other labels may
    not, finished ones, those of an export, or shards that nothing says the origin of.
    """

    def is_begun_here() -> bool | None:
        if (output / WORK_DIRECTORY).exists():
            return False  # an export's
        found = output / CONFIG_NAME
        return read_yaml(found).keys() == type(config).model_fields.keys() if found.is_file() else None

    claim(
        output,
        KIND,
        config_hash(config),
        can_repair=True,
        data_files="shard-*.parquet",
        is_begun_here=is_begun_here,
    )


def begin_directory(config: Config, output: Path) -> str:
    """Make the output directory, unfinished, and put the config into it; returns the config hash.

    What `claim_output` lets pass is written over: it took minutes at most. Raises ArtifactError as that does.
    """
    claim_output(config, output)
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    write_config(config, output)
    return config_hash(config)


def write_rows(
    output: Path, tables: Iterable[ShardTable], answer_words: Sequence[str], *, first_shard: int = 0
) -> tuple[dict[str, int], Counter[str]]:
    """Write rows as shards from `first_shard` on; returns the rows of each file and of each split."""
    rows: dict[str, int] = {}
    by_split: Counter[str] = Counter()
    pieces = _cut(tables, ROWS_A_SHARD)
    for first in pieces:
        name = shard_name(first_shard + len(rows))
        taken = 0
        with shard_file(output / name, answer_words) as writer:
            for table in chain([first], pieces):
                writer.append(table)
                by_split.update(table.splits)
                taken += len(table)
                if taken == ROWS_A_SHARD:
                    break
        rows[name] = taken
    return rows, by_split


def finish_directory(
    output: Path,
    work_hash: str,
    rows: Mapping[str, int],
    by_split: Mapping[str, int],
    answer_words: Sequence[str],
    *,
    inputs: Mapping[str, str],
    details: Mapping[str, Any],
) -> Manifest:
    """Remove shards of an earlier attempt that are no part of this one, and write the manifest."""
    for path in output.glob("shard-*.parquet"):
        if path.name not in rows:
            path.unlink()
    own = {
        "answer_words": list(answer_words),
        "temperature": 1,
        "num_pairs": dict(sorted(by_split.items())),
    }
    return write_manifest(
        output,
        KIND,
        config_hash=work_hash,
        inputs=inputs,
        files=rows,
        rows=rows,
        details=own | dict(details),
    )


def rows_where(table: ShardTable, keep_n: Sequence[bool]) -> ShardTable:
    """The rows of a table that are to be kept, top logits left out."""
    places = [place for place, keep in enumerate(keep_n) if keep]
    return ShardTable(
        [table.pair_ids[n] for n in places],
        [table.pair_hashes[n] for n in places],
        [table.splits[n] for n in places],
        table.logits[places],
        table.log_rest_mass[places],
    )


def _cut(tables: Iterable[ShardTable], rows_a_piece: int) -> Iterator[ShardTable]:
    """The same rows with a border at each multiple of `rows_a_piece`; empty tables are left out."""
    position = 0
    for table in tables:
        start = 0
        while start < len(table):
            end = min(len(table), start + rows_a_piece - position % rows_a_piece)
            yield replace(
                table,
                pair_ids=table.pair_ids[start:end],
                pair_hashes=table.pair_hashes[start:end],
                splits=table.splits[start:end],
                logits=table.logits[start:end],
                log_rest_mass=table.log_rest_mass[start:end],
            )
            position += end - start
            start = end
