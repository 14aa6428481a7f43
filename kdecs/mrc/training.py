"""Training the MRC baseline on one device, with exact resume (kdecs.training.loop)."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kdecs.artifact import check_output, is_complete
from kdecs.config import config_hash, write_config
from kdecs.corpus.splits import warn_of_shared_texts
from kdecs.errors import ConfigError
from kdecs.evaluation.metrics import evaluate
from kdecs.models import load_tokenizer
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
from kdecs.runtime import Runtime, autocast, seed_everything, warn_of_emulation
from kdecs.student.decision import choose_threshold, pair_gains
from kdecs.student.model import longest_prompt
from kdecs.tracking.datasets import corpus_datasets
from kdecs.tracking.record import RunRecord
from kdecs.tracking.stage import stage_record
from kdecs.training.checkpoint import TrainState, install_best, remove_checkpoint
from kdecs.training.loop import EpochLoop, Floats, Ints, LoopSettings, Metrics, adamw


def train_mrc(
    config: MrcConfig,
    runtime: Runtime,
    *,
    on_epoch: Callable[[Metrics], None] | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Train the baseline of a config and return its directory; resumes by itself, skips what is complete.

    `on_epoch` gets each epoch's line of metrics.jsonl.
    Raises Stopped after a requested stop was saved, TrainingError if a loss or gradient is not finite,
    ArtifactError if the output holds other work, ConfigError under several ranks, and what loading raises.
    """
    if runtime.world_size > 1:
        raise ConfigError(
            f"the MRC baseline trains on one device, found {runtime.world_size} ranks; start it with plain python"
        )
    digest = config_hash(config)
    if is_complete(config.output, "mrc", digest):
        remove_checkpoint(config.output)  # of a start that was killed right after it wrote the manifest
        print(f"{config.output}: MRC baseline complete, skipped", flush=True)
        return config.output
    check_output(config.output, "mrc", digest)
    warn_of_emulation(runtime, config.precision, "precision")
    task = MrcTask(config, runtime)
    settings = LoopSettings(
        output=config.output,
        config_hash=digest,
        rows=np.arange(len(task.data.train)),
        num_tokens=task.data.num_tokens_P,
        batch_size=config.batches.global_batch_pairs,
        bucket_batches=config.batches.bucket_batches,
        optimization=config.optimization,
        patience_epochs=config.patience_epochs,
    )
    loop = EpochLoop(task, settings, runtime, stop or StopSignal(), on_epoch)
    # Only now: the loop has refused a checkpoint of another config, whose config.json must stay as it is.
    write_config(config, config.output)
    warn_of_shared_texts(config.corpus)
    num_causes = sum(question.answer_start != 0 for question in task.data.train)
    num_cut = task.data.num_cut
    cut = f", {num_cut} cut to {task.max_tokens} tokens beyond their old context" if num_cut else ""
    best = loop.run(f"{len(task.data.train)} questions ({num_causes} with an answer{cut})")
    details = {
        "valid": {key: value for key, value in best.items() if key not in ("time", "train_pairs_per_s")},
        "threshold": best["threshold"],
        "num_questions": len(task.data.train),
        "num_cut": num_cut,
        "epochs": loop.state.epoch,
    }
    install_best(config.output, loop.state.best_epoch, READER_NAMES)
    finish_product(config, digest, details, num_epochs=loop.state.epoch)
    # Last: until the manifest is written, a second run finishes the move from the checkpoint.
    remove_checkpoint(config.output)
    print(f"{config.output}: MRC baseline of {task.line(best)}", flush=True)
    return config.output


def mrc_record(config: MrcConfig) -> RunRecord:
    """What MLflow shows of a training, as its files are now."""
    datasets = corpus_datasets(config.corpus, universe="fold1")
    digest = config_hash(config)
    return stage_record(
        config, "mrc", output=config.output, name=config.name, config_hash=digest, datasets=datasets
    )


class MrcTask:
    """One baseline in training, as the loop needs it: model, data, optimizer, and the last threshold chosen."""

    criterion = "macro_f1"

    def __init__(self, config: MrcConfig, runtime: Runtime) -> None:
        self.config, self.device = config, runtime.device
        self.no_sums = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        seed_everything(config.optimization.seed)
        self.tokenizer = load_tokenizer(config.model.base)
        self.pad_id: int = self.tokenizer.pad_token_id or 0
        self.model = load_reader(config.model.base).to(runtime.device)
        self.max_tokens = longest_prompt(self.tokenizer, self.model, config.model.max_tokens)
        encoder = QuestionEncoder(
            self.tokenizer, self.max_tokens, only_candidate=config.model.answer_within == "candidate"
        )
        self.data = load_mrc_data(config, encoder)
        self.optimizer = adamw(self.model, config.optimization)
        self.threshold = 0.0

    def loss(self, rows_B: Ints, weights_B: Floats, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """SQuAD's loss on a batch, and its sum over the questions."""
        del weights_B  # one rank: no row only pads a share
        batch = question_batch([self.data.train[row] for row in rows_B], self.pad_id).to(self.device)
        with autocast(self.device, self.config.precision):
            start_BT, end_BT = answer_logits(self.model, batch)
        loss = answer_loss(start_BT, end_BT, batch.start_B, batch.end_B)
        return loss, loss.detach().double() * count

    def validate(self, state: TrainState, num_rows: int) -> Metrics:
        """Scores of the validation split (fold1, protocol reccon) with the threshold that is best for macro F1."""
        data = self.data
        score_P, span_P2 = answer_questions(
            self.model,
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
        # Emotions are left out: they would bar the pairs of neutral targets, of which fold1 has none.
        self.threshold, _ = choose_threshold(pair_gains(score_P, [None] * len(gold), gold, texts))
        found = [
            decide(*item, self.threshold).prediction
            for item in zip(data.valid_pairs, data.valid, score_P.tolist(), span_P2, strict=True)
        ]
        scores = evaluate(data.valid_corpus, {item.key: item for item in found}, universe="fold1")
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "time": time.time(),
            "train_loss": state.sums.item() / num_rows,
            "train_pairs_per_s": num_rows / max(state.seconds, 1e-9),
            "threshold": self.threshold,
            **scores.values,
        }

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer and card with the chosen threshold."""
        card = MrcCard(
            question_version=QUESTION_VERSION,
            max_tokens=self.max_tokens,
            answer_within=self.config.model.answer_within,
            threshold=self.threshold,
        )
        save_reader(folder, self.model, self.tokenizer, card)

    def line(self, metrics: Metrics) -> str:
        """What the terminal shows of an epoch."""
        return (
            f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, valid macro F1 {metrics['macro_f1']:.2f} "
            f"(Pos {metrics['positive_f1']:.2f}, Neg {metrics['negative_f1']:.2f}), "
            f"EM {metrics['exact_match']:.2f}, utterance Pos F1 {metrics['utterance_positive_f1']:.2f}, "
            f"threshold {metrics['threshold']:.3f}, {metrics['train_pairs_per_s']:.0f} questions/s"
        )
