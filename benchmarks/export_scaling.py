"""Pairs a second of an export by two ranks against one, each rank of one thread on a core of its own.

A real LoRA teacher (LLaMA architecture, made here by the project's own pretraining and training) labels the same pairs
both ways, in rounds that take turns. Loading is outside the clock: ranks wait for each other once their teacher is
there. Two cores need not be twice one (they may share a physical core, or memory): what two independent
processes of plain matrix products reach on the same cores is measured beside it and recorded.

Checked in the same run: both ways write the same bytes.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from record import corpus_split, write_record

from kdecs.config import parse_config

TARGET = 0.9
ROUNDS = 3
NUM_SHARDS = 16
PROBE_S = 5.0
PROBE_SIZE = 384


def make_teacher(directory: Path, corpus: dict[str, str], hidden: int, layers: int) -> Path:
    """A finished teacher over a base of so many hidden units; a few steps each, what it says does not matter."""
    import torch

    from kdecs.demo.base_model import train_base_model
    from kdecs.demo.config import BaseModelConfig
    from kdecs.process import StopSignal
    from kdecs.runtime import Runtime, process_group
    from kdecs.teacher.config import TeacherConfig
    from kdecs.teacher.training import train_teacher

    torch.set_num_threads(1)
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    base = {
        "name": "base", "output": str(directory / "base"), "corpus": corpus, "architecture": "llama",
        "vocabulary_size": 4000, "hidden_size": hidden, "num_layers": layers, "num_heads": 4,
        "max_positions": 2048, "max_steps": 2, "batch_size": 4, "sequence_tokens": 64,
    }  # fmt: skip
    train_base_model(parse_config(BaseModelConfig, base, source="benchmark"), runtime, StopSignal())
    teacher = {
        "name": "teacher", "output": str(directory / "teacher"), "corpus": corpus | {"train_share": 0.1},
        "model": {"family": "causal", "base": str(directory / "base")}, "optimization": {"epochs": 1},
    }  # fmt: skip
    with process_group(runtime, single=True):
        train_teacher(parse_config(TeacherConfig, teacher, source="benchmark"), runtime, StopSignal())
    return directory / "teacher"


def rank_of(rank: int, world_size: int, values: dict[str, Any], ready: Barrier, times: Any) -> None:
    """One rank on its own core: loads, waits for the others, exports, notes when it began and ended."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import torch

    from kdecs.process import StopSignal
    from kdecs.runtime import Runtime
    from kdecs.soft_labels.config import ExportConfig
    from kdecs.soft_labels.export import export_shards
    from kdecs.teacher.scoring import TeacherScorer

    torch.set_num_threads(1)
    config = parse_config(ExportConfig, values, source="benchmark")
    runtime = Runtime(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
    scorer = TeacherScorer.load(
        config.teacher, runtime=runtime, dtype="float32", micro_batch_tokens=config.micro_batch_tokens
    )
    ready.wait()
    started = time.perf_counter()
    result = export_shards(config, scorer, runtime, StopSignal(), poll_s=0.01)
    times.put((started, time.perf_counter(), sum(result.manifest.details["num_pairs"].values())))


def probe_of(rank: int, ready: Barrier, times: Any) -> None:
    """Matrix products of one thread for some seconds: how many a second this core does beside the other."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import torch

    torch.set_num_threads(1)
    a, count = torch.randn(PROBE_SIZE, PROBE_SIZE), 0
    ready.wait()
    started = time.perf_counter()
    while time.perf_counter() - started < PROBE_S:
        a @ a
        count += 1
    times.put(count / (time.perf_counter() - started))


def run_together(target: Callable[..., None], count: int, *arguments: Any) -> list[Any]:
    """What so many processes put, all of them begun at one moment."""
    context = multiprocessing.get_context("spawn")
    ready, times = context.Barrier(count), context.Queue()
    processes = [context.Process(target=target, args=(n, *arguments, ready, times)) for n in range(count)]
    for process in processes:
        process.start()
    found = [times.get(timeout=900) for _ in processes]
    for process in processes:
        process.join()
    return found


def export_rate(values: dict[str, Any], world_size: int) -> float:
    """Pairs a second of a fresh export, from the first rank's start to the last one's end."""
    shutil.rmtree(values["output"], ignore_errors=True)
    found = run_together(rank_of, world_size, world_size, values)
    return found[0][2] / (max(end for _, end, _ in found) - min(start for start, _, _ in found))


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("shard-*.parquet")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        print("one core: there is nothing to scale over, skipped")
        return
    path, corpus = corpus_split("valid")
    with tempfile.TemporaryDirectory() as scratch:
        folder, paths = Path(scratch), {"train": str(path), "valid": str(path)}  # each pair twice
        values: dict[str, Any] = {
            "teacher": str(make_teacher(folder, paths, arguments.hidden, arguments.layers)),
            "corpus": paths,
            "num_shards": NUM_SHARDS,
            "micro_batch_tokens": 2048,
        }
        outputs = {1: folder / "one", 2: folder / "two"}
        rates: dict[int, list[float]] = {1: [], 2: []}
        probes: dict[int, list[float]] = {1: [], 2: []}
        for number in range(arguments.rounds):
            for ranks in (1, 2) if number % 2 == 0 else (2, 1):
                probes[ranks].append(sum(run_together(probe_of, ranks)))
                rates[ranks].append(export_rate(values | {"output": str(outputs[ranks])}, ranks))
        assert shard_bytes(outputs[1]) == shard_bytes(outputs[2])
    efficiency = statistics.median(two / (2 * one) for one, two in zip(rates[1], rates[2], strict=True))
    machine = statistics.median(two / (2 * one) for one, two in zip(probes[1], probes[2], strict=True))
    write_record(
        "export_scaling",
        unit="pairs/s",
        ours=statistics.median(rates[2]),
        baseline=2 * statistics.median(rates[1]),
        baseline_name="twice one rank",
        ratio=efficiency,
        target=TARGET,
        corpus=corpus,
        dtype="float32",
        details={
            "meaning": "ratio: efficiency, two ranks over twice one rank, the median round",
            "pairs_per_second": {"one_rank": rates[1], "two_ranks": rates[2]},
            "efficiency_of_independent_matrix_products": machine,
            "efficiency_over_what_the_machine_allows": efficiency / machine,
            "matrix_products_per_second": {"one_process": probes[1], "two_processes": probes[2]},
            "teacher": {"hidden_size": arguments.hidden, "layers": arguments.layers},
            "num_shards": NUM_SHARDS,
            "same_bytes": True,
        },
    )


if __name__ == "__main__":
    main()
