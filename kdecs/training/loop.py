"""The one training loop: epochs of steps with exact resume, for students and baselines.

An epoch ends with a validation. It is a pass over the data, or with `optimization.steps` a number of steps.

A stage hands in a `Task` (how to compute the loss of a batch, how to validate, which files to save) and `LoopSettings`
(what to train on and for how long). The loop owns the rest: the order of batches, learning rates, the optimizer step,
ranks, stops, the best epoch, checkpoints and the lines of `metrics.jsonl`. The demo's base models, which have no
epochs, share its `GuardedSteps`.

Batches, learning rates and dropout are pure functions of the config's seed and the step. A resume therefore needs no
random states and no scheduler, and a training that was stopped ends with the weights of one that was not.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from kdecs.config import BudgetedOptimization, Optimizer
from kdecs.errors import Stopped, TrainingError
from kdecs.process import ProgressBar, StopSignal
from kdecs.runtime import Runtime, any_rank, gather_objects, on_main
from kdecs.training.checkpoint import (
    TrainState,
    best_files,
    check_best,
    keep_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
    write_metrics,
)

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]
Metrics = dict[str, float]

# Steps between two looks at a flag on the device and at the other ranks: each look waits for both.
_CHECK_STEPS = 20


class Task(Protocol):
    """What a stage adds to the loop."""

    model: torch.nn.Module
    """The module to train and to checkpoint, without a wrapper for several ranks."""
    optimizer: torch.optim.Optimizer
    """Its parameter groups may carry `rate_factor`, a multiple of the learning rate."""
    criterion: str
    """The metric that the best epoch is chosen by (the higher, the better)."""

    @property
    def no_sums(self) -> Tensor:
        """Zeros of the shape of the sums that `loss` returns, float64."""
        ...

    def loss(self, rows_B: Ints, weights_B: Floats, count: int) -> tuple[Tensor, Tensor]:
        """Run this rank's share of a global batch of `count` rows forward.

        Returns the loss to differentiate, and this rank's part of the sums over the epoch's rows. A row of weight 0
        only pads the share.
        """
        ...

    def validate(self, state: TrainState, num_rows: int) -> Metrics:
        """The metrics of the epoch that just ended. Called on rank 0.

        It trained on `num_rows` rows, and `state.sums` are the sums over them, of all ranks.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the product's files for the epoch that `validate` just saw. Called on rank 0."""
        ...

    def line(self, metrics: Metrics) -> str:
        """What the terminal shows of an epoch."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """What the loop trains on, how, and where it keeps its state."""

    output: Path
    config_hash: str
    rows: Ints
    """Indices of the rows to train on, into `num_tokens`."""
    num_tokens: Ints
    """Length of each row: batches hold rows of similar length."""
    batch_size: int
    """Rows per step, over all ranks."""
    bucket_batches: int
    optimization: BudgetedOptimization
    patience_epochs: int | None = None
    unit: str = "pair"
    groups: Sequence[Ints] | None = None
    """The rows to train on in groups that stay together in a batch and on a rank; None: each row by itself."""

    @property
    def pass_steps(self) -> int:
        """Steps of a pass over the rows."""
        steps = math.ceil(len(self.rows) / self.batch_size)
        return steps if self.groups is None else min(steps, len(self.groups))

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch; of a training for steps the last one may have fewer."""
        return self.pass_steps if self.optimization.epochs else self.optimization.steps_per_validation

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.optimization.steps or self.pass_steps * self.optimization.num_epochs

    def epoch_batches(self, epoch: int) -> list[list[Ints]]:
        """The groups of each batch of an epoch (of single rows: one group, the whole batch)."""
        first = epoch * self.epoch_steps
        last = min(first + self.epoch_steps, self.total_steps)
        found: list[list[Ints]] = []
        # Without a gap: where one pass over the rows ends, amid an epoch or not, the next one begins.
        for number in range(first // self.pass_steps, math.ceil(last / self.pass_steps)):
            begin = number * self.pass_steps
            found += self._pass_batches(number)[max(0, first - begin) : last - begin]
        return found

    def _pass_batches(self, number: int) -> list[list[Ints]]:
        """The batches of one pass over the rows, in the order that seed and number give."""
        seed = self.optimization.seed
        if self.groups is None:
            batches = epoch_batches(
                self.num_tokens,
                self.rows,
                batch_size=self.batch_size,
                bucket_batches=self.bucket_batches,
                seed=seed,
                epoch=number,
            )
            return [[rows] for rows in batches]
        sizes = np.array([len(group) for group in self.groups])
        chosen = grouped_batches(sizes, num_batches=self.pass_steps, seed=seed, epoch=number)
        return [[self.groups[index] for index in batch] for batch in chosen]


class EpochLoop:
    """One training: its task, settings and state on this rank."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        runtime: Runtime,
        stop: StopSignal,
        on_epoch: Callable[[Metrics], None] | None = None,
    ) -> None:
        """Load the checkpoint if there is one. Raises ArtifactError if it is damaged or of another config."""
        self.task, self.settings, self.runtime = task, settings, runtime
        self.stop, self.on_epoch = stop, on_epoch
        state = load_checkpoint(
            settings.output, settings.config_hash, task.model, task.optimizer, runtime.device
        )
        self.state = state or TrainState(sums=task.no_sums)
        # A checkpoint holds the sums of all ranks: rank 0 continues from them, the others from zero. They are cloned,
        # since steps add to the sums in place and the task's zeros must stay zeros.
        self.state.sums = (self.state.sums if runtime.is_main else task.no_sums).clone().to(runtime.device)
        self.steps = GuardedSteps(task.model, task.optimizer, settings.optimization.max_grad_norm, runtime)

    @property
    def is_resumed(self) -> bool:
        """True if the state comes from a checkpoint."""
        return self.state.step > 0

    def run(self, what: str) -> Metrics:
        """Train the epochs that are left and return the metrics of the best one. Collective.

        `what` describes the data in the first line on the terminal. Raises Stopped after a requested stop was saved,
        TrainingError if a loss or gradient is not finite.
        """
        settings, state = self.settings, self.state
        epochs = settings.optimization.num_epochs
        on_main(lambda: check_best(settings.output, state), self.runtime)  # of a resume
        if self.runtime.is_main:
            keep_best(settings.output, state.best_epoch)
            write_metrics(settings.output, state.history)  # a kill may have left the last line unwritten
            resumed = f", resumed at step {state.step}" if self.is_resumed else ""
            length = (
                f"{epochs} epochs" if settings.optimization.epochs else f"{settings.total_steps} steps in all"
            )
            print(
                f"{settings.output}: training on {what}, {settings.epoch_steps} steps per epoch, "
                f"{length}{resumed}",
                flush=True,
            )
        while state.epoch < epochs and not self._is_patience_over():
            self._end_epoch(self._train_epoch())
            # After the last epoch there is nothing to resume: the training finishes in seconds and ignores the stop.
            if state.epoch < epochs and any_rank(self.stop.requested, self.runtime):
                self._save_and_stop()
        on_main(lambda: check_best(settings.output, state), self.runtime)  # the stage installs them next
        return state.history[state.best_epoch - 1]

    def _is_patience_over(self) -> bool:
        patience = self.settings.patience_epochs
        return patience is not None and self.state.epoch - self.state.best_epoch >= patience

    def _train_epoch(self) -> int:
        """Take the steps that are left of an epoch; returns the number of rows of the whole epoch."""
        settings, state, runtime = self.settings, self.state, self.runtime
        # The whole order at once: it depends on seed and epoch alone, so a resume leaves out the batches that were
        # taken.
        batches = settings.epoch_batches(state.epoch)
        self.task.model.train()  # Transformers loads a model in evaluation mode
        began = time.monotonic()
        num_rows = sum(len(rows) for batch in batches for rows in batch)
        name = f"epoch {state.epoch + 1}/{settings.optimization.num_epochs}"
        with ProgressBar(
            num_rows,
            initial=sum(len(rows) for batch in batches[: state.batch] for rows in batch),
            desc=name,
            unit=settings.unit,
            is_shown=runtime.is_main,
            leave=False,
        ) as bar:
            while state.batch < len(batches):
                batch = batches[state.batch]
                self.step(batch)
                state.batch += 1
                state.step += 1
                bar.update(sum(map(len, batch)))
                if state.batch % self.steps.check_every == 0:
                    self._refuse_not_finite()
                    # All ranks agree to stop, or those that go on would wait forever for the gradients of the others.
                    if any_rank(self.stop.requested, runtime):
                        state.seconds += time.monotonic() - began
                        self._save_and_stop()
        self._refuse_not_finite()
        state.seconds += time.monotonic() - began
        return num_rows

    def step(self, batch: Sequence[Ints]) -> None:
        """One optimizer step on the groups of a global batch: forward and backward of this rank's share."""
        settings, runtime, state = self.settings, self.runtime, self.state
        if settings.groups is None:
            share, weights = rank_share(np.concatenate(batch), runtime.rank, runtime.world_size)
        else:
            share, weights = group_share(batch, runtime.rank, runtime.world_size)
        # Dropout from the step's own seed: a resume restores no random states.
        torch.manual_seed(step_seed(settings.optimization.seed, state.step, runtime.rank))
        loss, sums = self.task.loss(share, weights, sum(map(len, batch)))
        self.steps.take(loss, learning_rate_at(state.step, settings.total_steps, settings.optimization))
        state.sums += sums

    def _refuse_not_finite(self) -> None:
        """Raise TrainingError on every rank once a loss or gradient was not finite; such a state is never saved."""
        if not self.steps.all_finite():
            raise TrainingError(
                f"{self.settings.output}: a loss or gradient is not finite near step {self.state.step}; lower "
                "optimization.learning_rate (the last epoch's checkpoint is sound)"
            )

    def _end_epoch(self, num_rows: int) -> None:
        """Validate on rank 0, keep the best model, write the checkpoint, then the epoch's line.

        Each write can be the last one before a kill, so their order matters.
        """
        task, settings, state, runtime = self.task, self.settings, self.state, self.runtime
        state.sums = summed_over_ranks(state.sums, runtime)
        metrics: Metrics = {}
        if runtime.is_main:
            metrics = task.validate(state, num_rows)
        # Every rank decides the best epoch and the patience by the metrics of rank 0.
        metrics = gather_objects(metrics, runtime)[0]
        if metrics[task.criterion] > state.best_macro_f1:
            # The folder before the checkpoint that names it: a checkpoint never names files that are not there. Until
            # the checkpoint is written the folder of the previous best epoch stays, too.
            if runtime.is_main:
                save_best(settings.output, state.epoch + 1, task.save)
                state.best_files = best_files(settings.output, state.epoch + 1)
            state.best_epoch, state.best_macro_f1 = state.epoch + 1, metrics[task.criterion]
        state.history.append(metrics)
        state.epoch, state.batch, state.seconds = state.epoch + 1, 0, 0.0
        state.sums = torch.zeros_like(state.sums)
        if not runtime.is_main:
            return
        # The checkpoint before the line: an epoch whose line a reader has seen is never trained and timed again, which
        # would give one epoch two lines that differ.
        save_checkpoint(settings.output, settings.config_hash, state, task.model, task.optimizer)
        # Only now does no checkpoint name the older folders.
        keep_best(settings.output, state.best_epoch)
        write_metrics(settings.output, state.history)
        tqdm.write(task.line(metrics), file=sys.stdout)
        sys.stdout.flush()
        if self.on_epoch:
            self.on_epoch(metrics)

    def _save_and_stop(self) -> None:
        settings, state = self.settings, self.state
        state.sums = summed_over_ranks(state.sums, self.runtime)
        if self.runtime.is_main:
            save_checkpoint(
                settings.output, settings.config_hash, state, self.task.model, self.task.optimizer
            )
        any_rank(False, self.runtime)  # a launcher ends all ranks once one has left: wait for the checkpoint
        raise Stopped(
            f"{settings.output}: stopped at step {state.step}, state saved; run the same command again to resume"
        )


class GuardedSteps:
    """Optimizer steps that change nothing from the first loss or gradient on that is not finite.

    Reading a flag from the device after every step would make the host wait for the device. Instead fused AdamW reads
    the flag itself (`found_inf`, which torch has for loss scaling), and the host asks for it only now and then. An
    optimizer that is not fused has no such flag and spoils its weights, but they are checked before they are saved.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        runtime: Runtime,
    ) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm
        self.runtime = runtime
        self.is_finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        self.check_every = _CHECK_STEPS if runtime.world_size > 1 or runtime.device.type == "cuda" else 1

    def take(self, loss: Tensor, learning_rate: float) -> None:
        """Differentiate the loss, clip the gradients and take one step at a learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # With several ranks these are the averaged gradients already, so every rank clips alike.
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        with torch.no_grad():
            # The gradients' norm is not finite if one gradient is not. Once False, the flag stays False.
            self.is_finite &= torch.isfinite(norm) & torch.isfinite(loss)
            if self.optimizer.defaults.get("fused"):
                # By name, since torch's type of an optimizer does not declare it.
                setattr(self.optimizer, "found_inf", (~self.is_finite).float())  # noqa: B010
            self.optimizer.step()

    def all_finite(self) -> bool:
        """True if every loss and gradient so far was finite on every rank. Collective; waits for the device."""
        return not any_rank(not bool(self.is_finite), self.runtime)


def epoch_batches(
    num_tokens_P: Ints, rows: Ints, *, batch_size: int, bucket_batches: int, seed: int, epoch: int
) -> list[Ints]:
    """Every row once, in batches of similar length: the same on any number of ranks.

    The rows are shuffled and cut into buckets of `bucket_batches` batches; each bucket is sorted by length and cut
    into batches, and the batches are shuffled.
    """
    # On RECCON random batches of 16 are half padding (53%). Sorting everything by length would show the same rows
    # together in every epoch; buckets of 50 batches keep the shuffling and leave 2.3% of padding.
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(rows)
    batches: list[Ints] = []
    bucket_size = batch_size * bucket_batches
    for start in range(0, len(shuffled), bucket_size):
        bucket = shuffled[start : start + bucket_size]
        bucket = bucket[np.argsort(num_tokens_P[bucket], kind="stable")]
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
    order = generator.permutation(len(batches))
    return [batches[index] for index in order]


def grouped_batches(sizes_G: Ints, *, num_batches: int, seed: int, epoch: int) -> list[Ints]:
    """Every group once, in random order, in `num_batches` batches of about equally many rows.

    The order is cut where a batch's share of the rows is reached, so that every epoch has the same number of steps.
    """
    # Not by length, as `epoch_batches`: groups are not padded, and their length says much about their labels. Of a
    # neutral target a single pair is trained on, so that batches of short trees would be neutral through and through.
    order = np.random.default_rng([seed, epoch]).permutation(len(sizes_G))
    # The end of each batch lies where the cumulative rows are nearest to its share; each batch has at least one group.
    ends = np.cumsum(sizes_G[order])
    wanted = ends[-1] * np.arange(1, num_batches) / num_batches
    # Against the middle of each group: a group belongs to the batch in which most of it lies.
    cuts = np.searchsorted(ends - sizes_G[order] / 2, wanted)
    # Pushed apart from the left, then from the right: however large a group is, no batch may be empty.
    spare = np.arange(1, num_batches)
    cuts = np.maximum.accumulate(np.maximum(cuts, 1) - spare) + spare
    cuts = np.minimum(cuts, len(order) - num_batches + spare)
    return np.split(order, cuts)


def group_share(groups: Sequence[Ints], rank: int, world_size: int) -> tuple[Ints, Floats]:
    """This rank's whole groups of a global batch, and the weights of their rows.

    Ranks get about equally many rows. A rank that would get nothing takes a row of weight 0, so that it reaches the
    collectives.
    """
    loads = [0] * world_size
    mine: list[Ints] = []
    # The largest first, each to the rank with the fewest rows so far: the same on every rank.
    for group in sorted(groups, key=len, reverse=True):
        least = loads.index(min(loads))
        loads[least] += len(group)
        if least == rank:
            mine.append(group)
    if not mine:
        return groups[0][:1], np.zeros(1, dtype=np.float32)
    share = np.concatenate(mine)
    return share, np.ones(len(share), dtype=np.float32)


def rank_share(rows: Ints, rank: int, world_size: int) -> tuple[Ints, Floats]:
    """This rank's rows of a global batch and their weights.

    Every rank gets as many rows as the largest share, so that all ranks reach the collectives: shorter shares are
    padded with rows of weight 0.
    """
    # The rows of a batch are of similar length, so a deal in turn gives every rank about as much to compute.
    share = rows[rank::world_size]
    missing = -(-len(rows) // world_size) - len(share)
    weights = np.ones(len(share) + missing, dtype=np.float32)
    if missing:
        share = np.concatenate([share, rows[:missing]])
        weights[-missing:] = 0
    return share, weights


def learning_rate_at(step: int, total_steps: int, optimization: Optimizer) -> float:
    """Linear warm-up over the first share of the steps, then a constant rate, or linear decay to 0 after the last."""
    warmup = math.ceil(total_steps * optimization.warmup_share)
    # One step further than `step` says, or the first step would have a rate of 0 and move nothing.
    if step < warmup:
        return optimization.learning_rate * (step + 1) / warmup
    if optimization.schedule == "constant":
        return optimization.learning_rate
    return optimization.learning_rate * (total_steps - step) / max(1, total_steps - warmup)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the dropout masks of one step on one rank; no two ranks share a mask."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits, which fit a signed integer


def adamw(
    model: torch.nn.Module,
    optimization: Optimizer,
    *,
    heads: Iterable[torch.nn.Module] = (),
    head_rate_factor: float = 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW. Vectors and scalars (biases, layer norms, priors) are not decayed.

    The parameters of `heads` have a learning rate of their own, as a multiple (`rate_factor`) of the others'.
    """
    # By identity: parameters compare element by element. The order of the groups is that of the model's parameters, on
    # which a checkpoint of the optimizer relies.
    in_heads = {id(p) for head in heads for p in head.parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in in_heads, parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": optimization.weight_decay if is_decayed else 0.0,
                "rate_factor": head_rate_factor if is_head else 1.0,
            }
            for (is_head, is_decayed), parameters in groups.items()
        ],
        lr=optimization.learning_rate,
        # The AdamW that reads `found_inf` (GuardedSteps), and one kernel for all parameters.
        fused=True,
    )


def summed_over_ranks(sums: Tensor, runtime: Runtime) -> Tensor:
    """The sums of all ranks together, on each of them. Collective."""
    if runtime.world_size == 1:
        return sums
    total = sums.clone()
    dist.all_reduce(total)
    return total
