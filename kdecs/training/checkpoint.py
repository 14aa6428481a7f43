"""The best epoch so far, in a folder of its own beside the checkpoint until training ends.

    best-3/    the files of epoch 3, as they will stand in the output directory

A checkpoint names its best epoch. The folder of an epoch appears whole (temporary folder, fsync, rename) before the
checkpoint that names it, and older ones go after it: wherever a kill hits, what the checkpoint names is there. At the
end the files move to their final places, which a second run can take up in the middle.
"""

import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdecs.artifact import atomic_path, fsync
from kdecs.errors import ArtifactError

CHECKPOINT_NAME = "checkpoint.pt"


@dataclass
class Progress:
    """Where training stands: next batch of an epoch, steps taken, what was measured.

    `sums` holds the sums of the epoch's losses over pairs, float64: this rank's in training, those of all ranks in a
    checkpoint; `seconds` the epoch's training so far.
    """

    sums: torch.Tensor
    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_macro_f1: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(
    directory: Path,
    config_hash: str,
    progress: Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Replace the checkpoint atomically."""
    state = {
        "config_hash": config_hash,
        "progress": {**vars(progress), "sums": progress.sums.cpu()},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(directory / CHECKPOINT_NAME) as temporary:
        torch.save(state, temporary)


def load_checkpoint(
    directory: Path,
    config_hash: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Progress | None:
    """Load model and optimizer in place and return the progress; None where there is no checkpoint.

    Raises ArtifactError for a checkpoint of another config or version, or a damaged one.
    """
    path = directory / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found, values = state["config_hash"], state["progress"]
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"{path}: not a readable checkpoint ({reason}); remove it to train anew"
        ) from None
    if found != config_hash:
        raise ArtifactError(
            f"{directory}: holds the unfinished training of another config; remove it or choose another output"
        )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(**values)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArtifactError(
            f"{path}: written by another version of kdecs ({reason}); remove it to train anew"
        ) from None


def remove_checkpoint(directory: Path) -> None:
    """Remove the checkpoint of a finished training."""
    (directory / CHECKPOINT_NAME).unlink(missing_ok=True)


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
            fsync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(folder)
    fsync(output)


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
    fsync(output)
    shutil.rmtree(folder, ignore_errors=True)


def _folder(output: Path, epoch: int) -> Path:
    return output / f"best-{epoch}"
