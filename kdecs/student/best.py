"""The best epoch so far, in a folder of its own beside the checkpoint until training ends.

    best-3/    the files of epoch 3, as they will stand in the output directory

A checkpoint names its best epoch. The folder of an epoch appears whole (temporary folder, fsync, rename) before the
checkpoint that names it, and older ones go after it: wherever a kill hits, what the checkpoint names is there. At the
end the files move to their final places, which a second run can take up in the middle.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from kdecs.errors import ArtifactError

_FOLDER = re.compile(r"\.?best-\d+(\.tmp)?")


def save_best(output: Path, epoch: int, write: Callable[[Path], object]) -> None:
    """Write the files of an epoch with `write(folder)`; the folder appears whole or not at all."""
    folder = _folder(output, epoch)
    temporary = output / f".{folder.name}.tmp"
    for leftover in (temporary, folder):  # of a training that was killed before its checkpoint
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(folder)
    _fsync(output)


def keep_best(output: Path, epoch: int) -> None:
    """Remove the folders of all other epochs, and unfinished ones."""
    kept = _folder(output, epoch)
    for path in output.iterdir():
        if path != kept and path.is_dir() and _FOLDER.fullmatch(path.name):
            shutil.rmtree(path)


def install_best(output: Path, epoch: int, names: Iterable[str], *, optional: Iterable[str] = ()) -> None:
    """Move an epoch's files and folders to their final places, and remove its folder.

    What is not in the folder was moved before a kill. Raises ArtifactError where it is not in its place either,
    unless it is `optional`: an epoch that an earlier version of kdecs saved may lack it.
    """
    folder = _folder(output, epoch)
    needed = set(names)
    for name in (*names, *optional):
        source, target = folder / name, output / name
        if source.exists():
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(source, target)
        elif name in needed and not target.exists():
            raise ArtifactError(f"{source}: missing, the checkpoint names it; remove {output} to train anew")
    _fsync(output)
    shutil.rmtree(folder, ignore_errors=True)


def _folder(output: Path, epoch: int) -> Path:
    return output / f"best-{epoch}"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
