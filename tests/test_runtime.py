"""What a rank says of its device, how it imports DeepSpeed, and how it notices that another rank is lost."""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from support import free_port, start_python, wait_until

from kdecs.runtime import Runtime, import_deepspeed, warn_of_emulation


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "rank", "warns"),
    [
        ("AVX2", "cpu", "bfloat16", 0, True),
        ("AVX2", "cpu", "bfloat16", 1, False),
        ("AVX2", "cpu", "float32", 0, False),
        ("AVX2", "cuda", "bfloat16", 0, False),
        ("AVX512", "cpu", "bfloat16", 0, False),
        ("DEFAULT", "cpu", "bfloat16", 0, False),  # ARM
    ],
)
def test_an_emulated_bfloat16_is_told_once(monkeypatch, capsys, capability, device, dtype, rank, warns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    runtime = Runtime(rank=rank, local_rank=rank, world_size=2, device=torch.device(device))
    warn_of_emulation(runtime, dtype, "zero.dtype")
    shown = capsys.readouterr().err
    assert ("--set zero.dtype=float32" in shown) == warns
    assert shown.count("\n") == warns


@pytest.mark.parametrize("is_imported", [False, True])
def test_deepspeed_is_imported_without_mlflow(tmp_path, monkeypatch, is_imported):
    (tmp_path / "mlflow.py").touch()
    # As its autotuner does.
    (tmp_path / "deepspeed.py").write_text(
        "try:\n    import mlflow\n    has_mlflow = True\nexcept Exception:\n    has_mlflow = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("deepspeed", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, None)  # so that it is removed at the end
        del sys.modules[name]
    if is_imported:
        importlib.import_module("mlflow")
    import_deepspeed()
    assert sys.modules["deepspeed"].has_mlflow == is_imported
    assert importlib.import_module("mlflow").__file__ == str(tmp_path / "mlflow.py")


# Forks the two ranks of each job that its argument describes, once it has imported torch for all of them, and answers
# with their process ids. A rank works in collectives until a file says "end"; the options change how it does that.
RANKS = """
import gc, json, os, sys, time
from datetime import timedelta
from pathlib import Path
from kdecs import runtime
from kdecs.errors import TrainingError
from kdecs.process import run_entry

def work(place, options):
    state = runtime.start_runtime(device="cpu")
    if options.get("absent") == state.rank:
        return
    with runtime.process_group(state, lost_rank_s=options.get("lost_rank_s", 1.0)):
        while not runtime.any_rank((place / "end").exists(), state):
            (place / f"{state.rank}.works").touch()
            if options.get("fails") == state.rank:
                raise TrainingError("this rank alone")
            if options.get("sleeps") == state.rank:
                time.sleep(600)  # as in a long forward, during which no collective fails
            time.sleep(0.02)

runtime.RankWatch._GRACE_S = 1.0
gc.freeze()  # or each rank, as it exits, copies and looks through all that torch has made
for place, port, options in json.loads(sys.argv[1]):
    runtime._JOIN_TIMEOUT = timedelta(seconds=options.get("join", 60))
    for rank in "01":
        if (child := os.fork()) == 0:
            os.dup2(os.open(f"{place}/{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ["KDECS_RESUMABLE_FILE"] = f"{place}/{rank}.resumable"
            run_entry(lambda: work(Path(place), options))
        Path(place, f"{rank}.pid").write_text(str(child))
codes = {}
while len(codes) < 2 * len(json.loads(sys.argv[1])):
    child, status = os.wait()
    codes[child] = os.waitstatus_to_exitcode(status)
print(json.dumps(codes))
"""
# name: the options, the signal and the ranks that get it; then of each rank the exit code and its line
HOST = socket.gethostname()
AGAIN = "run the same command again to resume"
KILLED = f"{{}} on {HOST} ended without a word (it was killed, or the memory did not suffice); {AGAIN}"
SILENT = f"rank 1 on {HOST} has given no sign of life for 1 s (lost_rank_s): its host or the network is down; {AGAIN}"
FAILED = f"{{}} on {HOST} ended with an error, which it has printed; {AGAIN}"
LOSSES = {
    "a killed rank": ({}, signal.SIGKILL, [1], [(1, KILLED.format("rank 1")), (-9, "")]),
    "a killed first rank": ({}, signal.SIGKILL, [0], [(-9, ""), (1, KILLED.format("rank 0"))]),
    "a killed rank that no collective waits for": (
        {"sleeps": 0},
        signal.SIGKILL,
        [1],
        [(1, KILLED.format("rank 1")), (-9, "")],
    ),
    "a silent rank": ({}, signal.SIGSTOP, [1], [(1, SILENT), (1, "")]),
    "a rank that fails alone": (
        {"fails": 1},
        None,
        [],
        [(1, FAILED.format("rank 1")), (1, "this rank alone")],
    ),
    "a job that was suspended": ({}, signal.SIGSTOP, [0, 1], [(0, ""), (0, "")]),
    "a job that nobody watches": ({"lost_rank_s": 0}, signal.SIGSTOP, [1], [(0, ""), (0, "")]),
    "a rank that never came": (
        {"join": 1, "absent": 1},
        None,
        [],
        [(1, "rank 0 of 2 did not find"), (0, "")],
    ),
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str, bool]]]:
    """How each rank of LOSSES ended, what it printed, and whether its job may be queued again.

    All jobs run side by side.
    """
    root = tmp_path_factory.mktemp("losses")
    places = {name: root / str(number) for number, name in enumerate(LOSSES)}
    for place in places.values():
        place.mkdir()
    jobs = [(str(places[name]), free_port(), options) for name, (options, *_) in LOSSES.items()]
    signalled = [(places[name], number, ranks) for name, (_, number, ranks, _) in LOSSES.items()]

    def send(place: Path, rank: int, number: int) -> None:
        wait_until((place / f"{rank}.works").exists, f"rank {rank} works in {place}")
        os.kill(int((place / f"{rank}.pid").read_text()), number)

    with start_python("-c", RANKS, json.dumps(jobs)) as parent:
        try:
            for place, number, ranks in signalled:
                for rank in ranks:
                    send(place, rank, number)
            time.sleep(2)  # longer than a rank may be silent
            for place, number, ranks in signalled:
                (place / "end").touch()
                for rank in ranks:
                    if number == signal.SIGSTOP:
                        send(place, rank, signal.SIGCONT)
            codes = json.loads(parent.communicate(timeout=100)[0])
        finally:
            if parent.poll() is None:
                for path in root.glob("*/*.pid"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
                parent.kill()
    return {
        name: [
            (
                codes[(place / f"{rank}.pid").read_text()],
                (place / f"{rank}.err").read_text(),
                (place / f"{rank}.resumable").exists(),
            )
            for rank in (0, 1)
        ]
        for name, place in places.items()
    }


@pytest.mark.parametrize("name", LOSSES)
def test_a_lost_rank_ends_the_others_with_one_line(losses, name):
    for (code, said, is_resumable), (expected, line) in zip(losses[name], LOSSES[name][-1], strict=True):
        assert code == expected, said
        assert said.count("\n") == bool(line), said
        assert line in said
        # A job whose rank refuses its input would be queued again and again.
        assert is_resumable == (
            code == 1 and name not in ("a rank that fails alone", "a rank that never came")
        )
