"""What an export refuses before it begins: an output of other work, a teacher of another corpus.

Workers of one and the same export may share an output directory; `.work/job.json` tells whose it is.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from kdecs.artifact import Kind, Manifest, atomic_path, claim, content_checksum
from kdecs.config import CONFIG_NAME, write_config
from kdecs.errors import ArtifactError
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import WORK_DIRECTORY
from kdecs.soft_labels.plan import PLAN_DIRECTORY, remove_leftovers

_RENEWALS_A_LEASE = 5
_MAX_OWNER_BYTES = 4096
_ATTEMPTS, _BETWEEN_ATTEMPTS_S = 5, 0.05


def host_identity() -> str:
    """This host, and this boot of it: what tells whether kernel locks are of the same kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text(encoding="ascii").strip() if boot.is_file() else ""
    return f"{socket.gethostname()} {boot_id}".strip()


class Lease:
    """A lease that this process took; `is_held` turns false once another owner has it, or may have."""

    def __init__(self, path: Path, token: str, file: BinaryIO, lease_s: float) -> None:
        self.path = path
        self.is_held = True
        self._token = token
        self._file = file
        self._lease_s = lease_s
        self._renewed = time.monotonic()

    def renew(self) -> None:
        """Set the lease's time to the file system's now, unless it is another's by now.

        A file system that fails for a moment costs nothing: until `lease_s` has passed without a renewal nobody else
        can have taken the lease.
        """
        asked = time.monotonic()
        try:
            if _owner_of(self.path.read_bytes()).get("token") == self._token:
                os.utime(self.path)
                self._renewed = asked
                return
        except OSError:
            if time.monotonic() - self._renewed <= self._lease_s:
                return
        self.is_held = False

    def confirm(self) -> bool:
        """Whether the lease is this process' own at this moment: it is renewed, with several attempts."""
        for _ in range(_ATTEMPTS):
            before = self._renewed
            self.renew()
            if not self.is_held or self._renewed > before:
                return self.is_held
            time.sleep(_BETWEEN_ATTEMPTS_S)
        self.is_held = False
        return False

    def release(self) -> None:
        """Give the lease back; another's lease of the same name is left alone."""
        with contextlib.suppress(FileNotFoundError):
            if _owner_of(self.path.read_bytes()).get("token") == self._token:
                self.path.unlink()
        self.is_held = False
        self._file.close()


class Leases:
    """The leases of one directory, as one worker sees them."""

    def __init__(self, directory: Path, *, lease_s: float, host: str | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.lease_s = lease_s
        self.host = host_identity() if host is None else host
        self._held: set[Lease] = set()
        self._changed = threading.Condition()
        self._renewer: threading.Thread | None = None

    def take(self, name: str) -> Lease | None:
        """The lease of a name, or None while another owner has it. Raises OSError (a full disk, say)."""
        path = self.directory / f"{name}.lease"
        for _ in range(3):  # each round a dead owner's lease may be cleared, and lost again to another worker
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if not self._clear_if_dead(path):
                    return None
                continue
            return self._own(path, os.fdopen(handle, "r+b", buffering=0))
        return None

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[Lease | None]:
        """`take`, released at the end of the block."""
        lease = self.take(name)
        try:
            yield lease
        finally:
            if lease is not None:
                self.release(lease)

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        with self._changed:
            self._held.discard(lease)
            self._changed.notify_all()
        lease.release()

    def remove_litter(self) -> None:
        """Remove what killed workers left: leases that are out, probes, leases that were being moved away.

        A live worker whose probe or move is disturbed takes the lease for gone, and tries again.
        """
        for leftover in self.directory.glob(".*"):
            leftover.unlink(missing_ok=True)
        for path in self.directory.glob("*.lease"):
            self._clear_if_dead(path)

    def _own(self, path: Path, file: BinaryIO) -> Lease:
        token = secrets.token_hex(8)
        try:
            with contextlib.suppress(OSError):  # a file system without kernel locks: the time alone decides
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(json.dumps({"token": token, "host": self.host, "pid": os.getpid()}).encode())
        except BaseException:
            path.unlink(missing_ok=True)
            file.close()
            raise
        lease = Lease(path, token, file, self.lease_s)
        with self._changed:
            self._held.add(lease)
            if self._renewer is None or not self._renewer.is_alive():
                self._renewer = threading.Thread(target=self._renew, name="leases", daemon=True)
                self._renewer.start()
        return lease

    def _renew(self) -> None:
        """Renew what is held; ends when nothing is, so that an idle worker has no thread."""
        while True:
            with self._changed:
                if not self._held:
                    self._renewer = None
                    return
                self._changed.wait(self.lease_s / _RENEWALS_A_LEASE)
                held = list(self._held)
            for lease in held:
                lease.renew()

    def _clear_if_dead(self, path: Path) -> bool:
        """Remove the lease of an owner that is dead or silent for too long; whether the name may be free now."""
        try:
            with path.open("r+b") as file:
                seen = os.fstat(file.fileno())
                is_dead = self._is_dead(file) or self._now() - seen.st_mtime > self.lease_s
                return is_dead and self._bury(path, seen)
        except FileNotFoundError:
            return True

    def _is_dead(self, file: BinaryIO) -> bool:
        """Whether the owner is of this host and its kernel lock is gone."""
        if _owner_of(file.read(_MAX_OWNER_BYTES)).get("host") != self.host:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _bury(self, path: Path, seen: os.stat_result) -> bool:
        """Remove a lease, unless it is no longer the one that was judged. Whether it was.

        One worker at a time, who looks again: of two who judged the same lease the second must not move away what
        the first has made in its place. Should an owner have given it up just then, the move is taken back.
        """
        permit = path.with_name(f".{path.name}.burial")
        try:
            os.close(os.open(permit, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            if self._now() - permit.stat().st_mtime > self.lease_s:  # its worker was killed
                permit.unlink(missing_ok=True)
            return False
        grave = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            if not _is_same(path.stat(), seen):
                return False
            path.rename(grave)
            if not _is_same(grave.stat(), seen):
                grave.rename(path)
                return False
            grave.unlink()
            return True
        finally:
            permit.unlink(missing_ok=True)

    def _now(self) -> float:
        """The file system's own time."""
        probe = self.directory / f".now-{secrets.token_hex(8)}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _is_same(found: os.stat_result, seen: os.stat_result) -> bool:
    return (found.st_ino, found.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns)


def _owner_of(data: bytes) -> dict[str, object]:
    """Who a lease names; nobody while its owner is still writing it."""
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def tidy(output: Path, *, lease_s: float) -> None:
    """Remove the litter of a finished export, unless another worker is at its last step; best effort.

    A directory that cannot be written to, or that came without its working files, is left as it is.
    """
    work = output / WORK_DIRECTORY
    if not work.is_dir():
        return
    with contextlib.suppress(OSError):
        leases = Leases(work / "leases", lease_s=lease_s)
        with leases.holding("manifest") as lease:
            if lease:
                remove_litter(output, leases)


def remove_litter(output: Path, leases: Leases) -> None:
    """Remove the litter of a complete export; call it under the lease of the manifest.

    Nobody needs it any more: all shards are there. A worker that was taken for dead and still writes finds its file
    gone, and looks again.
    """
    work = output / WORK_DIRECTORY
    for leftover in (*output.glob(".*.tmp"), *work.glob(".*.tmp"), *work.glob(".*.own")):
        leftover.unlink(missing_ok=True)
    remove_leftovers(work / PLAN_DIRECTORY)
    leases.remove_litter()


KIND: Kind = "soft-labels"
JOB_NAME = "job.json"


def claim_output(output: Path, work_hash: str) -> None:
    """Refuse a directory that holds other work, finished or not, or another kind (ArtifactError)."""

    def is_begun_here() -> bool | None:
        job = _read_job(output / WORK_DIRECTORY / JOB_NAME)
        return None if job is None else job.get("config_hash") == work_hash

    if not is_begun_here():  # if so, a manifest that says otherwise is a damaged one, and is written again
        claim(
            output,
            KIND,
            work_hash,
            can_repair=True,
            data_files="shard-*.parquet",
            is_begun_here=is_begun_here,
        )


def check_teacher_corpus(config: ExportConfig, teacher: Manifest) -> None:
    """Refuse a teacher that was trained on another corpus, unless the config allows it (ArtifactError)."""
    if config.allow_other_corpus:
        return
    for name, path in (("corpus_train", config.corpus.train), ("corpus_valid", config.corpus.valid)):
        found, expected = teacher.inputs.get(name), content_checksum(path)
        if found != expected:
            was = f"sha256 {found[:12]}…" if found else "none on record"
            raise ArtifactError(
                f"{config.teacher}: this teacher was trained with another {name} ({was}) than {path} "
                f"(sha256 {expected[:12]}…); name its corpus, or set allow_other_corpus: true for this one"
            )


def open_job(
    config: ExportConfig, work_hash: str, *, lineage: Mapping[str, str], answer_words: Sequence[str]
) -> None:
    """Join the work on the output directory, or begin it: `.work/job.json` first, then `config.json`.

    Raises ArtifactError where unfinished shards of other work lie in the directory.
    """
    output = config.output
    job = {"config_hash": work_hash, "lineage": dict(lineage), "answer_words": list(answer_words)}
    path = output / WORK_DIRECTORY / JOB_NAME
    if not path.is_file():
        _write_once(path, json.dumps(job, indent=2, sort_keys=True) + "\n")
    if (found := _read_job(path) or {}) != job:
        raise _other_work(output, [key for key in job if found.get(key) != job[key]])
    if not (output / CONFIG_NAME).is_file():
        write_config(config, output)


def _write_once(path: Path, text: str) -> None:
    """Write a file that the first of several writers makes, whole when it appears; later ones change nothing."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}.own")
    with atomic_path(own) as temporary:
        temporary.write_text(text, encoding="utf-8")
    try:
        os.link(own, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links: the last writer wins, and the others see that it did
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _other_work(output: Path, keys: Sequence[str]) -> ArtifactError:
    return ArtifactError(
        f"{output}: holds unfinished soft labels of other work (another {' and '.join(keys)}); "
        "remove the directory or choose another output"
    )


def _read_job(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: not a JSON object; remove the directory and export again")
    return found
