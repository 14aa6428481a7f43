"""The state of one rank: device, threads, process group and its watch, seeds, memory, and shared collectives."""

import ctypes
import importlib
import json
import os
import random
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from kdecs.errors import EXIT_REFUSED, DeviceError, KdecsError, RankError, Stopped, first_line, printable
from kdecs.process import ERROR_PREFIX, launched_rank, note_resumable

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
def process_group(runtime: Runtime, *, single: bool = False, lost_rank_s: float = 0.0) -> Iterator[None]:
    """Open a torch process group over all ranks (NCCL on GPUs, gloo on CPUs) and destroy it at the end.

    A single rank gets none, unless `single`: DeepSpeed's engine needs a group even of one. If another rank is silent
    for `lost_rank_s` (0: for however long), or ends without a word, this process ends with one line (`RankWatch`).
    Raises RankError if not all ranks join within ten minutes.
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
    watch = None
    try:
        store = _join(runtime)
        if runtime.world_size > 1 and lost_rank_s:
            # Before the group, whose connections would be waited for as long as for any collective.
            watch = RankWatch(store, runtime, lost_rank_s)
        dist.init_process_group(
            "nccl" if runtime.device.type == "cuda" else "gloo",
            store=store,
            rank=runtime.rank,
            world_size=runtime.world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        yield
    except BaseException as error:
        if watch is not None:
            if _is_broken_connection(error):
                watch.end_process(error)
            watch.leave("left" if isinstance(error, Stopped) else "failed")
        raise
    else:
        if watch is not None:
            watch.leave("left")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_deepspeeds_group()
        for name in added:  # a process started later would take this group's rendezvous for its own
            os.environ.pop(name, None)


# Rank 0 may build a cache or write a checkpoint alone for longer than torch's default of ten minutes.
_COLLECTIVE_TIMEOUT = timedelta(hours=1)
_JOIN_TIMEOUT = timedelta(minutes=10)


def _join(runtime: Runtime) -> dist.Store:
    """The store through which the ranks find each other, once all of them have joined it."""
    try:
        store, _, _ = next(dist.rendezvous("env://", runtime.rank, runtime.world_size, timeout=_JOIN_TIMEOUT))
    except dist.DistError as error:
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RankError(
            f"{address}: rank {runtime.rank} of {runtime.world_size} did not find the others there "
            f"({first_line(error)}); start all ranks within {_JOIN_TIMEOUT.seconds // 60} minutes, with an address of "
            "rank 0's host that the other hosts reach and a port that is free there"
        ) from None
    store.set_timeout(_COLLECTIVE_TIMEOUT)
    return store


def _is_broken_connection(error: BaseException | None) -> bool:
    """True if a rank's connections to the others broke, also where a library has wrapped that error."""
    while error is not None:
        # gloo's errors have no type.
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class RankWatch:
    """Ends this process with one line when another rank is lost: killed, cut off, or on a host without power.

    A collective would wait for such a rank for an hour, and the launcher for its ssh as long as TCP does. So each rank
    has a thread that sends a sign of life over a connection to rank 0, and rank 0 answers. An end of the connection
    means that the process has ended; silence for `timeout_s`, that the host or its network is down. Rank 0 tells the
    others. A rank that leaves says so first, and is not waited for any more.

    The thread ends the process itself, because the main thread may hang in a collective, which nothing interrupts. What
    is written to disk survives that, as it survives a kill.
    """

    _KEY = "kdecs/watch"
    # After a rank has ended, the others' collectives usually fail at once, and their main threads clean up first.
    _GRACE_S = 15.0
    _SAY_S = 5.0  # a pipe to a lost host may be full, and the line then waits for ever

    def __init__(self, store: dist.Store, runtime: Runtime, timeout_s: float) -> None:
        """Connect to rank 0, or listen there, and start the thread. Raises RankError if rank 0 cannot be reached."""
        self.runtime, self.timeout_s = runtime, timeout_s
        self.period_s = min(5.0, timeout_s / 5)
        self.host = self._hub_host = socket.gethostname()
        self._is_hub_lost, self._is_resumable = False, True
        now = time.monotonic()
        self.peers: dict[int, _Peer] = {}  # those that are still expected to give signs of life
        self.reason: str | None = None  # why this process has to end
        self._ends_at = float("inf")
        self._is_known, self._is_leaving = threading.Event(), threading.Event()
        self._once = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        master = os.environ["MASTER_ADDR"]
        if runtime.is_main:
            self.peers = {rank: _Peer(rank, "", now) for rank in range(1, runtime.world_size)}
            self._listener = _listener(master)
            self._selector.register(self._listener, selectors.EVENT_READ)
            port, self._token = self._listener.getsockname()[1], secrets.token_hex(16)
            address = _own_address(master)
            store.set(self._KEY, json.dumps([address, port, self._token, self.host]))
        else:
            address, port, self._token, self._hub_host = json.loads(store.get(self._KEY))
            link = _connected([address, master], port)
            link.sendall(f"{self._token} {runtime.rank} {self.host}\n".encode())
            link.setblocking(False)
            self.peers = {0: _Peer(0, self._hub_host, now, link)}
            self._selector.register(link, selectors.EVENT_READ, self.peers[0])
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def leave(self, word: str) -> None:
        """Stop watching, and tell the others that this rank has `left`, or that it has `failed` and says why itself."""
        self._is_leaving.set()
        self._waker.send(b".")
        self._thread.join()
        for peer in self.peers.values():
            peer.send(word)
            peer.close()
        for end in (self._listener, self._wake, self._waker):
            if end is not None:
                end.close()
        self._selector.close()

    def end_process(self, error: BaseException) -> NoReturn:
        """End the process after a collective's error, with a line that names the lost rank once it is known."""
        self._is_known.wait(self.timeout_s)
        self._end(
            self.reason
            or f"the connection to another rank broke ({first_line(error)}); run the same command again to resume"
        )

    def _run(self) -> None:
        beat = slept = time.monotonic()
        while not self._is_leaving.is_set():
            for key, _ in self._selector.select(self.period_s / 2):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Peer):
                    self._read(key.data)
            now = time.monotonic()
            if now - slept > 2 * self.period_s:
                # This process itself was suspended, as by Ctrl-Z, and with it perhaps the whole job.
                for peer in self.peers.values():
                    peer.heard = now
            slept = now
            if now - beat >= self.period_s:
                beat = now
                for peer in self.peers.values():
                    peer.send("alive")
            for peer in list(self.peers.values()):
                if now - peer.heard > self.timeout_s:
                    self._lose(
                        peer,
                        f"has given no sign of life for {self.timeout_s:g} s (lost_rank_s): its host or the network "
                        "is down; run the same command again to resume, without that host if it stays away",
                        grace_s=0.0,
                    )
            if now > self._ends_at:
                assert self.reason is not None
                self._end(self.reason)

    def _accept(self) -> None:
        assert self._listener is not None
        link, _ = self._listener.accept()
        link.setblocking(False)
        # Not a peer before its first line has shown the token.
        self._selector.register(link, selectors.EVENT_READ, _Peer(-1, "", time.monotonic(), link))

    def _read(self, peer: "_Peer") -> None:
        how = "ended without a word (it was killed, or the memory did not suffice)"
        try:
            lines = peer.receive()
        except BlockingIOError:
            return
        except ConnectionResetError:
            lines = None
        except OSError as error:
            lines, how = None, f"cannot be reached ({error.strerror})"
        if lines is None:
            self._forget(peer)
            if peer.rank in self.peers:
                self._lose(peer, f"{how}; run the same command again to resume")
            return
        for line in lines:
            word, _, rest = line.partition(" ")
            if peer.rank < 0:
                rank, _, peer.host = rest.partition(" ")
                if word != self._token or int(rank) not in self.peers:
                    self._forget(peer)
                    return
                peer.rank = int(rank)
                self.peers[peer.rank] = peer
            peer.heard = time.monotonic()
            if word in ("left", "failed"):
                self._forget(peer)
                self.peers.pop(peer.rank, None)
            if word == "failed":
                self._is_resumable = False  # the same command may fail again
                self._lose(
                    peer, "ended with an error, which it has printed; run the same command again to resume"
                )
            elif word in ("lost", "erred"):
                self._is_resumable &= word == "lost"
                self._tell(rest)

    def _forget(self, peer: "_Peer") -> None:
        if peer.link is not None:
            self._selector.unregister(peer.link)
            peer.close()

    def _lose(self, peer: "_Peer", how: str, *, grace_s: float | None = None) -> None:
        if peer.link is None:
            self.peers.pop(peer.rank, None)
        else:
            peer.heard = float(
                "inf"
            )  # it is lost once; if it was suspended, it may yet read why the job ends
        self._is_hub_lost |= (
            peer.rank == 0 and self.reason is None
        )  # a rank 0 that gave a reason has printed it
        place = f" on {peer.host}" if peer.host else ""
        reason = f"rank {peer.rank}{place} {how}"
        if self.runtime.is_main:
            self._send_reason(reason)
        self._tell(reason, grace_s=grace_s)

    def _send_reason(self, reason: str) -> None:
        for peer in list(self.peers.values()):
            peer.send(f"{'lost' if self._is_resumable else 'erred'} {reason}")

    def _tell(self, reason: str, *, grace_s: float | None = None) -> None:
        if self.reason is None:
            self.reason = reason
        self._ends_at = min(self._ends_at, time.monotonic() + (self._GRACE_S if grace_s is None else grace_s))
        self._is_known.set()

    def _end(self, line: str) -> NoReturn:
        with self._once:  # the process ends inside the block, so the second of two threads waits here
            self._send_reason(line)
            if self._speaks():
                said = threading.Thread(target=_print_error, args=[line], daemon=True)
                said.start()
                said.join(self._SAY_S)
            if self._is_resumable:
                note_resumable(line)
            os._exit(EXIT_REFUSED)

    def _speaks(self) -> bool:
        """True on one rank per host: rank 0, the first rank of another host, or the one after a rank 0 that is lost."""
        if self._hub_host != self.host:
            return self.runtime.local_rank == 0
        return self.runtime.rank == (1 if self._is_hub_lost else 0)


@dataclass
class _Peer:
    """Another rank, as far as this one knows it, and the connection to it."""

    rank: int
    host: str
    heard: float
    link: socket.socket | None = None
    _unread: bytes = b""

    def send(self, line: str) -> None:
        """Send a line, or drop it where the connection takes none: reading finds out why."""
        if self.link is not None:
            with suppress(OSError):
                self.link.send(f"{line}\n".encode())

    def receive(self) -> list[str] | None:
        """The lines that have arrived, or None at the end of the connection."""
        assert self.link is not None
        data = self.link.recv(_MAX_LINE)
        if not data or len(self._unread) > _MAX_LINE:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self.link is not None:
            self.link.close()
            self.link = None


_MAX_LINE = 4096
_CONNECT_S = 30.0


def _listener(master: str) -> socket.socket:
    """A socket that listens on a free port: on loopback if the ranks meet there, else on every interface."""
    if master in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_address(master: str) -> str:
    """The address by which other hosts reach this one, as seen from the network of `master`; "" if that is loopback."""
    with suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            address = str(probe.getsockname()[0])
            # Debian lets a host's own name be 127.0.1.1 in that host's /etc/hosts.
            return "" if address.startswith("127.") or address == "::1" else address
    return ""


def _connected(addresses: list[str], port: int) -> socket.socket:
    """A connection to the first of some addresses that answers. Raises RankError."""
    reason: OSError | None = None
    for address in filter(None, addresses):
        try:
            return socket.create_connection((address, port), timeout=_CONNECT_S)
        except OSError as error:
            reason = error
    raise RankError(
        f"{addresses[-1]}:{port}: rank 0 does not answer there ({reason}); open all ports between the hosts of a job, "
        "or set lost_rank_s=0, which leaves lost ranks unnoticed"
    )


def _print_error(line: str) -> None:
    with suppress(OSError):
        print(f"{ERROR_PREFIX}{printable(line)}", file=sys.stderr, flush=True)


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
