"""Three ways to serve batches of soft labels by pair id and hash; run as a script: one reader's own memory.

python benchmarks/_label_readers.py KIND DIR   # prints own bytes before and after, waits for a line in between
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from kdecs.soft_labels.labels import SoftLabels

BATCH_PAIRS = 16
LINES_NAME = "labels.jsonl"
CACHE_NAME = "cache"
Serve = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def mapped(directory: Path) -> Serve:
    """Ours: the joined file of the node, mapped; its index is part of it."""
    labels = SoftLabels.open(directory, directory.parent / CACHE_NAME)
    return lambda ids, hashes: labels.logits(labels.rows_of(ids, hashes))


def parquet(directory: Path) -> Serve:
    """A plain Parquet read: every shard into memory, a dict of rows, a gather."""
    row_of: dict[tuple[str, str], int] = {}
    parts = []
    for path in sorted(directory.glob("shard-*.parquet")):
        table = pq.read_table(path, columns=["pair_id", "pair_hash", "logits"])
        names = zip(table.column("pair_id").to_pylist(), table.column("pair_hash").to_pylist(), strict=True)
        for name in names:
            row_of[name] = len(row_of)
        parts.append(table.column("logits").combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1))
    logits_NA = np.concatenate(parts)
    return lambda ids, hashes: logits_NA[[row_of[name] for name in zip(ids, hashes, strict=True)]]


def json_lines(directory: Path) -> Serve:
    """JSON lines, one a pair: every line parsed into a dict of arrays."""
    logits_of: dict[tuple[str, str], np.ndarray] = {}
    with (directory.parent / LINES_NAME).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            logits_of[row["pair_id"], row["pair_hash"]] = np.array(row["logits"], dtype=np.float32)
    return lambda ids, hashes: np.stack([logits_of[name] for name in zip(ids, hashes, strict=True)])


READERS: dict[str, Callable[[Path], Serve]] = {
    "mapped": mapped,
    "parquet": parquet,
    "json lines": json_lines,
}


def batches(names: Sequence[tuple[str, str]], number: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Random batches of pairs, as (ids, hashes)."""
    draw = random.Random(seed)
    chosen = [draw.sample(names, BATCH_PAIRS) for _ in range(number)]
    return [([i for i, _ in batch], [h for _, h in batch]) for batch in chosen]


def own_bytes() -> int:
    """Memory of this process that no other shares: /proc/self/smaps_rollup, private pages."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines[1:])
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))


def main() -> None:
    """Report own memory before reading and, with all readers up, after every row was touched."""
    kind, directory = sys.argv[1], Path(sys.argv[2])
    with (directory.parent / "names.json").open(encoding="utf-8") as file:
        asked = json.load(file)
    before = own_bytes()
    serve = READERS[kind](directory)
    for ids, hashes in asked:
        serve(ids, hashes)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"before": before, "after": own_bytes()}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
