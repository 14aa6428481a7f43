"""What a sweep gives its trials' processes, and how its plan crosses to Ray's process. No Ray is started."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kdecs.artifact import file_lock
from kdecs.errors import DeviceError
from kdecs.sweep import ray as ray_trials
from kdecs.sweep.ray import (
    RAY_LOCK_NAME,
    Plan,
    limit_gpu_memory,
    most_epochs,
    ray_storage,
    train_with_ray,
    worker_environment,
)
from kdecs.sweep.trial import TrialRun


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


def test_a_plan_is_read_as_it_was_written(make_config, tmp_path):
    run = TrialRun("fake_trainer:train", Path("/x/.stop"), Path("/x/students"), max_failures=3)
    plan = Plan(make_config(), run, ["a"], ["b"], 1, 3.0, 0, "macro_f1", 1234)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


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
    ],
)
def test_no_trial_is_stopped_for_having_come_to_its_end(make_config, changes, expected):
    assert most_epochs(make_config(**changes)) == expected


@pytest.fixture
def plan(make_config):
    """A plan of this process' parent, so that this process is no orphan."""
    config = make_config()
    config.output.mkdir(parents=True)
    run = TrialRun("fake_trainer:train", config.output / ".stop-1-2", config.output.parent / "students")
    return Plan(config, run, [], [], None, 3.0, 0, "macro_f1", os.getppid())


@pytest.fixture
def ray_starts(monkeypatch):
    """What would be started by Ray: the storage of each start."""
    started = []
    monkeypatch.setattr(ray_trials, "_start_ray", lambda *arguments: None)
    monkeypatch.setattr(ray_trials, "_fit", lambda plan, storage: started.append(storage))
    return started


def test_a_start_waits_for_the_trials_of_an_earlier_one(plan, ray_starts, monkeypatch):
    monkeypatch.setattr(ray_trials, "_LOCK_POLL_S", 0.05)
    killed = plan.config.output / ".ray.stop-0-1"
    killed.mkdir()
    with file_lock(plan.config.output / RAY_LOCK_NAME):
        thread = threading.Thread(target=train_with_ray, args=(plan,))
        thread.start()
        time.sleep(0.3)
        assert ray_starts == []
    thread.join()
    assert ray_starts == [ray_storage(plan)] and not killed.exists()


def test_an_orphan_begins_nothing(plan, ray_starts, monkeypatch):
    train_with_ray(Plan(**{**plan.__dict__, "driver": 1 << 22}))
    assert ray_starts == []
    monkeypatch.setattr(
        os, "getppid", iter([plan.driver, 1]).__next__
    )  # the driver is killed while Ray starts
    train_with_ray(plan)
    assert ray_starts == []


def test_a_stopped_start_does_not_wait(plan, ray_starts):
    plan.run.stop_file.touch()
    with file_lock(plan.config.output / RAY_LOCK_NAME):
        train_with_ray(plan)
    assert ray_starts == []


def test_nothing_is_suggested_while_a_sweep_stops(make_config):
    pytest.importorskip("optuna")
    from kdecs.sweep.search import read_suggestions
    from kdecs.sweep.tpe import TpeSearcher

    config = make_config(search={"method": "tpe", "num_trials": 2})
    stop_file = config.output / ".stop"
    searcher = TpeSearcher(config, "macro_f1", stop_file)
    stop_file.parent.mkdir(exist_ok=True)
    stop_file.touch()
    assert searcher.suggest("a") is None and read_suggestions(config.output) == []
    stop_file.unlink()
    assert searcher.suggest("a")["trial"] and len(read_suggestions(config.output)) == 1
