"""Writes the label directories that no teacher scores: combined, calibrated, imported, cross-fitted ones, controls.

One process writes such a directory in minutes, so it has no working files: an unfinished one is written anew.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from kdecs.artifact import (
    MANIFEST_NAME,
    Kind,
    Manifest,
    atomic_path,
    check_output,
    remove_leftovers,
    write_manifest,
)
from kdecs.config import CONFIG_NAME, Config, config_hash, read_yaml, write_config
from kdecs.soft_labels.format import WORK_DIRECTORY, ShardTable, shard_name, shard_writer

KIND: Kind = "soft-labels"
ROWS_PER_SHARD = 1 << 20  # the writer holds one row group of them in memory


def check_label_output(config: Config, output: Path) -> None:
    """Refuse an output that holds anything but this work, finished or not (ArtifactError).

    Damaged labels of this very work, and an unfinished attempt at a config of the same kind, may be written over.
    """

    def is_begun_here() -> bool | None:
        # Only an export has working files, and its shards cost hours of a teacher.
        if (output / WORK_DIRECTORY).exists():
            return False
        # A config of the same kind is enough: an unfinished attempt with other settings is worth minutes at most.
        found = output / CONFIG_NAME
        return read_yaml(found).keys() == type(config).model_fields.keys() if found.is_file() else None

    check_output(
        output,
        KIND,
        config_hash(config),
        can_repair=True,
        data_files="shard-*.parquet",
        is_begun_here=is_begun_here,
    )


class LabelDirectory:
    """A label directory in the making: `write` rows as often as needed, then `finish`."""

    def __init__(self, config: Config, output: Path, answer_words: Sequence[str]) -> None:
        """Begin the output directory with its config. Raises ArtifactError as `check_label_output` does."""
        check_label_output(config, output)
        # A manifest of damaged labels must not stand over the shards that replace them.
        (output / MANIFEST_NAME).unlink(missing_ok=True)
        write_config(config, output)
        self.output = output
        self._config_hash = config_hash(config)
        self._answer_words = tuple(answer_words)
        self._rows: dict[str, int] = {}
        self._by_split: Counter[str] = Counter()

    def write(self, tables: Iterable[ShardTable]) -> list[str]:
        """Write rows as new shards of ROWS_PER_SHARD rows; returns the shards' names.

        The division depends on the number of rows alone, so the same rows give the same bytes.
        """
        names = []
        # One iterator feeds both loops: the inner one takes the pieces of a shard, the outer one begins the next.
        pieces = _cut(tables, ROWS_PER_SHARD)
        for first in pieces:
            name = shard_name(len(self._rows))
            with (
                atomic_path(self.output / name) as temporary,
                shard_writer(temporary, self._answer_words) as writer,
            ):
                for table in chain([first], pieces):
                    writer.append(table)
                    self._by_split.update(table.splits)
                    if writer.rows == ROWS_PER_SHARD:
                        break
            self._rows[name] = writer.rows
            names.append(name)
        return names

    def finish(self, *, inputs: Mapping[str, str], details: Mapping[str, Any]) -> Manifest:
        """Remove what earlier attempts left and this one has no part in, and write the manifest."""
        for leftover in self.output.glob(".shard-*.tmp"):
            remove_leftovers(leftover.with_name(leftover.name[1:].rsplit(".", 2)[0]))
        for path in self.output.glob("shard-*.parquet"):
            if path.name not in self._rows:
                path.unlink()
        own = {
            "answer_words": list(self._answer_words),
            "temperature": 1,
            "num_pairs": dict(sorted(self._by_split.items())),
        }
        return write_manifest(
            self.output,
            KIND,
            config_hash=self._config_hash,
            inputs=inputs,
            files=self._rows,
            rows=self._rows,
            details=own | dict(details),
        )


def select_rows(table: ShardTable, keep_n: Sequence[bool]) -> ShardTable:
    """The rows of a table where `keep_n` is true, without their top logits."""
    places = [place for place, keep in enumerate(keep_n) if keep]
    return ShardTable(
        [table.pair_ids[n] for n in places],
        [table.pair_hashes[n] for n in places],
        [table.splits[n] for n in places],
        table.logits[places],
        table.log_rest_mass[places],
    )


def _cut(tables: Iterable[ShardTable], piece_rows: int) -> Iterator[ShardTable]:
    """The same rows with a border at each multiple of `piece_rows`; empty tables are left out."""
    position = 0
    for table in tables:
        start = 0
        while start < len(table):
            # Up to the end of the table or the next border, whichever comes first.
            end = min(len(table), start + piece_rows - position % piece_rows)
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
