"""Kill -9 of a teacher's training on two ranks, at random points: the same command gives the identical adapter.

One directory is killed and started again until all kills are spent; the run that follows the last one ends and is
compared, bit by bit, with a run that nobody touched. Every second step writes a checkpoint, so that many kills fall
into writing. Every tenth start and the last one go through the deepspeed launcher, the others through the entry
script in forked ranks, since a launcher costs most of a start. Then the same across world sizes: 2 ranks, killed,
1 rank, killed, 2 ranks to the end.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import ForkedPython, free_port, start_forked_ranks

from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.demo.base_model import train_base_model
from kdecs.demo.config import BaseModelConfig
from kdecs.process import StopSignal
from kdecs.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 20
EPOCHS_A_KILL = 0.43
TRAIN = "launch/train_teacher.py"


LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--no_local_rank"]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A config over a tiny LLaMA: 24 steps an epoch, a checkpoint every second, 12 validations an epoch."""
    directory = tmp_path_factory.mktemp("campaign")
    corpus = {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("test"))}
    base = parse_config(
        BaseModelConfig,
        {
            "name": "tiny",
            "output": str(directory / "base"),
            "corpus": corpus,
            "architecture": "llama",
            "vocabulary_size": 800,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "max_positions": 512,
            "max_steps": 3,
            "batch_size": 4,
            "sequence_tokens": 64,
        },
        source="test",
    )
    train_base_model(base, Runtime(0, 0, 1, torch.device("cpu")), StopSignal())
    few = dict(list(json.loads(bundled_sample("valid").read_text()).items())[:4])
    small = directory / "few.json"
    small.write_text(json.dumps(few))
    return {
        "name": "campaign",
        "corpus": {"train": corpus["train"], "valid": str(small)},
        "model": {"family": "causal", "base": str(base.output)},
        "lora": {"rank": 4},
        "zero": {"stage": 2, "dtype": "float32"},
        "batches": {"global_batch_pairs": 10, "micro_batch_tokens": 512, "max_prompt_tokens": 400},
        "optimization": {"learning_rate": 0.002, "epochs": 2},
        "checkpoint_every_steps": 2,
        "validate_per_epoch": 12,
        "log_every_steps": 1,
        "threads_per_rank": 1,
    }


class Training:
    """One output directory, started again and again by the same command."""

    def __init__(self, values: dict, directory: Path, name: str) -> None:
        self.output = directory / name
        self.config = directory / f"{name}.yaml"
        self.config.write_text(yaml.safe_dump({**values, "output": str(self.output)}))
        self.log = directory / f"{name}.log"

    def start(self, ranks: int = 2, *, launched: bool = False) -> "Started":
        if not launched:
            command = (TRAIN, "--config", self.config)
            forked = start_forked_ranks(*command, num_ranks=ranks, log=self.log)
            return Started([psutil.Process(rank.pid) for rank in forked], forked)
        with self.log.open("ab") as log:
            launcher = subprocess.Popen(
                [
                    *LAUNCHER,
                    "--master_port",
                    str(free_port()),
                    TRAIN,
                    "--config",
                    str(self.config),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            )
        return Started([psutil.Process(launcher.pid)], [launcher])

    def finish(self, ranks: int = 2, *, launched: bool = False) -> None:
        codes = self.start(ranks, launched=launched).wait(600)
        assert set(codes) == {0}, self.log.read_text()[-3000:]
        assert (self.output / "manifest.json").is_file()

    def steps(self) -> int:
        path = self.output / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def losses(self) -> list[float]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["train_loss"] for line in lines]

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "adapter_model.safetensors")

    def is_writing(self) -> bool:
        """Whether a checkpoint is there that is not finished."""
        folders = (self.output / "checkpoints").glob("step-*")
        return any(not (folder / "state.json").is_file() for folder in folders)


class Started:
    """The processes of one start: forked ranks, or a launcher with its children."""

    def __init__(
        self, roots: list[psutil.Process], handles: list[ForkedPython] | list[subprocess.Popen]
    ) -> None:
        self.roots = roots
        self.handles = handles

    def has_ended(self) -> bool:
        return all(handle.poll() is not None for handle in self.handles)

    def wait(self, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while not self.has_ended():
            assert time.monotonic() < deadline, "a training hangs"
            time.sleep(0.05)
        return [handle.wait() for handle in self.handles]

    def kill(self, rng: random.Random) -> str:
        """SIGKILL one rank, or all with their launcher; returns when none of them is left."""
        everyone = [*self.roots, *(c for root in self.roots for c in root.children(recursive=True))]
        ranks = self.roots if len(self.roots) > 1 else [p for p in everyone if "-u launch" in _line(p)]
        whom = rng.choice(["one rank", "all"]) if ranks else "all"
        for victim in [rng.choice(ranks)] if whom == "one rank" else everyone:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself just now
                victim.send_signal(signal.SIGKILL)
        # the others find a closed connection, or are ended by the launcher; a hanging one would be a fault
        self.wait(180)
        _, left = psutil.wait_procs(everyone, timeout=60)
        assert not left, [p.cmdline() for p in left]
        return whom


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def strike(training: Training, started: Started, rng: random.Random, where: str, last: int) -> list[str]:
    """Kill at a random moment of the kind `where`; says what was hit and whom."""
    before = training.steps()
    wanted = rng.randint(1, max(1, (last - before) // 6))
    deadline = time.monotonic() + 300
    if where == "start":
        ends = time.monotonic() + rng.uniform(0.5, 6)
        # a fast machine may be at work by then
        while not started.has_ended() and time.monotonic() < ends and training.steps() <= before:
            time.sleep(0.005)
    else:
        # metrics.jsonl is cut back at a resume, so the count may fall first
        while not started.has_ended() and time.monotonic() < deadline and training.steps() < before + wanted:
            time.sleep(0.005)
        if where == "writing":
            while not started.has_ended() and time.monotonic() < deadline and not training.is_writing():
                pass
        else:
            time.sleep(rng.uniform(0, 0.3))
    assert not started.has_ended(), "the run ended before its kill"
    writing, steps = training.is_writing(), training.steps()
    whom = started.kill(rng)
    return ["writing a checkpoint" if writing else "starting" if steps <= before else "a step", whom]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(2400)
def test_killed_trainings_end_with_the_adapter_of_the_untouched_one(
    values: dict,
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Callable[[str, dict[str, float | int | str]], None],
) -> None:
    epochs = max(
        3, round(EPOCHS_A_KILL * num_faults(NUM_KILLS))
    )  # so that the last kill still finds it at work
    values = {**values, "optimization": {**values["optimization"], "epochs": epochs}}
    straight = Training(values, tmp_path, "straight")
    straight.finish()
    num_steps = len(straight.losses())
    training = Training(values, tmp_path, "killed")
    hits: Counter[str] = Counter()
    num_kills = 0
    while num_kills < num_faults(NUM_KILLS):
        where = rng.choice(["start", "step", "writing", "writing"])
        started = training.start(launched=num_kills % 10 == 1)
        moment, whom = strike(training, started, rng, where, num_steps)
        num_kills += 1
        hits.update([f"kills while {moment}", f"kills of {whom}"])
    training.finish(launched=True)
    assert training.losses() == straight.losses()
    ours, theirs = training.adapter(), straight.adapter()
    identical = set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    log = training.log.read_text()
    record_campaign(
        "teacher_kills",
        {
            "ranks": 2,
            "zero_stage": values["zero"]["stage"],
            "steps": num_steps,
            "kills": num_kills,
            **dict(sorted(hits.items())),
            "resumed from a checkpoint": log.count("resumed at step"),
            "adapter identical": int(identical),
        },
    )
    assert identical


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_kills_on_the_way_through_other_world_sizes_change_rounding_only(
    values: dict,
    tmp_path: Path,
    rng: random.Random,
    num_faults: Callable[[int], int],
    record_campaign: Callable[[str, dict[str, float | int | str]], None],
) -> None:
    if num_faults(NUM_KILLS) < NUM_KILLS:
        pytest.skip("whole campaigns only: tests/teacher/test_launch.py goes through other world sizes too")
    # Many small trees a batch: with two, one rank and two would sum to the same bits.
    values = {**values, "batches": {**values["batches"], "global_batch_pairs": 24, "micro_batch_tokens": 200}}
    values["optimization"] = {**values["optimization"], "epochs": 4}
    straight = Training(values, tmp_path, "straight")
    straight.finish()
    num_steps = len(straight.losses())
    training = Training(values, tmp_path, "worlds")
    for ranks in (2, 1):
        strike(training, training.start(ranks), rng, "step", num_steps)
    training.finish(2)
    log = training.log.read_text()
    assert log.count("resumed at step") == 2
    ours, theirs = training.losses(), straight.losses()
    error = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    adapter, expected = training.adapter(), straight.adapter()
    norm = sum(float(tensor.norm() ** 2) for tensor in expected.values()) ** 0.5
    apart = sum(float((adapter[name] - expected[name]).norm() ** 2) for name in expected) ** 0.5 / norm
    record_campaign(
        "teacher_worlds",
        {
            "ranks": "2, 1, 2",
            "steps": num_steps,
            "kills": 2,
            "greatest relative difference of losses": error,
            "difference of adapters by norm": apart,
        },
    )
    assert error < 1e-4
    assert apart < 1e-3
