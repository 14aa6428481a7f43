"""Small soft-label directories made by hand."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from kdecs.artifact import write_manifest
from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.soft_labels.format import ShardTable, encode_shard, iter_shard, shard_name

WORDS = CONNECTIVES


def make_table(ids: Sequence[str], *, split: str = "train", value: float = 0.5) -> ShardTable:
    """Rows of one value, with the hash of no text."""
    n = len(ids)
    logits = np.full((n, len(WORDS)), value, np.float32)
    return ShardTable(list(ids), ["0" * 32] * n, [split] * n, logits, np.full(n, -1, np.float32))


def make_labels(directory: Path, *tables: ShardTable, words: Sequence[str] = WORDS) -> Path:
    """A finished directory of these shards."""
    directory.mkdir(parents=True)
    rows = {}
    for index, table in enumerate(tables):
        (directory / shard_name(index)).write_bytes(encode_shard(table, words))
        rows[shard_name(index)] = len(table)
    num_pairs = Counter(split for table in tables for split in table.splits)
    details = {"answer_words": list(words), "lineage": {"teacher": directory.name}, "num_pairs": num_pairs}
    write_label_manifest(directory, rows, details)
    return directory


def write_label_manifest(directory: Path, rows: Mapping[str, int], details: Mapping[str, Any]) -> None:
    """The manifest of shards that are there."""
    write_manifest(
        directory, "soft-labels", config_hash="0", inputs={}, files=rows, rows=rows, details=details
    )


def read_shard(path: Path, words: Sequence[str] = WORDS) -> ShardTable:
    """All rows of a small shard, with the top logits that it has."""
    file = pq.ParquetFile(path)
    top_k = file.schema_arrow.field("top_ids").type.list_size if "top_ids" in file.schema_arrow.names else 0
    (table,) = iter_shard(path, words, rows=file.metadata.num_rows, top_k=top_k)
    return table


def names_of(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """Ids and hashes of pairs, as lookups take them."""
    return [pair.id for pair in pairs], [pair.hash for pair in pairs]


def sample_pairs(split: str = "train") -> list[Pair]:
    """The pairs of the bundled sample that an export labels."""
    return [p for d in read_corpus(bundled_sample(split)).dialogues for p in pairs_of(d, "fold1+neutral")]


def sample_labels(
    directory: Path, *, seed: int, tilt: float = 2.0, splits: Sequence[str] = ("train", "valid")
) -> Path:
    """Random labels of the bundled sample, tilted towards gold: one shard a split."""
    rng = np.random.default_rng(seed)
    tables = []
    for split in splits:
        pairs = sample_pairs(split)
        logits = rng.normal(size=(len(pairs), len(WORDS))).astype(np.float32)
        logits[np.arange(len(pairs)), [0 if p.is_cause else NUM_CAUSAL for p in pairs]] += tilt
        rest = np.log(rng.uniform(0.1, 0.9, size=len(pairs))).astype(np.float32)
        ids, hashes = [p.id for p in pairs], [p.hash for p in pairs]
        tables.append(ShardTable(ids, hashes, [split] * len(pairs), logits, rest))
    return make_labels(directory, *tables)


def by_pair(tables: Sequence[ShardTable]) -> Mapping[tuple[str, str, str], tuple[np.ndarray, float]]:
    """(split, id, hash) -> (logits, log rest mass), row by row."""
    return {
        (t.splits[n], t.pair_ids[n], t.pair_hashes[n]): (t.logits[n], float(t.log_rest_mass[n]))
        for t in tables
        for n in range(len(t))
    }
