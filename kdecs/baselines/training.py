"""Training a baseline of Table 4 on one device, with exact resume (kdecs.training.loop).

The rows of the loop are dialogues: each passes the encoder once for all of its pairs. The best epoch by macro F1 on the
validation split becomes the product (kdecs.baselines.prediction).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kdecs.artifact import MANIFEST_NAME, check_output, is_complete, write_manifest
from kdecs.baselines.config import BASELINE_VERSION, BaselineCard, BaselineConfig, Kec
from kdecs.baselines.dialogues import (
    DialogueEncoder,
    TrainingDialogue,
    batch_labels,
    moved,
    training_dialogue,
)
from kdecs.baselines.kec import read_knowledge
from kdecs.baselines.prediction import (
    BASELINE_NAMES,
    build_model,
    encode_dialogues,
    save_baseline,
    score_pairs,
    span_texts,
)
from kdecs.config import CONFIG_NAME, config_hash, input_checksums, write_config
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.splits import read_split, require_causes, training_split, warn_of_shared_texts
from kdecs.errors import ConfigError
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import Prediction, write_predictions
from kdecs.models import load_tokenizer
from kdecs.process import StopSignal
from kdecs.runtime import Runtime, autocast, return_freed_memory, seed_everything, warn_of_emulation
from kdecs.student.config import VALIDATION_NAME
from kdecs.student.decision import (
    DEFAULT_THRESHOLD,
    DecisionRule,
    Level,
    choose_decision,
    decide,
    pair_emotions,
)
from kdecs.student.model import load_language_model, longest_prompt
from kdecs.student.training import scores_line
from kdecs.tracking.datasets import corpus_datasets
from kdecs.tracking.record import METRICS_NAME, RunRecord
from kdecs.tracking.stage import stage_record
from kdecs.training.checkpoint import TrainState, install_best, remove_checkpoint
from kdecs.training.loop import EpochLoop, Floats, Ints, LoopSettings, Metrics, adamw

TRAIN_UNIVERSE = "all"  # the pairs of every target whose causes are known


def train_baseline(
    config: BaselineConfig,
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
            f"a baseline trains on one device, found {runtime.world_size} ranks; start it with plain python"
        )
    digest = config_hash(config)
    if is_complete(config.output, "baseline", digest):
        remove_checkpoint(config.output)  # of a start that was killed right after it wrote the manifest
        print(f"{config.output}: baseline complete, skipped", flush=True)
        return config.output
    check_output(config.output, "baseline", digest, can_repair=True)
    warn_of_emulation(runtime, config.precision, "precision")
    task = BaselineTask(config, runtime)
    settings = LoopSettings(
        output=config.output,
        config_hash=digest,
        rows=np.arange(len(task.train)),
        num_tokens=np.array([item.encoded.num_tokens for item in task.train]),
        batch_size=config.batches.global_batch_dialogues,
        bucket_batches=config.batches.bucket_batches,
        optimization=config.optimization,
        patience_epochs=config.patience_epochs,
        unit="dialogue",
    )
    loop = EpochLoop(task, settings, runtime, stop or StopSignal(), on_epoch)
    warn_of_shared_texts(config.corpus)
    # Only now: the loop has refused a checkpoint of another config, whose config.json must stay as it is.
    (config.output / MANIFEST_NAME).unlink(missing_ok=True)
    write_config(config, config.output)
    num_cut = sum(item.encoded.num_truncated for item in task.train)
    cut = f" ({num_cut} utterances cut to {task.encoder.max_tokens} tokens)" if num_cut else ""
    num_pairs = sum(len(item.places_P2) for item in task.train)
    best = loop.run(f"{num_pairs} pairs of {len(task.train)} dialogues{cut}")
    install_best(config.output, loop.state.best_epoch, BASELINE_NAMES)
    finish_baseline(
        config,
        digest,
        {
            # Without the clock and the speed: the manifest of the same work should be the same.
            "valid": {k: v for k, v in best.items() if k not in ("time", "train_pairs_per_s")},
            "threshold": best["threshold"],
            "emotions": task.card.emotions,
            "num_pairs": num_pairs,
            "num_cut": num_cut,
            "epochs": loop.state.epoch,
            "system": config.system.name,
            "task": config.task,
        },
    )
    # Last: until the manifest is written, a second run finishes the move from the checkpoint.
    remove_checkpoint(config.output)
    print(
        f"{config.output}: baseline {config.system.name} of epoch {loop.state.best_epoch}: "
        f"valid {scores_line(best, task.criterion)}, threshold {best['threshold']:.3f}",
        flush=True,
    )
    del task, loop
    return_freed_memory()
    return config.output


def baseline_record(config: BaselineConfig) -> RunRecord:
    """What MLflow shows of a training that is no trial of a sweep, as its files are now."""
    datasets = corpus_datasets(config.corpus, universe=TRAIN_UNIVERSE)
    return stage_record(
        config,
        "baseline",
        output=config.output,
        name=config.name,
        config_hash=config_hash(config),
        datasets=datasets,
    )


class BaselineTask:
    """One baseline in training, as the loop needs it: model, data, optimizer, and what the last validation chose."""

    def __init__(self, config: BaselineConfig, runtime: Runtime) -> None:
        self.config, self.device = config, runtime.device
        self.level: Level = config.threshold_for if config.task == "ecspe" else "utterance"
        self.criterion = "macro_f1" if config.task == "ecspe" else "utterance_macro_f1"
        seed_everything(config.optimization.seed)
        self.tokenizer = load_tokenizer(config.model.base)
        # Of the four systems only ueca-prompt reads the language model's head.
        language_model = load_language_model(config.model.base, logs=config.system.name == "ueca-prompt")
        max_tokens = longest_prompt(self.tokenizer, language_model, config.model.max_utterance_tokens + 2) - 2
        self.encoder = DialogueEncoder(self.tokenizer, max_tokens)
        dialogues = list(training_split(config.corpus))
        self.valid_corpus = read_split(config.corpus, config.corpus.valid)
        self.valid_pairs = [
            pair for dialogue in self.valid_corpus.dialogues for pair in pairs_of(dialogue, "fold1+neutral")
        ]
        emotions = sorted({u.emotion for d in dialogues for u in d.utterances if u.emotion is not None})
        encoded = (self.encoder.encode(d) for d in tqdm(dialogues, desc="encode", disable=None, leave=False))
        labelled = (training_dialogue(item, emotions) for item in encoded)
        self.train: list[TrainingDialogue] = [item for item in labelled if len(item.places_P2)]
        require_causes(config.corpus.train, (bool(item.is_cause_P.any()) for item in self.train))
        require_causes(config.corpus.valid, (pair.is_cause for pair in self.valid_pairs))
        self.valid_encoded = encode_dialogues(self.encoder, self.valid_pairs)
        system, knowledge = config.system, None
        if isinstance(system, Kec) and system.knowledge is not None:
            knowledge = read_knowledge(system.knowledge)
            system = system.model_copy(update={"knowledge": None})  # the card holds no path of this machine
        self.card = BaselineCard(
            version=BASELINE_VERSION,
            system=system,
            task=config.task,
            emotions=tuple(emotions),
            max_utterance_tokens=max_tokens,
            uses_knowledge=knowledge is not None,
            threshold=DEFAULT_THRESHOLD,
        )
        self.model = build_model(language_model, self.tokenizer, self.card, knowledge).to(runtime.device)
        self.no_sums = torch.zeros(1 + len(self.model.parts), dtype=torch.float64, device=runtime.device)
        self.optimizer = adamw(
            self.model,
            config.optimization,
            heads=[part for name, part in self.model.named_children() if name != "language_model"],
            head_rate_factor=config.head_rate_factor,
        )
        self.predictions: list[Prediction] = []

    def loss(self, rows_B: Ints, weights_B: Floats, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the system's losses on a batch of dialogues, and with its parts as sums over the dialogues."""
        del weights_B  # one rank: no row only pads a share
        dialogues = [self.train[row] for row in rows_B]
        pairs_P3, spanned_P, labels = batch_labels(dialogues)
        inputs = self.model.inputs([item.encoded for item in dialogues], pairs_P3, self.encoder)
        inputs, pairs_P3, spanned_P, labels = moved((inputs, pairs_P3, spanned_P, labels), self.device)
        with autocast(self.device, self.config.precision):
            output = self.model(inputs, pairs_P3, spanned_P)
        parts = torch.stack(self.model.losses(output, labels, spanned_P))
        loss = parts.sum()
        return loss, torch.cat((loss[None], parts)).detach().double() * count

    def validate(self, state: TrainState, num_rows: int) -> Metrics:
        """Choose threshold and neutral offset on the validation split as a student does, and score it with them."""
        config, pairs, emotions = self.config, self.valid_pairs, self.card.emotions
        scores, ranges = score_pairs(
            self.model,
            self.encoder,
            self.valid_encoded,
            pairs,
            num_emotions=len(emotions),
            device=self.device,
            batch_tokens=config.batches.evaluation_batch_tokens,
        )
        spans = span_texts(pairs, ranges)
        rule = DecisionRule(self.level, config.neutral_decision)
        threshold, offset = choose_decision(scores, pairs, emotions, spans, rule)
        self.card = self.card.model_copy(update={"threshold": threshold, "neutral_offset": offset})
        self.predictions = decide(
            pairs, scores, pair_emotions(scores, pairs, emotions, offset), spans, threshold
        )
        found = evaluate(self.valid_corpus, {p.key: p for p in self.predictions}, universe="fold1")
        loss, *parts = (state.sums / num_rows).tolist()
        # Per pass over the dialogues, of which an epoch may be a part or several.
        num_pairs = sum(len(item.places_P2) for item in self.train) * num_rows / len(self.train)
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "time": time.time(),
            "train_loss": loss,
            **{f"train_{name}_loss": value for name, value in zip(self.model.parts, parts, strict=True)},
            "train_pairs_per_s": num_pairs / max(state.seconds, 1e-9),
            "threshold": threshold,
            "neutral_offset": offset,
            **found.values,
        }

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer, card with the chosen decision, and the predictions that chose it."""
        save_baseline(folder, self.model, self.tokenizer, self.card)
        write_predictions(folder / VALIDATION_NAME, self.predictions)

    def line(self, metrics: Metrics) -> str:
        """What the terminal shows of an epoch."""
        return (
            f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, "
            f"valid {scores_line(metrics, self.criterion)}, {metrics['train_pairs_per_s']:.0f} pairs/s"
        )


def finish_baseline(config: BaselineConfig, digest: str, details: dict[str, Any]) -> None:
    """Write the manifest over all files, which makes the directory complete."""
    knowledge = config.system.knowledge if isinstance(config.system, Kec) else None
    files = [
        path.relative_to(config.output).as_posix()
        for name in BASELINE_NAMES
        for path in sorted([config.output / name, *(config.output / name).rglob("*")])
        if path.is_file()
    ]
    tables = (METRICS_NAME, VALIDATION_NAME)
    write_manifest(
        config.output,
        "baseline",
        config_hash=digest,
        inputs=input_checksums(
            train=config.corpus.train,
            valid=config.corpus.valid,
            base=config.model.base,
            knowledge=knowledge,
        ),
        files=[*files, CONFIG_NAME, METRICS_NAME],
        rows={name: len((config.output / name).read_bytes().splitlines()) for name in tables},
        details=details,
    )
