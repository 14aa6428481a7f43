"""A student's data: batches a second from the mapped cache against tokenising each epoch, and memory a process.

The plain way is a Dataset that renders and tokenises a pair when it is asked for, and a collate function that pads, as
scripts on Transformers do; in batches of 16 on one thread. Checked in the same run: the same token ids. The memory is
what opening the cache and reading all of it adds to a fresh process (private pages; mapped ones are shared).

    python benchmarks/student_data.py
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
from _student_parts import corpus_tokenizer, some_dialogues
from record import alternate, corpus_split, write_rates

from kdecs.corpus.cache import CorpusCache, open_cache
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.prompts import student_prompt
from kdecs.corpus.reading import read_corpus
from kdecs.student.data import cached_batch
from kdecs.training.loop import epoch_batches

BATCH_PAIRS = 16


def private_mib() -> float:
    """MiB of this process's own pages (not shared with any other)."""
    kib = sum(
        int(line.split()[1])
        for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        if line.startswith(("Private_Clean", "Private_Dirty"))
    )
    return kib / 1024


def _read_all(corpus_file: Path, encoder: PairEncoder, cache: Path) -> CorpusCache:
    opened = open_cache(corpus_file, encoder, cache)
    for rows in np.array_split(np.arange(len(opened)), max(1, len(opened) // BATCH_PAIRS)):
        cached_batch(opened, rows, 0)
    return opened


def _memory_of_reading(warm_file: Path, corpus_file: Path, base: Path, cache: Path) -> float:
    from transformers import AutoTokenizer

    encoder = PairEncoder(AutoTokenizer.from_pretrained(base), 512)
    _read_all(warm_file, encoder, cache)  # what is loaded or allocated once, whatever the data
    before = private_mib()
    opened = _read_all(corpus_file, encoder, cache)
    after = private_mib()
    assert len(opened)  # held while it is measured
    return after - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialogues", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        path, corpus = corpus_split("train")
        path = some_dialogues(path, directory, arguments.dialogues)
        warm = some_dialogues(corpus_split("valid")[0], directory, 3)
        tokenizer = corpus_tokenizer(path)
        tokenizer.save_pretrained(directory / "base")
        cache = open_cache(path, PairEncoder(tokenizer, 512), directory / "cache")
        pairs = [p for d in read_corpus(path).dialogues for p in pairs_of(d, "fold1+neutral")]
        rows = np.arange(len(cache))

        def text(row: int) -> str:
            pair = pairs[row]
            return student_prompt(
                pair.dialogue, pair.target, pair.candidate, mask="<mask>", separator="</s>"
            ).text

        for row in range(0, len(rows), 97):
            if tokenizer(text(row))["input_ids"] != cache.list_at("token_ids", row).tolist():
                raise SystemExit(f"pair {pairs[row].id}: the cache holds other tokens")

        def ours() -> float:
            for batch in epoch_batches(
                cache.num_tokens, rows, batch_size=BATCH_PAIRS, bucket_batches=50, seed=0, epoch=0
            ):
                cached_batch(cache, batch, 0)
            return float(len(rows))

        def baseline() -> float:
            shuffled = np.random.default_rng(0).permutation(rows)
            for first in range(0, len(rows), BATCH_PAIRS):
                items = [tokenizer(text(row)) for row in shuffled[first : first + BATCH_PAIRS]]
                tokenizer.pad(items, return_tensors="pt")
            return float(len(rows))

        rates = alternate(ours, baseline, rounds=arguments.rounds)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory = pool.apply(_memory_of_reading, (warm, path, directory / "base", directory / "cache"))
        size = sum(file.stat().st_size for file in cache.directory.iterdir()) / 2**20
    write_rates(
        "student_data",
        rates,
        baseline_name="tokenising each pair when it is asked for",
        corpus=corpus,
        dtype="int32",
        details={"pairs": len(rows), "cache_mib": size, "private_mib_a_process": memory},
    )


if __name__ == "__main__":
    main()
