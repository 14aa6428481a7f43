"""Bytes a pair on disk: soft labels over the answer words against logits over the whole vocabulary, and the top 50.

The pairs are a corpus' own (ids, hashes, splits as exported); the logits are normal float32 values, which compress as
badly as a model's. All three sides are written by the same Parquet writer with the same compression, and read back.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record import corpus_split, write_record

from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import EXPORT_UNIVERSE, Pair, pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.soft_labels.format import ShardTable, encode_shard, iter_shard

VOCABULARY = 32_000  # LLaMA's
TOP_K = 50
FULL_PAIRS = 1_000
"""Pairs written over the whole vocabulary: 128 MB of values tell as much as all of them would."""


def label_table(pairs: list[Pair], *, top_k: int = 0) -> ShardTable:
    """Labels of some pairs as an export has them."""
    generator = np.random.default_rng(0)
    n = len(pairs)
    top_ids = generator.integers(0, VOCABULARY, size=(n, top_k), dtype=np.int32) if top_k else None
    top = -np.sort(-generator.normal(size=(n, top_k)).astype(np.float32), axis=1) if top_k else None
    return ShardTable(
        pair_ids=[pair.id for pair in pairs],
        pair_hashes=[pair.hash for pair in pairs],
        splits=["train"] * n,
        logits=generator.normal(size=(n, len(CONNECTIVES))).astype(np.float32),
        log_rest_mass=-generator.random(n).astype(np.float32),
        top_ids=top_ids,
        top_logits=top,
    )


def bytes_a_pair(path: Path, table: ShardTable, *, top_k: int = 0) -> float:
    """Of a shard as the export writes it, read back and compared."""
    path.write_bytes(encode_shard(table, CONNECTIVES))
    found = list(iter_shard(path, CONNECTIVES, rows=len(table), top_k=top_k))
    np.testing.assert_array_equal(np.concatenate([part.logits for part in found]), table.logits)
    if top_k:
        np.testing.assert_array_equal(np.concatenate([part.top_logits for part in found]), table.top_logits)
    return path.stat().st_size / len(table)


def full_bytes_a_pair(path: Path, pairs: list[Pair]) -> float:
    """Of pair ids, hashes and a float32 logit for every token."""
    logits = np.random.default_rng(0).normal(size=(len(pairs), VOCABULARY)).astype(np.float32)
    values = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), VOCABULARY)
    ids, hashes = pa.array([pair.id for pair in pairs]), pa.array([pair.hash for pair in pairs])
    table = pa.table({"pair_id": ids, "pair_hash": hashes, "logits": values})
    pq.write_table(table, path, compression="zstd", write_page_checksum=True, use_dictionary=["pair_hash"])
    assert pq.read_table(path).equals(table)
    return path.stat().st_size / len(pairs)


def main() -> None:
    path, corpus = corpus_split("train")
    pairs = [
        pair
        for dialogue in read_corpus(path, log=False).dialogues
        for pair in pairs_of(dialogue, EXPORT_UNIVERSE)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ours = bytes_a_pair(folder / "shard-00000.parquet", label_table(pairs))
        top = bytes_a_pair(folder / "shard-00001.parquet", label_table(pairs, top_k=TOP_K), top_k=TOP_K)
        full = full_bytes_a_pair(folder / "full.parquet", pairs[:FULL_PAIRS])
    write_record(
        "soft_label_bytes",
        unit="bytes a pair",
        ours=ours,
        baseline=full,
        baseline_name=f"float32 logits over {VOCABULARY:,} tokens",
        ratio=full / ours,
        corpus=corpus,
        dtype="float32",
        details={
            "meaning": "ratio: how many times fewer bytes; more is better",
            "pairs": len(pairs),
            "top_k": TOP_K,
            "bytes_a_pair_top_k_beside": top,
            "bytes_a_pair_top_k_alone": top - ours,
            "top_k_alone_over_ours": (top - ours) / ours,
        },
    )


if __name__ == "__main__":
    main()
