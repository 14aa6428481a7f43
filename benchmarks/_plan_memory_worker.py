"""The ranks of a row of `plan_memory.py`: each trains a few steps of a random teacher and writes its memory as JSON.

They are forked from this process after it has imported the libraries, which takes longer than the steps. Memory is a
rank's resident set (VmHWM of /proc/self/status). It is reset once the engine stands, because loading maps the weights'
file, which is no part of training. Every rank inherits the same pages from this process, whether its network is large
or very small, so the difference of two ranks does not contain them.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

PREFIX_SHARE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, help="a TeacherConfig as JSON")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, required=True, help="packed tokens of a micro-batch")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="memory as JSON, one file a rank")
    arguments = parser.parse_args()
    from kdecs.runtime import import_deepspeed

    import_deepspeed()

    import kdecs.teacher.engine  # noqa: F401  (for the ranks)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ranks = [start_rank(rank, port, arguments) for rank in range(arguments.ranks)]
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if code := os.waitstatus_to_exitcode(status):
            for rank in ranks:  # they would wait for the one that has ended
                os.kill(rank, signal.SIGKILL)
            sys.exit(code if code > 0 else 128 - code)


def start_rank(rank: int, port: int, arguments: argparse.Namespace) -> int:
    """Fork a rank and return its process id."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run_rank(arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads may abort a process that tears its interpreter down


def run_rank(arguments: argparse.Namespace) -> None:
    from kdecs.config import load_config
    from kdecs.runtime import process_group, start_runtime
    from kdecs.teacher.config import TeacherConfig

    config = load_config(TeacherConfig, arguments.config)
    runtime = start_runtime(threads=1)
    with process_group(runtime, single=True):
        measured = measure(config, runtime, arguments.tokens, arguments.prompts, arguments.steps)
    path = arguments.output.with_name(f"{arguments.output.name}.{runtime.rank}")
    path.write_text(json.dumps(measured), encoding="utf-8")


def measure(config: Any, runtime: Any, num_tokens: int, num_prompts: int, steps: int) -> dict[str, Any]:
    """Resident bytes with the engine standing, and the highest while it trains."""
    import torch

    from kdecs.teacher.engine import start_engine
    from kdecs.teacher.families import make_family
    from kdecs.teacher.network import connective_loss

    family = make_family(config.model, max_prompt_tokens=4 * num_tokens, emotions_shown="coarse")
    prompts = synthetic_prompts(num_tokens, num_prompts)
    is_cause_P = torch.arange(len(prompts)) % 2 == 0
    imported = resident_bytes("VmRSS")
    engine = start_engine(config, family, runtime, 2)
    engine.module.use_tree = config.batches.batching != "pairs"
    engine.train()
    touch(engine.module)
    give_back_freed_memory()
    loading_peak = resident_bytes("VmHWM")
    standing = resident_bytes("VmRSS")
    peaks = []
    for _ in range(2 * steps):
        Path("/proc/self/clear_refs").write_text("5")
        engine.backward(connective_loss(engine(prompts), is_cause_P))
        engine.step()
        peaks.append(resident_bytes("VmHWM"))
    return {
        "imported": imported,
        "loading_peak": loading_peak,
        "standing": standing,
        "training_peak": max(peaks),
        "micro_step_peaks": peaks,
    }


def touch(network: Any) -> None:
    """Read every weight, so that those which lie in a mapped file are resident whether or not a step needs them."""
    for parameter in network.parameters():
        parameter.detach().sum()


def synthetic_prompts(num_tokens: int, num_prompts: int) -> list[Any]:
    """Prompts whose tree has exactly `num_tokens` tokens: one shared half, the rest in branches."""
    from kdecs.teacher.families import EncodedPrompt

    generator = np.random.default_rng(0)
    shared = generator.integers(5, 90, int(num_tokens * PREFIX_SHARE))
    branches = np.array_split(generator.integers(5, 90, num_tokens - len(shared)), num_prompts)
    prompts = []
    for number, branch in enumerate(branches):
        tokens = np.concatenate([shared, [100 + number], branch[1:]]).astype(np.int32)
        prompts.append(EncodedPrompt(tokens=tokens, answer=len(tokens) - 1))
    return prompts


def resident_bytes(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is now, VmHWM the highest."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def give_back_freed_memory() -> None:
    """Have glibc return what was freed while loading, so that it is not counted as training's."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()
