"""The machine that a run is on, in files that tracking uploads.

environment.json   versions, host and device
system.jsonl       one JSON object per sample: time (unix s) and the load of the machine and of the process
"""

import contextlib
import functools
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from kdecs.artifact import write_json
from kdecs.tracking.record import environment_tags

ENVIRONMENT_NAME = "environment.json"
SYSTEM_NAME = "system.jsonl"
_PACKAGES = ("kdecs", "torch", "transformers", "deepspeed", "peft", "ray", "mlflow", "pyarrow", "numpy")
_SAMPLE_S = 10.0
_MIB = 1 << 20


def write_environment(directory: Path) -> None:
    """Replace the `environment.json` of an output directory."""
    write_json(directory / ENVIRONMENT_NAME, environment())


def environment() -> dict[str, Any]:
    """Versions, host and device of this process."""
    found: dict[str, Any] = {
        **environment_tags(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": dict(_versions()),
    }
    cuda = _cuda()
    if cuda is not None:
        found["gpu"] = cuda.get_device_name(0)
    return found


@functools.cache  # a process has imported one version of each, and a sweep asks for every trial
def _versions() -> Mapping[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return MappingProxyType(found)


def _cuda() -> Any:
    """torch.cuda if this process uses it. Torch is not imported for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


@contextlib.contextmanager
def sampled_load(directory: Path, *, interval_s: float = _SAMPLE_S) -> Iterator[None]:
    """Append samples of the load on this machine and process to `system.jsonl`, every `interval_s` and at the end."""
    ended = threading.Event()
    process = psutil.Process()
    psutil.cpu_percent(None)  # the first call measures nothing
    process.cpu_percent(None)

    def append() -> None:
        line = json.dumps({"time": time.time(), **load(process)})
        # Appended and not replaced: a kill costs half a line at most, which `read_samples` leaves out.
        with (directory / SYSTEM_NAME).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def sample() -> None:
        while not ended.wait(interval_s):
            append()

    sampler = threading.Thread(target=sample, daemon=True, name="load")
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        # Two threads must not write at the same time, or their lines would mix.
        sampler.join()
        append()


def read_samples(path: Path) -> list[dict[str, float]]:
    """The samples of a `system.jsonl`. A line that a kill cut short is left out."""
    found: list[dict[str, float]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def load(process: psutil.Process) -> dict[str, float]:
    """The load of the machine and of a process: percent since the last call, and MiB now."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(None),
        "system/system_memory_usage_megabytes": (memory.total - memory.available) / _MIB,
        "system/trial_cpu_utilization_percentage": process.cpu_percent(None),
        "system/trial_memory_usage_megabytes": process.memory_info().rss / _MIB,
    }
    cuda = _cuda()
    # To ask a GPU for its memory makes a context on it, which takes hundreds of MiB in a process that has none yet.
    if cuda is not None and cuda.is_initialized():
        free, total = cuda.mem_get_info()
        found["system/gpu_0_memory_usage_megabytes"] = (total - free) / _MIB
        found["system/gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
        found["system/trial_gpu_memory_usage_megabytes"] = cuda.memory_reserved() / _MIB
        with contextlib.suppress(ModuleNotFoundError):  # NVIDIA's own bindings are optional
            found["system/gpu_0_utilization_percentage"] = float(cuda.utilization())
    return found
