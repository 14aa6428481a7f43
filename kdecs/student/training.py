"""Training a student (Eq. 5-13) on one or many ranks, with exact resume.

Every epoch ends with validation on rank 0, a line in `metrics.jsonl` and a checkpoint; the best model by macro F1
is kept in its final place. Nothing is read from the device between steps but a flag now and then.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from kdecs.artifact import MANIFEST_NAME, is_complete, read_manifest
from kdecs.config import config_hash, input_checksums, write_config
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.errors import ArtifactError, Stopped, TrainingError
from kdecs.runtime import Runtime, StopSignal, any_rank, gather_objects, on_main_first, seed_everything
from kdecs.schedule import learning_rate_at
from kdecs.student.batches import Ints, epoch_batches, rank_share
from kdecs.student.checkpoint import Progress, load_checkpoint, remove_checkpoint, save_checkpoint
from kdecs.student.config import StudentConfig
from kdecs.student.data import TrainingData, load_training_data
from kdecs.student.inference import autocast
from kdecs.student.model import (
    StudentModel,
    load_language_model,
    load_tokenizer,
    longest_prompt,
    student_answer_ids,
)
from kdecs.student.objective import adamw, loss_parts, step_loss, step_seed
from kdecs.student.product import StudentCard, finish_student, save_student, write_metrics
from kdecs.student.validation import Validation, validate

OnEpoch = Callable[[dict[str, float]], None]
_CHECK_STEPS = 20  # between two looks at a flag of the device, or at the other ranks
_LINE_EVERY_S = 60.0


def train_student(
    config: StudentConfig,
    runtime: Runtime,
    *,
    on_epoch: OnEpoch | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Train the student of a config and return its directory; resumes by itself, skips what is complete.

    `on_epoch` gets each epoch's line of metrics.jsonl, on rank 0. Collective: with several ranks a process group
    is up. Raises Stopped after a requested stop was saved, TrainingError for a loss or gradient that is not
    finite, ArtifactError where the output holds other work, and what loading the inputs raises.
    """
    digest = config_hash(config)
    if is_complete(config.output, "student", digest):
        if runtime.is_main:
            print(f"{config.output}: student complete, skipped", flush=True)
        return config.output
    if (config.output / MANIFEST_NAME).is_file() and read_manifest(config.output).config_hash != digest:
        raise ArtifactError(
            f"{config.output}: holds the student of another config; remove it or choose another output"
        )
    if runtime.is_main:
        config.output.mkdir(parents=True, exist_ok=True)
        # A manifest of this very work with a damaged file: it must not stand over a half-trained student.
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)
    trainer = _Trainer(config, digest, runtime, on_epoch, stop or StopSignal())
    if runtime.is_main:
        write_config(config, config.output)
    trainer.train()
    return config.output


class _Trainer:
    """One student in training: its model, data, optimizer and progress on this rank."""

    def __init__(
        self, config: StudentConfig, digest: str, runtime: Runtime, on_epoch: OnEpoch | None, stop: StopSignal
    ) -> None:
        self.config, self.digest, self.runtime = config, digest, runtime
        self.on_epoch, self.stop = on_epoch, stop
        seed_everything(config.optimization.seed)
        self.tokenizer = load_tokenizer(config.model.base)
        language_model = load_language_model(config.model.base)
        self.max_prompt_tokens = longest_prompt(
            self.tokenizer, language_model, config.model.max_prompt_tokens
        )
        self.data: TrainingData = on_main_first(
            lambda: load_training_data(config, self.tokenizer, self.max_prompt_tokens), runtime
        )
        answers = student_answer_ids(self.tokenizer, self.data.emotions, config.model.stand_ins)
        self.model = StudentModel(
            language_model,
            answers,
            span_head=config.model.span_head,
            max_prompt_tokens=self.max_prompt_tokens,
        ).to(runtime.device)
        self.optimizer = adamw(self.model, config.optimization)
        self.progress = load_checkpoint(
            config.output, digest, self.model, self.optimizer, runtime.device
        ) or Progress(sums=_no_sums(runtime.device))
        self.progress.sums = self.progress.sums.to(runtime.device)
        self.network: torch.nn.Module = self.model
        if runtime.world_size > 1:
            devices = [runtime.device] if runtime.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=devices)
        self.is_finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        batch_pairs = config.batches.global_batch_pairs
        self.epoch_steps = math.ceil(len(self.data.rows) / batch_pairs)
        self.check_steps = _CHECK_STEPS if runtime.world_size > 1 or runtime.device.type == "cuda" else 1

    def train(self) -> None:
        """All epochs that are left, then the manifest."""
        progress, epochs = self.progress, self.config.optimization.epochs
        if self.runtime.is_main:
            resumed = f", resumed at step {progress.step}" if progress.step else ""
            print(
                f"{self.config.output}: training on {len(self.data.rows)} pairs, {self.epoch_steps} steps an epoch, "
                f"{epochs} epochs{resumed}",
                flush=True,
            )
        while progress.epoch < epochs and not self._is_patience_over():
            self._train_epoch()
            self._end_epoch()
            if progress.epoch < epochs and any_rank(self.stop.requested, self.runtime):
                self._save_and_stop()
        if self.runtime.is_main:
            self._finish()
        any_rank(False, self.runtime)  # no rank leaves before the directory is complete

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        batches = epoch_batches(
            self.data.train.num_tokens,
            self.data.rows,
            batch_size=config.batches.global_batch_pairs,
            bucket_batches=config.batches.bucket_batches,
            seed=config.optimization.seed,
            epoch=progress.epoch,
        )
        self.network.train()
        began = last_line = time.monotonic()
        bar = tqdm(
            total=len(self.data.rows),
            initial=sum(len(rows) for rows in batches[: progress.batch]),
            desc=f"epoch {progress.epoch + 1}/{config.optimization.epochs}",
            unit="pair",
            disable=None if self.runtime.is_main else True,
            leave=False,
        )
        with bar:
            while progress.batch < len(batches):
                rows = batches[progress.batch]
                self._step(rows)
                progress.batch += 1
                progress.step += 1
                bar.update(len(rows))
                if progress.batch % self.check_steps == 0:
                    self._check_finite()
                    if any_rank(self.stop.requested, self.runtime):
                        progress.seconds += time.monotonic() - began
                        self._save_and_stop()
                if bar.disable and self.runtime.is_main and time.monotonic() - last_line > _LINE_EVERY_S:
                    last_line = time.monotonic()
                    print(f"epoch {progress.epoch + 1}: step {progress.batch} of {len(batches)}", flush=True)
        self._check_finite()
        progress.seconds += time.monotonic() - began

    def _step(self, rows: Ints) -> None:
        """One optimizer step on a global batch: forward and backward of this rank's share."""
        config, runtime, progress = self.config, self.runtime, self.progress
        share, weights = rank_share(rows, runtime.rank, runtime.world_size)
        batch, targets = self.data.batch(share, weights)
        batch, targets = batch.to(runtime.device), targets.to(runtime.device)
        torch.manual_seed(step_seed(config.optimization.seed, progress.step, runtime.rank))
        total_steps = self.epoch_steps * config.optimization.epochs
        rate = learning_rate_at(progress.step, total_steps, config.optimization)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(runtime.device, config.precision):
            output = self.network(batch)
        parts = loss_parts(
            output, targets, config.distillation, count=len(rows), world_size=runtime.world_size
        )
        loss = step_loss(parts, config.distillation)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimization.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.is_finite &= torch.isfinite(norm) & torch.isfinite(loss)
            word = parts.distillation if parts.distillation is not None else parts.connective
            assert word is not None
            # Shares of the batch mean times the number of pairs: their sum over ranks is a sum over pairs.
            values = torch.stack([loss, parts.emotion, parts.span, word]).double()
            progress.sums += values * (len(rows) / runtime.world_size)

    def _check_finite(self) -> None:
        """Raise TrainingError on every rank once a loss or gradient was not finite; no such state is ever saved."""
        if any_rank(not bool(self.is_finite), self.runtime):
            raise TrainingError(
                f"{self.config.output}: a loss or gradient is not finite near step {self.progress.step}; lower "
                "optimization.learning_rate (the last epoch's checkpoint is sound)"
            )

    def _save_and_stop(self) -> None:
        if self.runtime.is_main:
            save_checkpoint(self.config.output, self.digest, self.progress, self.model, self.optimizer)
        any_rank(False, self.runtime)  # the launcher ends all ranks once one has left
        raise Stopped(
            f"{self.config.output}: stopped at step {self.progress.step}, state saved; "
            "run the same command again to go on"
        )

    def _end_epoch(self) -> None:
        """Validate on rank 0, note the epoch, keep the best model, write a checkpoint."""
        progress = self.progress
        sums = _summed_over_ranks(progress.sums, self.runtime)
        metrics: dict[str, float] = {}
        if self.runtime.is_main:
            validation = validate(
                self.model,
                self.data.valid,
                self.data.valid_corpus,
                self.data.emotions,
                device=self.runtime.device,
                precision=self.config.precision,
                batch_tokens=self.config.batches.evaluation_batch_tokens,
                pad_id=self.data.pad_id,
            )
            metrics = self._metrics(validation, sums)
            if metrics["macro_f1"] > progress.best_macro_f1:
                save_student(self.config.output, self.model, self.tokenizer, self._card(validation.threshold))
        metrics = gather_objects(metrics, self.runtime)[0]
        if metrics["macro_f1"] > progress.best_macro_f1:
            progress.best_epoch, progress.best_macro_f1 = progress.epoch + 1, metrics["macro_f1"]
        progress.history.append(metrics)
        progress.epoch, progress.batch, progress.seconds = progress.epoch + 1, 0, 0.0
        progress.sums = _no_sums(self.runtime.device)
        if not self.runtime.is_main:
            return
        write_metrics(self.config.output, progress.history)
        save_checkpoint(self.config.output, self.digest, progress, self.model, self.optimizer)
        tqdm.write(_epoch_line(metrics), file=sys.stdout)
        sys.stdout.flush()
        if self.on_epoch:
            self.on_epoch(metrics)

    def _metrics(self, validation: Validation, sums: Tensor) -> dict[str, float]:
        word_loss = "distillation" if self.config.distillation.mode == "kd" else "connective"
        pairs = len(self.data.rows)
        loss, emotion, span, word = (sums / pairs).tolist()
        return {
            "epoch": self.progress.epoch + 1,
            "step": self.progress.step,
            "time": time.time(),
            "train_loss": loss,
            "train_emotion_loss": emotion,
            "train_span_loss": span,
            f"train_{word_loss}_loss": word,
            "train_pairs_per_s": pairs / max(self.progress.seconds, 1e-9),
            "threshold": validation.threshold,
            **validation.scores.values,
        }

    def _card(self, threshold: float) -> StudentCard:
        return StudentCard(
            emotions=self.data.emotions,
            stand_ins=self.config.model.stand_ins,
            connectives=CONNECTIVES,
            span_head=self.config.model.span_head,
            max_prompt_tokens=self.max_prompt_tokens,
            prompt_version=PROMPT_VERSION,
            threshold=threshold,
        )

    def _is_patience_over(self) -> bool:
        patience = self.config.patience_epochs
        return patience is not None and self.progress.epoch - self.progress.best_epoch >= patience

    def _finish(self) -> None:
        config, progress = self.config, self.progress
        best = progress.history[progress.best_epoch - 1]
        write_metrics(config.output, progress.history)
        inputs = input_checksums(
            train=config.corpus.train,
            valid=config.corpus.valid,
            base=config.model.base,
            soft_labels=config.distillation.labels,
        )
        details = {
            "valid": {key: value for key, value in best.items() if key not in ("time", "train_pairs_per_s")},
            "threshold": best["threshold"],
            "emotions": self.data.emotions,
            "num_pairs": len(self.data.rows),
            "epochs": progress.epoch,
            "mode": config.distillation.mode,
            "teacher": teacher_lineage(config),
        }
        finish_student(config.output, config_hash=self.digest, inputs=inputs, details=details)
        remove_checkpoint(config.output)
        print(
            f"{config.output}: student of epoch {progress.best_epoch}: valid macro F1 {best['macro_f1']:.2f}, "
            f"EM {best['exact_match']:.2f}, emotion accuracy {best['emotion_accuracy']:.2f}, "
            f"threshold {best['threshold']:.3f}",
            flush=True,
        )


def teacher_lineage(config: StudentConfig) -> dict[str, Any] | None:
    """What the soft labels say of where they come from; None without distillation."""
    if config.distillation.mode != "kd" or config.distillation.labels is None:
        return None
    manifest = read_manifest(config.distillation.labels, "soft-labels")
    return {"inputs": manifest.inputs, "soft_labels_hash": manifest.config_hash, "details": manifest.details}


def _no_sums(device: torch.device) -> Tensor:
    """Zeros for the sums over pairs of: the loss, its emotion, span and word parts."""
    return torch.zeros(4, dtype=torch.float64, device=device)


def _summed_over_ranks(sums: Tensor, runtime: Runtime) -> Tensor:
    if runtime.world_size == 1:
        return sums
    total = sums.clone()
    dist.all_reduce(total)
    return total


def _epoch_line(metrics: dict[str, float]) -> str:
    return (
        f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, valid macro F1 {metrics['macro_f1']:.2f} "
        f"(Pos {metrics['positive_f1']:.2f}, Neg {metrics['negative_f1']:.2f}), EM {metrics['exact_match']:.2f}, "
        f"emotion accuracy {metrics['emotion_accuracy']:.2f}, {metrics['train_pairs_per_s']:.0f} pairs/s"
    )
