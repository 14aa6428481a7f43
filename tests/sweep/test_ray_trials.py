"""Sweeps by a real, small Ray: dying trials, a killed or stopped driver."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdecs.sweep.results import read_results
from kdecs.sweep.space import enumerate_trials

pytestmark = pytest.mark.slow
DRIVE = Path(__file__).with_name("drive.py")


def drive(config, tmp_path, **behaviour):
    path = tmp_path / "sweep.json"
    path.write_text(config.model_dump_json())
    environment = {**os.environ, "FAKE_TRAINER": json.dumps(behaviour)}
    return subprocess.Popen(
        [sys.executable, str(DRIVE), str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, timeout_s=90.0):
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.1)


def epochs_written(config):
    return sum(1 for trial in enumerate_trials(config) if (trial.directory / "metrics.jsonl").exists())


def ray_processes(config):
    """Processes that train for this sweep: their command or environment names its plan."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(config.output) in command:
                found.append(int(folder.name))
    return found


def check_whole(config, runs):
    results = read_results(config.output)
    assert {result.status for result in results} == {"complete"}
    client, parents, children = runs
    assert len(parents) == 1
    assert set(children) == {trial.id for trial in enumerate_trials(config)}
    for run in children.values():
        assert run.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")] == [1, 2, 3]


def test_killed_trials_resume_and_failing_ones_are_listed(make_config, uri, runs_of, tmp_path):
    config = make_config(
        space={"optimization.seed": {"grid": [0, 1, 2, 3]}, "teacher": {"grid": ["t5-tiny"]}}
    )
    process = drive(config, tmp_path, kill_once=[1], refuse=[2], kill=[3])
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1, (out, err)
    assert err.count("\n") == 1 and err.startswith("kdecs: error: 2 of 4 trials failed")
    assert "the process died without a word" in err and "the loss is not finite" in err
    trials = json.loads((config.output / "trials.json").read_text())
    assert [(t["status"], t["attempts"]) for t in trials] == [
        ("complete", 2),
        ("complete", 2),
        ("failed", 1),
        ("failed", 2),
    ] or [t["status"] for t in trials] == ["complete", "complete", "failed", "failed"]
    log = (enumerate_trials(config)[1].directory / "log.txt").read_text()
    assert "seed 1: from epoch 0" in log and "seed 1: from epoch 1" in log and "with 1 threads" in log
    assert "Traceback" not in out + err and "raylet" not in out + err

    process = drive(config, tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    check_whole(config, runs_of(uri))
    assert not list(config.output.glob(".ray"))


@pytest.mark.parametrize("how", ["group-term", "kill"])
def test_stopped_or_killed_driver_goes_on(make_config, uri, runs_of, tmp_path, how):
    config = make_config(space={"optimization.seed": {"grid": [0, 1, 2]}, "teacher": {"grid": ["t5-tiny"]}})
    process = drive(config, tmp_path, epoch_s=1.5)
    wait_for(lambda: epochs_written(config) >= 2)
    if how == "kill":
        process.kill()
        process.communicate(timeout=60)
    else:
        os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a scheduler does
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert err.count("\n") == 1 and "run the same command again" in err
    wait_for(lambda: not ray_processes(config), 60)
    done_before = epochs_written(config)
    assert done_before >= 2
    process = drive(config, tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    check_whole(config, runs_of(uri))
    logs = "".join((t.directory / "log.txt").read_text() for t in enumerate_trials(config))
    assert "from epoch 1" in logs or "from epoch 2" in logs, "nothing was resumed"
