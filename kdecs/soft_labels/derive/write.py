"""Writes label directories that no teacher scores anew: combined, imported and cross-fitted ones.

Rows come as a stream and go into shards of ROWS_A_SHARD rows by their number alone, so that the same rows give the
same bytes. Temp, fsync and rename a file; the manifest last.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from kdecs import __version__
from kdecs.artifact import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Kind,
    Manifest,
    claim_directory,
    read_manifest,
    seal,
    sha256_of_file,
    write_json,
)
from kdecs.config import CONFIG_NAME, Config, config_hash, read_yaml, write_config
from kdecs.errors import ArtifactError
from kdecs.soft_labels.format import WORK_DIRECTORY, ShardTable, shard_file, shard_name

KIND: Kind = "soft-labels"
ROWS_A_SHARD = 1 << 20


def check_directory(config: Config, output: Path) -> None:
    """Refuse an output that holds anything but this work, finished or not (ArtifactError).

    Damaged labels of this very work and an unfinished attempt of the same kind may be written over; other labels may
    not, finished ones, those of an export, or shards that nothing says the origin of.
    """
    work_hash = config_hash(config)
    if (output / MANIFEST_NAME).is_file() and read_manifest(output, KIND).config_hash != work_hash:
        claim_directory(output, KIND, work_hash)
    found = output / CONFIG_NAME
    is_foreign = found.is_file() and read_yaml(found).keys() != type(config).model_fields.keys()
    if is_foreign or (output / WORK_DIRECTORY).exists():
        raise ArtifactError(
            f"{output}: holds unfinished soft labels of other work; choose another output or remove it"
        )
    strangers = sorted(shard.name for shard in output.glob("shard-*.parquet"))
    if strangers and not found.is_file():
        raise ArtifactError(
            f"{output}: holds {strangers[0]} but no {CONFIG_NAME} that says what wrote it; "
            "choose another output or remove it"
        )


def begin_directory(config: Config, output: Path) -> str:
    """Make the output directory, unfinished, and put the config into it; returns the config hash.

    What `check_directory` lets pass is written over: it took minutes at most. Raises ArtifactError as that does.
    """
    check_directory(config, output)
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
    """Remove shards of an earlier attempt that are no part of this one, and write the sealed manifest."""
    for path in output.glob("shard-*.parquet"):
        if path.name not in rows:
            path.unlink()
    entries = []
    for name in sorted(rows):
        path = output / name
        checksum = sha256_of_file(path)
        entries.append(FileEntry(path=name, bytes=path.stat().st_size, sha256=checksum, rows=rows[name]))
    own = {
        "answer_words": list(answer_words),
        "temperature": 1,
        "num_pairs": dict(sorted(by_split.items())),
    }
    manifest = Manifest(
        kind=KIND,
        format_version=FORMAT_VERSION,
        kdecs_version=__version__,
        config_hash=work_hash,
        inputs=dict(sorted(inputs.items())),
        files=tuple(entries),
        details=json.loads(json.dumps(own | dict(details))),  # as a reader will see it
    )
    manifest = seal(manifest)
    write_json(output / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


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
