"""The simulation behind `kdecs plan --scale` against real trainings and exports whose processes are killed.

A tiny teacher trains and labels with the project's own code, on one and on two ranks or workers. Kills come at moments
drawn from an exponential law, as SIGKILL; the same moments are given to the simulation, together with the times of a
start, a step, a checkpoint, a shard and a claim, measured in a run without kills. Compared are the wall time and the
work that had to be done again.

Starts, steps, checkpoints and forwards are padded by sleeping to a fixed length (`PADS`), as if a GPU worked, so that
the other programs of a shared machine do not show in the clock's times. Each start of a worker names another host, so
that the others do not see it die and its lease has to expire.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from export_scaling import make_teacher
from record import RESULTS, write_record

from kdecs.corpus.reading import bundled_sample
from kdecs.teacher.plan.simulation import (
    ExportRun,
    Lifetimes,
    Outcome,
    TrainingRun,
    random_lifetimes,
    simulate_export,
    simulate_training,
)

TARGET = 0.15
PADS = {"start": 4.0, "step": 0.2, "checkpoint": 0.5, "pair": 0.02}
STEPS, EVERY, SHARDS, LEASE_S, POLL_S = 180, 10, 24, 2.0, 0.2
CALIBRATED_SHARE = 0.2
"""Of the dialogues, on which a training without kills is measured."""
MTBF_S = {"training": 12.0, "export": 9.0}
"""Seconds from each start of a launch, or of a worker, to its kill, on average."""
SEED = 3


@dataclass(frozen=True)
class Event:
    """What a process did: `at` is the clock's time, which all processes of a machine share."""

    worker: int
    what: str
    at: float


# --- What runs in the processes --------------------------------------------------------------------------------------


class Log:
    """Appends events to a file, a line each, so that a kill loses none."""

    def __init__(self, path: Path, worker: int) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._worker = worker

    def __call__(self, what: str) -> None:
        self._file.write(json.dumps(asdict(Event(self._worker, what, time.monotonic()))) + "\n")


def padded(function: Callable[..., Any], seconds: Callable[..., float], before: Any, after: Any) -> Any:
    """The function, noted before and after, and sleeping until so many seconds have passed."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        before()
        ends = time.monotonic() + seconds(*arguments)
        result = function(*arguments, **keywords)
        time.sleep(max(0.0, ends - time.monotonic()))
        after()
        return result

    return run


def nothing() -> None:
    """Note no event."""


def train(rank: int, ranks: int, port: int, values: dict[str, Any], log_path: Path, began: float) -> None:
    """One rank of a training, as a launcher starts it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from kdecs.config import parse_config
    from kdecs.process import StopSignal
    from kdecs.runtime import process_group, start_runtime
    from kdecs.teacher import training
    from kdecs.teacher.config import TeacherConfig

    _be_quiet(log_path)
    log = Log(log_path, rank) if rank == 0 else lambda _: None
    run = training.TeacherTraining.run

    def run_later(*arguments: Any) -> None:
        time.sleep(max(0.0, began + PADS["start"] - time.monotonic()))
        log("ready")
        run(*arguments)

    training.TeacherTraining.run = run_later
    training.TeacherTraining.step = padded(
        training.TeacherTraining.step, lambda *_: PADS["step"], nothing, lambda: log("step")
    )
    training.save_checkpoint = padded(
        training.save_checkpoint, lambda *_: PADS["checkpoint"], lambda: log("saves"), lambda: log("saved")
    )
    runtime = start_runtime(threads=1)
    config = parse_config(TeacherConfig, values, source="benchmark")
    with process_group(runtime, single=True):
        training.train_teacher(config, runtime, StopSignal())


def label(worker: int, workers: int, host: str, values: dict[str, Any], log_path: Path, began: float) -> None:
    """One worker of an export, which believes that it is alone on its host."""
    import torch

    from kdecs.config import parse_config
    from kdecs.process import StopSignal
    from kdecs.runtime import Runtime
    from kdecs.soft_labels import claims, export
    from kdecs.soft_labels.config import ExportConfig
    from kdecs.teacher.scoring import TeacherScorer

    _be_quiet(log_path)
    torch.set_num_threads(1)
    log = Log(log_path, worker)
    claims.host_identity = lambda: host
    config = parse_config(ExportConfig, values, source="benchmark")
    runtime = Runtime(rank=worker, local_rank=worker, world_size=workers, device=torch.device("cpu"))
    scorer = TeacherScorer.load(config.teacher, runtime=runtime, dtype="float32", micro_batch_tokens=2048)
    TeacherScorer.score = padded(
        TeacherScorer.score, lambda _, pairs: PADS["pair"] * len(pairs), nothing, nothing
    )
    export._Worker._label = padded(
        export._Worker._label, lambda *_: 0.0, lambda: log("labels"), lambda: log("labelled")
    )
    time.sleep(max(0.0, began + PADS["start"] - time.monotonic()))
    log("ready")
    export.export_shards(config, scorer, runtime, StopSignal(), poll_s=POLL_S)


def _be_quiet(log_path: Path) -> None:
    """Send what a process prints to a file beside its events."""
    target = os.open(log_path.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(target, stream)


# --- Real runs with kills --------------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Course:
    """A real run: its outcome, its events, and when it ended."""

    outcome: Outcome
    events: list[Event]
    began: float
    ended: float


def supervise(
    start: Callable[[int], list[BaseProcess]], groups: int, lives: list[Lifetimes], log: Path
) -> Course:
    """Keep `groups` launches going until each has ended by itself; kill each at its lifetimes, and start it again.

    `start` starts the processes of a group, and one of them is killed first, as a failing device would end it.
    """
    began = time.monotonic()
    running: list[tuple[list[BaseProcess], float]] = []
    for group in range(groups):
        life = time.monotonic() + next(lives[group])
        running.append((start(group), life))
    ended, kills = [False] * groups, [0] * groups
    deaths: list[Event] = []
    while not all(ended):
        time.sleep(0.005)
        for group, (processes, dies_at) in enumerate(running):
            if ended[group]:
                continue
            if time.monotonic() >= dies_at:
                for process in processes:
                    os.kill(process.pid or 0, signal.SIGKILL)
                deaths.append(Event(group, "killed", time.monotonic()))
                for process in processes:
                    process.join()
                kills[group] += 1
                life = time.monotonic() + next(lives[group])
                running[group] = (start(group), life)
            elif all(process.exitcode is not None for process in processes):
                codes = [process.exitcode for process in processes]
                assert codes == [0] * len(codes), log.with_suffix(".out").read_text()[-2000:]
                ended[group] = True
    now = time.monotonic()
    events = [Event(**json.loads(line)) for line in log.read_text().splitlines()]
    events = sorted([*events, *deaths], key=lambda event: event.at)
    lost = sum(lost_before(death, events) for death in deaths)
    return Course(Outcome(now - began, len(deaths), lost, 0.0), events, began, now)


def lost_before(death: Event, events: list[Event]) -> float:
    """Seconds of work that a kill undid: since the checkpoint or the start, or since the claim of a shard."""
    before = [event for event in events if event.worker == death.worker and event.at < death.at]
    for event in reversed(before):
        if event.what in ("ready", "saved", "labels"):
            return death.at - event.at
        if event.what in ("killed", "labelled"):
            break  # it was still starting, or between two shards
    return 0.0


def gaps(events: list[Event], first: str, second: str) -> list[float]:
    """Seconds from each `first` to the `second` that follows it at once."""
    return [b.at - a.at for a, b in itertools.pairwise(events) if (a.what, b.what) == (first, second)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- Comparison ------------------------------------------------------------------------------------------------------


def training_case(folder: Path, values: dict[str, Any], ranks: int) -> dict[str, Any]:
    """A training on so many ranks, first without kills to measure its parts, then with kills, and simulated."""

    def course(name: str, share: float, lives: Lifetimes) -> Course:
        output = folder / f"{name}-{ranks}"
        of_run = values | {"output": str(output)}
        of_run["corpus"] = values["corpus"] | {"train_share": share}
        log = output.with_suffix(".jsonl")

        def start(group: int) -> list[BaseProcess]:
            del group
            port, began = free_port(), time.monotonic()
            processes: list[BaseProcess] = [
                CONTEXT.Process(target=train, args=(rank, ranks, port, of_run, log, began))
                for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            return processes

        return supervise(start, 1, [lives], log)

    never = itertools.repeat(float("inf"))
    plain = course("plain", CALIBRATED_SHARE, never)
    steps = gaps(plain.events, "step", "step")
    saves = gaps(plain.events, "saves", "saved")
    last = max(event.at for event in plain.events if event.what == "step")
    ready = next(event.at for event in plain.events if event.what == "ready")
    lives = draw(MTBF_S["training"], SEED + ranks)
    real = course("killed", 1.0, iter(lives))
    total = sum(event.what == "step" for event in real.events)
    manifest = json.loads((folder / f"killed-{ranks}" / "manifest.json").read_text())
    run = TrainingRun(
        steps=num_steps(folder / f"killed-{ranks}"),
        step_s=statistics.median(steps),
        checkpoint_every_steps=EVERY,
        checkpoint_s=statistics.median(saves),
        start_s=ready - plain.began,
        finish_s=max(0.0, plain.ended - last - statistics.median(saves)),
    )
    assert manifest["details"]["world_size"] == ranks
    return compare(
        f"training, {ranks} ranks", real, simulate_training(run, iter(lives)), run, {"steps_taken": total}
    )


def num_steps(output: Path) -> int:
    """The steps of a finished training."""
    return int(json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def export_case(folder: Path, values: dict[str, Any], workers: int) -> dict[str, Any]:
    """An export by so many workers, first without kills, then with kills, and simulated."""
    starts = itertools.count()

    def course(name: str, lives: list[Lifetimes]) -> Course:
        output = folder / f"{name}-{workers}"
        log = output.with_suffix(".jsonl")

        def start(worker: int) -> list[BaseProcess]:
            host, began = f"host-{next(starts)}", time.monotonic()
            of_run = values | {"output": str(output)}
            process = CONTEXT.Process(target=label, args=(worker, workers, host, of_run, log, began))
            process.start()
            return [process]

        return supervise(start, workers, lives, log)

    plain = course("plain-labels", [itertools.repeat(float("inf"))] * workers)
    per_worker = [[event for event in plain.events if event.worker == worker] for worker in range(workers)]
    shards = [gap for events in per_worker for gap in gaps(events, "labels", "labelled")]
    claims = [gap for events in per_worker for gap in gaps(events, "labelled", "labels")]
    ready = [event.at for event in plain.events if event.what == "ready"]
    lives = [draw(MTBF_S["export"], SEED + 10 * workers + worker) for worker in range(workers)]
    real = course("killed-labels", [iter(life) for life in lives])
    run = ExportRun(
        workers=workers,
        shards=SHARDS,
        shard_s=statistics.fmean(shards),
        claim_s=statistics.median(claims),
        start_s=statistics.fmean(ready) - plain.began,
        lease_s=LEASE_S,
        poll_s=POLL_S,
        finish_s=plain.ended - max(event.at for event in plain.events if event.what == "labelled"),
    )
    rng = np.random.default_rng(SEED)
    simulated = simulate_export(run, lambda worker: iter(lives[worker]), rng)
    return compare(f"export, {workers} workers", real, simulated, run, {})


def draw(mtbf_s: float, seed: int) -> list[float]:
    return list(itertools.islice(random_lifetimes(mtbf_s, np.random.default_rng(seed)), 1000))


def compare(
    name: str, real: Course, simulated: Outcome, run: TrainingRun | ExportRun, more: dict[str, Any]
) -> dict[str, Any]:
    found = {
        "wall_s": {"real": real.outcome.wall_s, "simulated": simulated.wall_s},
        "lost_s": {"real": real.outcome.lost_s, "simulated": simulated.lost_s},
        "failures": {"real": real.outcome.failures, "simulated": simulated.failures},
        "wall_off_by": simulated.wall_s / real.outcome.wall_s - 1,
        "lost_off_by": simulated.lost_s / real.outcome.lost_s - 1 if real.outcome.lost_s else None,
        "measured": asdict(run),
        **more,
    }
    print(f"{name}: {json.dumps(found)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=("training", "export"), help="measure one stage; the other's cases stay"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training")
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "KDECS_DEVICE": "cpu"}
    CONTEXT.set_forkserver_preload(
        ["kdecs.teacher.training", "kdecs.teacher.scoring", "kdecs.soft_labels.export"]
    )
    # The server of forked processes imports the libraries once, before anything is timed.
    first = CONTEXT.Process(target=nothing)
    first.start()
    first.join()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = {"train": str(bundled_sample("train")), "valid": str(bundled_sample("valid"))}
        teacher = make_teacher(folder, corpus, 32, 2)
        training = {
            "name": "tiny", "corpus": {**corpus, "valid": str(few_dialogues(folder))},
            "model": {"family": "causal", "base": str(folder / "base")},
            "zero": {"stage": 2, "dtype": "float32"}, "optimization": {"epochs": 1},
            "batches": {"global_batch_pairs": 1623 // arguments.steps, "micro_batch_tokens": 512},
            "checkpoint_every_steps": EVERY, "log_every_steps": 1, "threads_per_rank": 1,
        }  # fmt: skip
        export = {
            "teacher": str(teacher), "corpus": corpus, "num_shards": SHARDS, "lease_s": LEASE_S,
        }  # fmt: skip
        if arguments.only != "export":
            found |= {f"training_{n}": training_case(folder, training, n) for n in (1, 2)}
        if arguments.only != "training":
            found |= {f"export_{n}": export_case(folder, export, n) for n in (1, 2)}
    record = RESULTS / "scale_simulator.json"
    if arguments.only and record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))["details"]["cases"] | found
    worst = max(found.values(), key=lambda case: abs(case["wall_off_by"]))
    write_record(
        "scale_simulator",
        unit="s of wall time",
        ours=worst["wall_s"]["simulated"],
        baseline=worst["wall_s"]["real"],
        baseline_name="the real run, of the case that is furthest off",
        target=TARGET,
        ratio=abs(worst["wall_off_by"]),
        corpus="sample",
        dtype="float32",
        details={
            "meaning": "ratio: how far the simulated time is from the real one, of the worst case; less is better",
            "pads": PADS,
            "mtbf_s": MTBF_S,
            "cases": found,
        },
    )
    if abs(worst["wall_off_by"]) > TARGET:
        raise SystemExit(f"the simulation is off by {abs(worst['wall_off_by']):.0%}")


def few_dialogues(folder: Path) -> Path:
    """Four dialogues to validate on, so that validation takes no time."""
    whole = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    path = folder / "few.json"
    path.write_text(json.dumps(dict(list(whole.items())[:4])), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
