"""What a sweep costs beyond its trainings (Ray, the driver, tracking, starting), and the memory of one more trial.

- `sweep_overhead`: wall time of `tune/sweep.py` over eight trials, two at a time with one thread each, against the sum
  of the same trainings in one process with one thread, halved. Less is better: 1 is no overhead at all. Both sides must
  write the same metrics.
- `sweep_data_memory`: private memory for the data of one more trial beside others, without model and optimizer: the
  whole training split, in mode kd with soft labels for each of its pairs.
- `sweep_trials_per_hour`: the same trials per hour, against a plain Ray Tune script with Hugging Face's Trainer.

Parts can run one by one (`--part`); their figures are kept under `--work`, and the last part writes the records.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, corpus_split, write_record

from kdecs.config import parse_config
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig
from kdecs.tracking.record import read_points

NUM_TRIALS, AT_A_TIME = 8, 2
UNTIMED = ("time", "train_pairs_per_s")
PARTS = ("setup", "serial", "sweep", "memory", "plain")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "KDECS_DEVICE": "cpu",
    "DS_ACCELERATOR": "cpu",
}


def student_values(work: Path, epochs: int) -> dict[str, Any]:
    """The config of a trial: a tiny student, hard labels, the whole machinery of validation."""
    return {
        "corpus": {
            "train": str(corpus_split("train")[0]),
            "valid": str(corpus_split("valid")[0]),
            "train_share": 0.05,
        },
        "model": {"base": str(work / "base"), "span_head": "pointer", "max_prompt_tokens": 128},
        "distillation": {"mode": "joint"},
        "optimization": {"epochs": epochs, "learning_rate": 1e-3},
        "threads": 1,
    }


def trial_config(work: Path, place: str, seed: int, epochs: int) -> StudentConfig:
    """One trial's config with an output below `place`."""
    values = student_values(work, epochs)
    values["optimization"]["seed"] = seed
    values |= {"output": str(work / place / str(seed)), "cache": str(work / place / "cache")}
    return parse_config(StudentConfig, values, source="benchmark")


def train(config: StudentConfig) -> float:
    """Train in this process; the seconds it took."""
    from kdecs.runtime import start_runtime
    from kdecs.student.training import train_student

    began = time.perf_counter()
    train_student(config, start_runtime(device="cpu", threads=1))
    return time.perf_counter() - began


def setup(work: Path, seconds: float) -> dict[str, Any]:
    """A base model, and as many epochs as make a trial of about `seconds`."""
    from kdecs.demo.base_model import train_base_model
    from kdecs.demo.config import BaseModelConfig
    from kdecs.process import StopSignal
    from kdecs.runtime import start_runtime

    files = {split: str(corpus_split(split)[0]) for split in ("train", "valid")}
    values = {
        "name": "base",
        "output": str(work / "base"),
        "corpus": {**files, "train_share": 0.05},
        "architecture": "roberta",
        "num_layers": 2,
        "max_steps": 1,
        "threads": 1,
    }
    train_base_model(
        parse_config(BaseModelConfig, values, source="benchmark"), start_runtime(device="cpu"), StopSignal()
    )
    # The first training also imports and warms up what no later one does.
    _, one, three = (train(trial_config(work, f"calibration-{n}", 0, n)) for n in (2, 1, 3))
    an_epoch = max((three - one) / 2, 0.1)
    epochs = max(1, math.ceil((seconds - (one - an_epoch)) / an_epoch))
    return {"epochs": epochs, "seconds_an_epoch": an_epoch}


def serial(work: Path, epochs: int) -> dict[str, Any]:
    """The same trainings in this process, one after another."""
    return {"seconds": [train(trial_config(work, "serial", seed, epochs)) for seed in range(NUM_TRIALS)]}


def sweep(work: Path, epochs: int) -> dict[str, Any]:
    """The whole command, from its start to its exit."""
    values = {
        "name": "overhead",
        "output": str(work / "runs" / "sweep"),
        "student": student_values(work, epochs),
        "space": {"optimization.seed": {"grid": list(range(NUM_TRIALS))}},
        "max_concurrent_trials": AT_A_TIME,
    }
    path = work / "space.json"
    path.write_text(parse_config(SweepConfig, values, source="benchmark").model_dump_json())
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "tune" / "sweep.py"), str(path), "--set", "report=false"], check=True
    )
    return {"seconds": time.perf_counter() - began}


def plain(work: Path, epochs: int) -> dict[str, Any]:
    """The plain Ray Tune script over the same seeds, epochs and pairs."""
    began = time.perf_counter()
    config = trial_config(work, "plain", 0, epochs)
    path = work / "plain.json"
    path.write_text(config.model_dump_json())
    script = Path(__file__).with_name("_plain_tune.py")
    answer = subprocess.run(
        [sys.executable, str(script), str(path), str(NUM_TRIALS), str(AT_A_TIME)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {"seconds": time.perf_counter() - began, **json.loads(answer.stdout.splitlines()[-1])}


def memory(work: Path, epochs: int) -> dict[str, Any]:
    """Private MB that the data takes in each of two processes that hold it at once."""
    del epochs
    make_labels(work)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, initializer=_keep, initargs=(context.Barrier(1),)) as pool:
        pool.apply(_data_memory, (str(work),))  # the node's cache is there now, as for a second trial
    barrier = context.Barrier(AT_A_TIME)
    with context.Pool(AT_A_TIME, initializer=_keep, initargs=(barrier,)) as pool:
        found = pool.map(_data_memory, [str(work)] * AT_A_TIME, chunksize=1)
    return {"data_mb": [mb for mb, _ in found], "pairs": found[0][1]}


def make_labels(work: Path) -> None:
    """Random soft labels of every pair of both splits, imported as a user's own scores are."""
    splits = {split: corpus_split(split)[0] for split in ("train", "valid")}
    random = np.random.default_rng(0)
    with (work / "scores.jsonl").open("w", encoding="utf-8") as table:
        for split, path in splits.items():
            for dialogue in read_corpus(path).dialogues:
                for pair in pairs_of(dialogue, "fold1+neutral"):
                    line = {"pair_id": pair.id, "split": split, "logits": random.normal(size=5).tolist()}
                    table.write(json.dumps(line) + "\n")
    corpora = [part for split, path in splits.items() for part in ("--corpus", f"{split}={path}")]
    command = [
        "soft-labels",
        "import",
        str(work / "scores.jsonl"),
        *corpora,
        "--output",
        str(work / "labels"),
    ]
    subprocess.run([sys.executable, "-m", "kdecs.cli", *command], check=True, stdout=subprocess.DEVNULL)


_BARRIER: Any = None


def _keep(barrier: Any) -> None:
    global _BARRIER  # a barrier crosses processes by inheritance alone
    _BARRIER = barrier


def _data_memory(work: str) -> tuple[float, int]:
    import psutil

    from kdecs.models import load_tokenizer
    from kdecs.student.data import load_training_data
    from kdecs.training.loop import epoch_batches, rank_share

    values = student_values(Path(work), 1) | {
        "output": f"{work}/memory/student",
        "cache": f"{work}/memory/cache",
    }
    values["corpus"]["train_share"] = 1.0
    values["distillation"] = {"mode": "kd", "labels": f"{work}/labels"}
    config = parse_config(StudentConfig, values, source="benchmark")
    tokenizer = load_tokenizer(config.model.base)
    tokenizer("warm up")
    _BARRIER.wait()
    process = psutil.Process()
    before = process.memory_full_info().uss
    data = load_training_data(config, tokenizer, config.model.max_prompt_tokens)
    lengths = data.train.num_tokens
    for rows in epoch_batches(lengths, data.rows, batch_size=16, bucket_batches=50, seed=0, epoch=0):
        data.batch(*rank_share(rows, 0, 1))
    after = process.memory_full_info().uss
    _BARRIER.wait()  # all hold it now
    return (after - before) / 1e6, len(data.rows)


def same_metrics(work: Path) -> bool:
    """Whether both sides wrote the same metrics, to the last bit."""

    def points(directory: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in point.items() if key not in UNTIMED}
            for point in read_points(directory / "metrics.jsonl")
        ]

    ours = {
        json.loads((trial / "config.json").read_text())["optimization"]["seed"]: points(trial)
        for trial in (work / "runs" / "sweep" / "trials").iterdir()
    }
    return all(ours[seed] == points(work / "serial" / str(seed)) for seed in range(NUM_TRIALS))


def write_records(found: dict[str, dict[str, Any]], work: Path) -> None:
    """The three records; the ratios of overhead and memory are better the less they are."""
    assert same_metrics(work), "the sweep's trainings differ from the same trainings in one process"
    corpus = f"{corpus_split('train')[1]}, 5% of the training dialogues"
    total, wall = sum(found["serial"]["seconds"]), found["sweep"]["seconds"]
    write_record(
        "sweep_overhead",
        unit="s for 8 trials, two at a time (less is better)",
        ours=wall,
        baseline=total / AT_A_TIME,
        baseline_name="the same trainings in one process, one thread, halved",
        corpus=corpus,
        dtype="float32",
        target=1.15,
        details={"less_is_better": True, "trial_seconds": found["serial"]["seconds"], **found["setup"]},
    )
    write_record(
        "sweep_data_memory",
        unit="private MB of data a concurrent trial (less is better)",
        ours=max(found["memory"]["data_mb"]),
        baseline=50.0,
        baseline_name="the limit",
        corpus=f"{corpus_split('train')[1]}, the whole training split",
        dtype="float32",
        target=1.0,
        details={
            "less_is_better": True,
            "each": found["memory"]["data_mb"],
            "pairs": found["memory"]["pairs"],
            "mode": "kd",
        },
    )
    write_record(
        "sweep_trials_per_hour",
        unit="trials an hour",
        ours=3600 * NUM_TRIALS / wall,
        baseline=3600 * NUM_TRIALS / found["plain"]["seconds"],
        baseline_name="Ray Tune with Hugging Face's Trainer",
        corpus=corpus,
        dtype="float32",
        details={key: value for key, value in found["plain"].items() if key != "seconds"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of one trial (default 60)")
    parser.add_argument(
        "--work", type=Path, help="keep what parts find here (default: a temporary directory)"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="this part alone; repeatable")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="kdecs-bench-") as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        for part in arguments.part or PARTS:
            result = work / f"{part}.result.json"
            if result.is_file():
                continue
            if part == "setup":
                value = setup(work, arguments.seconds)
            else:
                epochs = json.loads((work / "setup.result.json").read_text())["epochs"]
                value = {"serial": serial, "sweep": sweep, "memory": memory, "plain": plain}[part](
                    work, epochs
                )
            result.write_text(json.dumps(value))
            print(f"{part}: {value}", flush=True)
        files = {part: work / f"{part}.result.json" for part in PARTS}
        if all(path.is_file() for path in files.values()):
            write_records({part: json.loads(path.read_text()) for part, path in files.items()}, work)


if __name__ == "__main__":
    main()
