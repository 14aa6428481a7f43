"""Ten million pairs through the real export, manifest, check and reader: time and peak memory of each stage.

The corpus is synthetic JSON lines (dialogues of 30 utterances with causes in every one: 465 pairs each), the teacher a
stub that lives here alone. Each stage runs in a process of its own, whose peak resident memory the kernel tells.

    python benchmarks/soft_label_scale.py [--pairs 10000000] [--keep DIR]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from record import write_record

from kdecs.artifact import Manifest, read_manifest, verify_artifact, write_manifest
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import open_dialogues
from kdecs.process import StopSignal
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.export import export_shards
from kdecs.soft_labels.labels import SoftLabels
from kdecs.soft_labels.verify import content_faults

NUM_SHARDS = 64
UTTERANCES = 30
PAIRS_A_DIALOGUE = UTTERANCES * (UTTERANCES + 1) // 2
LIMIT_MIB = 1024.0
CHECKED_DIALOGUES = 200
STAGES = ("export", "verify", "read")


@dataclass
class StubScorer:
    """Logits that are a function of the pair alone, and cost nothing."""

    directory: Path
    answer_words: tuple[str, ...] = CONNECTIVES
    lineage: dict[str, str] = field(default_factory=lambda: {"teacher": "stub"})

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.directory, "teacher")

    def score(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        return stub_logits(pairs), np.full(len(pairs), -0.5, np.float32)


def stub_logits(pairs: Sequence[Pair]) -> np.ndarray:
    """(n, A) float32 in (-8, 8), mixed from dialogue number, target and candidate."""
    numbers = np.array(
        [(int(p.dialogue.id[1:]) << 12) + (p.target << 6) + p.candidate for p in pairs], dtype=np.uint64
    )
    mixed = (
        numbers[:, None] * np.uint64(2654435761) + np.arange(len(CONNECTIVES), dtype=np.uint64)
    ) % np.uint64(1_000_003)
    return (mixed.astype(np.float32) / np.float32(62_500.0) - np.float32(8.0)).astype(np.float32)


def write_corpus(path: Path, first: int, num_dialogues: int) -> None:
    """Dialogues d{first} … as JSON lines; every utterance is its own cause."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(first, first + num_dialogues):
            utterances = []
            for turn in range(1, UTTERANCES + 1):
                text = f"This is what was said in turn {turn} of dialogue {number} , and no more ."
                utterances.append(
                    {
                        "turn": turn,
                        "speaker": "AB"[turn % 2],
                        "utterance": text,
                        "emotion": "happiness",
                        "expanded emotion cause evidence": [turn],
                        "expanded emotion cause span": [text],
                    }
                )
            file.write(json.dumps({"id": f"d{number}", "utterances": utterances}) + "\n")


def export(work: Path) -> dict[str, float]:
    """Plan, label, write and finish."""
    corpus = {"train": work / "train.jsonl", "valid": work / "valid.jsonl"}
    config = ExportConfig.model_validate(
        {
            "teacher": work / "teacher",
            "output": work / "labels",
            "corpus": corpus,
            "num_shards": NUM_SHARDS,
            "allow_other_corpus": True,
        }
    )
    worker = SimpleNamespace(rank=0, world_size=1, device="cpu")
    result = export_shards(config, StubScorer(work / "teacher"), worker, StopSignal())
    return {"pairs": float(result.num_new_pairs)}


def verify(work: Path) -> dict[str, float]:
    """Every byte by sha256, every page by its checksum, every value."""
    manifest = read_manifest(work / "labels", "soft-labels")
    faults = verify_artifact(work / "labels") + content_faults(work / "labels", manifest)
    assert faults == [], faults[0]
    return {"pairs": float(sum(entry.rows or 0 for entry in manifest.files))}


def read(work: Path) -> dict[str, float]:
    """Join, map, look the pairs of some dialogues up and compare them with the stub."""
    labels = SoftLabels.open(work / "labels", work / "cache")
    for place, dialogue in enumerate(open_dialogues(work / "train.jsonl")):
        if place == CHECKED_DIALOGUES:
            break
        pairs = pairs_of(dialogue, "fold1+neutral")
        ids, hashes = [pair.id for pair in pairs], [pair.hash for pair in pairs]
        np.testing.assert_array_equal(
            labels.logits(labels.rows_of(ids, hashes, split="train")), stub_logits(pairs)
        )
    return {"pairs": float(len(labels))}


def run_stage(name: str, work: Path) -> None:
    """One stage in this process: its seconds and peak memory as JSON on stdout."""
    started = time.perf_counter()
    found = {"export": export, "verify": verify, "read": read}[name](work)
    found["seconds"] = time.perf_counter() - started
    found["cpu_seconds"] = time.process_time()
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def measure(work: Path, num_pairs: int) -> dict[str, dict[str, float]]:
    """All stages over a fresh corpus of about so many pairs."""
    num_dialogues = -(-num_pairs // PAIRS_A_DIALOGUE)
    write_corpus(work / "train.jsonl", 0, num_dialogues)
    write_corpus(work / "valid.jsonl", num_dialogues, 20)
    (work / "teacher").mkdir()
    (work / "teacher" / "weights.txt").write_text("none")
    write_manifest(work / "teacher", "teacher", config_hash="0" * 64, inputs={}, files=["weights.txt"])
    found = {}
    for name in STAGES:
        command = [sys.executable, __file__, "--stage", name, "--keep", str(work)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {found[name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="work here and leave it, instead of in a scratch directory")
    parser.add_argument("--stage", choices=STAGES, help="of the benchmark itself: run one stage")
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.keep)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = measure(work, arguments.pairs)
        corpus_bytes = (work / "train.jsonl").stat().st_size
        label_bytes = sum(path.stat().st_size for path in (work / "labels").glob("shard-*.parquet"))
    assert len({stage["pairs"] for stage in found.values()}) == 1, found
    peak = max(stage["peak_mib"] for stage in found.values())
    write_record(
        "soft_label_scale",
        unit="MiB at peak",
        ours=peak,
        baseline=LIMIT_MIB,
        baseline_name="the limit of 1 GiB",
        target=1.0,
        corpus=f"{int(found['export']['pairs']):,} synthetic pairs",
        dtype="float32",
        details={
            "meaning": "ratio: share of the limit that the largest stage used; less is better",
            "corpus_bytes": corpus_bytes,
            "label_bytes": label_bytes,
            "num_shards": NUM_SHARDS,
            "stages": found,
        },
    )


if __name__ == "__main__":
    main()
