"""How the workers of an export share one directory: who may begin there, claims of shards, publication.

Workers share nothing but the directory: they may be ranks of one launch or jobs on several hosts. Their protocol is

    claim     create `.work/leases/NAME.lease` (O_EXCL); a thread renews its mtime while the claim is held
    expiry    a claim is free again when its mtime is older than `lease_s`, or at once when its owner was a process
              of this host that died (the kernel drops the lock on the file with the process)
    label     write the shard into a temporary file, then its record (kdecs.soft_labels.format)
    publish   hard-link the temporary file to the shard's name, which fails if the name is taken

A claim only keeps two workers from doing the same work; it protects nothing. A worker that is suspended for longer than
its lease may wake up beside the one that took over its shard, and both may finish it. The link decides: the first
published shard stands, and the other worker drops its file. On like hardware both files have the same bytes anyway. A
record is written before its shard, so a worker that sees a shard also finds the record of its bytes.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from kdecs.artifact import (
    Kind,
    Manifest,
    check_output,
    content_checksum,
    fsync,
    host_identity,
    is_temporary,
    temporary_path,
)
from kdecs.config import CONFIG_NAME, files_of, write_config
from kdecs.errors import ArtifactError
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import WORK_DIRECTORY

KIND: Kind = "soft-labels"
JOB_NAME = "job.json"
LEASES_DIRECTORY = "leases"
# A slow file system may swallow a few renewals before a live worker looks dead.
_RENEWALS_PER_LEASE = 5
_MAX_OWNER_BYTES = 4096
# What link() answers on FAT, some FUSE stores and object-store mounts.
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def check_export_output(output: Path, work_hash: str) -> None:
    """Refuse a directory that holds other work, finished or not, or another kind (ArtifactError)."""

    def is_begun_here() -> bool | None:
        job = _read_job(output / WORK_DIRECTORY / JOB_NAME)
        return None if job is None else job.get("config_hash") == work_hash

    # If this work has begun here, a manifest that says otherwise is damaged and will be written again.
    if not is_begun_here():
        check_output(
            output,
            KIND,
            work_hash,
            can_repair=True,
            data_files="shard-*.parquet",
            is_begun_here=is_begun_here,
        )


def check_teacher_corpus(config: ExportConfig, teacher: Manifest) -> None:
    """Refuse a teacher that was trained on another corpus, unless the config allows it (ArtifactError).

    Files to label without gold labels, for which the config gives emotions, are of no teacher's training. The
    validation file must be the teacher's even so.
    """
    if config.allow_other_corpus:
        return
    # Teachers train on these two splits; the test split is theirs to label, whichever file it is. A teacher of several
    # training files may label some of them.
    trained = [digest for name, digest in teacher.inputs.items() if name.startswith("corpus_train")]
    has_gold = config.emotions is None
    training = [("corpus_train", path, trained) for path in files_of(config.corpus.train) if has_gold]
    valid = [digest for name, digest in teacher.inputs.items() if name == "corpus_valid"]
    for name, path, found in (*training, ("corpus_valid", config.corpus.valid, valid)):
        if (expected := content_checksum(path)) not in found:
            was = ", ".join(f"sha256 {digest[:12]}…" for digest in found) or "none on record"
            raise ArtifactError(
                f"{config.teacher}: this teacher was trained with another {name} ({was}) than {path} "
                f"(sha256 {expected[:12]}…); name its corpus, or set allow_other_corpus: true for this one"
            )


def open_job(
    config: ExportConfig, work_hash: str, *, lineage: Mapping[str, str], answer_words: Sequence[str]
) -> None:
    """Join the work on the output directory, or begin it: `.work/job.json` first, then `config.json`.

    Raises ArtifactError where the directory holds an unfinished export of other work.
    """
    output = config.output
    job = {"config_hash": work_hash, "lineage": dict(lineage), "answer_words": list(answer_words)}
    path = output / WORK_DIRECTORY / JOB_NAME
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Published by link, not by rename: of two exports with different configs that begin at the same moment the
        # first keeps the directory, where a rename would replace its job.
        temporary = temporary_path(path)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(job, indent=2, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    # Read again, since another worker may have been first, and with another config.
    if (found := _read_job(path) or {}) != job:
        other = " and ".join(key for key in job if found.get(key) != job[key])
        raise ArtifactError(
            f"{output}: holds unfinished soft labels of other work (another {other}); "
            "remove the directory or choose another output"
        )
    if not (output / CONFIG_NAME).is_file():
        write_config(config, output)


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


def publish(temporary: Path, path: Path) -> bool:
    """Give a complete file its name; False, with nothing changed, if another worker's file has the name already.

    The bytes must be on disk: after a crash of the machine the name must not stand for a part of them.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Without hard links two workers that get here at the same moment may both rename. The later file stands, and
        # its record is there as well.
        if path.exists():
            return False
        temporary.rename(path)
    fsync(path.parent)
    return True


class Claim:
    """A claim that this process took; `is_held` turns False once another worker has it, or may have it."""

    def __init__(self, path: Path, file: BinaryIO, owner: bytes, claims: "Claims") -> None:
        self.path = path
        self.is_held = True
        self._file = file
        self._owner = owner
        self._claims = claims
        self._renewed = claims.monotonic()

    def renew(self) -> bool:
        """Set the claim's mtime to now, unless another worker has the claim; returns `is_held`.

        A file system that fails for a moment costs nothing: nobody else can have taken the claim before `lease_s` has
        passed without a renewal.
        """
        # Taken before the file system answers: a renewal that hangs must not count from the moment it ends.
        asked = self._claims.monotonic()
        try:
            # Compared before it is stamped: to stamp a claim that another worker has taken over would renew it for that
            # worker.
            if self.path.read_bytes() != self._owner:
                self.is_held = False
            else:
                self._claims.stamp(self.path)
                self._renewed = asked
        except FileNotFoundError:
            self.is_held = False
        except OSError:
            self.is_held = self.is_held and asked - self._renewed <= self._claims.lease_s
        return self.is_held

    def release(self) -> None:
        """Give the claim back; another worker's claim of the same name is left alone."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_bytes() == self._owner:
                self.path.unlink()
        self.is_held = False
        # Closing frees the kernel lock, so it comes after the unlink: a claim without lock counts as abandoned.
        self._file.close()


class Claims:
    """The claims of one directory, as one worker sees them.

    `stamp` and `now` set and tell the file system's time, `monotonic` this process'; a test may hand in others.
    """

    def __init__(
        self,
        directory: Path,
        *,
        lease_s: float,
        host: str | None = None,
        stamp: Callable[[Path], None] = os.utime,
        now: Callable[[], float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.lease_s = lease_s
        self.host = host_identity() if host is None else host
        self.stamp, self.now, self.monotonic = stamp, now or self._file_system_time, monotonic

    def take(self, name: str) -> Claim | None:
        """The claim of a name, or None while another worker has it. Raises OSError (a full disk, say)."""
        path = self.directory / f"{name}.lease"
        for _ in range(2):  # the second try is for a claim that the first one found abandoned
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if not self._is_abandoned(path):
                    return None
                # Between the look and this line another worker may have taken the claim: it loses it again, as if it
                # had expired, and the shard is labelled twice.
                path.unlink(missing_ok=True)
            else:
                # Without a buffer, so that the owner is in the file when `write` returns.
                return self._own(path, os.fdopen(handle, "r+b", buffering=0))
        return None

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[Claim | None]:
        """`take`, renewed by a thread during the block and released at its end."""
        held = self.take(name)
        if held is None:
            yield None
            return
        is_over = threading.Event()

        def renew() -> None:
            while not is_over.wait(self.lease_s / _RENEWALS_PER_LEASE):
                held.renew()

        # A thread, because the worker may be in a single forward for longer than a lease lasts.
        heartbeat = threading.Thread(target=renew, name=f"renew {name}", daemon=True)
        heartbeat.start()
        try:
            yield held
        finally:
            is_over.set()
            heartbeat.join()
            held.release()

    def clear(self) -> None:
        """Remove what killed workers left in a complete export: their claims, and the files that tell them the time.

        A claim that names no owner goes, too, however young it is: its worker died in taking it, or is taking it now
        and finds its shard published.
        """
        for leftover in self.directory.glob(".now-*"):
            leftover.unlink(missing_ok=True)
        for path in self.directory.glob("*.lease"):
            if self._is_abandoned(path) or _names_no_owner(path):
                path.unlink(missing_ok=True)

    def _own(self, path: Path, file: BinaryIO) -> Claim:
        # The token tells two claims of one process apart; the pid is for people who look at the file.
        owner = json.dumps({"token": secrets.token_hex(8), "host": self.host, "pid": os.getpid()}).encode()
        try:
            # The lock comes before the owner is written: a claim that names this host without being locked counts as
            # abandoned. A file system without kernel locks leaves the decision to the time alone.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(owner)
        except BaseException:
            path.unlink(missing_ok=True)
            file.close()
            raise
        return Claim(path, file, owner, self)

    def _is_abandoned(self, path: Path) -> bool:
        """True if a claim's owner is dead or has been silent for longer than the lease, or if the claim is gone."""
        try:
            # For writing, too, because NFS grants an exclusive lock on no other handle.
            with path.open("r+b") as file:
                owner = file.read(_MAX_OWNER_BYTES)
                # An owner that is still being written names no host yet, and is judged by its age.
                is_of_this_host = f'"host": {json.dumps(self.host)}'.encode() in owner
                if is_of_this_host and _is_unlocked(file):
                    return True
                return self.now() - os.fstat(file.fileno()).st_mtime > self.lease_s
        except FileNotFoundError:
            return True

    def _file_system_time(self) -> float:
        """The time by which the file system stamps: that of a file server, whatever the hosts' clocks say."""
        probe = self.directory / f".now-{secrets.token_hex(8)}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        except FileNotFoundError:  # removed by `clear` of another worker, this moment
            return time.time()
        finally:
            probe.unlink(missing_ok=True)


def _names_no_owner(path: Path) -> bool:
    """True of a claim's file into which no owner has been written."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return True


def _is_unlocked(file: BinaryIO) -> bool:
    """True if no process of this host holds the kernel lock on an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_temporaries(output: Path, lease_s: float, claims: Claims | None = None) -> None:
    """Remove the files that killed workers left in a complete export, unless another worker does so.

    Every shard is published, so no worker needs these files: one whose file is removed finds its shard published. A
    directory that cannot be written to, or that was copied without its working files, stays as it is.
    """
    work = output / WORK_DIRECTORY
    if not work.is_dir():
        return
    with contextlib.suppress(OSError):
        claims = claims or Claims(work / LEASES_DIRECTORY, lease_s=lease_s)
        # Whoever holds this claim may be writing the manifest's own temporary file now.
        with claims.holding("manifest") as held:
            if held:
                # Those of shards and manifest, of the job, and of the plan and the records, which have folders.
                for leftover in (*output.glob(".*.tmp"), *work.glob(".*.tmp"), *work.glob("*/.*.tmp")):
                    if is_temporary(leftover):
                        leftover.unlink(missing_ok=True)
                claims.clear()
