"""Training a baseline on one or many ranks, with exact resume (kdecs.training.loop).

The best epoch by macro F1 on the validation split becomes the product, a directory of kind baseline
(kdecs.baselines.prediction) or mrc (kdecs.baselines.mrc.model).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kdecs.artifact import MANIFEST_NAME, check_output, is_complete, write_manifest
from kdecs.baselines.config import BASELINE_VERSION, AnyBaseline, BaselineCard, BaselineConfig, Kec, MrcConfig
from kdecs.baselines.dialogues import (
    DialogueEncoder,
    TrainingDialogue,
    batch_labels,
    moved,
    training_dialogue,
    without_labels,
)
from kdecs.baselines.kec import read_knowledge
from kdecs.baselines.model import LossPart
from kdecs.baselines.mrc.task import MrcTask
from kdecs.baselines.prediction import (
    BASELINE_NAMES,
    build_model,
    encode_dialogues,
    save_baseline,
    score_pairs,
    span_texts,
)
from kdecs.baselines.task import BaselineTask
from kdecs.config import CONFIG_NAME, config_hash, input_checksums, write_config
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.splits import read_split, require_causes, training_split, warn_of_shared_texts
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import Prediction, write_predictions
from kdecs.models import load_tokenizer
from kdecs.process import StopSignal
from kdecs.runtime import Runtime, any_rank, autocast, return_freed_memory, seed_everything, warn_of_emulation
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
from kdecs.training.checkpoint import install_best, remove_checkpoint
from kdecs.training.loop import EpochLoop, Floats, Ints, LoopSettings, Metrics, adamw


def train_baseline(
    config: AnyBaseline,
    runtime: Runtime,
    *,
    on_epoch: Callable[[Metrics], None] | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Train the baseline of a config and return its directory; resumes by itself, skips what is complete.

    `on_epoch` gets each epoch's line of metrics.jsonl, on rank 0. Collective: with several ranks a process group
    is up. Raises Stopped after a requested stop was saved, TrainingError if a loss or gradient is not finite,
    ArtifactError if the output holds other work, and what loading raises.
    """
    digest = config_hash(config)
    if is_complete(config.output, config.kind, digest):
        if runtime.is_main:
            remove_checkpoint(config.output)  # of a start that was killed right after it wrote the manifest
            print(f"{config.output}: baseline complete, skipped", flush=True)
        return config.output
    check_output(config.output, config.kind, digest, can_repair=True)
    warn_of_emulation(runtime, config.precision, "precision")
    task: BaselineTask
    task = MrcTask(config, runtime) if isinstance(config, MrcConfig) else JointTask(config, runtime)
    settings = LoopSettings(
        output=config.output,
        config_hash=digest,
        rows=np.arange(len(task.num_tokens)),
        num_tokens=task.num_tokens,
        batch_size=task.batch_size,
        bucket_batches=config.batches.bucket_batches,
        optimization=config.optimization,
        patience_epochs=config.patience_epochs,
        unit=task.unit,
    )
    loop = EpochLoop(task, settings, runtime, stop or StopSignal(), on_epoch)
    # After the loop has loaded a checkpoint: the weights of rank 0 are copied to the others here, and not again.
    if runtime.world_size > 1:
        task.share_gradients()
    if runtime.is_main:
        warn_of_shared_texts(config.corpus)
        # Only now: the loop has refused a checkpoint of another config, whose config.json must stay as it is.
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)
        write_config(config, config.output)
    best = loop.run(task.what)
    if runtime.is_main:
        install_best(config.output, loop.state.best_epoch, task.files)
        details = {
            # Without the clock and the speed: the manifest of the same work should be the same.
            "valid": {k: v for k, v in best.items() if k not in ("time", "train_pairs_per_s")},
            "threshold": best["threshold"],
            "epochs": loop.state.epoch,
            **task.details,
        }
        finish_baseline(config, digest, task.files, details)
        # Last: until the manifest is written, a second run finishes the move from the checkpoint.
        remove_checkpoint(config.output)
        print(
            f"{config.output}: baseline {config.system_name} of epoch {loop.state.best_epoch}: "
            f"valid {scores_line(best, task.criterion)}, threshold {best['threshold']:.3f}",
            flush=True,
        )
    any_rank(False, runtime)  # no rank leaves before the directory is complete
    del task, loop
    return_freed_memory()
    return config.output


def baseline_record(config: AnyBaseline) -> RunRecord:
    """What MLflow shows of a training that is no trial of a sweep, as its files are now."""
    # The systems that predict emotions learn from the pairs of every target whose causes are known.
    universe = "fold1" if isinstance(config, MrcConfig) else "all"
    return stage_record(
        config,
        config.kind,
        output=config.output,
        name=config.name,
        config_hash=config_hash(config),
        datasets=corpus_datasets(config.corpus, universe=universe),
    )


class JointTask(BaselineTask):
    """A system that predicts emotions, pairs and spans together.

    Its rows are dialogues: each passes the encoder once for all of its pairs.
    """

    unit = "dialogue"
    files = BASELINE_NAMES

    def __init__(self, config: BaselineConfig, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.config = config
        self.level: Level = config.threshold_for if config.task == "ecspe" else "utterance"
        self.criterion = "macro_f1" if config.task == "ecspe" else "utterance_macro_f1"
        seed_everything(config.optimization.seed)
        self.tokenizer = load_tokenizer(config.model.base)
        # Of the four systems only ueca-prompt reads the language model's head.
        language_model = load_language_model(
            config.model.base, logs=runtime.is_main and config.system.name == "ueca-prompt"
        )
        max_tokens = longest_prompt(self.tokenizer, language_model, config.model.max_utterance_tokens + 2) - 2
        self.encoder = DialogueEncoder(self.tokenizer, max_tokens)
        dialogues = list(training_split(config.corpus))
        self.valid_corpus = read_split(config.corpus, config.corpus.valid)
        self.valid_pairs = [
            pair
            for dialogue in self.valid_corpus.dialogues
            for pair in pairs_of(dialogue, "fold1+neutral", config.candidates.after)
        ]
        emotions = sorted({u.emotion for d in dialogues for u in d.utterances if u.emotion is not None})
        is_hidden = None if runtime.is_main else True  # None: shown on a terminal
        encoded = (
            self.encoder.encode(d) for d in tqdm(dialogues, desc="encode", disable=is_hidden, leave=False)
        )
        labelled = (training_dialogue(item, emotions, config.candidates.after) for item in encoded)
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
            neutral_weighs_causes=config.neutral_decision == "balanced",
            candidates_after=config.candidates.after,
        )
        self.model = build_model(language_model, self.tokenizer, self.card, knowledge).to(runtime.device)
        self.parts = self.model.parts
        self.optimizer = adamw(
            self.model,
            config.optimization,
            heads=[part for name, part in self.model.named_children() if name != "language_model"],
            head_rate_factor=config.head_rate_factor,
        )
        self.predictions: list[Prediction] = []
        self.num_tokens = np.array([item.encoded.num_tokens for item in self.train])
        self.batch_size = config.batches.global_batch_dialogues
        num_pairs = sum(len(item.places_P2) for item in self.train)
        self.pairs_per_row = num_pairs / len(self.train)
        num_cut = sum(item.encoded.num_truncated for item in self.train)
        cut = f" ({num_cut} utterances cut to {max_tokens} tokens)" if num_cut else ""
        self.what = f"{num_pairs} pairs of {len(self.train)} dialogues{cut}"
        self.details = {
            "emotions": self.card.emotions,
            "num_pairs": num_pairs,
            "num_cut": num_cut,
            "system": config.system_name,
            "task": config.task,
        }

    def losses(self, rows_B: Ints, weights_B: Floats) -> list[LossPart]:
        """The system's losses on some dialogues."""
        device = self.runtime.device
        dialogues = [
            item if weight else without_labels(item)
            for item, weight in zip([self.train[row] for row in rows_B], weights_B, strict=True)
        ]
        pairs_P3, spanned_P, labels = batch_labels(dialogues)
        inputs = self.model.inputs([item.encoded for item in dialogues], pairs_P3, self.encoder)
        inputs, pairs_P3, spanned_P, labels = moved((inputs, pairs_P3, spanned_P, labels), device)
        with autocast(device, self.config.precision):
            output = self.network(inputs, pairs_P3, spanned_P)
        return self.model.losses(output, labels, spanned_P)

    def score(self) -> Metrics:
        """With the threshold and the neutral offset that a student would choose."""
        config, pairs, emotions = self.config, self.valid_pairs, self.card.emotions
        scores, ranges = score_pairs(
            self.model,
            self.encoder,
            self.valid_encoded,
            pairs,
            num_emotions=len(emotions),
            device=self.runtime.device,
            batch_tokens=config.batches.evaluation_batch_tokens,
        )
        spans = span_texts(pairs, ranges)
        rule = DecisionRule(self.level, config.neutral_decision)
        threshold, offset = choose_decision(scores, pairs, emotions, spans, rule)
        self.card = self.card.model_copy(update={"threshold": threshold, "neutral_offset": offset})
        self.predictions = decide(
            pairs,
            scores,
            pair_emotions(scores, pairs, emotions, offset, weighs_causes=rule.weighs_causes),
            spans,
            threshold,
        )
        found = evaluate(
            self.valid_corpus,
            {p.key: p for p in self.predictions},
            universe="fold1",
            candidates_after=config.candidates.after,
        )
        return {"threshold": threshold, "neutral_offset": offset, **found.values}

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer, card with the chosen decision, and the predictions that chose it."""
        save_baseline(folder, self.model, self.tokenizer, self.card)
        write_predictions(folder / VALIDATION_NAME, self.predictions)


def finish_baseline(
    config: AnyBaseline, digest: str, names: tuple[str, ...], details: dict[str, Any]
) -> None:
    """Write the manifest over all files, which makes the directory complete."""
    system = config.system
    files = [
        path.relative_to(config.output).as_posix()
        for name in names
        for path in sorted([config.output / name, *(config.output / name).rglob("*")])
        if path.is_file()
    ]
    files += [CONFIG_NAME, METRICS_NAME]
    write_manifest(
        config.output,
        config.kind,
        config_hash=digest,
        inputs=input_checksums(
            train=config.corpus.train,
            valid=config.corpus.valid,
            base=config.model.base,
            knowledge=system.knowledge if isinstance(system, Kec) else None,
        ),
        files=files,
        rows={
            name: len((config.output / name).read_bytes().splitlines())
            for name in files
            if name.endswith(".jsonl")
        },
        details=details,
    )
