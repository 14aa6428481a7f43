"""What the epoch loop keeps on disk so that a kill at any moment costs at most one epoch.

    checkpoint.pt   the training state, the weights and the optimizer, and a sha256 over all three, replaced atomically
    best-3/         the files of the best epoch so far (here 3), as the output directory will hold them
    metrics.jsonl   one JSON object per epoch (it stays beside the product)

The checkpoint names its best epoch. The folder of an epoch appears complete or not at all (temporary folder, fsync,
rename), before the checkpoint that names it is written; older folders are removed after that. So wherever a kill
hits, the folder that the checkpoint names is there. At the end of the training its files move to their final places,
and a second run can finish a move that was interrupted.

The checkpoint also holds the sha256 of each file of the best epoch. A resume and the end of the training compare them,
since a model that was changed on the disk must not be finished under the scores of the one that was validated.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from kdecs.artifact import (
    FileEntry,
    atomic_path,
    file_entries,
    file_faults,
    fsync,
    remove_leftovers,
    write_text,
)
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
    best_files: list[dict[str, Any]] = field(default_factory=list)
    """Path, size and sha256 of each file of the best epoch (`FileEntry`)."""
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
    values["sha256"] = _sha256_of(values)
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
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found, progress = values["config_hash"], values["progress"]
    except _UNREADABLE as error:
        raise ArtifactError(
            f"{path}: not a readable checkpoint ({_reason(error)}); remove it to start the training again"
        ) from None
    # Before the state is read: the checkpoint of another config is sound, and its user should be told so.
    if found != config_hash:
        raise ArtifactError(
            f"{output}: holds the unfinished training of another config; remove it or choose another output"
        )
    try:
        state = TrainState(**progress)
        # Before anything goes into model and optimizer, which a damaged file must not reach.
        expected = values.pop("sha256")
        if (sha256 := _sha256_of(values)) != expected:
            raise ArtifactError(
                f"{path}: sha256 of its values {sha256[:12]}…, expected {expected[:12]}…: the file is damaged; remove "
                "it to start the training again"
            )
        state.sums = state.sums.to(device)
        model.load_state_dict(values["model"])
        optimizer.load_state_dict(values["optimizer"])
        return state
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: written by another version of kdecs ({_reason(error)}); remove it to start the training again"
        ) from None


def _sha256_of(value: Any) -> str:
    """A checksum of nested dictionaries, lists and tuples of tensors and plain values, on any device.

    It is over values, not over the file: the file has to hold it, so that both are replaced together. torch checks no
    checksum when it reads a file.
    """
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
        # As bytes, since numpy has no bfloat16. A tensor without dimensions has no other view.
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
    if isinstance(value, Mapping):
        value = ["mapping", *([repr(key), _sha256_of(item)] for key, item in value.items())]
    elif isinstance(value, list | tuple):
        value = ["sequence", *map(_sha256_of, value)]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def remove_checkpoint(output: Path) -> None:
    """Remove the checkpoint of a finished training, and what killed processes left of one."""
    remove_leftovers(output / CHECKPOINT_NAME)
    (output / CHECKPOINT_NAME).unlink(missing_ok=True)


def write_metrics(output: Path, history: list[dict[str, float]]) -> None:
    """Replace `metrics.jsonl` by the epochs so far."""
    lines = "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history)
    write_text(output / METRICS_NAME, lines)


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


def best_files(output: Path, epoch: int) -> list[dict[str, Any]]:
    """The files of an epoch's folder, for `TrainState.best_files`."""
    folder = _folder(output, epoch)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [entry.model_dump() for entry in file_entries(folder, names)]


def check_best(output: Path, state: TrainState) -> None:
    """Raise ArtifactError if a file of the best epoch is not the one that the training wrote.

    A kill may have left some of them in their final places (`install_best`).
    """
    folder = _folder(output, state.best_epoch)
    listed = [FileEntry.model_validate(values) for values in state.best_files]
    for top in sorted({PurePosixPath(entry.path).parts[0] for entry in listed}):
        place = folder if (folder / top).exists() else output
        if not (place / top).exists():
            continue  # `install_best` knows what an epoch may lack
        entries = [entry for entry in listed if PurePosixPath(entry.path).parts[0] == top]
        for fault in file_faults(place, entries, says="but the checkpoint names it with"):
            raise ArtifactError(f"{fault}; remove {output} to start the training again")
        # Folders move as a whole, so a file that somebody put there would become part of the product.
        found = {
            path.relative_to(place).as_posix(): path for path in (place / top).rglob("*") if path.is_file()
        }
        if strangers := sorted(set(found) - {entry.path for entry in entries}):
            raise ArtifactError(
                f"{found[strangers[0]]}: the checkpoint does not name this file of the best epoch; remove the file"
            )


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
    # Only once the new names are on the disk may the folder go that they came from.
    shutil.rmtree(folder, ignore_errors=True)


def _folder(output: Path, epoch: int) -> Path:
    return output / f"best-{epoch}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
