"""The state of one rank: device, threads, process group, seeds, memory, and the collectives that stages share."""

import ctypes
import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from kdecs.errors import DeviceError, KdecsError
from kdecs.process import launched_rank

_T = TypeVar("_T")


@dataclass(frozen=True)
class Runtime:
    """The state of one rank, made once at an entry and passed down."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes for the whole job."""
        return self.rank == 0


def start_runtime(*, device: str = "auto", threads: int = 0) -> Runtime:
    """The rank state from the launcher's RANK, LOCAL_RANK and WORLD_SIZE. Without a launcher there is one rank.

    `device` is auto, cpu or cuda; KDECS_DEVICE overrides auto. Raises DeviceError if CUDA is asked for but absent.
    """
    rank, local_rank, world_size = launched_rank()
    wanted = os.environ.get("KDECS_DEVICE", "auto") if device == "auto" else device
    if wanted not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device {wanted!r}: expected auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda: torch sees no GPU; check the driver, or use device cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"local rank {local_rank}: no GPU left for it, torch sees {torch.cuda.device_count()}; "
                "start one rank per GPU"
            )
        torch.cuda.set_device(local_rank)
        chosen = torch.device("cuda", local_rank)
    else:
        chosen = torch.device("cpu")
        # DeepSpeed chooses a device by itself when it is imported, and would take a GPU that is left unused here.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if threads:
        torch.set_num_threads(threads)
    return Runtime(rank=rank, local_rank=local_rank, world_size=world_size, device=chosen)


def warn_of_emulation(runtime: Runtime, dtype: str, key: str) -> None:
    """Warn once per job if torch only emulates bfloat16 on this CPU. `key` is the config's name of the dtype.

    Without AVX-512 a product of bfloat16 matrices took 50 times as long as one of float32 (torch 2.13).
    """
    emulated = torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")
    if runtime.is_main and runtime.device.type == "cpu" and dtype == "bfloat16" and emulated:
        print(
            f"{key}: this CPU emulates bfloat16 (it has no AVX-512), tens of times slower; try --set {key}=float32",
            file=sys.stderr,
            flush=True,
        )


def import_deepspeed() -> None:
    """Import DeepSpeed, but not MLflow with it.

    DeepSpeed's autotuner, which kdecs never runs, takes MLflow along where it is installed. That is a fifth of the time
    that a rank spends on imports.
    """
    if "mlflow" in sys.modules:
        importlib.import_module("deepspeed")
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's own sign that there is no such module
    try:
        importlib.import_module("deepspeed")
    finally:
        del sys.modules["mlflow"]


@contextmanager
def process_group(runtime: Runtime, *, single: bool = False) -> Iterator[None]:
    """Open a torch process group over all ranks (NCCL on GPUs, gloo on CPUs) and destroy it at the end.

    A single rank gets none, unless `single`: DeepSpeed's engine needs a group even of one.
    """
    if runtime.world_size == 1 and not single:
        yield
        return
    rendezvous = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        # 0 lets the system choose a free port, so that single ranks on one machine do not collide.
        "MASTER_PORT": "0" if runtime.world_size == 1 else "29500",
    }
    added = {name: value for name, value in rendezvous.items() if name not in os.environ}
    os.environ.update(added)
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    # Rank 0 may build a cache or write a checkpoint alone for longer than the default ten minutes.
    dist.init_process_group(
        backend, rank=runtime.rank, world_size=runtime.world_size, timeout=timedelta(hours=1)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        _forget_deepspeeds_group()
        for name in added:  # a process started later would take this group's rendezvous for its own
            os.environ.pop(name, None)


def _forget_deepspeeds_group() -> None:
    """Make DeepSpeed accept another group, since it keeps the first one that it saw in module globals."""
    # By name, because DeepSpeed declares no types for its own globals.
    if "deepspeed.comm.comm" in sys.modules:
        setattr(sys.modules["deepspeed.comm.comm"], "cdb", None)  # noqa: B010
    if "deepspeed.utils.groups" in sys.modules:
        setattr(sys.modules["deepspeed.utils.groups"], "_WORLD_GROUP", None)  # noqa: B010


def any_rank(flag: bool, runtime: Runtime) -> bool:
    """True on every rank if the flag is true on any. Collective."""
    if runtime.world_size == 1:
        return flag
    value = torch.tensor([int(flag)], device=runtime.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_objects(value: Any, runtime: Runtime) -> list[Any]:
    """The values of all ranks, by rank, on every rank. Collective. Values are pickled within the job only."""
    if runtime.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def on_main(action: Callable[[], _T], runtime: Runtime) -> _T:
    """What `action` returns on rank 0, on every rank. If it refuses something there, every rank does. Collective."""
    # A refusal travels as a value: raised on rank 0 alone, it would leave the other ranks waiting for the gather below.
    result: _T | KdecsError | None = None
    if runtime.is_main:
        try:
            result = action()
        except KdecsError as error:
            result = error
    made = gather_objects(result, runtime)[0]
    if isinstance(made, KdecsError):
        raise made
    return made


def autocast(device: torch.device, precision: str) -> Any:
    """A context of bfloat16 autocast where the precision asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; to a GPU from pinned memory, since any other copy waits for what runs there."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def plain_torch_loads() -> Iterator[None]:
    """Within the block torch.load makes tensors and plain values only, even where a library asks it for any object.

    Other objects are made by running code that the file names. Where there is one, torch raises an UnpicklingError.
    """
    # torch reads these variables at each load. The two of them together it refuses.
    wanted = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": None}
    before = {name: os.environ.pop(name, None) for name in wanted}
    try:
        os.environ.update({name: value for name, value in wanted.items() if value is not None})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes 32 bits
    torch.manual_seed(seed)


def return_freed_memory() -> None:
    """Return freed memory to the system from all of glibc's arenas. Does nothing under another C library.

    Otherwise glibc keeps free pages that lie between live ones, above all those of a training's activations.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def on_main_first(action: Callable[[], Any], runtime: Runtime) -> Any:
    """Run `action` on rank 0, then on the others, which read the cache that rank 0 has built. Collective."""
    result = action() if runtime.is_main else None
    if runtime.world_size > 1:
        dist.barrier()
    return result if runtime.is_main else action()
