"""What a million more pairs cost each part of kdecs that holds all pairs, or sees them all in one process.

`kdecs plan --scale` names the part that breaks first from these figures: memory and processor time of planning an
export's shards, of joining its labels, and of preparing a teacher's training, each measured at two sizes in separate
processes, so that what the libraries take drops out of the difference; a claim of a shard; an upload of a trial to
MLflow; and the reading back of published shards. Seconds are the processor's, with one thread.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from export_scaling import make_teacher
from record import corpus_split, write_record
from soft_label_scale import PAIRS_A_DIALOGUE, StubScorer, export, read, write_corpus

from kdecs.artifact import write_manifest
from kdecs.corpus.splits import CorpusConfig, open_splits
from kdecs.soft_labels.claims import Claims
from kdecs.soft_labels.plan import PlanKind, make_plan

SIZES = {"plan": (4, 24), "prepare": (1, 3), "join": (400_000, 2_400_000)}
"""Copies of the corpus, or labels."""
CLAIMS = 3_000
TRIALS = 40
EPOCHS = 10


def plan(work: Path, size: int) -> float:
    """Plan the shards of a corpus of the real one's dialogues, `size` times over."""
    splits = open_splits(CorpusConfig(train=work / f"corpus-{size}.jsonl", valid=work / "valid.jsonl"))
    return float(make_plan(work / f"plan-{size}", PlanKind("0" * 64, 64), splits).num_pairs)


def label(work: Path, size: int) -> float:
    """An export of a stub's labels, to have some to join."""
    return export(work / f"labels-{size}")["pairs"]


def join(work: Path, size: int) -> float:
    """Join the labels of an export and look some up."""
    return read(work / f"labels-{size}")["pairs"]


def prepare(work: Path, size: int) -> float:
    """What each rank of a teacher's training reads, encodes and deals before its first step."""
    from kdecs.config import parse_config
    from kdecs.teacher.config import TeacherConfig
    from kdecs.teacher.data import prepare_data
    from kdecs.teacher.families import make_family

    values = {
        "name": "teacher", "output": str(work / "none"), "model": {"family": "causal", "base": str(work / "base")},
        "corpus": {"train": str(work / f"corpus-{size}.jsonl"), "valid": str(work / "valid.jsonl")},
        "optimization": {"epochs": 1},
    }  # fmt: skip
    config = parse_config(TeacherConfig, values, source="benchmark")
    family = make_family(config.model, max_prompt_tokens=2048, emotions_shown="coarse")
    data = prepare_data(config, family, use_tree=True, world_size=1, show_progress=False)
    return float(len(data.train.pairs))


STAGES = {"plan": plan, "label": label, "join": join, "prepare": prepare}


def measure(work: Path, stage: str, size: int) -> dict[str, float]:
    """One stage in a separate process: pairs, processor seconds, peak memory."""
    command = [sys.executable, __file__, "--stage", stage, "--size", str(size), "--work", str(work)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{stage} {size}: {found}", flush=True)
    return found


def run_stage(stage: str, size: int, work: Path) -> None:
    started = time.process_time()
    pairs = STAGES[stage](work, size)
    found = {"pairs": pairs, "cpu_seconds": time.process_time() - started}
    # Not getrusage, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(json.dumps(found | {"peak_mib": int(status.partition("VmHWM:")[2].split()[0]) / 1024}))


def slope(small: dict[str, float], large: dict[str, float]) -> dict[str, float]:
    """Bytes and processor seconds of one more pair."""
    pairs = large["pairs"] - small["pairs"]
    return {
        "bytes_a_pair": (large["peak_mib"] - small["peak_mib"]) * 2**20 / pairs,
        "seconds_a_pair": (large["cpu_seconds"] - small["cpu_seconds"]) / pairs,
    }


def repeat_corpus(source: Path, path: Path, copies: int) -> None:
    """The dialogues of a corpus in RECCON's JSON, several times over under other ids, as JSON lines."""
    dialogues: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for name, (utterances, *_) in dialogues.items():
                file.write(json.dumps({"id": f"c{copy}_{name}", "utterances": utterances}) + "\n")


def make_labels(work: Path, num_pairs: int) -> None:
    """A folder with the synthetic corpus and the stub of a teacher that `export` expects."""
    folder = work / f"labels-{num_pairs}"
    (folder / "teacher").mkdir(parents=True)
    num_dialogues = -(-num_pairs // PAIRS_A_DIALOGUE)
    write_corpus(folder / "train.jsonl", 0, num_dialogues)
    write_corpus(folder / "valid.jsonl", num_dialogues, 20)
    (folder / "teacher" / "weights.txt").write_text("none")
    write_manifest(folder / "teacher", "teacher", config_hash="0" * 64, inputs={}, files=["weights.txt"])
    assert StubScorer(folder / "teacher").manifest


def claim_seconds(work: Path) -> float:
    """Processor seconds of a claim that is taken and given back, with its thread of renewals."""
    claims = Claims(work / "claims", lease_s=60)
    started = time.process_time()
    for number in range(CLAIMS):
        with claims.holding(f"shard-{number}") as claim:
            assert claim
    return (time.process_time() - started) / CLAIMS


def hash_bytes_per_second() -> float:
    """How fast a published shard is read back: its sha256, from memory."""
    block = os.urandom(1 << 26)
    started = time.process_time()
    hashlib.sha256(block).hexdigest()
    return len(block) / (time.process_time() - started)


def trial_seconds(work: Path) -> float:
    """Processor seconds of the driver for one trial in MLflow on SQLite: its run, its epochs' metrics, its end."""
    from kdecs.tracking.mlflow import Tracker
    from kdecs.tracking.record import RunRecord, TrackingConfig

    tracker = Tracker(TrackingConfig(), work / "sweep")
    scores = {f"valid_{name}": 50.0 for name in ("loss", "macro_f1", "positive_f1", "negative_f1")}

    def record(name: str, *, ended: bool, parent: str | None = None) -> RunRecord:
        points = [{"epoch": n, "time": 1.7e9 + n, **scores} for n in range(EPOCHS)] if parent else []
        status = {"status": "FINISHED", "finished": 1.7e9 + EPOCHS} if ended else {}
        params = {f"parameter_{n}": n for n in range(10)}
        return RunRecord(
            {"trial": name}, name, parent, 1.7e9, params=params, tags={"a": "b"}, points=points, **status
        )

    assert tracker.sync_family(record("sweep", ended=False), [])  # makes the schema, which takes seconds
    started = time.process_time()
    for number in range(TRIALS):
        for ended in (False, True):
            child = record(f"trial {number}", ended=ended, parent=tracker.run_id({"trial": "sweep"}))
            assert tracker.sync_family(record("sweep", ended=False), [child])
    return (time.process_time() - started) / TRIALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, help="of the benchmark itself: run one stage")
    parser.add_argument("--size", type=int)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.size, arguments.work)
        return
    source, corpus = corpus_split("train")
    valid, _ = corpus_split("valid")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_teacher(work, {"train": str(valid), "valid": str(valid)}, 32, 2)
        repeat_corpus(valid, work / "valid.jsonl", 1)
        for copies in {*SIZES["plan"], *SIZES["prepare"]}:
            repeat_corpus(source, work / f"corpus-{copies}.jsonl", copies)
        for size in SIZES["join"]:
            make_labels(work, size)
            measure(work, "label", size)
        stages = {stage: [measure(work, stage, size) for size in sizes] for stage, sizes in SIZES.items()}
        slopes = {stage: slope(*found) for stage, found in stages.items()}
        [joined] = (work / f"labels-{SIZES['join'][1]}" / "cache").glob("*.arrow")
        details = {
            "meaning": "ratio: bytes of memory that the join takes per byte of the file that it writes",
            "slopes": slopes,
            "stages": stages,
            "joined_bytes_a_pair": joined.stat().st_size / stages["join"][1]["pairs"],
            "claim_seconds": claim_seconds(work),
            "mlflow_trial_seconds": trial_seconds(work),
            "hash_bytes_per_second": hash_bytes_per_second(),
            "timed_by": "processor seconds, one thread",
        }  # fmt: skip
    write_record(
        "scale_limits",
        unit="bytes a pair",
        ours=slopes["join"]["bytes_a_pair"],
        baseline=details["joined_bytes_a_pair"],
        baseline_name="the joined file",
        corpus=f"{corpus}, repeated, and synthetic labels",
        dtype="float32",
        details=details,
    )


if __name__ == "__main__":
    main()
