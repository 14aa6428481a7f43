"""launch/train_student.py as people start it: killed without warning, and under torchrun."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, child_environment, run_forked, run_forked_ranks, start_forked

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.student.training import train_student

pytestmark = pytest.mark.slow
SCRIPT = "launch/train_student.py"
STEPS_AN_EPOCH = 99


@pytest.fixture
def long_config(make_config):
    """A config of many small steps, so that a kill hits within an epoch."""

    def make(output: str):
        config = make_config(
            output,
            batches={"global_batch_pairs": 1},
            optimization={"learning_rate": 1e-3, "epochs": 4},
            threads=1,
        )
        path = config.output.with_suffix(".yaml")
        path.write_text(config.model_dump_json())
        return config, path

    return make


def test_a_training_killed_within_an_epoch_ends_with_the_weights_of_a_whole_one(long_config, runtime):
    whole = train_student(long_config("whole")[0], runtime)
    config, path = long_config("killed")
    started = start_forked(SCRIPT, "--config", path)
    metrics = config.output / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.is_file() and metrics.read_text()):
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # some steps into the second epoch
    started.send_signal(signal.SIGKILL)
    assert started.wait(timeout=60) == -signal.SIGKILL
    seen = metrics.read_text()
    assert not (config.output / "manifest.json").exists()
    done = run_forked(SCRIPT, "--config", path, timeout_s=400)
    assert done.returncode == 0, done.stderr
    # By the kill a fast machine may have ended the second epoch too, or saved it without its line.
    epochs = len(seen.splitlines())
    resumed = re.search(r"resumed at step (\d+)\n", done.stdout)
    assert resumed and int(resumed.group(1)) in (STEPS_AN_EPOCH * epochs, STEPS_AN_EPOCH * (epochs + 1))
    assert metrics.read_text().startswith(seen)
    for file in ("model/model.safetensors", "heads.safetensors"):
        expected, found = load_file(whole / file), load_file(config.output / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (whole / "student.json").read_bytes() == (config.output / "student.json").read_bytes()
    assert verify_artifact(config.output) == []
    assert "complete" in run_forked(SCRIPT, "--config", path, timeout_s=240).stdout


@pytest.mark.dist
def test_two_ranks_of_torchrun_train_one_student(make_config):
    config = make_config(optimization={"learning_rate": 1e-3, "epochs": 1}, threads=1)
    path = config.output.with_suffix(".yaml")
    path.write_text(config.model_dump_json())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, SCRIPT, "--config", str(path)],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("training on 99 pairs") == done.stdout.count("student of epoch 1") == 1
    assert verify_artifact(config.output) == []
    (line,) = (config.output / "metrics.jsonl").read_text().splitlines()
    assert (
        read_manifest(config.output, "student").details["valid"]["macro_f1"] == json.loads(line)["macro_f1"]
    )
    again = run_forked_ranks(SCRIPT, "--config", path)
    assert again.stdout.count("complete") == 1
