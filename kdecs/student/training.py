"""Training a student (Eq. 5-13) on one or many ranks, with exact resume.

Every epoch ends with validation on rank 0, a checkpoint and a line in `metrics.jsonl`; the best model by macro F1
waits beside the checkpoint and takes its final place at the end. Nothing is read from the device between steps but a
flag now and then.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from kdecs.artifact import MANIFEST_NAME, claim, is_complete
from kdecs.config import config_hash, input_checksums, write_config
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.errors import Stopped, TrainingError
from kdecs.evaluation.predictions import write_predictions
from kdecs.process import StopSignal
from kdecs.runtime import (
    Runtime,
    any_rank,
    gather_objects,
    on_main_first,
    return_freed_memory,
    seed_everything,
    warn_of_emulation,
)
from kdecs.student.batches import Ints, epoch_batches, rank_share
from kdecs.student.config import StudentConfig
from kdecs.student.data import TrainingData, given_emotions, load_training_data
from kdecs.student.decision import DEFAULT_THRESHOLD, DecisionRule, Level, Validation, autocast, validate
from kdecs.student.losses import LossParts, adamw, loss_parts, set_learning_rate, step_loss, step_seed
from kdecs.student.model import (
    StudentModel,
    load_language_model,
    load_tokenizer,
    longest_prompt,
    student_answer_ids,
)
from kdecs.student.priors import begin_at_counts
from kdecs.student.product import (
    STUDENT_NAMES,
    VALIDATION_NAME,
    StudentCard,
    finish_student,
    save_student,
    teacher_lineage,
    write_metrics,
)
from kdecs.training.checkpoint import (
    Progress,
    install_best,
    keep_best,
    load_checkpoint,
    remove_checkpoint,
    save_best,
    save_checkpoint,
)
from kdecs.training.loop import learning_rate_at

_PROBE_PAIRS = 64  # the untrained logits' means are taken over so many


@dataclass(frozen=True)
class Prepared:
    """A student before its training, on the rank's device; the card has no chosen decision yet."""

    tokenizer: Any
    model: StudentModel
    data: TrainingData
    card: StudentCard


def prepare(config: StudentConfig, runtime: Runtime) -> Prepared:
    """Load what a config names. Collective: rank 0 builds caches first. Raises what loading the inputs raises."""
    seed_everything(config.optimization.seed)
    tokenizer = load_tokenizer(config.model.base)
    language_model = load_language_model(config.model.base, logs=runtime.is_main)
    max_prompt_tokens = longest_prompt(tokenizer, language_model, config.model.max_prompt_tokens)
    data: TrainingData = on_main_first(
        lambda: load_training_data(config, tokenizer, max_prompt_tokens), runtime
    )
    card = _first_card(config, data.emotions, max_prompt_tokens)
    model = StudentModel(
        language_model,
        student_answer_ids(tokenizer, data.emotions, config.model.stand_ins),
        span_head=config.model.span_head,
        max_prompt_tokens=max_prompt_tokens,
        outputs=card.outputs,
    )
    return Prepared(tokenizer, model.to(runtime.device), data, card)


def begin_at_training(model: StudentModel, data: TrainingData, device: torch.device) -> None:
    """Set the priors from the counts of the training pairs, given what the untrained logits are on some of them."""
    assert model.priors is not None
    gold = data.rows[data.is_gold[data.rows]]
    some = gold[np.unique(np.linspace(0, len(gold) - 1, _PROBE_PAIRS).astype(int))]
    some = some[np.argsort(data.train.num_tokens[some], kind="stable")]
    emotions, connectives = [], []
    model.eval()
    with torch.inference_mode():
        for rows in np.array_split(some, max(1, len(some) // 16)):
            batch, _ = data.batch(rows, np.ones(len(rows), dtype=np.float32))
            output = model(batch.to(device))
            emotions.append(output.emotion_BE)
            connectives.append(output.connective_BA)
    begin_at_counts(
        model.priors,
        data.counts(),
        None if emotions[0] is None else torch.cat(emotions),
        None if connectives[0] is None else torch.cat(connectives),
        is_classifier=model.classifier is not None,
    )


def _first_card(config: StudentConfig, emotions: tuple[str, ...], max_prompt_tokens: int) -> StudentCard:
    return StudentCard(
        emotions=emotions,
        stand_ins=config.model.stand_ins,
        connectives=CONNECTIVES,
        span_head=config.model.span_head,
        max_prompt_tokens=max_prompt_tokens,
        prompt_version=PROMPT_VERSION,
        threshold=DEFAULT_THRESHOLD,
        mode=config.distillation.mode,
        task=config.task,
        priors=config.model.priors == "training",
        given_emotions=given_emotions(config),
        history_utterances=config.model.history_utterances,
    )


_EMOTION_KEY = "emotion_accuracy"
_PARTS = ("emotion", "span", "distillation", "cause")


def no_sums(device: torch.device) -> Tensor:
    """Zeros for the sums over pairs of: the loss, and each of its parts."""
    return torch.zeros(1 + len(_PARTS), dtype=torch.float64, device=device)


def step_sums(loss: Tensor, parts: LossParts, num_pairs: float) -> Tensor:
    """A step's share of the sums: batch means times the number of pairs; a part that there is not counts 0."""
    values = [getattr(parts, name) for name in _PARTS]
    zero = loss.new_zeros(())
    return torch.stack([loss, *(zero if value is None else value for value in values)]).double() * num_pairs


def summed_over_ranks(sums: Tensor, runtime: Runtime) -> Tensor:
    """The sums of all ranks. Collective."""
    if runtime.world_size == 1:
        return sums
    total = sums.clone()
    dist.all_reduce(total)
    return total


def epoch_metrics(
    config: StudentConfig,
    validation: Validation,
    sums: Tensor,
    *,
    epoch: int,
    step: int,
    seconds: float,
    num_pairs: int,
) -> dict[str, float]:
    """One epoch's line: means of the losses over its pairs, speed, and the scores on validation (percent).

    A student that is given the emotions has no score of theirs: it would only copy them.
    """
    predicts_emotions = config.model.given_emotions == "none"
    loss, *parts = (sums / num_pairs).tolist()
    names = _loss_names(config)
    return {
        "epoch": epoch,
        "step": step,
        "time": time.time(),
        "train_loss": loss,
        **{names[part]: value for part, value in zip(_PARTS, parts, strict=True) if part in names},
        "train_pairs_per_s": num_pairs / max(seconds, 1e-9),
        "threshold": validation.threshold,
        "neutral_offset": validation.neutral_offset,
        **{
            key: value
            for key, value in validation.scores.values.items()
            if predicts_emotions or not (key == _EMOTION_KEY or key.startswith("strict_"))
        },
    }


def epoch_line(metrics: dict[str, float], criterion: str) -> str:
    """What the terminal shows of an epoch."""
    return (
        f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, valid {scores_line(metrics, criterion)}, "
        f"{metrics['train_pairs_per_s']:.0f} pairs/s"
    )


def scores_line(metrics: dict[str, float], criterion: str) -> str:
    """The scores that an epoch is chosen by, and what stands beside: of spans, or of utterances (task ecpe)."""
    level = criterion.removesuffix("macro_f1")
    line = (
        f"{level.replace('_', ' ')}macro F1 {metrics[criterion]:.2f} "
        f"(Pos {metrics[level + 'positive_f1']:.2f}, Neg {metrics[level + 'negative_f1']:.2f})"
    )
    if not level:
        line += f", EM {metrics['exact_match']:.2f}"
    if _EMOTION_KEY in metrics:
        line += f", emotion accuracy {metrics[_EMOTION_KEY]:.2f}"
    return line


def _loss_names(config: StudentConfig) -> dict[str, str]:
    """Part -> name in the metrics, for the parts that the mode uses."""
    distillation = config.distillation
    cause = {"cls": "classifier", "span_only": ""}.get(distillation.mode, "connective")
    if distillation.mode == "kd" and distillation.hard_weight == 0:
        cause = ""
    used = {
        "emotion": "emotion" if config.model.given_emotions == "none" else "",
        "span": "span" if config.task == "ecspe" else "",
        "distillation": "distillation" if distillation.mode == "kd" else "",
        "cause": cause,
    }
    return {part: f"train_{name}_loss" for part, name in used.items() if name}


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
    claim(config.output, "student", digest, can_repair=True)
    if runtime.is_main:
        # A manifest of this very work with a damaged file: it must not stand over a half-trained student.
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)
    warn_of_emulation(runtime, config.precision, "precision")
    trainer = StudentTrainer(config, digest, runtime, on_epoch, stop or StopSignal())
    if runtime.is_main:
        write_config(config, config.output)
    trainer.train()
    del trainer
    return_freed_memory()  # a process that trains one student after another would keep it: 0.7 GiB of MiniLM-L6's
    return config.output


class StudentTrainer:
    """One student in training: its model, data, optimizer and progress on this rank."""

    def __init__(
        self, config: StudentConfig, digest: str, runtime: Runtime, on_epoch: OnEpoch | None, stop: StopSignal
    ) -> None:
        self.config, self.digest, self.runtime = config, digest, runtime
        self.on_epoch, self.stop = on_epoch, stop
        self.level: Level = config.threshold_for if config.task == "ecspe" else "utterance"
        self.criterion = "macro_f1" if config.task == "ecspe" else "utterance_macro_f1"
        prepared = prepare(config, runtime)
        self.tokenizer, self.card = prepared.tokenizer, prepared.card
        self.model, self.data = prepared.model, prepared.data
        self.optimizer = adamw(self.model, config.optimization, head_rate_factor=config.head_rate_factor)
        progress = load_checkpoint(config.output, digest, self.model, self.optimizer, runtime.device)
        if progress is None and self.model.priors is not None:
            begin_at_training(self.model, self.data, runtime.device)
        self.progress = progress or Progress(sums=no_sums(runtime.device))
        # A checkpoint holds the sums of all ranks: rank 0 goes on from them, the others from nothing.
        self.progress.sums = (
            self.progress.sums.to(runtime.device) if runtime.is_main else no_sums(runtime.device)
        )
        self.network: torch.nn.Module = self.model
        if config.compile:
            self.model.states.compile()
        if runtime.world_size > 1:
            devices = [runtime.device] if runtime.device.type == "cuda" else None
            # Without a word to predict the language model's head gets no gradient.
            has_words = self.card.outputs.emotions or self.card.outputs.cause_by == "connective"
            self.network = DistributedDataParallel(
                self.model, device_ids=devices, find_unused_parameters=not has_words
            )
        self.is_finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        batch_pairs = config.batches.global_batch_pairs
        self.epoch_steps = math.ceil(len(self.data.rows) / batch_pairs)
        self.check_steps = _CHECK_STEPS if runtime.world_size > 1 or runtime.device.type == "cuda" else 1

    def train(self) -> None:
        """All epochs that are left, then the manifest."""
        progress, epochs = self.progress, self.config.optimization.epochs
        if self.runtime.is_main:
            keep_best(self.config.output, progress.best_epoch)
            # A kill may have left the last line unwritten.
            write_metrics(self.config.output, progress.history)
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
                self.step(rows)
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

    def step(self, rows: Ints) -> None:
        """One optimizer step on a global batch: forward and backward of this rank's share.

        From the first loss or gradient on that is not finite the optimizer changes nothing, without a look at the
        device: fused AdamW reads the flag itself.
        """
        config, runtime, progress = self.config, self.runtime, self.progress
        share, weights = rank_share(rows, runtime.rank, runtime.world_size)
        batch, targets = self.data.batch(share, weights)
        batch, targets = batch.to(runtime.device), targets.to(runtime.device)
        torch.manual_seed(step_seed(config.optimization.seed, progress.step, runtime.rank))
        total_steps = self.epoch_steps * config.optimization.epochs
        set_learning_rate(self.optimizer, learning_rate_at(progress.step, total_steps, config.optimization))
        with autocast(runtime.device, config.precision):
            output = self.network(batch)
        parts = loss_parts(
            output, targets, config.distillation, count=len(rows), world_size=runtime.world_size
        )
        loss = step_loss(parts, config.distillation)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimization.max_grad_norm)
        with torch.no_grad():
            self.is_finite &= torch.isfinite(norm) & torch.isfinite(loss)
            setattr(self.optimizer, "found_inf", (~self.is_finite).float())  # noqa: B010
            self.optimizer.step()
            progress.sums += step_sums(loss, parts, len(rows) / runtime.world_size)

    def _check_finite(self) -> None:
        """Raise TrainingError on every rank once a loss or gradient was not finite; no such state is ever saved."""
        if any_rank(not bool(self.is_finite), self.runtime):
            raise TrainingError(
                f"{self.config.output}: a loss or gradient is not finite near step {self.progress.step}; lower "
                "optimization.learning_rate (the last epoch's checkpoint is sound)"
            )

    def _save_and_stop(self) -> None:
        self.progress.sums = summed_over_ranks(self.progress.sums, self.runtime)
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
        sums = summed_over_ranks(progress.sums, self.runtime)
        metrics: dict[str, float] = {}
        if self.runtime.is_main:
            validation = validate(
                self.model,
                self.data.valid,
                self.data.valid_corpus,
                self.data.emotions,
                device=self.runtime.device,
                batch_tokens=self.config.batches.evaluation_batch_tokens,
                pad_id=self.data.pad_id,
                rule=DecisionRule(self.level, self.config.neutral_decision),
            )
            metrics = epoch_metrics(
                self.config,
                validation,
                sums,
                epoch=progress.epoch + 1,
                step=progress.step,
                seconds=progress.seconds,
                num_pairs=len(self.data.rows),
            )
            if metrics[self.criterion] > progress.best_macro_f1:
                chosen = {"threshold": validation.threshold, "neutral_offset": validation.neutral_offset}
                card = self.card.model_copy(update=chosen)

                def write(folder: Path) -> None:
                    save_student(folder, self.model, self.tokenizer, card)
                    write_predictions(folder / VALIDATION_NAME, validation.predictions)

                save_best(self.config.output, progress.epoch + 1, write)
        metrics = gather_objects(metrics, self.runtime)[0]
        if metrics[self.criterion] > progress.best_macro_f1:
            progress.best_epoch, progress.best_macro_f1 = progress.epoch + 1, metrics[self.criterion]
        progress.history.append(metrics)
        progress.epoch, progress.batch, progress.seconds = progress.epoch + 1, 0, 0.0
        progress.sums = no_sums(self.runtime.device)
        if not self.runtime.is_main:
            return
        # The checkpoint first: a line that a reader has seen is never trained, timed and written a second time.
        save_checkpoint(self.config.output, self.digest, progress, self.model, self.optimizer)
        keep_best(self.config.output, progress.best_epoch)
        write_metrics(self.config.output, progress.history)
        tqdm.write(epoch_line(metrics, self.criterion), file=sys.stdout)
        sys.stdout.flush()
        if self.on_epoch:
            self.on_epoch(metrics)

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
            **{
                f"soft_labels_{number}" if number else "soft_labels": teacher.labels
                for number, teacher in enumerate(config.distillation.used_teachers)
            },
        )
        details = {
            "valid": {key: value for key, value in best.items() if key not in ("time", "train_pairs_per_s")},
            "threshold": best["threshold"],
            "emotions": self.data.emotions,
            "num_pairs": len(self.data.rows),
            "num_gold_pairs": int(self.data.is_gold[self.data.rows].sum()),
            "epochs": progress.epoch,
            "mode": config.distillation.mode,
            "task": config.task,
            "teacher": teacher_lineage(config),
        }
        install_best(config.output, progress.best_epoch, STUDENT_NAMES, optional=(VALIDATION_NAME,))
        finish_student(config.output, config_hash=self.digest, inputs=inputs, details=details)
        remove_checkpoint(config.output)
        print(
            f"{config.output}: student of epoch {progress.best_epoch}: valid {scores_line(best, self.criterion)}, "
            f"threshold {best['threshold']:.3f}",
            flush=True,
        )
