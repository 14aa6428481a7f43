"""Training a student (Eq. 5-13) on one or many ranks, with exact resume (kdecs.training.loop).

The story: `train_student` refuses or skips what is done, `prepare` loads base, corpus and soft labels, the loop trains
a `StudentTask` epoch by epoch, and the best epoch by macro F1 on the validation split becomes the product, an artifact
directory of kind student:

    model/              a Transformers masked language model (safetensors) with its tokenizer
    heads.safetensors   the tensors of the heads beside the language model (span, classifier, priors)
    student.json        StudentCard: what a predictor needs to know
    valid-predictions.jsonl   predictions of these weights for the validation pairs (kdecs.evaluation.predictions)
    config.json         the resolved config of the training
    metrics.jsonl       one JSON object per epoch
    manifest.json       details: metrics on validation, threshold, emotions, teacher

Loading unpickles nothing. The validation predictions are those that the best epoch was scored by; students of earlier
versions of kdecs have none.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from kdecs.artifact import MANIFEST_NAME, check_output, is_complete, read_manifest, write_manifest
from kdecs.config import CONFIG_NAME, config_hash, input_checksums, write_config
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import batches_of_tokens, cache_targets, groups_of
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.corpus.splits import warn_of_shared_texts
from kdecs.evaluation.predictions import write_predictions
from kdecs.models import load_tokenizer
from kdecs.process import StopSignal
from kdecs.runtime import (
    Runtime,
    any_rank,
    autocast,
    on_main_first,
    return_freed_memory,
    seed_everything,
    warn_of_emulation,
)
from kdecs.student.config import CARD_NAME, VALIDATION_NAME, StudentCard, StudentConfig
from kdecs.student.data import TrainingData, cached_batch, load_training_data
from kdecs.student.decision import DEFAULT_THRESHOLD, DecisionRule, Level, Validation, validate
from kdecs.student.losses import step_loss
from kdecs.student.model import (
    HEADS_NAME,
    MODEL_FOLDER,
    STUDENT_NAMES,
    StudentModel,
    load_language_model,
    longest_prompt,
    save_student,
    student_answer_ids,
)
from kdecs.student.priors import begin_at_counts
from kdecs.tracking.datasets import TRAIN_UNIVERSE, corpus_datasets, label_dataset
from kdecs.tracking.record import METRICS_NAME, RunRecord
from kdecs.tracking.stage import stage_record
from kdecs.training.checkpoint import TrainState, install_best, remove_checkpoint
from kdecs.training.loop import EpochLoop, Floats, Ints, LoopSettings, Metrics, adamw
from kdecs.trees import check_trees

_PARTS = ("emotion", "span", "distillation", "cause")  # of the loss, in the order of the sums after the total
_EMOTION_KEY = "emotion_accuracy"
_PROBE_PAIRS = 64  # the means of the untrained logits are taken over this many


def train_student(
    config: StudentConfig,
    runtime: Runtime,
    *,
    on_epoch: Callable[[Metrics], None] | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Train the student of a config and return its directory; resumes by itself, skips what is complete.

    `on_epoch` gets each epoch's line of metrics.jsonl, on rank 0. Collective: with several ranks a process group
    is up. Raises Stopped after a requested stop was saved, TrainingError if a loss or gradient is not finite,
    ArtifactError if the output holds other work, and what loading the inputs raises.
    """
    digest = config_hash(config)
    if is_complete(config.output, "student", digest):
        if runtime.is_main:
            remove_checkpoint(config.output)  # of a start that was killed right after it wrote the manifest
            print(f"{config.output}: student complete, skipped", flush=True)
        return config.output
    check_output(config.output, "student", digest, can_repair=True)
    warn_of_emulation(runtime, config.precision, "precision")
    task, loop = prepare(config, digest, runtime, stop or StopSignal(), on_epoch)
    if runtime.is_main:
        warn_of_shared_texts(config.corpus)
        # A manifest of this very work whose files are damaged must not stand over a student in training.
        (config.output / MANIFEST_NAME).unlink(missing_ok=True)
        write_config(config, config.output)
    best = loop.run(f"{len(task.data.rows)} pairs")
    if runtime.is_main:
        install_best(config.output, loop.state.best_epoch, STUDENT_NAMES, optional=(VALIDATION_NAME,))
        finish_student(
            config.output,
            config_hash=digest,
            inputs=_inputs(config),
            details={
                # Without the clock and the speed: the manifest of the same work should be the same.
                "valid": {k: value for k, value in best.items() if k not in ("time", "train_pairs_per_s")},
                "threshold": best["threshold"],
                "emotions": task.data.emotions,
                "num_pairs": len(task.data.rows),
                "num_gold_pairs": len(task.data.gold_rows),
                "epochs": loop.state.epoch,
                "mode": config.distillation.mode,
                "task": config.task,
                "teacher": teacher_lineage(config),
            },
        )
        # Last: until the manifest is written, a second run finishes the move from the checkpoint.
        remove_checkpoint(config.output)
        decided = (
            f"threshold {best['threshold']:.3f}" if config.cause_decision == "threshold" else "by argmax"
        )
        print(
            f"{config.output}: student of epoch {loop.state.best_epoch}: valid {scores_line(best, task.criterion)}, "
            f"{decided}",
            flush=True,
        )
    any_rank(False, runtime)  # no rank leaves before the directory is complete
    del task, loop
    return_freed_memory()  # a process that trains one student after another would keep 0.7 GiB of MiniLM-L6's
    return config.output


def prepare(
    config: StudentConfig,
    digest: str,
    runtime: Runtime,
    stop: StopSignal,
    on_epoch: Callable[[Metrics], None] | None = None,
) -> tuple["StudentTask", EpochLoop]:
    """The task of a config and the loop over it, resumed from a checkpoint if there is one. Collective."""
    task = StudentTask(config, runtime)
    train = task.data.train
    groups = None
    if (targets := cache_targets(train)) is not None:
        groups, _ = groups_of(task.data.rows, train.num_tokens, targets)
        # The pairs of a target have gold labels together, since a dialogue has.
        gold = [group for group in groups if task.data.is_gold_P[group[0]]]
        groups += gold * (task.data.gold_repeats - 1)
    settings = LoopSettings(
        output=config.output,
        config_hash=digest,
        rows=task.data.epoch_rows,
        num_tokens=train.num_tokens,
        groups=groups,
        batch_size=config.batches.global_batch_pairs,
        bucket_batches=config.batches.bucket_batches,
        optimization=config.optimization,
        patience_epochs=config.patience_epochs,
    )
    loop = EpochLoop(task, settings, runtime, stop, on_epoch)
    if task.model.priors is not None and not loop.is_resumed:
        task.begin_at_training_counts()
    # After the probe of the priors: it is a forward pass in evaluation mode that should not be traced.
    if config.compile:
        task.model.states.compile()
    # Last, since DistributedDataParallel copies the weights of rank 0 to the others when it is made, and not again.
    if runtime.world_size > 1:
        task.share_gradients()
    return task, loop


def student_record(config: StudentConfig) -> RunRecord:
    """What MLflow shows of a training that is no trial of a sweep, as its files are now."""
    datasets = corpus_datasets(config.corpus, universe=TRAIN_UNIVERSE)
    datasets += [label_dataset(teacher.labels) for teacher in config.distillation.used_teachers]
    digest = config_hash(config)
    return stage_record(
        config, "student", output=config.output, name=config.name, config_hash=digest, datasets=datasets
    )


class StudentTask:
    """One student in training, as the loop needs it: model, data, optimizer, and what the last validation chose."""

    def __init__(self, config: StudentConfig, runtime: Runtime) -> None:
        """Load what the config names. Collective: rank 0 builds the caches first."""
        self.config, self.runtime = config, runtime
        level: Level = config.threshold_for if config.task == "ecspe" else "utterance"
        self.rule = DecisionRule(
            level,
            config.neutral_decision,
            config.cause_decision,
            config.least_emotion_accuracy,
            config.cause_calibration,
        )
        self.criterion = "macro_f1" if config.task == "ecspe" else "utterance_macro_f1"
        self.no_sums = torch.zeros(1 + len(_PARTS), dtype=torch.float64, device=runtime.device)
        # Before the model: a base without a head and the student's own heads start with random weights.
        seed_everything(config.optimization.seed)
        self.tokenizer = load_tokenizer(config.model.base)
        language_model = load_language_model(config.model.base, logs=runtime.is_main)
        max_prompt_tokens = longest_prompt(self.tokenizer, language_model, config.model.max_prompt_tokens)
        self.data: TrainingData = on_main_first(
            lambda: load_training_data(
                config,
                self.tokenizer,
                max_prompt_tokens,
                connective_ids=student_answer_ids(self.tokenizer, ()).connectives,
                vocabulary_size=language_model.get_input_embeddings().weight.size(0),
            ),
            runtime,
        )
        self.card = StudentCard(
            emotions=self.data.emotions,
            stand_ins=config.model.stand_ins,
            connectives=CONNECTIVES,
            span_head=config.model.span_head,
            max_prompt_tokens=max_prompt_tokens,
            prompt_version=PROMPT_VERSION,
            threshold=DEFAULT_THRESHOLD,
            neutral_weighs_causes=self.rule.weighs_causes,
            cause_decision=config.cause_decision,
            mode=config.distillation.mode,
            task=config.task,
            layout=config.model.layout,
            branch=config.model.branch,
            priors=config.model.priors == "training",
            given_emotions=config.emotion_table,
            history_utterances=config.model.history_utterances,
            candidates_after=config.candidates.after,
        )
        self.model = StudentModel(
            language_model,
            student_answer_ids(self.tokenizer, self.data.emotions, config.model.stand_ins),
            span_head=config.model.span_head,
            max_prompt_tokens=max_prompt_tokens,
            outputs=self.card.outputs,
        ).to(runtime.device)
        if config.model.layout == "tree":
            check_trees(language_model.base_model, f"model {config.model.base}")
        self.model.reads_vocabulary = self.data.has_top
        self.network: torch.nn.Module = self.model
        self.optimizer = adamw(
            self.model,
            config.optimization,
            heads=self.model.heads.values(),
            head_rate_factor=config.head_rate_factor,
        )
        self.validation: Validation | None = None

    def begin_at_training_counts(self) -> None:
        """Set the priors from the counts of the training pairs, less what the untrained logits already say.

        That is their mean over some training pairs with gold labels, of all lengths.
        """
        assert self.model.priors is not None
        data = self.data
        gold = data.gold_rows
        # Spread over the split, then sorted by length so that the batches of 16 hold little padding.
        some = gold[np.unique(np.linspace(0, len(gold) - 1, _PROBE_PAIRS).astype(int))]
        some = some[np.argsort(data.train.num_tokens[some], kind="stable")]
        emotions, connectives = [], []
        self.model.eval()
        with torch.inference_mode():
            for rows in np.array_split(some, max(1, len(some) // 16)):
                batch, _ = data.batch(rows, np.ones(len(rows), dtype=np.float32))
                output = self.model(batch.to(self.runtime.device))
                emotions.append(output.emotion_BE)
                connectives.append(output.connective_BA)
        begin_at_counts(
            self.model.priors,
            data.counts(),
            None if emotions[0] is None else torch.cat(emotions),
            None if connectives[0] is None else torch.cat(connectives),
            is_classifier=self.model.classifier is not None,
        )

    def share_gradients(self) -> None:
        """Train with the ranks of the process group: gradients are averaged in the backward pass."""
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else None
        # Without a word to predict, the head of the language model gets no gradient.
        has_words = self.card.outputs.emotions or self.card.outputs.cause_by == "connective"
        self.network = DistributedDataParallel(
            self.model, device_ids=devices, find_unused_parameters=not has_words
        )

    def loss(self, rows_B: Ints, weights_B: Floats, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 13 on this rank's share of a batch of `count` pairs, and its part of the sums over pairs.

        The sums are those of the loss and of each of its parts (`_PARTS`); a part that the mode lacks counts 0.
        """
        config, runtime = self.config, self.runtime
        batch, targets = self.data.batch(rows_B, weights_B)
        batch, targets = batch.to(runtime.device), targets.to(runtime.device)
        with autocast(runtime.device, config.precision):
            output = self.network(batch)
        loss, parts = step_loss(
            output, targets, config.distillation, count=count, world_size=runtime.world_size
        )
        zero = loss.new_zeros(())
        values = [getattr(parts, name) for name in _PARTS]
        means = torch.stack([loss, *(zero if value is None else value for value in values)]).detach()
        # `batch_mean` multiplied by the world size for the gradients' sake, which the sums over ranks must undo.
        return loss, means.double() * (count / runtime.world_size)

    def validate(self, state: TrainState, num_rows: int) -> Metrics:
        """Choose threshold and neutral offset on the validation split, score it with them: one line of metrics.

        Means of the losses over the epoch's pairs, speed, and the scores in percent. A student that is given the
        emotions has no scores for them: it would only copy them.
        """
        config, cache = self.config, self.data.valid
        # In float32, whatever the training's precision: a student predicts in float32, and a threshold between two
        # scores of another precision would not separate the same pairs.
        batches = (
            (rows, self.model.logits(cached_batch(cache, rows, self.data.pad_id), self.runtime.device))
            for rows in batches_of_tokens(
                cache.num_tokens,
                np.arange(len(cache)),
                config.batches.evaluation_batch_tokens,
                cache_targets(cache),
            )
        )
        found = self.validation = validate(
            batches,
            cache,
            self.data.valid_corpus,
            self.data.emotions,
            self.card.outputs,
            self.rule,
            config.candidates.after,
        )
        loss, *parts = (state.sums / num_rows).tolist()
        names = _loss_names(config)
        predicts_emotions = config.model.given_emotions == "none"
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "time": time.time(),
            "train_loss": loss,
            **{names[part]: value for part, value in zip(_PARTS, parts, strict=True) if part in names},
            "train_pairs_per_s": num_rows / max(state.seconds, 1e-9),
            "threshold": found.threshold,
            "neutral_offset": found.neutral_offset,
            **{
                key: value
                for key, value in found.scores.values.items()
                if predicts_emotions or not (key == _EMOTION_KEY or key.startswith("strict_"))
            },
        }

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer, card with the chosen decision, and the predictions that chose it."""
        assert self.validation is not None  # the loop validates first
        chosen = {
            "threshold": self.validation.threshold,
            "neutral_offset": self.validation.neutral_offset,
            "cause_calibration": self.validation.calibration,
        }
        save_student(folder, self.model, self.tokenizer, self.card.model_copy(update=chosen))
        write_predictions(folder / VALIDATION_NAME, self.validation.predictions)

    def line(self, metrics: Metrics) -> str:
        """What the terminal shows of an epoch."""
        return (
            f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, "
            f"valid {scores_line(metrics, self.criterion)}, {metrics['train_pairs_per_s']:.0f} pairs/s"
        )


def scores_line(metrics: Metrics, criterion: str) -> str:
    """The scores that an epoch is chosen by, and those beside them: of spans, or of utterances (task ecpe)."""
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
    """Part of the loss -> its name in the metrics, for the parts that the mode uses."""
    distillation = config.distillation
    cause = {"cls": "classifier", "span_only": ""}.get(distillation.mode, "connective")
    if distillation.mode == "kd" and distillation.hard_weight == 0:  # `step_loss` leaves the part out, too
        cause = ""
    used = {
        "emotion": "emotion" if config.model.given_emotions == "none" else "",
        "span": "span" if config.task == "ecspe" else "",
        "distillation": "distillation" if distillation.mode == "kd" else "",
        "cause": cause,
    }
    return {part: f"train_{name}_loss" for part, name in used.items() if name}


def _inputs(config: StudentConfig) -> dict[str, Any]:
    """Checksums of what the student was made from, by name."""
    return input_checksums(
        train=config.corpus.train,
        valid=config.corpus.valid,
        base=config.model.base,
        # One teacher's name is the same whether it is given by `labels` or in `teachers`.
        soft_labels=tuple(teacher.labels for teacher in config.distillation.used_teachers),
    )


def finish_student(
    directory: Path, *, config_hash: str, inputs: Mapping[str, str], details: Mapping[str, Any]
) -> None:
    """Write the manifest over all files of the student, which makes the directory complete."""
    folder = directory / MODEL_FOLDER
    model_files = [p.relative_to(directory).as_posix() for p in folder.rglob("*") if p.is_file()]
    rows = {METRICS_NAME: _num_lines(directory / METRICS_NAME)}
    if (directory / VALIDATION_NAME).is_file():
        rows[VALIDATION_NAME] = _num_lines(directory / VALIDATION_NAME)
    write_manifest(
        directory,
        "student",
        config_hash=config_hash,
        inputs=inputs,
        files=[*model_files, HEADS_NAME, CARD_NAME, CONFIG_NAME, *rows],
        rows=rows,
        details=details,
    )


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def teacher_lineage(config: StudentConfig) -> dict[str, Any] | None:
    """Where the soft labels come from, by their own manifests; None without distillation.

    Of several teachers the first stands where a single one would, and `teachers` lists all with their weights.
    """
    used = config.distillation.used_teachers
    if not used:
        return None
    lineages = []
    for teacher in used:
        manifest = read_manifest(teacher.labels, "soft-labels")
        lineages.append(
            {"inputs": manifest.inputs, "soft_labels_hash": manifest.config_hash, "details": manifest.details}
        )
    if len(used) == 1:
        return lineages[0]
    weighed = [{**lineage, "weight": teacher.weight} for lineage, teacher in zip(lineages, used, strict=True)]
    return {**lineages[0], "teachers": weighed}
