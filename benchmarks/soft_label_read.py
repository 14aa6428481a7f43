"""Random access to soft labels by pair id and hash: the mapped file against a plain Parquet read and JSON lines.

What a training does: open the labels, then serve random batches. Three sides take turns; their batches are compared.
Then three readers of each kind run at once, touch every row, and tell what memory is theirs alone.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _label_readers import BATCH_PAIRS, LINES_NAME, READERS, batches, mapped
from record import alternate, write_record

from kdecs.artifact import write_manifest
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.soft_labels.format import ShardTable, encode_shard, shard_name

NUM_PAIRS = 300_000
NUM_SHARDS = 8
NUM_BATCHES = 2_000
NUM_READERS = 3
HELPER = Path(__file__).with_name("_label_readers.py")


def make_labels(directory: Path) -> list[tuple[str, str]]:
    """Synthetic labels as an export leaves them, and the same as JSON lines beside; their (id, hash)."""
    directory.mkdir()
    generator = np.random.default_rng(0)
    rows: dict[str, int] = {}
    names: list[tuple[str, str]] = []
    with (directory.parent / LINES_NAME).open("w", encoding="utf-8") as lines:
        for shard in range(NUM_SHARDS):
            numbers = range(shard, NUM_PAIRS, NUM_SHARDS)
            ids = [f"tr_{n // 33}/{n % 33 + 1}/1" for n in numbers]
            hashes = [hashlib.blake2b(name.encode(), digest_size=16).hexdigest() for name in ids]
            logits = generator.normal(size=(len(ids), len(CONNECTIVES))).astype(np.float32)
            rest = np.full(len(ids), -0.5, np.float32)
            table = ShardTable(ids, hashes, ["train"] * len(ids), logits, rest)
            (directory / shard_name(shard)).write_bytes(encode_shard(table, CONNECTIVES))
            rows[shard_name(shard)] = len(ids)
            names += zip(ids, hashes, strict=True)
            for name, mark, values in zip(ids, hashes, logits.tolist(), strict=True):
                lines.write(json.dumps({"pair_id": name, "pair_hash": mark, "logits": values}) + "\n")
    details = {"answer_words": list(CONNECTIVES)}
    write_manifest(
        directory, "soft-labels", config_hash="0", inputs={}, files=rows, rows=rows, details=details
    )
    return names


def serve_rates(directory: Path, asked: list[tuple[list[str], list[str]]]) -> dict[str, float]:
    """Batches a second once open, of each kind."""
    found = {}
    for kind, reader in READERS.items():
        serve = reader(directory)
        started = time.perf_counter()
        for ids, hashes in asked:
            serve(ids, hashes)
        found[kind] = len(asked) / (time.perf_counter() - started)
    return found


def own_memory(kind: str, directory: Path) -> float:
    """MB that each of several readers at once has for itself alone (median), beyond what it had before."""
    readers = [
        subprocess.Popen(
            [sys.executable, str(HELPER), kind, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(NUM_READERS)
    ]
    taken = []
    for reader in readers:  # all are up, with every row touched, before any is measured
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        assert reader.stdin is not None and reader.stdout is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
        figures = json.loads(reader.stdout.readline())
        taken.append((figures["after"] - figures["before"]) / 1e6)
    for reader in readers:
        reader.communicate("\n")
    return statistics.median(taken)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "labels"
        names = make_labels(directory)
        started = time.perf_counter()
        mapped(directory)  # builds the joined file: once a node
        build_s = time.perf_counter() - started
        asked = batches(names, NUM_BATCHES, seed=1)
        served = {}

        def side(kind: str) -> float:
            serve = READERS[kind](directory)
            served[kind] = [serve(ids, hashes) for ids, hashes in asked]
            return float(NUM_BATCHES)

        against_parquet = alternate(lambda: side("mapped"), lambda: side("parquet"))
        against_lines = alternate(lambda: side("mapped"), lambda: side("json lines"))
        for kind in ("parquet", "json lines"):
            assert all(np.array_equal(a, b) for a, b in zip(served["mapped"], served[kind], strict=True))
        rates = serve_rates(directory, asked)
        every = [names[n : n + 1024] for n in range(0, NUM_PAIRS, 1024)]
        (Path(scratch) / "names.json").write_text(
            json.dumps([([i for i, _ in part], [h for _, h in part]) for part in every]), encoding="utf-8"
        )
        memory = {kind: own_memory(kind, directory) for kind in READERS}
    write_record(
        "soft_label_read",
        unit="batches a second, opening included",
        ours=statistics.median(against_parquet.ours),
        baseline=statistics.median(against_parquet.baseline),
        ratio=against_parquet.ratio,
        baseline_name="Parquet read into memory",
        corpus=f"{NUM_PAIRS} synthetic pairs",
        dtype="float32",
        details={
            "batch_pairs": BATCH_PAIRS,
            "batches": NUM_BATCHES,
            "ratio_to_json_lines": against_lines.ratio,
            "batches_per_second_once_open": rates,
            "own_mb_per_extra_reader": memory,
            "build_joined_file_s": build_s,
        },
    )
    print(f"memory of each of {NUM_READERS} readers alone, MB: {memory}")


if __name__ == "__main__":
    main()
