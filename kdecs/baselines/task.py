"""What the trainings of all baselines share: the loss from its parts, the metrics of an epoch, and its line."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from kdecs.baselines.model import LossPart
from kdecs.runtime import Runtime
from kdecs.student.training import scores_line
from kdecs.training.checkpoint import TrainState
from kdecs.training.loop import Floats, Ints, Metrics, summed_over_ranks


class BaselineTask(ABC):
    """One baseline in training, as the loop needs it (kdecs.training.loop.Task).

    A subclass loads model and data in its constructor and sets the attributes below.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    criterion = "macro_f1"
    num_tokens: Ints
    """Length of each row of the training split."""
    batch_size: int
    unit: str
    """What a row is, for the progress bar."""
    what: str
    """What the training reads, for the terminal."""
    parts: tuple[str, ...] = ()
    """Names of the loss' parts in the metrics; none if there is a single one."""
    pairs_per_row = 1.0
    files: tuple[str, ...]
    """What `save` writes."""
    details: dict[str, Any]
    """What the manifest says of data and system."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._shared: DistributedDataParallel | None = None

    @property
    def network(self) -> torch.nn.Module:
        """What runs forward in training: the model, on several ranks in a wrapper that averages their gradients."""
        return self._shared or self.model

    def share_gradients(self) -> None:
        """Train with the ranks of the process group. Collective."""
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else None
        # The head of the language model stands idle in most systems, and parts of others for some dialogues.
        self._shared = DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=True)

    @property
    def no_sums(self) -> Tensor:
        """Zeros for the sums of the loss and of each named part."""
        return torch.zeros(1 + len(self.parts), dtype=torch.float64, device=self.runtime.device)

    @abstractmethod
    def losses(self, rows_B: Ints, weights_B: Floats) -> list[LossPart]:
        """The parts of the loss on some rows of the training split. A row of weight 0 has no labels."""

    @abstractmethod
    def score(self) -> Metrics:
        """Choose threshold and decisions on the validation split: them, and the scores (fold1) with them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the product's files, with what the last `score` chose."""

    def loss(self, rows_B: Ints, weights_B: Floats, count: int) -> tuple[Tensor, Tensor]:
        """The loss of this rank's share of a batch, and its part in the sums of the whole and of each named part.

        Each part of the loss is a mean over the labels of the whole batch, whichever ranks have them:
        Σ_r total_r / Σ_r count_r. Gradients are averaged over ranks, so a rank's loss is multiplied by their number.
        """
        parts = self.losses(rows_B, weights_B)
        counts = summed_over_ranks(torch.stack([part.count for part in parts]), self.runtime)
        means = torch.stack([LossPart(part.total, n).mean for part, n in zip(parts, counts, strict=True)])
        loss = means.sum()
        sums = torch.cat((loss[None], means)) if self.parts else loss[None]
        return loss * self.runtime.world_size, sums.detach().double() * count

    def validate(self, state: TrainState, num_rows: int) -> Metrics:
        """One line of metrics: the means of the losses over the epoch's rows, speed, decisions and scores."""
        found = self.score()
        loss, *parts = (state.sums / num_rows).tolist()
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "time": time.time(),
            "train_loss": loss,
            **{f"train_{name}_loss": value for name, value in zip(self.parts, parts, strict=True)},
            "train_pairs_per_s": self.pairs_per_row * num_rows / max(state.seconds, 1e-9),
            **found,
        }

    def line(self, metrics: Metrics) -> str:
        """What the terminal shows of an epoch."""
        return (
            f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, "
            f"valid {scores_line(metrics, self.criterion)}, {metrics['train_pairs_per_s']:.0f} pairs/s"
        )
