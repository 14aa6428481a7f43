"""Sweeps by a real, small Ray: dying trials, a killed or stopped driver."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support import wait_until

from kdecs.sweep import commands
from kdecs.sweep.search import read_suggestions
from kdecs.sweep.space import Space
from kdecs.sweep.status import read_note, read_results
from kdecs.tracking.record import read_points

pytestmark = pytest.mark.slow
DRIVE = Path(__file__).with_name("drive.py")


def drive(config, tmp_path, **behaviour):
    path = tmp_path / "sweep.json"
    path.write_text(config.model_dump_json())
    # No home directory, as in many containers: Ray keeps nothing in it.
    environment = {**os.environ, "FAKE_TRAINER": json.dumps(behaviour), "HOME": "/nonexistent"}
    return subprocess.Popen(
        [sys.executable, str(DRIVE), str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def epochs_written(config):
    return sum(bool(read_points(trial.directory / "metrics.jsonl")) for trial in Space(config).trials())


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


def check_private(driver):
    """Ray's servers listen on loopback alone, and no other user can read the token or enter Ray's directory."""
    processes = [p for p in psutil.Process(driver).children(recursive=True) if p.status() != "zombie"]
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4 and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    [raylet] = [process for process in processes if process.name() == "raylet"]
    token = Path(raylet.environ()["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def check_whole(config, runs):
    results = read_results(config.output)
    assert {result.status for result in results} == {"complete"}
    client, parents, children = runs
    assert len(parents) == 1
    assert set(children) == {trial.id for trial in Space(config).trials()}
    for run in children.values():
        assert run.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")] == [1, 2, 3]


def test_killed_trials_resume_and_failing_ones_are_listed(make_config, uri, runs_of, tmp_path):
    config = make_config(
        space={"optimization.seed": {"grid": [0, 1, 2, 3]}, "teacher": {"grid": ["t5-tiny"]}}
    )
    process = drive(config, tmp_path, kill_once=[1], kill=[0], refuse=[2], kill_early=[3])
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, (out, err)
    assert err.count("\n") == 1 and err.startswith("kdecs: error: 2 of 4 trials failed")
    assert "the process died without an error message" in err and "the loss is not finite" in err
    trials = json.loads((config.output / "trials.json").read_text())
    found = [(t["status"], t["attempts"]) for t in trials]
    assert found == [("complete", 4), ("complete", 2), ("failed", 1), ("failed", 2)]
    log = (Space(config).trials()[1].directory / "log.txt").read_text()
    assert "seed 1: from epoch 0" in log and "seed 1: from epoch 1" in log and "with 1 threads" in log
    assert "Traceback" not in out + err and "raylet" not in out + err

    process = drive(config, tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    check_whole(config, runs_of(uri))
    assert not list(config.output.glob(".ray.*"))


def test_a_driver_that_was_stopped_and_then_killed_goes_on(make_config, uri, runs_of, tmp_path):
    config = make_config(space={"optimization.seed": {"grid": [0, 1, 2]}, "teacher": {"grid": ["t5-tiny"]}})
    process = drive(config, tmp_path, epoch_s=6.0)  # so that the stop comes long before a trial ends
    wait_until(lambda: epochs_written(config) >= 2, "two trials have an epoch", 400, poll_s=0.1)
    check_private(process.pid)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a scheduler does
    _, err = process.communicate(timeout=240)
    assert process.returncode == 143, err
    assert err.count("\n") == 1 and "run the same command again" in err
    wait_until(lambda: not ray_processes(config), "the Ray process has ended", 400, poll_s=0.1)
    done_before = epochs_written(config)
    assert done_before >= 2
    process = drive(config, tmp_path, epoch_s=6.0)
    wait_until(
        lambda: epochs_written(config) > done_before, "a resumed trial has another epoch", 400, poll_s=0.1
    )
    process.kill()
    process.communicate(timeout=240)
    wait_until(lambda: not ray_processes(config), "the Ray process has ended", 400, poll_s=0.1)
    process = drive(config, tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    check_whole(config, runs_of(uri))
    logs = "".join((t.directory / "log.txt").read_text() for t in Space(config).trials())
    assert "from epoch 1" in logs or "from epoch 2" in logs, "nothing was resumed"


def test_asha_stops_poor_settings_and_survivors_get_all_seeds(make_config, uri, runs_of, tmp_path):
    config = make_config(
        student={**make_config().student, "optimization": {"epochs": 4}},
        space={
            "distillation.alpha": {"grid": [0.6, 0.58, 0.0, 0.05, 0.1, 1.0]},
            "teacher": {"grid": ["t5-tiny"]},
            "optimization.seed": {"grid": [0, 1]},
        },
        search={"method": "two-stage", "survivors": 2, "grace_epochs": 1, "reduction_factor": 2},
    )
    process = drive(config, tmp_path, epoch_s=0.5)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, (out, err)
    results = read_results(config.output)
    pruned = [result for result in results if result.status == "pruned"]
    assert pruned and all(result.stage == "search" and result.epoch < 4 for result in pruned)
    assert "stopped by the search after" in out
    compared = [result for result in results if result.is_compared]
    # Which setting comes first to a rung, and so is not stopped there, depends on the machine; the best survives.
    alphas = {result.settings["distillation.alpha"] for result in compared}
    assert 0.6 in alphas and len(alphas) == 2
    assert len(compared) == 4
    _, parents, children = runs_of(uri)
    assert len(parents) == 1 and len(children) == len(results)
    states = [children[result.id].data.tags["kdecs.state"] for result in results]
    assert states == [result.status for result in results]


def test_tpe_goes_on_after_its_driver_was_killed(make_config, uri, runs_of, tmp_path):
    pytest.importorskip("optuna")
    config = make_config(
        space={
            "distillation.alpha": {"uniform": [0.0, 1.0]},
            "distillation.temperature": {"choice": [1.0, 2.0, 4.0]},
            "teacher": {"grid": ["t5-tiny"]},
            "optimization.seed": {"grid": [0, 1]},
        },
        search={"method": "tpe", "num_trials": 6, "startup_trials": 3, "survivors": 1},
    )
    process = drive(config, tmp_path, epoch_s=1.0)
    wait_until(
        lambda: (
            len(read_suggestions(config.output)) >= 2
            and any(read_points(path) for path in config.output.glob("trials/*/metrics.jsonl"))
        ),
        "two points are suggested and one has an epoch",
        400,
        poll_s=0.1,
    )
    process.kill()
    process.communicate(timeout=240)
    wait_until(lambda: not ray_processes(config), "the Ray process has ended", 400, poll_s=0.1)
    before = read_suggestions(config.output)
    process = drive(config, tmp_path)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, (out, err)
    points = read_suggestions(config.output)
    assert points[: len(before)] == before and len(points) == 6
    results = read_results(config.output)
    assert len(results) == 7, "six of the search, and the second seed of the survivor"
    best = max((r for r in results if r.seed == 0), key=lambda r: r.score)
    assert {r.settings["distillation.alpha"] for r in results if r.is_compared} == {
        best.settings["distillation.alpha"]
    }
    _, parents, children = runs_of(uri)
    assert len(parents) == 1 and len(children) == 7


def test_a_person_stops_resumes_drops_and_adds_while_it_trains(make_config, uri, runs_of, tmp_path):
    """Through the command's own functions, in another process than the driver and its Ray."""
    config = make_config(
        space={
            "distillation.alpha": {"grid": [0.3, 0.6]},
            "optimization.seed": {"grid": [0, 1]},
            "teacher": {"grid": ["t5-tiny"]},
        }
    )
    first, second, third, fourth = Space(config).trials()
    process = drive(config, tmp_path, epoch_s=3.0)
    wait_until(lambda: epochs_written(config) >= 2, "two trials have an epoch", 400, poll_s=0.1)
    commands.stop(config.output, [first.label])
    commands.drop(config.output, [third.label])
    commands.add(config.output, ["distillation.alpha=0.9"])

    def is_held():
        run = runs_of(uri)[2].get(first.id)
        return run is not None and run.data.tags["kdecs.state"] == "held"

    wait_until(is_held, "MLflow says that the first trial is held", 60, poll_s=0.5)
    assert read_note(first.directory).status == "stopped"
    commands.resume(config.output, [first.id])
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    found = {result.label: (result.status, result.attempts) for result in read_results(config.output)}
    assert found == {
        first.label: ("complete", 2),
        second.label: ("complete", 1),
        third.label: ("dropped", 0),
        fourth.label: ("complete", 1),
        "t5-tiny α0.9 τ2 s0": ("complete", 1),
        "t5-tiny α0.9 τ2 s1": ("complete", 1),
    }
    assert "from epoch 1" in (first.directory / "log.txt").read_text()
    log = (config.output / "ray.log").read_text()
    assert log.count("Traceback") == 0, log
    assert f"{first.label}: stopped by hand" in out and f"{first.label}: resumed" in out
    assert "joining the queue: t5-tiny α0.9 τ2 s0, t5-tiny α0.9 τ2 s1" in out
    _, [parent], children = runs_of(uri)
    assert parent.info.status == "FINISHED" and third.id not in children, (
        "a trial that never began has no run"
    )
    assert {run.data.tags["kdecs.state"] for run in children.values()} == {"complete"}
