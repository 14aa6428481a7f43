"""Finished students of all sweeps by config hash, so that the same settings are trained once.

    STORE/HASH          a link to the trial's directory that holds the student; one whose target is gone is ignored
    STORE/.locks/HASH   held by who trains it now, so that two sweeps side by side do not train it twice

A sweep that finds a student there takes its files as hard links (copies, on another file system): it stays whole when
the other sweep is removed.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kdecs.artifact import MANIFEST_NAME, file_lock, is_complete, read_manifest
from kdecs.errors import ArtifactError

_POLL_S = 1.0


def find_student(store: Path, digest: str) -> Path | None:
    """The directory of a finished student with this config hash, or None."""
    target = (store / digest).resolve()
    with contextlib.suppress(ArtifactError):  # damaged since: it is trained again
        if is_complete(target, "student", digest):
            return target
    return None


def add_student(store: Path, digest: str, directory: Path) -> None:
    """Note where a finished student lies; a link that leads nowhere is replaced."""
    if find_student(store, digest):
        return
    store.mkdir(parents=True, exist_ok=True)
    temporary = store / f".{digest}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(directory, store))
    os.replace(temporary, store / digest)


def take_student(source: Path, target: Path) -> None:
    """Make `target` a finished student from the files of `source`, without a second copy on disk where possible."""
    target.mkdir(parents=True, exist_ok=True)
    for name in [*(entry.path for entry in read_manifest(source, "student").files), MANIFEST_NAME]:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source / name, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source / name, temporary)
        os.replace(temporary, place)


@contextlib.contextmanager
def training_lock(store: Path, digest: str, should_stop: Callable[[], bool]) -> Iterator[bool]:
    """Wait until nobody else trains this student and hold the right to; yields False once a stop is asked for."""
    path = store / ".locks" / digest
    while True:
        with file_lock(path, blocking=False) as held:
            if held:
                yield True
                return
        if should_stop():
            yield False
            return
        time.sleep(_POLL_S)
