"""LoRA fine-tuning of a teacher under DeepSpeed ZeRO (Eq. 1-4).

One optimizer step is one global batch, whose composition depends on seed and config alone. The engine divides by
accumulation steps and averages over ranks, so each rank's loss sum is scaled by
world size × accumulation / (pairs of the global batch): the gradient is that of the mean over all its pairs.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from kdecs.artifact import MANIFEST_NAME, claim_directory, write_json, write_manifest, write_text
from kdecs.config import config_hash, input_checksums, write_config
from kdecs.errors import ArtifactError, ModelError, Stopped, TrainingError
from kdecs.evaluation.metrics import utterance_scores
from kdecs.runtime import Runtime, StopSignal, any_rank, gather_objects, seed_everything
from kdecs.schedule import learning_rate_at
from kdecs.teacher.adapter import ADAPTER_FILE, save_adapter
from kdecs.teacher.batches import MicroBatch, Unit, fixed_batches, share_among_ranks
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.data import PromptSet, TeacherData, prepare_data
from kdecs.teacher.engine import start_engine
from kdecs.teacher.families import EncodedPrompt, Family, make_family
from kdecs.teacher.network import tree_is_exact
from kdecs.teacher.objective import connective_loss, is_causal

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
NEWEST = "newest.json"


@dataclass
class Progress:
    """All that a resume needs beside DeepSpeed's state: finished steps, pairs seen, validation so far."""

    step: int = 0
    pairs_seen: int = 0
    best_macro_f1: float = -1.0
    best_step: int = 0
    records: list[dict[str, float]] = field(default_factory=list)


def train_teacher(config: TeacherConfig, runtime: Runtime, stop: StopSignal) -> Path:
    """Train, validate, keep the best adapter, and write the teacher directory. Collective.

    Resumes from the directory's own checkpoint. Raises Stopped after a stop signal, once the state is saved.
    """
    work = config_hash(config)
    claim_directory(config.output, "teacher", work)
    seed_everything(config.optimization.seed)
    family = make_family(
        config.model,
        max_prompt_tokens=config.batches.max_prompt_tokens,
        emotions_shown=config.emotions_shown,
    )
    data, engine = _prepare(config, family, runtime)
    progress = _resume(engine, config, work, runtime)
    if runtime.is_main:
        write_config(config, config.output)
        family.tokenizer.save_pretrained(config.output)
    _run_steps(engine, config, family, data, progress, runtime, stop, work)
    if runtime.is_main:
        _finish(config, data, progress, work, runtime)
    if runtime.world_size > 1:
        dist.barrier()
    return config.output


def _prepare(config: TeacherConfig, family: Family, runtime: Runtime) -> tuple[TeacherData, Any]:
    """Data and engine; with a tree only where this very model takes one exactly. Collective."""
    wants_tree = config.batches.batching != "pairs" and family.can_share_prefixes
    for use_tree in (True, False) if wants_tree else (False,):
        data = prepare_data(
            config, family, use_tree=use_tree, world_size=runtime.world_size, show_progress=runtime.is_main
        )
        engine = start_engine(config, family, runtime, data.accumulation_steps)
        if not use_tree:
            break
        longest = max(data.train.units, key=lambda unit: unit.longest)
        probes = [data.train.prompts[n] for n in longest.pairs[-4:]]
        engine.eval()
        if tree_is_exact(engine, engine.module, probes):
            engine.module.use_tree = True
            break
        if config.batches.batching == "tree":
            raise ModelError(
                f"model {config.model.base}: a prefix tree does not give the logits of its prompts (a sliding window, "
                "ALiBi or the like); set batches.batching=pairs"
            )
        if runtime.is_main:
            print(
                f"teacher {config.name}: this model does not take a prefix tree exactly; going on with pairs"
            )
    return data, engine


def _run_steps(
    engine: Any,
    config: TeacherConfig,
    family: Family,
    data: TeacherData,
    progress: Progress,
    runtime: Runtime,
    stop: StopSignal,
    work: str,
) -> None:
    num_steps = len(data.steps)
    bar = tqdm(
        total=num_steps,
        initial=progress.step,
        desc=f"teacher {config.name}",
        unit="step",
        disable=not runtime.is_main,
    )
    validate_every = max(1, data.steps_per_epoch // config.validate_per_epoch)
    started, pairs_before = time.monotonic(), progress.pairs_seen
    while progress.step < num_steps:
        if any_rank(stop.requested, runtime):
            _save_checkpoint(engine, config, progress, work, runtime)
            raise Stopped(
                f"teacher {config.name}: stopped at step {progress.step} of {num_steps}, checkpoint written; "
                "run the same command again to go on"
            )
        batch = data.steps[progress.step]
        loss = _train_step(engine, config, data, batch, progress.step, runtime)
        progress.step += 1
        progress.pairs_seen += sum(len(unit.pairs) for unit in batch)
        rate = (progress.pairs_seen - pairs_before) / (time.monotonic() - started)
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", pairs_per_s=f"{rate:.1f}")
        at_end = progress.step == num_steps
        if progress.step % validate_every == 0 or at_end:
            record = _validate(engine, data.valid, config, data.padded, runtime)
            record |= {
                "step": progress.step,
                "epoch": progress.step / data.steps_per_epoch,
                "train_loss": loss,
            }
            record |= {"train_pairs_per_second": rate, "time": time.time()}
            _keep_best(engine, config, progress, record, runtime)
        if (
            progress.step % config.checkpoint_every_steps == 0 or progress.step % validate_every == 0
        ) and not at_end:
            _save_checkpoint(engine, config, progress, work, runtime)
    bar.close()


def _train_step(
    engine: Any, config: TeacherConfig, data: TeacherData, batch: Sequence[Unit], step: int, runtime: Runtime
) -> float:
    """One optimizer step over a global batch; returns the mean loss over its pairs. Collective."""
    seed_everything(config.optimization.seed * 1_000_003 + step * runtime.world_size + runtime.rank)
    rate = learning_rate_at(step, len(data.steps), config.optimization)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    micro_batches = share_among_ranks(
        batch,
        world_size=runtime.world_size,
        micro_batch_tokens=config.batches.micro_batch_tokens,
        padded=data.padded,
    )[runtime.rank]
    num_pairs = sum(len(unit.pairs) for unit in batch)
    scale = runtime.world_size * data.accumulation_steps / num_pairs
    engine.train()
    total = torch.zeros((), device=runtime.device)
    for number in range(data.accumulation_steps):
        micro = micro_batches[number] if number < len(micro_batches) else MicroBatch(())
        prompts, is_cause_P = _gather(data.train, micro, runtime)
        loss = connective_loss(engine(prompts), is_cause_P)
        if not micro.pairs:
            loss = loss * 0.0
        total += loss.detach()
        engine.backward(loss * scale)
        if number == data.accumulation_steps - 1:
            mean_loss = _finite_mean(total / num_pairs, step, runtime)
        engine.step()
    norm = engine.get_global_grad_norm()
    if (
        any_rank(norm is not None and not math.isfinite(float(norm)), runtime)
        and config.zero.dtype != "float16"
    ):
        raise TrainingError(
            f"gradient norm {norm} at step {step + 1}: training stopped before anything was saved; "
            "lower optimization.learning_rate"
        )
    return mean_loss


def _finite_mean(share: torch.Tensor, step: int, runtime: Runtime) -> float:
    """Sum of the ranks' shares of the mean loss; stops every rank before the optimizer moves if not finite."""
    if runtime.world_size > 1:
        dist.all_reduce(share)
    mean = float(share)
    if not torch.isfinite(share):
        raise TrainingError(
            f"loss {mean} at step {step + 1}: training stopped before the optimizer moved; "
            "lower optimization.learning_rate or use zero.dtype bfloat16"
        )
    return mean


def _gather(data: PromptSet, micro: MicroBatch, runtime: Runtime) -> tuple[list[EncodedPrompt], torch.Tensor]:
    """Prompts and gold of a micro-batch; an empty one computes the corpus' shortest prompt, for the collectives."""
    indices = micro.pairs or (min(range(len(data.prompts)), key=lambda n: len(data.prompts[n].tokens)),)
    is_cause_P = torch.tensor([data.pairs[n].is_cause for n in indices], device=runtime.device)
    return [data.prompts[n] for n in indices], is_cause_P


@torch.no_grad()
def _validate(
    engine: Any, valid: PromptSet, config: TeacherConfig, padded: bool, runtime: Runtime
) -> dict[str, float]:
    """Loss and utterance-level scores over the validation pairs, each once. Collective."""
    engine.eval()
    budget = config.batches.micro_batch_tokens
    batches = fixed_batches(valid.units, micro_batch_tokens=budget, padded=padded)
    rounds = -(-len(batches) // runtime.world_size)
    predicted: dict[int, bool] = {}
    loss_sum = 0.0
    for number in range(rounds):
        position = number * runtime.world_size + runtime.rank
        micro = batches[position] if position < len(batches) else MicroBatch(())
        prompts, is_cause_P = _gather(valid, micro, runtime)
        logits_PA = engine(prompts)
        if micro.pairs:
            loss_sum += float(connective_loss(logits_PA, is_cause_P))
            predicted |= dict(zip(micro.pairs, is_causal(logits_PA).tolist(), strict=True))
    merged: dict[int, bool] = {}
    total = 0.0
    for part, part_loss in gather_objects((predicted, loss_sum), runtime):
        merged |= part
        total += part_loss
    labels = [pair.is_cause for pair in valid.pairs]
    scores = utterance_scores(labels, [merged[n] for n in range(len(labels))])
    return {
        "valid_loss": total / len(labels),
        "valid_positive_f1": scores.positive_f1,
        "valid_negative_f1": scores.negative_f1,
        "valid_macro_f1": scores.macro_f1,
    }


def _keep_best(
    engine: Any, config: TeacherConfig, progress: Progress, record: dict[str, float], runtime: Runtime
) -> None:
    progress.records.append(record)
    if record["valid_macro_f1"] > progress.best_macro_f1:
        progress.best_macro_f1 = record["valid_macro_f1"]
        progress.best_step = progress.step
        save_adapter(engine.module.network, config.output, runtime, zero_stage=config.zero.stage)
    if runtime.is_main:
        lines = "".join(json.dumps(entry) + "\n" for entry in progress.records)
        write_text(config.output / METRICS_FILE, lines)
        tqdm.write(
            f"teacher {config.name}: step {progress.step}, train loss {record['train_loss']:.4f}, "
            f"valid loss {record['valid_loss']:.4f}, valid macro F1 {record['valid_macro_f1']:.2f}"
        )


def _save_checkpoint(
    engine: Any, config: TeacherConfig, progress: Progress, work: str, runtime: Runtime
) -> None:
    """DeepSpeed's state without frozen weights, beside our own progress; the previous one goes. Collective."""
    directory = config.output / CHECKPOINTS
    tag = f"step-{progress.step}"
    state = {"work": work, "progress": vars(progress)}
    # DeepSpeed names the newest tag without waiting for the other ranks' files: we name it, after its barrier.
    engine.save_checkpoint(
        str(directory), tag=tag, client_state=state, save_latest=False, exclude_frozen_parameters=True
    )
    any_rank(False, runtime)
    if runtime.is_main:
        write_json(directory / NEWEST, {"tag": tag, "ranks": runtime.world_size, "stage": config.zero.stage})
        for old in directory.iterdir():
            if old.is_dir() and old.name != tag:
                shutil.rmtree(old)
    any_rank(False, runtime)  # no rank may end the job while rank 0 tidies up


def _resume(engine: Any, config: TeacherConfig, work: str, runtime: Runtime) -> Progress:
    directory = config.output / CHECKPOINTS
    if not (directory / NEWEST).is_file():
        return Progress()
    newest = json.loads((directory / NEWEST).read_text(encoding="utf-8"))
    if (newest["ranks"], newest["stage"]) != (runtime.world_size, config.zero.stage):
        raise TrainingError(
            f"{directory}: a checkpoint of {newest['ranks']} ranks under ZeRO-{newest['stage']}, this start has "
            f"{runtime.world_size} under ZeRO-{config.zero.stage}; start as before, or remove it to begin anew"
        )
    _, state = engine.load_checkpoint(str(directory), tag=newest["tag"], load_module_strict=False)
    if state is None or state.get("work") != work:
        raise ArtifactError(
            f"{directory}: a checkpoint of other work (config or inputs changed); "
            "choose another output or remove it"
        )
    progress = Progress(**state["progress"])
    if runtime.is_main:
        tqdm.write(f"teacher {config.name}: resumed at step {progress.step}")
    return progress


def _finish(
    config: TeacherConfig, data: TeacherData, progress: Progress, work: str, runtime: Runtime
) -> None:
    labels = [pair.is_cause for pair in data.valid.pairs]
    majority = utterance_scores(labels, [sum(labels) * 2 > len(labels)] * len(labels))
    best = next(r for r in progress.records if r["step"] == progress.best_step)
    files = [
        path.name
        for path in config.output.iterdir()
        if path.is_file() and path.name != MANIFEST_NAME and not path.name.startswith(".")
    ]
    assert ADAPTER_FILE in files
    write_manifest(
        config.output,
        "teacher",
        config_hash=work,
        inputs=input_checksums(
            base=config.model.base, corpus_train=config.corpus.train, corpus_valid=config.corpus.valid
        ),
        files=files,
        details={
            "name": config.name,
            "family": config.model.family,
            "emotions_shown": config.emotions_shown,
            "best_step": progress.best_step,
            "valid": {key: value for key, value in best.items() if key.startswith("valid_")},
            "majority_macro_f1": majority.macro_f1,
            "train_pairs": len(data.train.pairs),
            "batching": "pairs" if data.padded else "tree",
            "zero_stage": config.zero.stage,
            "world_size": runtime.world_size,
        },
    )
    shutil.rmtree(config.output / CHECKPOINTS, ignore_errors=True)
    print(
        f"teacher {config.name}: {progress.step} steps on {runtime.world_size} ranks, ZeRO-{config.zero.stage}; "
        f"best valid macro F1 {progress.best_macro_f1:.2f} at step {progress.best_step} "
        f"(majority baseline {majority.macro_f1:.2f}); written to {config.output}",
        flush=True,
    )
