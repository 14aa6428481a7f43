"""What the epoch loop keeps on disk so that a kill at any moment costs at most one epoch.

    checkpoint.pt   the training state, the weights and the optimizer, replaced atomically
    best-3/         the files of the best epoch so far (here 3), as the output directory will hold them
    metrics.jsonl   one JSON object per epoch (it stays beside the product)

The checkpoint names its best epoch. The folder of an epoch appears complete or not at all (temporary folder, fsync,
rename), before the checkpoint that names it is written; older folders are removed after that. So wherever a kill
hits, the folder that the checkpoint names is there. At the end of the training its files move to their final places,
and a second run can finish a move that was interrupted.
"""

import json
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
from kdecs.tracking.record import METRICS_NAME, read_points

CHECKPOINT_NAME = "checkpoint.pt"
_BEST_FOLDER = re.compile(r"\.?best-\d+(\.tmp)?")
# What torch.load and the dictionary behind it raise for a file that is truncated, damaged or something else.
_UNREADABLE = (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


@dataclass
class TrainState:
    """All that a resume needs in addition to the weights and the optimizer.

    `batch` is the next batch of the current epoch (`epoch` epochs are complete), `step` the number of optimizer steps
    taken. `sums` are the sums of the losses over the pairs of the current epoch, float64: over this rank's pairs
    while training, over those of all ranks in a checkpoint. `seconds` is the time spent on the current epoch.
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
    output: Path,
    config_hash: str,
    state: TrainState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Replace the checkpoint atomically."""
    values = {
        "config_hash": config_hash,
        "progress": {**vars(state), "sums": state.sums.cpu()},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(output / CHECKPOINT_NAME) as temporary:
        torch.save(values, temporary)


def load_checkpoint(
    output: Path,
    config_hash: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> TrainState | None:
    """Load model and optimizer in place and return the state, or None if there is no checkpoint.

    Raises ArtifactError if the checkpoint belongs to another config or version, or is damaged.
    """
    path = output / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        # `weights_only` unpickles tensors and plain values, no code: the file may come from anywhere.
        values: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found, state = values["config_hash"], values["progress"]
    except _UNREADABLE as error:
        raise ArtifactError(
            f"{path}: not a readable checkpoint ({_reason(error)}); remove it to start the training again"
        ) from None
    if found != config_hash:
        raise ArtifactError(
            f"{output}: holds the unfinished training of another config; remove it or choose another output"
        )
    try:
        model.load_state_dict(values["model"])
        optimizer.load_state_dict(values["optimizer"])
        return TrainState(**state)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path}: written by another version of kdecs ({_reason(error)}); remove it to start the training again"
        ) from None


def remove_checkpoint(output: Path) -> None:
    """Remove the checkpoint of a finished training."""
    (output / CHECKPOINT_NAME).unlink(missing_ok=True)


def write_metrics(output: Path, history: list[dict[str, float]]) -> None:
    """Replace `metrics.jsonl` by the epochs so far."""
    lines = "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history)
    with atomic_path(output / METRICS_NAME) as temporary:
        temporary.write_text(lines, encoding="utf-8")


def restore_metrics(output: Path, config_hash: str) -> None:
    """Write the epochs that the checkpoint holds but that a kill kept out of `metrics.jsonl`.

    A checkpoint that cannot be read or belongs to another config is left alone: the training itself reports it.
    """
    path = output / CHECKPOINT_NAME
    if not path.is_file():
        return
    try:  # mapped, so that the tensors are not read
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found, history = values["config_hash"], values["progress"]["history"]
    except _UNREADABLE:
        return
    # Never fewer lines than before: a reader may have seen them all.
    if found == config_hash and len(history) > len(read_points(output / METRICS_NAME)):
        write_metrics(output, history)


def save_best(output: Path, epoch: int, write: Callable[[Path], object]) -> None:
    """Let `write(folder)` write the files of an epoch; the folder appears complete or not at all."""
    folder = _folder(output, epoch)
    temporary = output / f".{folder.name}.tmp"
    for leftover in (temporary, folder):  # of a training that was killed before its checkpoint
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        # Contents before the rename, or a crash of the machine could leave the name over empty files.
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
        if path != kept and path.is_dir() and _BEST_FOLDER.fullmatch(path.name):
            shutil.rmtree(path)


def install_best(output: Path, epoch: int, names: Iterable[str], *, optional: Iterable[str] = ()) -> None:
    """Move the files and folders of an epoch to their final places, and remove its folder.

    A name that the folder lacks was moved before a kill. Raises ArtifactError if it is not in its final place either,
    unless it is `optional`: an epoch that an earlier version of kdecs saved may lack it.
    """
    folder = _folder(output, epoch)
    needed = set(names)
    for name in (*names, *optional):
        source, target = folder / name, output / name
        if source.exists():
            # A folder cannot replace one that has files, here those of an earlier attempt.
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(source, target)
        elif name in needed and not target.exists():
            raise ArtifactError(
                f"{source}: missing, but the checkpoint names it; remove {output} to start the training again"
            )
    fsync(output)
    shutil.rmtree(folder, ignore_errors=True)


def _folder(output: Path, epoch: int) -> Path:
    return output / f"best-{epoch}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
