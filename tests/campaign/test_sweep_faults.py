"""Sweeps under faults: trials, a Ray node, MLflow and the driver are killed, and nothing is lost or doubled.

Each round is one sweep of tiny students by the real command on a Ray cluster of several nodes on this machine, with a
real MLflow server. Every fault of the round strikes while trials train. Its end is compared with trainings of the same
configs that nothing disturbed.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import free_port, wait_until

from kdecs.artifact import verify_artifact
from kdecs.config import load_config, parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.space import Space
from kdecs.sweep.status import read_results
from kdecs.tracking.record import read_points

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("trial", "node", "mlflow", "driver")
NUM_ROUNDS = 5
EPOCHS = 20
UNTIMED = ("time", "train_pairs_per_s")
Record = Callable[[str, dict[str, float | int | str]], None]


class EndedEarlyError(Exception):
    """The sweep ended before all faults had struck: a fast machine; the trainings must be longer."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base that was never trained, and few dialogues."""
    from kdecs.demo.base_model import train_base_model
    from kdecs.demo.config import BaseModelConfig
    from kdecs.process import StopSignal
    from kdecs.runtime import start_runtime

    folder = tmp_path_factory.mktemp("inputs")
    files = {}
    for split, count in (("train", 10), ("valid", 3)):
        raw = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        files[split] = folder / f"{split}.json"
        files[split].write_text(json.dumps({key: raw[key] for key in list(raw)[:count]}))
    values = {
        "name": "base",
        "output": str(folder / "base"),
        "corpus": {split: str(path) for split, path in files.items()},
        "architecture": "roberta",
        "hidden_size": 32,
        "num_layers": 2,
        "max_steps": 1,
        "threads": 1,
    }
    train_base_model(
        parse_config(BaseModelConfig, values, source="test"), start_runtime(device="cpu"), StopSignal()
    )
    return {**files, "base": folder / "base"}


def sweep_values(output: Path, inputs: dict[str, Path], epochs: int) -> dict[str, Any]:
    return {
        "name": "faults",
        "output": str(output),
        "student": {
            "corpus": {"train": str(inputs["train"]), "valid": str(inputs["valid"])},
            "model": {"base": str(inputs["base"]), "span_head": "pointer", "max_prompt_tokens": 96},
            "distillation": {"mode": "joint"},
            "optimization": {"epochs": epochs, "learning_rate": 1e-3},
        },
        "space": {"distillation.alpha": {"grid": [0.4, 0.6]}, "optimization.seed": {"grid": [0, 1]}},
        "report": False,
    }


@pytest.fixture(scope="module")
def quiet(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], list[dict[str, Any]]]:
    """The points of a config's training that nothing disturbs; each is trained once."""
    from kdecs.runtime import start_runtime
    from kdecs.student.config import StudentConfig
    from kdecs.student.training import train_student

    folder = tmp_path_factory.mktemp("quiet")
    known: dict[str, list[dict[str, Any]]] = {}

    def points(trial: Path) -> list[dict[str, Any]]:
        if trial.name not in known:
            config = load_config(StudentConfig, trial / "config.json")
            update = {"output": folder / trial.name, "cache": folder / "cache"}
            output = train_student(config.model_copy(update=update), start_runtime(device="cpu", threads=1))
            known[trial.name] = read_points(output / "metrics.jsonl")
        return known[trial.name]

    return points


class Rig:
    """A Ray cluster, an MLflow server and a sweep's driver, and ways to hurt them."""

    def __init__(self, folder: Path, values: dict[str, Any], rng: random.Random) -> None:
        from ray.cluster_utils import Cluster

        self.rng = rng
        self.folder = folder
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "KDECS_DEVICE": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as cluster/mlflow/serve.sh does
        }
        os.environ.update(self.environment)  # Ray's nodes inherit it
        self.port = free_port()
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        values = {
            **values,
            "ray_address": self.cluster.address,
            "tracking": {"uri": f"http://127.0.0.1:{self.port}"},
        }
        self.path = folder / "space.json"
        self.path.write_text(json.dumps(values))
        self.config = load_config(SweepConfig, self.path)
        self.trials = [trial.directory for trial in Space(self.config).trials()]
        self.server = self.start_server()
        self.driver = self.start_driver()

    def start_server(self) -> "subprocess.Popen[bytes]":
        log = (self.folder / "mlflow.log").open("ab")
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        return server

    def is_answering(self) -> bool:
        with contextlib.suppress(OSError, urllib.error.URLError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).status == 200
        return False

    def start_driver(self) -> "subprocess.Popen[bytes]":
        log = (self.folder / "driver.log").open("ab")
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tune" / "sweep.py"), str(self.path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )

    def epochs_done(self) -> int:
        return sum(len(read_points(trial / "metrics.jsonl")) for trial in self.trials)

    def workers(self) -> dict[int, Path]:
        """Processes that train now, by the log that their output goes to."""
        found = {}
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error, OSError):
                target = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
                if target.name == "log.txt" and target.parent in self.trials:
                    found[process.pid] = target.parent
        return found

    def hurt(self, kind: str, epochs: int) -> None:
        """A fault while trials train, more than so many epochs done; EndedEarlyError where the sweep has ended."""

        def victims() -> list[int]:
            if (code := self.driver.poll()) is not None:
                assert code == 0, (self.folder / "driver.log").read_text(errors="replace")
                raise EndedEarlyError
            return sorted(self.workers()) if self.epochs_done() > epochs else []

        def kill_one() -> bool:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself just now
                if training := victims():
                    os.kill(self.rng.choice(training), signal.SIGKILL)
                    return True
            return False

        wait_until(kill_one if kind == "trial" else victims, f"trials train, to hurt {kind}", 600, poll_s=0.1)
        if kind != "trial":
            getattr(self, f"hurt_{kind}")()

    def hurt_node(self) -> None:
        node = self.nodes.pop(self.rng.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def hurt_mlflow(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        time.sleep(self.rng.uniform(2, 6))
        self.server = self.start_server()

    def hurt_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()
        time.sleep(self.rng.uniform(0, 2))
        self.driver = self.start_driver()

    def close(self) -> None:
        for process in (self.driver, self.server):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.cluster.shutdown()


@contextlib.contextmanager
def rig(folder: Path, values: dict[str, Any], rng: random.Random) -> Iterator[Rig]:
    before = dict(os.environ)
    made = Rig(folder, values, rng)
    try:
        yield made
    finally:
        made.close()
        os.environ.clear()
        os.environ.update(before)


def check(made: Rig, quiet: Callable[[Path], list[dict[str, Any]]]) -> Counter[str]:
    """What was lost or is double, by comparison with quiet trainings; all zero is what is wanted."""
    from mlflow import MlflowClient

    counts: Counter[str] = Counter(trials_lost=0, metrics_lost=0, duplicates=0, epochs_resumed=0)
    results = read_results(made.config.output)
    counts["trials_lost"] += sum(result.status != "complete" for result in results)
    counts["trials_lost"] += sum(bool(verify_artifact(trial)) for trial in made.trials)
    client = MlflowClient(f"http://127.0.0.1:{made.port}")
    experiment = client.get_experiment_by_name("kdecs")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    # The sweep's own run counts as the trial "none".
    by_trial = Counter(run.data.tags.get("kdecs.trial") or run.data.tags["kdecs.setting_id"] for run in runs)
    counts["duplicates"] += sum(number - 1 for number in by_trial.values())
    counts["trials_lost"] += sum(trial.name not in by_trial for trial in made.trials)
    for run in runs:
        assert run.info.status == "FINISHED"
        if run.data.tags["kdecs.kind"] != "trial":
            continue
        trial = next(path for path in made.trials if path.name == run.data.tags["kdecs.trial"])
        written, expected = read_points(trial / "metrics.jsonl"), quiet(trial)
        assert [point["epoch"] for point in written] == list(range(1, len(expected) + 1))
        for ours, theirs in zip(written, expected, strict=True):
            for key in theirs.keys() - set(UNTIMED):
                assert ours[key] == theirs[key], (
                    f"{trial.name} epoch {ours['epoch']}: {key} differs from a quiet run"
                )
        for key in expected[0].keys() - {"epoch", "step", "time"}:
            history = client.get_metric_history(run.info.run_id, key)
            got = Counter((metric.step, round(metric.value, 9)) for metric in history)
            wanted = Counter((point["epoch"], round(point[key], 9)) for point in written)
            counts["metrics_lost"] += (wanted - got).total()
            counts["duplicates"] += (got - wanted).total()
        counts["epochs_resumed"] += (trial / "log.txt").read_text(errors="replace").count("resumed at step")
    return counts


def one_round(
    folder: Path,
    values: dict[str, Any],
    kinds: list[str],
    rng: random.Random,
    quiet: Callable[[Path], list[dict[str, Any]]],
) -> Counter[str]:
    """One sweep under faults of these kinds, to its end and once more; what was lost or is double."""
    folder.mkdir()
    with rig(folder, values, rng) as made:
        wait_until(made.is_answering, "MLflow's server answers", 600, poll_s=0.1)
        done = 0
        for kind in kinds:
            made.hurt(kind, done)
            done = made.epochs_done() + 1
        wait_until(lambda: made.driver.poll() is not None, "the sweep has ended", 1200, poll_s=0.1)
        log = (folder / "driver.log").read_text(errors="replace")
        assert made.driver.returncode == 0, log
        assert "Traceback" not in log
        wait_until(made.is_answering, "MLflow's server answers", 600, poll_s=0.1)
        # The same command uploads what a server that was away at the end did not get.
        again = made.start_driver()
        assert again.wait(600) == 0
        return check(made, quiet)


def test_sweeps_lose_nothing(
    inputs: dict[str, Path],
    quiet: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    num_faults: Callable[[int], int],
    rng: random.Random,
    record_campaign: Record,
) -> None:
    began = time.monotonic()
    totals: Counter[str] = Counter()
    epochs = EPOCHS
    for number in range(num_faults(NUM_ROUNDS)):
        kinds = list(KINDS)
        rng.shuffle(kinds)
        while True:
            folder = tmp_path / f"round{number}-{epochs}"
            try:
                counts = one_round(
                    folder, sweep_values(folder / "runs" / "sweep", inputs, epochs), kinds, rng, quiet
                )
                break
            except EndedEarlyError:
                assert epochs < 50 * EPOCHS, "sweeps end before their faults strike, however long they are"
                epochs *= 2
                print(
                    f"round {number} ended before its faults had struck: again, {epochs} epochs", flush=True
                )
                shutil.rmtree(folder)
        shutil.rmtree(folder)
        totals.update(counts)
        totals.update(f"{kind}_faults" for kind in kinds)
        print(f"round {number}: {kinds}, {dict(counts)}", flush=True)
    record_campaign(
        "sweep", {**totals, "rounds": num_faults(NUM_ROUNDS), "seconds": round(time.monotonic() - began)}
    )
    assert all(totals[f"{kind}_faults"] >= num_faults(NUM_ROUNDS) for kind in KINDS)
    assert totals["epochs_resumed"] > 0, "no trial was resumed from its checkpoint"
    assert (totals["trials_lost"], totals["metrics_lost"], totals["duplicates"]) == (0, 0, 0)
