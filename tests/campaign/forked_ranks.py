"""Ranks of `launch/train_teacher.py` forked from a process that has imported everything: a start costs a second.

What runs is the entry script itself, with the environment that a launcher gives it; only the launcher is missing.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["kdecs.teacher.training"])


def start_ranks(config: Path, log: Path, *, num_ranks: int, port: int) -> list[BaseProcess]:
    """Start the ranks of one training."""
    ranks = [
        CONTEXT.Process(target=run_rank, args=(config, log, rank, num_ranks, port))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def run_rank(config: Path, log: Path, rank: int, num_ranks: int, port: int) -> None:
    """The body of one rank: the entry script, its output in the log."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.argv = ["launch/train_teacher.py", "--config", str(config)]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
