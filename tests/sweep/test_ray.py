"""The Ray process: what it gives its trials' processes, when it begins and waits. No Ray is started."""

import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kdecs.artifact import file_lock
from kdecs.config import write_config
from kdecs.errors import DeviceError
from kdecs.sweep import ray as sweep_ray
from kdecs.sweep.control import Control
from kdecs.sweep.ray import (
    _Queue,
    limit_gpu_memory,
    most_epochs,
    private_directory,
    ray_storage,
    train_stage,
    worker_environment,
    write_token,
)
from kdecs.sweep.status import TrialNote
from kdecs.sweep.trial import OUT_OF_MEMORY, RAY_LOCK_NAME, STAGE_NAME, StageRun, TrialRun


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, "1"), (1, "1"), (3.5, "3")])
def test_threads_are_divided(make_config, cpus, threads):
    environment = worker_environment(make_config(cpus_per_trial=cpus))
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == threads


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_the_threads_of_a_worker_share_one_arena(make_config):
    """What a trial's thread has freed serves the next trial's, since they allocate in one place."""
    script = """
import ctypes, threading
ended = threading.Event()
started = threading.Barrier(9)
for _ in range(8):
    threading.Thread(target=lambda: (bytearray(100_000), started.wait(), ended.wait()), daemon=True).start()
started.wait()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = {**plain, **worker_environment(make_config())}
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert found.count("<heap nr=") == 1, found


@pytest.mark.parametrize(("gpus", "is_shared"), [(0, False), (0.5, True), (1, False)])
def test_trials_that_share_a_gpu_get_segments_that_grow(make_config, gpus, is_shared):
    environment = worker_environment(make_config(gpus_per_trial=gpus))
    assert (environment.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True") == is_shared
    assert ("PYTORCH_CUDA_ALLOC_CONF" in environment) == is_shared


def test_the_limit_is_the_share_less_the_context(monkeypatch):
    import torch

    set_to = []
    total = 80 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": total})
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    limit_gpu_memory(0.5)
    limit_gpu_memory(1)
    limit_gpu_memory(2)
    [fraction] = set_to
    assert fraction * total == pytest.approx(0.5 * total - (600 << 20)), "whole GPUs are not limited"


def test_a_gpu_that_torch_does_not_see_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"0\.5 GPU"):
        limit_gpu_memory(0.5)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, None), (1, None)])
def test_a_trial_without_a_gpu_does_not_see_the_hosts(make_config, gpus, device):
    assert worker_environment(make_config(gpus_per_trial=gpus)).get("KDECS_DEVICE") == device


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 3),
        ({"variants": {"long": {"optimization.epochs": 7}, "short": {"optimization.epochs": 2}}}, 7),
        ({"variants": {"long": {"optimization": {"epochs": 8}}}}, 8),
        ({"space": {"optimization.epochs": {"grid": [5, 4]}, "teacher": {"grid": ["t5-tiny"]}}}, 5),
        ({"space": {"optimization.steps": {"grid": [None, 100]}, "teacher": {"grid": ["t5-tiny"]}}}, 10),
        ({"variants": {"often": {"optimization.steps": 90, "optimization.validate_every_steps": 4}}}, 23),
        ({"baselines": {"KEC": {"system": "kec", "optimization.epochs": 9}}}, 9),
        ({"baselines": {"LM": {"system": "generative", "model.base": "x", "validate_per_epoch": 4}}}, 12),
    ],
)
def test_no_trial_is_stopped_for_having_come_to_its_end(make_config, changes, expected):
    assert most_epochs(make_config(**changes)) == expected


@pytest.fixture
def stage(make_config):
    """A stage of this process' parent, so that this process is no orphan."""
    config = make_config()
    config.output.mkdir(parents=True)
    write_config(config, config.output)
    run = TrialRun(stop_file=config.output / ".stop-1-2", store=config.student_store)
    return StageRun(sweep=config.output, run=run, trials=(), driver=os.getppid())


@pytest.fixture
def starts(monkeypatch):
    """The storage of each start of Ray, which is not started."""
    found = []
    monkeypatch.setattr(sweep_ray, "_start_ray", lambda *arguments: None)
    monkeypatch.setattr(sweep_ray, "_fit", lambda stage, config: found.append(ray_storage(stage)))
    return found


def test_a_start_waits_for_the_trials_of_an_earlier_one(stage, starts, monkeypatch):
    monkeypatch.setattr(sweep_ray, "_LOCK_POLL_S", 0.05)
    killed = stage.sweep / ".ray.stop-0-1"
    killed.mkdir()
    with file_lock(stage.sweep / RAY_LOCK_NAME):
        thread = threading.Thread(target=train_stage, args=(stage,))
        thread.start()
        time.sleep(0.3)
        assert starts == []
    thread.join()
    assert starts == [ray_storage(stage)] and not killed.exists()


def test_each_sweep_has_a_private_place_and_removes_what_its_killed_process_left(
    tmp_path, tmp_path_factory, monkeypatch
):
    place = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(sweep_ray, "_LONGEST_TEMPORARY", len(str(place)))
    first, other = private_directory(tmp_path / "a"), private_directory(tmp_path / "b")
    tokens = [write_token(first), write_token(other)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (first, other)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tokens} == {0o600}
    assert len({path.read_text() for path in tokens}) == 2 and all(len(p.read_text()) == 64 for p in tokens)
    link = first.with_name(first.name[:-1])  # a name like those of this sweep, made by somebody else
    link.symlink_to(other)
    again = private_directory(tmp_path / "a")
    assert not first.exists() and again.is_dir() and link.is_symlink() and tokens[1].exists()


def test_a_deep_temporary_directory_is_not_for_rays_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = private_directory(tmp_path / "sweep")
    try:
        assert found.parent == Path("/tmp")
    finally:
        found.rmdir()


@pytest.mark.parametrize("address", [None, "192.0.2.1:6379"])
def test_only_a_ray_of_its_own_gets_the_sweeps_token(make_config, tmp_path, monkeypatch, address):
    asked = []
    monkeypatch.setattr(sweep_ray.ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(sweep_ray.ray, "cluster_resources", lambda: {})
    users = {"RAY_AUTH_TOKEN": "the cluster's", "RAY_AUTH_TOKEN_PATH": "/the/clusters"}
    environment = {**os.environ, **users}
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(DeviceError):
        sweep_ray._start_ray(make_config(ray_address=address), tmp_path, tmp_path / "stop")
    [options] = asked
    token = tmp_path / "token"
    if address:
        assert environment.items() >= users.items() and not token.exists()
    else:
        assert "RAY_AUTH_TOKEN" not in environment and environment["RAY_AUTH_TOKEN_PATH"] == str(token)
        # Ray makes its own directory writable by all; the one above it stays as it is
        assert Path(options["_temp_dir"]).parent == tmp_path and options["include_dashboard"] is False


def test_an_orphan_begins_nothing(stage, starts, monkeypatch):
    train_stage(stage.model_copy(update={"driver": 1 << 22}))
    assert starts == []
    # the driver is killed while Ray starts
    monkeypatch.setattr(os, "getppid", iter([stage.driver, 1]).__next__)
    train_stage(stage)
    assert starts == []


def test_a_stopped_start_does_not_wait(stage, starts):
    stage.run.stop_file.touch()
    with file_lock(stage.sweep / RAY_LOCK_NAME):
        train_stage(stage)
    assert starts == []


@pytest.mark.parametrize("is_memory", [True, False])
def test_only_a_worker_killed_for_its_memory_ends_with_its_exit_code(stage, starts, monkeypatch, is_memory):
    from ray.exceptions import OutOfMemoryError

    def fail(*arguments):
        cause = OutOfMemoryError("1 worker was killed") if is_memory else ValueError("something else")
        raise RuntimeError("Caught unexpected exception") from cause

    monkeypatch.setattr(sweep_ray, "_fit", fail)
    with pytest.raises(SystemExit if is_memory else RuntimeError) as caught:
        train_stage(stage)
    assert not is_memory or caught.value.code == OUT_OF_MEMORY


def test_nothing_is_suggested_while_a_sweep_stops(make_config, stage):
    pytest.importorskip("optuna")
    from kdecs.sweep.search import Search, TpeSuggester, read_suggestions

    config = make_config(search={"method": "tpe", "num_trials": 2})
    queue = _Queue(stage, suggester=TpeSuggester(Search(config), "macro_f1"))
    stage.run.stop_file.touch()
    assert queue.suggest("a") is None and read_suggestions(config.output) == []
    stage.run.stop_file.unlink()
    assert queue.suggest("a")["trial"] and len(read_suggestions(config.output)) == 1


def test_the_queue_keeps_back_what_was_stopped_and_takes_what_is_appended(stage):
    stage = stage.model_copy(update={"trials": ("a", "b"), "settled": ("s",)})
    queue = _Queue(stage, first=stage.settled)
    for name in "sabc":
        (stage.sweep / "trials" / name).mkdir(parents=True)

    def ends(key, status, **end):
        TrialNote(status=status).write(stage.sweep / "trials" / given.pop(key))
        queue.on_trial_complete(key, **end)

    given = {key: queue.suggest(key)["trial"] for key in "12"}
    assert [*given.values()] == ["s", "a"], "a search first learns again what it knew"
    Control(trials={"a": "stop", "b": "drop"}).write(stage.sweep)
    assert queue.suggest("3") is None, "the rest is kept out, and what runs may yet be followed by something"
    ends("1", "complete")
    ends("2", "stopped")
    assert queue.suggest("3") == "FINISHED", "nothing runs, and all else is kept out"
    Control(trials={"b": "drop"}).write(stage.sweep)
    given = {"4": queue.suggest("4")["trial"]}
    assert given == {"4": "a"}, "it was resumed"
    stage.model_copy(update={"trials": ("a", "b", "c")}).write(stage.sweep / STAGE_NAME)
    given["5"] = queue.suggest("5")["trial"]
    assert given["5"] == "c"
    ends("4", "running", error=True)  # its process died for good
    ends("5", "pruned")
    assert queue.suggest("6") == "FINISHED", "neither comes back"


def test_a_point_of_tpe_that_was_stopped_waits_for_its_person(make_config, stage):
    pytest.importorskip("optuna")
    from kdecs.sweep.search import Search, TpeSuggester, read_suggestions

    config = make_config(search={"method": "tpe", "num_trials": 2, "startup_trials": 1})
    stopped = _Queue(stage, suggester=TpeSuggester(Search(config), "macro_f1")).suggest("a")["trial"]
    Control(trials={stopped: "stop"}).write(stage.sweep)
    queue = _Queue(stage, suggester=TpeSuggester(Search(config), "macro_f1"))
    other = queue.suggest("b")["trial"]
    assert other != stopped and len(read_suggestions(config.output)) == 2
    assert queue.suggest("c") is None
    Control().write(stage.sweep)
    stage.model_copy(update={"trials": (stopped, other)}).write(stage.sweep / STAGE_NAME)
    assert queue.suggest("d") == {"trial": stopped}
    TrialNote(status="complete").write(stage.sweep / "trials" / other)
    TrialNote(status="complete").write(stage.sweep / "trials" / stopped)
    queue.on_trial_complete("b")
    queue.on_trial_complete("d")
    assert queue.suggest("e") == "FINISHED"
