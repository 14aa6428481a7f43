"""The training checkpoint: all that an exact resume needs, and nothing else.

One file, `checkpoint.pt` in the output directory, a torch archive of tensors and plain values, read with
`weights_only=True`. It is the training's own: gone once the student is complete, never part of what is sent.
There are no random states in it: batches and dropout are drawn from (seed, epoch) and (seed, step, rank).
"""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdecs.artifact import atomic_path
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
