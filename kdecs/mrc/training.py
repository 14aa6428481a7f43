"""Training the MRC baseline on one device, with exact resume.

Every epoch ends with validation, a checkpoint and a line in `metrics.jsonl`; the best model by macro F1 is kept.
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kdecs.artifact import claim, is_complete
from kdecs.config import config_hash, write_config
from kdecs.errors import ConfigError, Stopped, TrainingError
from kdecs.evaluation.metrics import evaluate
from kdecs.mrc.config import QUESTION_VERSION, MrcConfig
from kdecs.mrc.model import (
    READER_NAMES,
    MrcCard,
    answer_logits,
    answer_loss,
    finish_product,
    load_reader,
    question_batch,
    save_reader,
)
from kdecs.mrc.prediction import answer_questions, decide
from kdecs.mrc.questions import QuestionEncoder, answer_text, load_mrc_data
from kdecs.process import StopSignal
from kdecs.runtime import Runtime, seed_everything, warn_of_emulation
from kdecs.student.batches import Ints, epoch_batches
from kdecs.student.decision import autocast, choose_threshold, pair_gains
from kdecs.student.losses import step_seed
from kdecs.student.model import load_tokenizer, longest_prompt
from kdecs.student.product import write_metrics
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

_LINE_EVERY_S = 60.0


def train_mrc(config: MrcConfig, runtime: Runtime, *, stop: StopSignal | None = None) -> Path:
    """Train the baseline of a config and return its directory; resumes by itself, skips what is complete.

    Raises Stopped after a requested stop was saved, TrainingError for a loss or gradient that is not finite,
    ArtifactError where the output holds other work, ConfigError under several ranks, and what loading raises.
    """
    if runtime.world_size > 1:
        raise ConfigError(
            f"the MRC baseline trains on one device, found {runtime.world_size} ranks; start it with plain python"
        )
    digest = config_hash(config)
    if is_complete(config.output, "mrc", digest):
        print(f"{config.output}: MRC baseline complete, skipped", flush=True)
        return config.output
    claim(config.output, "mrc", digest)
    warn_of_emulation(runtime, config.precision, "precision")
    trainer = _Trainer(config, digest, runtime, stop or StopSignal())
    write_config(config, config.output)
    trainer.train()
    return config.output


class _Trainer:
    """One baseline in training: its model, data, optimizer and progress."""

    def __init__(self, config: MrcConfig, digest: str, runtime: Runtime, stop: StopSignal) -> None:
        self.config, self.digest, self.device, self.stop = config, digest, runtime.device, stop
        seed_everything(config.optimization.seed)
        self.tokenizer = load_tokenizer(config.model.base)
        self.pad_id: int = self.tokenizer.pad_token_id or 0
        self.reader = load_reader(config.model.base).to(runtime.device)
        self.max_tokens = longest_prompt(self.tokenizer, self.reader, config.model.max_tokens)
        self.encoder = QuestionEncoder(
            self.tokenizer, self.max_tokens, only_candidate=config.model.answer_within == "candidate"
        )
        self.data = load_mrc_data(config, self.encoder)
        self.optimizer = _adamw(self.reader, config)
        self.progress = load_checkpoint(
            config.output, digest, self.reader, self.optimizer, runtime.device
        ) or Progress(sums=torch.zeros(1, dtype=torch.float64))
        self.progress.sums = self.progress.sums.to(runtime.device)
        self.epoch_steps = math.ceil(len(self.data.train) / config.batches.global_batch_pairs)

    def train(self) -> None:
        """All epochs that are left, then the manifest."""
        progress, epochs = self.progress, self.config.optimization.epochs
        num_causes = sum(question.answer_start != 0 for question in self.data.train)
        num_cut = self.data.num_cut
        cut = f", {num_cut} cut to {self.max_tokens} tokens beyond their old context" if num_cut else ""
        keep_best(self.config.output, progress.best_epoch)
        write_metrics(self.config.output, progress.history)  # a kill may have left the last line unwritten
        resumed = f", resumed at step {progress.step}" if progress.step else ""
        print(
            f"{self.config.output}: training on {len(self.data.train)} questions ({num_causes} with an answer{cut}), "
            f"{self.epoch_steps} steps an epoch, {epochs} epochs{resumed}",
            flush=True,
        )
        while progress.epoch < epochs and not self._is_patience_over():
            self._train_epoch()
            self._end_epoch()
            if progress.epoch < epochs and self.stop.requested:
                self._save_and_stop()
        self._finish()

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        batches = epoch_batches(
            self.data.num_tokens_P,
            torch.arange(len(self.data.train)).numpy(),
            batch_size=config.batches.global_batch_pairs,
            bucket_batches=config.batches.bucket_batches,
            seed=config.optimization.seed,
            epoch=progress.epoch,
        )
        self.reader.train()
        began = last_line = time.monotonic()
        name = f"epoch {progress.epoch + 1}/{config.optimization.epochs}"
        done = sum(len(rows) for rows in batches[: progress.batch])
        with tqdm(
            total=len(self.data.train), initial=done, desc=name, unit="pair", disable=None, leave=False
        ) as bar:
            while progress.batch < len(batches):
                rows = batches[progress.batch]
                self._step(rows)
                progress.batch += 1
                progress.step += 1
                bar.update(len(rows))
                if self.stop.requested:
                    progress.seconds += time.monotonic() - began
                    self._save_and_stop()
                if bar.disable and time.monotonic() - last_line > _LINE_EVERY_S:
                    last_line = time.monotonic()
                    print(f"{name}: step {progress.batch} of {len(batches)}", flush=True)
        progress.seconds += time.monotonic() - began

    def _step(self, rows: Ints) -> None:
        config, progress = self.config, self.progress
        batch = question_batch([self.data.train[row] for row in rows], self.pad_id).to(self.device)
        torch.manual_seed(step_seed(config.optimization.seed, progress.step, 0))
        total_steps = self.epoch_steps * config.optimization.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(progress.step, total_steps, config.optimization)
        with autocast(self.device, config.precision):
            start_BT, end_BT = answer_logits(self.reader, batch)
        loss = answer_loss(start_BT, end_BT, batch.start_B, batch.end_B)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.reader.parameters(), config.optimization.max_grad_norm)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise TrainingError(
                f"{config.output}: the loss or a gradient is not finite at step {progress.step}; lower "
                "optimization.learning_rate (the last epoch's checkpoint is sound)"
            )
        self.optimizer.step()
        progress.sums += loss.detach().double() * len(rows)

    def _save_and_stop(self) -> None:
        save_checkpoint(self.config.output, self.digest, self.progress, self.reader, self.optimizer)
        raise Stopped(
            f"{self.config.output}: stopped at step {self.progress.step}, state saved; "
            "run the same command again to go on"
        )

    def _end_epoch(self) -> None:
        """Validate, note the epoch, keep the best model, write a checkpoint."""
        config, progress = self.config, self.progress
        values, threshold = self._validate()
        metrics: dict[str, float] = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "time": time.time(),
            "train_loss": progress.sums.item() / len(self.data.train),
            "train_pairs_per_s": len(self.data.train) / max(progress.seconds, 1e-9),
            "threshold": threshold,
            # A baseline without emotions has no figure of theirs, and a strict one that is 0 by that says nothing.
            **{k: v for k, v in values.items() if not k.startswith("strict_") and k != "emotion_accuracy"},
        }
        if metrics["macro_f1"] > progress.best_macro_f1:
            card = MrcCard(
                question_version=QUESTION_VERSION,
                max_tokens=self.max_tokens,
                answer_within=config.model.answer_within,
                threshold=threshold,
            )
            save_best(
                config.output,
                progress.epoch + 1,
                lambda folder: save_reader(folder, self.reader, self.tokenizer, card),
            )
            progress.best_epoch, progress.best_macro_f1 = progress.epoch + 1, metrics["macro_f1"]
        progress.history.append(metrics)
        progress.epoch, progress.batch, progress.seconds = progress.epoch + 1, 0, 0.0
        progress.sums = torch.zeros_like(progress.sums)
        save_checkpoint(config.output, self.digest, progress, self.reader, self.optimizer)
        keep_best(config.output, progress.best_epoch)
        write_metrics(config.output, progress.history)
        tqdm.write(_line(metrics), file=sys.stdout)
        sys.stdout.flush()

    def _validate(self) -> tuple[dict[str, float], float]:
        """Scores of the validation split (fold1, protocol reccon) with the threshold that is best for macro F1."""
        data = self.data
        score_P, span_P2 = answer_questions(
            self.reader,
            data.valid,
            self.pad_id,
            device=self.device,
            batch_tokens=self.config.batches.evaluation_batch_tokens,
        )
        texts = [
            answer_text(question, *map(int, span))[0]
            for question, span in zip(data.valid, span_P2, strict=True)
        ]
        gold = [pair.spans for pair in data.valid_pairs]
        threshold, _ = choose_threshold(pair_gains(score_P, [None] * len(gold), gold, texts))
        found = [
            decide(*item, threshold).prediction
            for item in zip(data.valid_pairs, data.valid, score_P.tolist(), span_P2, strict=True)
        ]
        scores = evaluate(data.valid_corpus, {item.key: item for item in found}, universe="fold1")
        return scores.values, threshold

    def _is_patience_over(self) -> bool:
        patience = self.config.patience_epochs
        return patience is not None and self.progress.epoch - self.progress.best_epoch >= patience

    def _finish(self) -> None:
        progress = self.progress
        best = progress.history[progress.best_epoch - 1]
        details = {
            "valid": {key: value for key, value in best.items() if key not in ("time", "train_pairs_per_s")},
            "threshold": best["threshold"],
            "num_questions": len(self.data.train),
            "num_cut": self.data.num_cut,
            "epochs": progress.epoch,
        }
        install_best(self.config.output, progress.best_epoch, READER_NAMES)
        finish_product(self.config, self.digest, details, num_epochs=progress.epoch)
        remove_checkpoint(self.config.output)
        print(f"{self.config.output}: MRC baseline of {_line(best)}", flush=True)


def _adamw(reader: Any, config: MrcConfig) -> torch.optim.AdamW:
    """AdamW; biases and layer norms are not decayed."""
    groups = [
        {
            "params": [p for p in reader.parameters() if (p.ndim >= 2) == is_decayed],
            "weight_decay": config.optimization.weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=config.optimization.learning_rate, fused=True)


def _line(metrics: dict[str, float]) -> str:
    return (
        f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, valid macro F1 {metrics['macro_f1']:.2f} "
        f"(Pos {metrics['positive_f1']:.2f}, Neg {metrics['negative_f1']:.2f}), EM {metrics['exact_match']:.2f}, "
        f"utterance Pos F1 {metrics['utterance_positive_f1']:.2f}, threshold {metrics['threshold']:.3f}, "
        f"{metrics['train_pairs_per_s']:.0f} questions/s"
    )
