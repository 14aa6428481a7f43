"""Artifact directories: how a stage checks its output, completes it with a manifest, and how a reader verifies it.

Format of `manifest.json` (version 1), one JSON object:

    kind            corpus-cache | base-model | teacher | soft-labels | student | student-onnx | mrc | baseline |
                    generative | sweep | report
    format_version  1
    kdecs_version   version of the writer
    config_hash     hash of the resolved config (kdecs.config.config_hash)
    inputs          {name: sha256 of the input's manifest or content}
    files           [{path, bytes, sha256, rows (or null)}], paths relative with "/"
    details         free facts of the kind (metrics, answer words, …), no absolute paths, no dates

The manifest is written last, by temporary file, fsync and rename, so a directory without one is unfinished.
A manifest of soft labels also carries its own checksum in `details.seal`: the sha256 of its canonical JSON without
that key. Labels pass through many hands and files, and a changed count or lineage would otherwise go unnoticed.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdecs import __version__
from kdecs.errors import ArtifactError, OutputError

MANIFEST_NAME = "manifest.json"
CHECKSUM_KEY = "seal"  # in the details of a manifest that carries its own checksum
FORMAT_VERSION = 1
Kind = Literal[
    "corpus-cache",
    "base-model",
    "teacher",
    "soft-labels",
    "student",
    "student-onnx",
    "mrc",
    "baseline",
    "generative",
    "sweep",
    "report",
]
_BLOCK_BYTES = 1 << 20  # hashlib releases the interpreter's lock for each, so threads hash at the same time
_MAX_MANIFEST_BYTES = 256 << 20  # over a million files; a damaged file must not fill the memory first
_MAX_THREADS = 16  # more would wait for the disk
_MODEL_KINDS = ("base-model", "teacher", "student", "student-onnx", "mrc", "baseline", "generative")
_MODEL_FOLDER = "model"
# What Transformers, PEFT, torch and the loaders of kdecs look for in a directory without being asked to.
_LOADED_NAMES = re.compile(
    r"(config|adapter_config|generation_config|(pre)?processor_config|special_tokens_map|added_tokens|chat_template"
    r"|student|onnx|mrc|baseline|vocab|tokenizer.*|.*\.index)\.json|(vocab|merges)\.txt|\.metadata"
    r"|[^.].*\.(safetensors|bin|pt|pth|ckpt|gguf|distcp|model|onnx|data|spm|tiktoken|jinja|py)"
)
_Given = TypeVar("_Given")
_Made = TypeVar("_Made")
_Record = TypeVar("_Record", bound=BaseModel)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_FOREIGN_LEFTOVER_S = 86_400.0
_LONGEST_NAME = 255 - len("..0123456789abcdef.tmp")  # bytes of a name that a temporary one can still hold


class FileEntry(BaseModel):
    """One file of an artifact: its path in the directory, size, checksum, and rows if it is a table."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int | None = None


class Manifest(BaseModel):
    """The parsed `manifest.json` of an artifact directory; the format is at the top of this module."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    format_version: int
    kdecs_version: str
    config_hash: str
    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    details: dict[str, Any] = Field(default_factory=dict)


def sha256_of_file(path: Path, *, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex sha256 of a file, read in blocks of 1 MiB. `on_bytes` is called with the size of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if on_bytes:
                on_bytes(len(block))
    return digest.hexdigest()


def content_checksum(path: Path) -> str:
    """A checksum that stands for a path's content, the same on every machine.

    A file: its sha256. An artifact directory: the sha256 of its manifest (which holds those of its files).
    Any other directory: the sha256 over the sorted (relative path, sha256) of its visible files.
    Raises ArtifactError if the path does not exist.
    """
    if path.is_file():
        return _remembered_sha256(path)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such file or directory")
    # The manifest holds the sha256 of every file, so a few KiB stand for gigabytes of weights.
    manifest = path / MANIFEST_NAME
    if manifest.is_file():
        return sha256_of_file(manifest)
    # Hidden files are caches and locks: they come and go while the content stays the same.
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_remembered_sha256(file)}\n".encode())
    return digest.hexdigest()


def _remembered_sha256(path: Path) -> str:
    """Hash each input once per process, because a sweep asks for the same base model in every trial."""
    state = path.stat()
    return _sha256_at(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256_at(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    del inode, size, mtime_ns  # part of the cache's key alone: a file that was changed is hashed again
    return sha256_of_file(path)


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's list of names, survive a crash of the machine."""
    # Reading is enough for a sync on Linux, and a directory can be opened for nothing else.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to. On success, fsync it and rename it to `path`.

    On any error the temporary file is removed and `path` stays as it was. The file gets the mode that the umask gives,
    and what killed writers of the same path left is removed. A link to a file is replaced, never followed, so that a
    directory from elsewhere leads nowhere. Raises OutputError if something else than a file stands there.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: {kind_of(path)} is in the place of a file; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, handle = _locked_file(path)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        yield temporary
        # Before the rename, or a crash of the machine could leave the final name over an empty file.
        fsync(temporary)
        # safetensors replaces this file with one that only its owner may read.
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
        # The rename itself is an entry of the directory.
        fsync(path.parent)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a private folder beside `path`, for what is to become that path or is needed only while it is made.

    It is removed at the end, together with those that killed processes left beside the same path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    while True:
        folder = temporary_path(path)
        folder.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover
            handle = os.open(folder, os.O_RDONLY)
            if _is_locked(handle):
                break
            os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def scratch_folder(name: str) -> AbstractContextManager[Path]:
    """`temporary_folder` in the system's directory for temporary files; `name` says what it is for."""
    return temporary_folder(Path(tempfile.gettempdir(), f"kdecs-{name}"))


def temporary_path(path: Path) -> Path:
    """A new hidden name beside a path. `remove_leftovers` knows it again after its writer was killed."""
    # The host's mark tells `remove_leftovers` whether it can see the lock of this writer.
    return path.with_name(f"{_prefix(path)}{_host_mark()}{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """True if a name is one that `temporary_path` gives."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders that killed writers of a path left beside it.

    Each writer holds a kernel lock on its own until it ends, so those of living writers stay. Not every file system
    tells one host of the locks of another, so those of another host or of an earlier boot stay for a day.
    """
    names = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):  # no such directory, or none of ours
        for entry in os.scandir(path.parent):
            # In a shared directory such as /tmp, another user's files are not ours to judge.
            if names.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                _remove_unlocked(entry)


def _remove_unlocked(entry: "os.DirEntry[str]") -> None:
    is_folder = entry.is_dir(follow_symlinks=False)
    is_of_this_host = entry.name.removesuffix(".tmp")[-16:-8] == _host_mark()
    with contextlib.suppress(OSError):  # locked, or gone already
        if not is_of_this_host and time.time() - entry.stat().st_mtime < _FOREIGN_LEFTOVER_S:
            return
        # NFS locks only what is open for writing, which a folder cannot be.
        # Without O_NONBLOCK a named pipe of such a name would hold this process up until somebody wrote to it.
        handle = os.open(entry, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            # Refused while the writer lives: the kernel frees its lock when it dies, however it dies.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_folder:
                shutil.rmtree(entry, ignore_errors=True)
            else:
                Path(entry).unlink()
        finally:
            os.close(handle)


def _locked_file(path: Path) -> tuple[Path, int]:
    """A new temporary file for a path, and its open, locked handle."""
    while True:
        temporary = temporary_path(path)
        # The kernel applies the umask, and the directory's default ACL, to this mode.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _is_locked(handle):
            return temporary, handle
        os.close(handle)


def _is_locked(handle: int) -> bool:
    """Lock a new temporary file or folder. False if another process has taken it for a leftover and removed it."""
    # Waits for a `remove_leftovers` that holds the lock now; the number of links shows whether it has removed the file.
    with contextlib.suppress(OSError):  # without kernel locks nobody removes it either
        fcntl.flock(handle, fcntl.LOCK_EX)
    return os.fstat(handle).st_nlink > 0


def _prefix(path: Path) -> str:
    # A long name leaves no room for the rest of a temporary one.
    name = path.name if len(os.fsencode(path.name)) <= _LONGEST_NAME else _digest_of(path.name)
    return f".{name}."


def host_identity() -> str:
    """This host and its current boot: kernel locks tell about processes of the same kernel only."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text(encoding="ascii").strip() if boot.is_file() else ""
    return f"{socket.gethostname()} {boot_id}".strip()


@functools.cache
def _host_mark() -> str:
    return hashlib.sha256(host_identity().encode()).hexdigest()[:8]


def _digest_of(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def share_files(folder: Path) -> None:
    """Give every file below a folder the mode that new files have there: safetensors gives its own to their owner."""
    # The kernel alone knows what umask and default ACL make of a new file, so the mode is read from one.
    probe, handle = _locked_file(folder / "mode")
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        probe.unlink()
        os.close(handle)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def install_files(source: Path, target: Path) -> list[str]:
    """Move every file below a folder to the same place below another, each atomically; returns their relative paths.

    For what libraries write file by file, such as a model with its tokenizer.
    """
    share_files(source)
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        fsync(source / name)
        os.replace(source / name, target / name)
    # Before the caller's manifest, which must not name a file whose rename a crash of the machine can still undo.
    for folder in {(target / name).parent for name in names}:
        fsync(folder)
    return names


def kind_of(path: Path) -> str:
    """What stands at a path that exists, in words, for messages."""
    mode = path.stat().st_mode
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a disk device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "something that is no file")


def write_text(path: Path, text: str) -> None:
    """Replace a file's text (UTF-8) atomically and durably."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file with indented JSON (sorted keys, no NaN) atomically and durably."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


@contextlib.contextmanager
def file_lock(path: Path, *, blocking: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which is made if missing. Yields False if it is taken and not `blocking`.

    The kernel frees the lock when its holder dies. The file itself stays.
    """
    # If it were removed, one process could hold the lock of the removed file and another that of a new one.
    path.parent.mkdir(parents=True, exist_ok=True)
    # Appending makes the file and cuts nothing off one that is there. NFS grants an exclusive lock only on a handle
    # that may write.
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def build_manifest(
    kind: Kind,
    *,
    config_hash: str,
    inputs: Mapping[str, str],
    files: Iterable[FileEntry],
    details: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of a finished directory as a reader will see it: sorted, details in plain JSON values."""
    manifest = Manifest(
        kind=kind,
        format_version=FORMAT_VERSION,
        kdecs_version=__version__,
        config_hash=config_hash,
        # Sorted: workers finish their files in any order, and the same work must give the same bytes.
        inputs=dict(sorted(inputs.items())),
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        # Tuples become lists here, as they will for a reader, so that both compute the same checksum.
        details=json.loads(json.dumps(dict(details or {}))),
    )
    return with_checksum(manifest) if kind == "soft-labels" else manifest


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, which completes the directory. Every listed file must be durable before."""
    write_json(directory / MANIFEST_NAME, manifest.model_dump(mode="json"))


def write_manifest(
    directory: Path,
    kind: Kind,
    *,
    config_hash: str,
    inputs: Mapping[str, str],
    files: Iterable[str],
    rows: Mapping[str, int] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Manifest:
    """Checksum the named files (relative paths), fsync them, and write the manifest last."""
    entries = file_entries(directory, files, rows=rows)
    manifest = build_manifest(kind, config_hash=config_hash, inputs=inputs, files=entries, details=details)
    save_manifest(directory, manifest)
    return manifest


def file_entries(
    directory: Path, names: Iterable[str], *, rows: Mapping[str, int] | None = None
) -> list[FileEntry]:
    """Size and sha256 of the named files (relative paths), by name; each of them is durable afterwards."""

    def entry(name: str) -> FileEntry:
        path = _inside(directory, name)
        fsync(path)  # a record must never list a file that a crash of the machine can still take away
        return FileEntry(
            path=name, bytes=path.stat().st_size, sha256=sha256_of_file(path), rows=(rows or {}).get(name)
        )

    return _in_threads(entry, sorted(set(names)))


def with_checksum(manifest: Manifest) -> Manifest:
    """The manifest with its own checksum among its details."""
    return manifest.model_copy(update={"details": {**manifest.details, CHECKSUM_KEY: _checksum(manifest)}})


def has_valid_checksum(manifest: Manifest) -> bool:
    """True if the manifest carries its own checksum and agrees with it."""
    return manifest.details.get(CHECKSUM_KEY) == _checksum(manifest)


def _checksum(manifest: Manifest) -> str:
    values = manifest.model_dump(mode="json")
    # A checksum cannot cover itself.
    values["details"].pop(CHECKSUM_KEY, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path, *kinds: Kind) -> Manifest:
    """Parse a directory's manifest and check its kind (any if none is given), version and paths (no checksums).

    Raises ArtifactError, one line, if the directory is missing, unfinished or of another kind.
    """
    expected = " or ".join(kinds) or "output of kdecs"
    if not directory.is_dir():
        raise ArtifactError(
            f"{directory}: no such directory, expected the directory of a finished {expected}"
        )
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{directory}: has no {MANIFEST_NAME}, so it is unfinished or no {expected}; name another directory, or "
            "run the command that writes this one again"
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path}: {path.stat().st_size} bytes, more than any manifest has; it is damaged")
    manifest = read_record(Manifest, path, "it is damaged")
    if manifest.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format version {manifest.format_version}, this kdecs reads {FORMAT_VERSION}; "
            "write the directory again or install the kdecs that wrote it"
        )
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(f"{directory}: holds a {manifest.kind}, expected a {expected} directory")
    # Readers open these paths, and the directory may come from somebody else.
    for entry in manifest.files:
        _inside(directory, entry.path)
    return manifest


def read_record(model: type[_Record], path: Path, remedy: str) -> _Record:
    """A JSON file of an artifact, by its pydantic model. Raises ArtifactError, which ends with the remedy."""
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path}: {field}: {first['msg']}; {remedy}") from None


def is_complete(directory: Path, kind: Kind, config_hash: str) -> bool:
    """True if the directory holds this work, finished: kind, config hash and file sizes agree. No checksum is read."""
    if not (directory / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(directory, kind)
    if manifest.config_hash != config_hash:
        return False
    # Sizes alone, because the driver of a sweep asks this about every trial once a second.
    return not any(_size_fault(directory, entry) for entry in manifest.files)


def check_output(
    directory: Path,
    kind: Kind,
    config_hash: str,
    *,
    can_repair: bool = False,
    data_files: str | None = None,
    is_begun_here: Callable[[], bool | None] = lambda: None,
    remedy: str = "choose another output or remove the directory",
) -> None:
    """Raise ArtifactError if an output directory belongs to other work. Changes nothing, and makes no directory.

    A finished artifact must be of this kind and config hash, and undamaged unless the caller `can_repair` it.
    An unfinished one belongs to the work that its own records name: `is_begun_here` returns True for this work, False
    for other work, None without a record. Files that match `data_files` then need an owner: without a manifest and
    without a record they are refused, since nothing says what they are.
    """
    is_finished = (directory / MANIFEST_NAME).is_file()
    if is_finished:
        manifest = read_manifest(directory, kind)
        if manifest.config_hash != config_hash:
            raise ArtifactError(
                f"{directory}: holds a finished {kind} directory of another config or of other inputs "
                f"(hash {manifest.config_hash[:12]}…, this one is {config_hash[:12]}…); {remedy}"
            )
        faults = (fault for entry in manifest.files if (fault := _size_fault(directory, entry)))
        if not can_repair and (fault := next(faults, None)):
            raise ArtifactError(f"{directory}: holds a damaged {kind} directory ({fault}); {remedy}")
    # Files before records: another worker may begin the same work now, and it writes its record first.
    strays = (
        sorted(path.name for path in directory.glob(data_files)) if data_files and not is_finished else []
    )
    is_ours = is_begun_here()
    if is_ours is False:
        raise ArtifactError(f"{directory}: holds unfinished {kind} of other work; {remedy}")
    if strays and is_ours is None:
        raise ArtifactError(
            f"{directory}: holds {strays[0]} but no record of the work that wrote it; {remedy}"
        )


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for the first file that is missing or has another size (cheap check)."""
    for entry in manifest.files:
        if fault := _size_fault(directory, entry):
            raise ArtifactError(f"{fault}; run the command that writes {directory} again")


def read_verified_manifest(directory: Path, *kinds: Kind) -> Manifest:
    """The manifest of a directory after reading every byte of it. Raises ArtifactError for the first fault."""
    manifest = read_manifest(directory, *kinds)
    if unlisted := _unlisted_faults(directory, manifest):  # before gigabytes are read
        raise ArtifactError(f"{unlisted[0]}; move it out of the directory")
    if faults := verify_artifact(directory):
        raise ArtifactError(f"{faults[0]}; run the command that writes {directory} again")
    return manifest


def verify_artifact(directory: Path, *, on_bytes: Callable[[int], object] | None = None) -> list[str]:
    """Every fault of an artifact directory, one line each. The list is empty if it is complete and undamaged.

    Of a model, a file that the manifest does not list is a fault, too, if loading the model would read it. Reads every
    byte, several files at a time in threads, since hashlib releases the interpreter's lock. `on_bytes` is called, one
    call at a time, with the bytes checked since the last call, for a progress bar.
    Raises ArtifactError if there is no readable manifest.
    """
    manifest = read_manifest(directory)
    faults = file_faults(directory, manifest.files, on_bytes=on_bytes)
    return [*faults, *_unlisted_faults(directory, manifest)]


def file_faults(
    directory: Path,
    entries: Sequence[FileEntry],
    *,
    says: str = "the manifest says",
    on_bytes: Callable[[int], object] | None = None,
) -> list[str]:
    """Every listed file that is missing, has another size, or has another sha256: one line each.

    `says` stands before what was expected, and names the list. `on_bytes` is that of `verify_artifact`.
    Raises ArtifactError for a path that leaves the directory.
    """
    # All names before any byte: a list that leads out of the directory is not worth reading.
    for listed in entries:
        _inside(directory, listed.path)
    lock = threading.Lock()

    def advance(num_bytes: int) -> None:
        if on_bytes:
            with lock:
                on_bytes(num_bytes)

    faults = _in_threads(lambda entry: _file_fault(directory, entry, says, advance), entries)
    return [fault for fault in faults if fault]


def _in_threads(action: Callable[[_Given], _Made], items: Sequence[_Given]) -> list[_Made]:
    """The results of an action that hashes a file, in the order of the items, several files at a time."""
    # A thread costs more than a small file, and most artifacts that are looked at have few files or one that matters.
    if len(items) < 2:
        return [action(item) for item in items]
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(items))) as pool:
        return list(pool.map(action, items))


def listed_file(directory: Path, manifest: Manifest, name: str, *, remedy: str | None = None) -> Path:
    """The path of a file of an artifact after reading every byte of it, for readers that need this file alone.

    Raises ArtifactError, which ends with the remedy, if the manifest does not list the file or says otherwise of it.
    """
    remedy = remedy or f"run the command that writes {directory} again"
    entry = next((entry for entry in manifest.files if entry.path == name), None)
    if entry is None:
        raise ArtifactError(f"{directory}: its {MANIFEST_NAME} lists no {name}; {remedy}")
    for fault in file_faults(directory, [entry]):
        raise ArtifactError(f"{fault}; {remedy}")
    return directory / name


def _unlisted_faults(directory: Path, manifest: Manifest) -> list[str]:
    """Files that nobody checked and that would be loaded with a model, or instead of it."""
    if manifest.kind not in _MODEL_KINDS:
        return []
    # Other folders hold training states, whose files state.json lists.
    files = [*directory.iterdir(), *(directory / _MODEL_FOLDER).rglob("*")]
    listed = {entry.path for entry in manifest.files}
    return [
        f"{path}: {MANIFEST_NAME} does not list this file, but loading the {manifest.kind} would read it"
        for path in sorted(files)
        if _LOADED_NAMES.fullmatch(path.name)
        and not path.is_dir()
        and path.relative_to(directory).as_posix() not in listed
    ]


def _file_fault(
    directory: Path, entry: FileEntry, says: str, on_bytes: Callable[[int], object]
) -> str | None:
    path = directory / entry.path
    if fault := _size_fault(directory, entry, says):
        on_bytes(entry.bytes)  # not read, but the progress bar must come to its end
        return fault
    try:
        found = sha256_of_file(path, on_bytes=on_bytes)
    except OSError as error:  # such as a bad sector: the other files are still worth checking
        return f"{path}: cannot be read ({error.strerror})"
    if found != entry.sha256:
        return f"{path}: sha256 {found[:12]}…, {says} {entry.sha256[:12]}…: the file is damaged"
    return None


def _size_fault(directory: Path, entry: FileEntry, says: str = "the manifest says") -> str | None:
    path = directory / entry.path
    if not path.is_file():
        return f"{path}: missing, {says} {entry.bytes} bytes"
    if (found := path.stat().st_size) != entry.bytes:
        return f"{path}: {found} bytes, {says} {entry.bytes} bytes"
    return None


def _inside(directory: Path, name: str) -> Path:
    """The path of a listed file. Raises ArtifactError for a name that leaves the directory by `..`, root or link."""
    # The name is judged as text first, since a file that is missing has no links to follow.
    pure = PurePosixPath(name)
    path = directory / name
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise ArtifactError(f"{directory}: lists the file {name!r}, which lies outside the directory")
    # A harmless name may still pass through a folder that is a link to somewhere else.
    if path.exists() and not path.resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(f"{directory}: {name!r} is a link that leaves the directory")
    return path
