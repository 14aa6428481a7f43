"""Fine-tune a teacher under DeepSpeed ZeRO, with LoRA or whole (Eq. 1-4).

`train_teacher` is the whole story: prepare the data and the engine, resume, run the remaining steps, install the best
product. `TeacherTraining` holds what the steps share. What is learnt is an `Objective`: a teacher's is `Connectives`,
and the generative baseline (kdecs.baselines.generative) trains on answers by the same story.

An optimizer step takes one global batch, whose composition depends only on the seed and the config. DeepSpeed averages
gradients over ranks, so each rank scales its loss sum by world size / (pairs of the global batch): the gradient is that
of the mean over all pairs. A step takes as many micro-batches as its own batch fills on the fullest rank.
"""

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from kdecs.artifact import check_output, file_lock, write_manifest
from kdecs.config import CONFIG_NAME, config_hash, input_checksums, write_config
from kdecs.corpus.pairs import Pair
from kdecs.corpus.splits import warn_of_shared_texts
from kdecs.errors import ArtifactError, ModelError, Stopped, TrainingError
from kdecs.evaluation.counts import PairCounts
from kdecs.process import ProgressBar, StopSignal
from kdecs.runtime import Runtime, any_rank, gather_objects, seed_everything, warn_of_emulation
from kdecs.teacher.checkpoint import best_product, resume, save_checkpoint
from kdecs.teacher.config import TeacherConfig, TuningConfig
from kdecs.teacher.data import (
    MicroBatch,
    PromptSet,
    TeacherData,
    Unit,
    connective_pairs,
    deal,
    fixed_batches,
    prompts_and_gold,
    share_among_ranks,
    training_encoder,
)
from kdecs.teacher.engine import check_device, start_engine
from kdecs.teacher.families import EncodedPrompt, Family, make_family
from kdecs.teacher.metering import Meter, MetricsFile, tuning_record
from kdecs.teacher.network import (
    TeacherNetwork,
    check_config,
    check_head,
    connective_loss,
    is_causal,
    target_loss,
    tree_is_exact,
    tree_probes,
)
from kdecs.teacher.product import install_product, separator_details
from kdecs.tracking.record import METRICS_NAME
from kdecs.tracking.stage import StageUpload, stage_upload
from kdecs.training.loop import learning_rate_at

_Config = TypeVar("_Config", bound=TuningConfig, contravariant=True)


class Objective(Protocol[_Config]):
    """What a model learns, and how it is judged. The loop, its checkpoints and its products know no more of it."""

    kind: Literal["teacher", "generative"]
    universe: str
    """What is trained on, for tracking."""
    network: type[TeacherNetwork]
    needs_trees: bool
    """Whether the loss is none over single prompts."""
    criterion: str
    """The validation score that chooses the product; where there is none, the loss alone does."""
    beside: tuple[str, ...]
    """The files that `save` may write."""

    def pairs(self, config: _Config) -> tuple[list[Pair], list[Pair]]:
        """The training and the validation pairs."""

    def encoder(self, config: _Config, family: Any) -> Callable[[Pair], EncodedPrompt]:
        """What encodes a training pair; the family itself encodes those of validation."""

    def check(self, engine: Any, prompt: EncodedPrompt, base: str) -> None:
        """Raise ModelError if the network computes something else than the model. Collective."""

    def weight(self, data: PromptSet, indices: Iterable[int]) -> int:
        """What the summed loss of these pairs is divided by. More than 0."""

    def loss(self, engine: Any, data: PromptSet, micro: MicroBatch, runtime: Runtime) -> torch.Tensor:
        """The summed loss of a micro-batch; of an empty one, any loss of a forward. Collective."""

    def judge(
        self, engine: Any, data: PromptSet, micro: MicroBatch, runtime: Runtime
    ) -> tuple[torch.Tensor, dict[int, bool]]:
        """The summed loss of a micro-batch, and which of its pairs are called causal, if any are. Collective."""

    def scores(
        self, engine: Any, data: PromptSet, decisions: Mapping[int, bool], runtime: Runtime
    ) -> dict[str, float]:
        """The validation scores beside the loss, the same on every rank. Collective."""

    def save(self, folder: Path) -> None:
        """Write what belongs to the product of the last validation besides the weights. Rank 0 alone."""

    def line(self, point: Mapping[str, float | None]) -> str:
        """The validation scores of a line of `metrics.jsonl`, in words."""

    def details(self, config: _Config, data: TeacherData, family: Any) -> dict[str, Any]:
        """What the manifest says besides the facts of every training."""


class Connectives:
    """Eq. 4: the cross-entropy of the connective, judged by the macro F1 of the pairs that are called causal.

    With `target_loss_weight` w, the loss of a step is (Eq. 4 summed over its pairs + w times `target_loss`, summed over
    its targets) / its number of pairs. Validation reports Eq. 4 alone, so that losses of any w compare.
    """

    kind: Literal["teacher", "generative"] = "teacher"
    network = TeacherNetwork
    criterion = "valid_macro_f1"
    beside: tuple[str, ...] = ()

    def __init__(self, config: TeacherConfig) -> None:
        self.universe: str = config.train_pairs
        self.gold = config.gold_connective
        self.target_weight = config.target_loss_weight
        self.needs_trees = config.target_loss_weight > 0

    def pairs(self, config: TeacherConfig) -> tuple[list[Pair], list[Pair]]:
        """See `Objective`, as for all methods."""
        return connective_pairs(config)

    def encoder(self, config: TeacherConfig, family: Family) -> Callable[[Pair], EncodedPrompt]:
        """A share of the prompts has a hint."""
        return training_encoder(config, family)

    def check(self, engine: Any, prompt: EncodedPrompt, base: str) -> None:
        """The answer words' logits come from the head's rows alone."""
        check_head(engine, engine.module, prompt, base)

    def weight(self, data: PromptSet, indices: Iterable[int]) -> int:
        """The number of pairs."""
        del data
        return len(list(indices))

    def loss(self, engine: Any, data: PromptSet, micro: MicroBatch, runtime: Runtime) -> torch.Tensor:
        """The sum over pairs, and that over targets, with its weight.

        Of a target that is in several units (`PromptSet.target_of_pair`), each part with a gold cause counts as a
        separate target.
        """
        prompts, is_cause_P = prompts_and_gold(data, micro, runtime)
        logits_PA = engine(prompts)
        loss = connective_loss(logits_PA, is_cause_P, self.gold)
        if self.target_weight and micro.pairs:
            of_targets = target_loss(logits_PA, is_cause_P, data.target_of_pair[list(micro.pairs)])
            loss = loss + self.target_weight * of_targets
        return loss

    def judge(
        self, engine: Any, data: PromptSet, micro: MicroBatch, runtime: Runtime
    ) -> tuple[torch.Tensor, dict[int, bool]]:
        """A pair is causal if the causal words together are more probable than the other one."""
        prompts, is_cause_P = prompts_and_gold(data, micro, runtime)
        logits_PA = engine(prompts)
        decisions = dict(zip(micro.pairs, is_causal(logits_PA).tolist(), strict=True)) if micro.pairs else {}
        return connective_loss(logits_PA, is_cause_P, self.gold), decisions

    def scores(
        self, engine: Any, data: PromptSet, decisions: Mapping[int, bool], runtime: Runtime
    ) -> dict[str, float]:
        """F1 of the causal pairs, of the others, and their mean."""
        del engine, runtime
        labels = [pair.is_cause for pair in data.pairs]
        counts = PairCounts.of(labels, [decisions[n] for n in range(len(labels))])
        return {f"valid_{key}": score for key, score in counts.scores().items()}

    def save(self, folder: Path) -> None:
        """Nothing: a teacher is its weights."""
        del folder

    def line(self, point: Mapping[str, float | None]) -> str:
        """The macro F1, too."""
        return f"valid loss {point['valid_loss']:.4f}, valid macro F1 {point['valid_macro_f1']:.2f}"

    def details(self, config: TeacherConfig, data: TeacherData, family: Family) -> dict[str, Any]:
        """What a validation score has to beat at the very least, and what the teacher was shown."""
        labels = [pair.is_cause for pair in data.valid.pairs]
        majority = [sum(labels) * 2 > len(labels)] * len(labels)
        return {
            "emotions_shown": config.emotions_shown,
            "majority_macro_f1": PairCounts.of(labels, majority).scores()["macro_f1"],
            **({"split_targets": data.train.num_split_targets} if self.target_weight else {}),
            **separator_details(family),
        }


def prepare(
    config: TuningConfig, family: Family, objective: Objective[Any], runtime: Runtime
) -> tuple[TeacherData, Any]:
    """Prepare data and engine, with prefix trees only if this model gives the same logits over them. Collective.

    Raises ModelError if the model changes its logits after the head, or if the config insists on trees that the model
    does not take.
    """
    if config.batches.batching == "pairs" or not family.can_share_prefixes:
        return _start(config, family, objective, runtime, use_tree=False)
    # The batches are dealt as trees already, but the network computes single prompts until the check has passed.
    data, engine = _start(config, family, objective, runtime, use_tree=True)
    budget = config.batches.micro_batch_tokens
    probes = tree_probes(data.train.pairs, data.train.prompts, max_tokens=budget)
    if tree_is_exact(engine, engine.module, probes, runtime):
        engine.module.use_tree = True
        return data, engine
    if config.batches.batching == "tree" or objective.needs_trees:
        without = " and target_loss_weight=0, which needs trees" if objective.needs_trees else ""
        raise ModelError(
            f"model {config.model.base}: gives other logits over a prefix tree than over single prompts (it may use "
            f"a sliding window or ALiBi); set batches.batching=pairs{without}"
        )
    if runtime.is_main:
        print(
            f"{objective.kind} {config.name}: this model gives other logits over a prefix tree; it trains on pairs"
        )
    # Batches of pairs need other accumulation buffers, so the engine starts over.
    engine.destroy()
    del data, engine  # before the next one is loaded: two networks may not fit
    # The engine's hooks and the network refer to each other, so only the collector frees them.
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return _start(config, family, objective, runtime, use_tree=False)


def _start(
    config: TuningConfig, family: Family, objective: Objective[Any], runtime: Runtime, *, use_tree: bool
) -> tuple[TeacherData, Any]:
    data = deal(
        config,
        family,
        objective.pairs(config),
        encode=objective.encoder(config, family),
        use_tree=use_tree,
        world_size=runtime.world_size,
        show_progress=runtime.is_main,
    )
    engine = start_engine(config, family, runtime, data.accumulation_steps, objective.network)
    engine.eval()
    objective.check(engine, data.train.prompts[data.train.shortest], config.model.base)
    return data, engine


@torch.no_grad()
def validate(
    engine: Any,
    valid: PromptSet,
    config: TuningConfig,
    objective: Objective[Any],
    *,
    padded: bool,
    runtime: Runtime,
) -> dict[str, float]:
    """Compute valid_loss over all pairs, and the objective's scores. Collective.

    Raises TrainingError on every rank if the loss is not finite.
    """
    engine.eval()
    budget = config.batches.micro_batch_tokens
    batches = fixed_batches(valid.units, micro_batch_tokens=budget, padded=padded)
    # All ranks run equally many forwards: under ZeRO-3 each one gathers its parameters from all of them.
    rounds = -(-len(batches) // runtime.world_size)
    predicted: dict[int, bool] = {}
    loss_sum = 0.0
    for number in range(rounds):
        position = number * runtime.world_size + runtime.rank
        micro = batches[position] if position < len(batches) else MicroBatch(())
        loss, decisions = objective.judge(engine, valid, micro, runtime)
        if micro.pairs:
            loss_sum += float(loss)
            predicted |= decisions
    merged: dict[int, bool] = {}
    total = 0.0
    for part, part_loss in gather_objects((predicted, loss_sum), runtime):
        merged |= part
        total += part_loss
    # The sum is the same on every rank, so all of them raise, and none waits for the others.
    if not math.isfinite(total):
        raise TrainingError(
            f"validation loss {total}: training stopped before it saved anything; lower optimization.learning_rate"
        )
    weight = objective.weight(valid, range(len(valid.pairs)))
    return {"valid_loss": total / weight} | objective.scores(engine, valid, merged, runtime)


def validation_steps(num_steps: int, num_validations: int) -> set[int]:
    """The steps (counted from 1) to validate after: evenly spread, the last one after the last step."""
    # At least 1: a tiny corpus may have fewer steps than validations.
    return {max(1, round(num_steps * (n + 1) / num_validations)) for n in range(num_validations)}


class TeacherTraining:
    """A training on this rank. `state` is all that a resume needs besides DeepSpeed's own state."""

    def __init__(
        self,
        config: TuningConfig,
        data: TeacherData,
        engine: Any,
        objective: Objective[Any],
        work: str,
        runtime: Runtime,
    ) -> None:
        self.config, self.data, self.engine, self.work, self.runtime = config, data, engine, work, runtime
        self.objective = objective
        self.state = resume(engine, config, work, runtime, prime=self.prime)

    def run(
        self,
        metrics: MetricsFile,
        upload: StageUpload,
        stop: StopSignal,
        on_validation: Callable[[], object] | None = None,
    ) -> None:
        """Take all remaining steps, with validations, metrics and checkpoints between them. Collective.

        Raises Stopped after a stop signal, once the state is saved. `on_validation`: see `tune`.
        """
        config, data, state, runtime = self.config, self.data, self.state, self.runtime
        num_steps = len(data.steps)
        validated = validation_steps(num_steps, config.optimization.epochs * config.validate_per_epoch)
        meter = Meter(config, self.engine.module.network, data.train, runtime)
        with ProgressBar(
            num_steps,
            initial=state.step,
            desc=f"{self.objective.kind} {config.name}",
            unit="step",
            is_shown=runtime.is_main,
        ) as bar:
            while state.step < num_steps:
                # A signal may have reached only some ranks, but all have to leave the loop at the same step.
                if any_rank(stop.requested, runtime):
                    save_checkpoint(self.engine, config, state, self.work, runtime, self.objective.save)
                    raise Stopped(
                        f"{self.objective.kind} {config.name}: stopped at step {state.step} of {num_steps}, "
                        "checkpoint written; run the same command again to resume"
                    )
                batch = data.steps[state.step]
                started = time.monotonic()
                loss, rate = self.step(batch)
                meter.add(batch, time.monotonic() - started)
                state.step += 1
                state.pairs_seen += sum(len(unit.pairs) for unit in batch)
                state.tokens_seen += sum(unit.tokens for unit in batch)
                bar.update(loss=f"{loss:.3f}", pairs_per_s=f"{meter.pairs_per_second:.1f}")

                validates = state.step in validated
                if validates or state.step % config.log_every_steps == 0:
                    point: dict[str, float | None] = {
                        "step": state.step,
                        "train_loss": loss,
                        "learning_rate": rate,
                        "pairs_seen": state.pairs_seen,
                        "tokens_seen": state.tokens_seen,
                        "epoch": state.step / data.steps_per_epoch,
                        "time": time.time(),
                        **meter.line(),
                    }
                    if validates:
                        scores = validate(
                            self.engine,
                            data.valid,
                            config,
                            self.objective,
                            padded=data.padded,
                            runtime=runtime,
                        )
                        point |= scores
                        state.keep_if_best(scores, self.objective.criterion)
                    if runtime.is_main:
                        metrics.add(point)
                        upload.sync()
                        if validates:
                            tqdm.write(_validation_line(config, self.objective, point))
                # After the metrics line: a resume cuts the lines back to its checkpoint, so that none is missing or
                # double.
                if validates or state.step % config.checkpoint_every_steps == 0:
                    save_checkpoint(self.engine, config, state, self.work, runtime, self.objective.save)
                if validates and on_validation is not None and runtime.is_main:
                    on_validation()

    def step(self, batch: Sequence[Unit]) -> tuple[float, float]:
        """Take an optimizer step over a global batch: its mean loss, and the rate. Collective.

        Raises TrainingError on every rank if the loss or the gradient is not finite.
        """
        config, data, engine, runtime, step = (
            self.config,
            self.data,
            self.engine,
            self.runtime,
            self.state.step,
        )
        # Dropout depends on seed, step and rank alone, so that a resume needs no random states. The large factor keeps
        # trainings with neighbouring seeds from drawing the same masks a few steps apart.
        seed_everything(config.optimization.seed * 1_000_003 + step * runtime.world_size + runtime.rank)
        rate = learning_rate_at(step, len(data.steps), config.optimization)
        for group in engine.optimizer.param_groups:
            # The rate is a function of the step: a scheduler of DeepSpeed's would be one more state to resume.
            group["lr"] = rate
        shares = share_among_ranks(
            batch,
            world_size=runtime.world_size,
            micro_batch_tokens=config.batches.micro_batch_tokens,
            padded=data.padded,
        )
        # Every rank works out the shares of all, so that all agree on the number without a collective.
        num_micro_steps = max(len(share) for share in shares)
        micro_batches = shares[runtime.rank]
        weight = self.objective.weight(data.train, (n for unit in batch for n in unit.pairs))
        engine.train()
        # Summed on the device: reading the loss of each micro-batch would wait for it.
        loss_sum = torch.zeros((), device=runtime.device)
        for number in range(num_micro_steps):
            # A rank with fewer micro-batches computes empty ones: the engine's collectives wait for every rank.
            micro = micro_batches[number] if number < len(micro_batches) else MicroBatch(())
            # The engine cannot count them itself: the number of micro-steps differs between steps.
            engine.set_gradient_accumulation_boundary(number == num_micro_steps - 1)
            loss = self.objective.loss(engine, data.train, micro, runtime)
            if not micro.pairs:  # computed only because the other ranks' collectives wait for this rank
                loss = loss * 0.0
            loss_sum += loss.detach()
            # Without scale_wrt_gas=False, DeepSpeed would also divide by the accumulation steps, as if every step took
            # as many.
            engine.backward(loss * (runtime.world_size / weight), scale_wrt_gas=False)

        mean_loss = loss_sum / weight
        if runtime.world_size > 1:
            dist.all_reduce(mean_loss)
        # This waits for the device. It has to: DeepSpeed's step cannot be taken back once it has moved the weights.
        if not math.isfinite(mean_loss):
            raise TrainingError(
                f"loss {float(mean_loss)} at step {step + 1}: training stopped before the optimizer moved; "
                "lower optimization.learning_rate or use zero.dtype bfloat16"
            )
        if engine.zero_optimization_stage() == 0 and config.zero.dtype == "float32":
            # Here DeepSpeed clips without returning the norm, and AdamW would take what it made of an infinite one.
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._check_norm(float(torch.nn.utils.get_total_norm(gradients)))
        engine.step()
        # Known only after the weights have moved. Nothing is saved before the check, so an infinite norm spoils no
        # checkpoint.
        norm = engine.get_global_grad_norm()
        # In float16 an infinite norm is how the loss scale is found: DeepSpeed skips that step.
        if norm is not None and config.zero.dtype != "float16":
            self._check_norm(float(norm))
        return float(mean_loss), rate

    def _check_norm(self, norm: float) -> None:
        if any_rank(not math.isfinite(norm), self.runtime):
            raise TrainingError(
                f"gradient norm {norm} at step {self.state.step + 1}: training stopped before it saved anything; "
                "lower optimization.learning_rate"
            )

    def prime(self) -> None:
        """Take a step that moves nothing, after which the optimizer has its states. Collective."""
        for group in self.engine.optimizer.param_groups:
            # AdamW multiplies its weight decay by the rate, so nothing at all moves.
            group["lr"] = 0.0
        self.engine.train()
        self.engine.set_gradient_accumulation_boundary(True)
        loss = self.objective.loss(self.engine, self.data.train, MicroBatch(()), self.runtime)
        self.engine.backward(loss * 0.0, scale_wrt_gas=False)
        self.engine.step()

    def finish(self, family: Family) -> None:
        """Put the best product into the teacher directory, and the manifest last. Rank 0 alone."""
        config, data, state = self.config, self.data, self.state
        details = self.objective.details(config, data, family)
        # Before the manifest: a start after a kill between the two finds the last checkpoint and installs the product
        # again.
        product = best_product(config, state.best_step, self.objective.beside)
        files = install_product(*product, family, config.output)
        write_manifest(
            config.output,
            self.objective.kind,
            config_hash=self.work,
            inputs=input_checksums(
                base=config.model.base, corpus_train=config.corpus.train, corpus_valid=config.corpus.valid
            ),
            files=[*files, CONFIG_NAME, METRICS_NAME],
            details={
                "name": config.name,
                "family": config.model.family,
                "tuning": "full" if config.lora is None else "lora",
                "best_step": state.best_step,
                "valid": state.best,
                "train_pairs": len(data.train.pairs),
                "prompts_cut": data.train.num_cut,
                "batching": data.batching,
                "zero_stage": config.zero.stage,
                "world_size": self.runtime.world_size,
                **details,
            },
        )
        majority = details.get("majority_macro_f1")
        print(
            f"{self.objective.kind} {config.name}: {state.step} steps on {self.runtime.world_size} ranks, "
            f"ZeRO-{config.zero.stage}; best at step {state.best_step}: {self.objective.line(state.best)}"
            f"{'' if majority is None else f' (majority baseline {majority:.2f})'}; written to {config.output}",
            flush=True,
        )


def _validation_line(config: TuningConfig, objective: Objective[Any], point: dict[str, float | None]) -> str:
    mfu = "" if point["mfu"] is None else f", MFU {100 * point['mfu']:.1f}%"
    return (
        f"{objective.kind} {config.name}: step {point['step']}, train loss {point['train_loss']:.4f}, "
        f"{objective.line(point)}; {point['pairs_per_second']:.1f} pairs/s, {point['tokens_per_second']:.0f} tokens/s, "
        f"peak {point['memory_peak_gib']:.2f} GiB{mfu}"
    )


LOCK_NAME = ".training.lock"
# The ranks of a killed launcher take some seconds to end, and a restart should survive that.
LOCK_WAIT_S = 60.0


def train_teacher(config: TeacherConfig, runtime: Runtime, stop: StopSignal) -> Path:
    """Train a teacher, and write its directory (`tune`). Collective."""

    def family_of() -> Family:
        return make_family(
            config.model,
            max_prompt_tokens=config.batches.max_prompt_tokens,
            emotions_shown=config.emotions_shown,
            tree_attention=config.batches.tree_attention,
        )

    return tune(config, Connectives(config), family_of, runtime, stop)


def tune(
    config: TuningConfig,
    objective: Objective[Any],
    make: Callable[[], Family],
    runtime: Runtime,
    stop: StopSignal,
    on_validation: Callable[[], object] | None = None,
) -> Path:
    """Train for an objective, validate, keep the best, and write the output directory. Collective.

    `make` loads the tokenizer. Resumes from the directory's own checkpoints, with any number of ranks and any ZeRO
    stage. `on_validation` is called on rank 0 once the line of a validation and its checkpoint are written. Raises
    Stopped after a stop signal, once the state is saved.
    """
    check_device(config, runtime.device)
    warn_of_emulation(runtime, config.zero.dtype, "zero.dtype")
    work = config_hash(config)
    check_output(config.output, objective.kind, work)
    family = make()
    # Before the output directory is made, and before the weights are loaded, which takes minutes for a large base.
    check_config(config.model.base, config.model.family, family.max_prompt_tokens)
    with lock_output(config.output, runtime):
        # All ranks draw the same first values for LoRA's A and for a new head.
        seed_everything(config.optimization.seed)
        data, engine = prepare(config, family, objective, runtime)
        training = TeacherTraining(config, data, engine, objective, work, runtime)
        metrics = MetricsFile(config.output)
        if runtime.is_main:
            # On a resume, too: settings outside the config hash (stage, offload, logging) may have changed.
            write_config(config, config.output)
            metrics.cut_back(training.state.step)
            warn_of_shared_texts(config.corpus)
            for prompts, split in ((data.train, "train"), (data.valid, "valid")):
                cut = prompts.num_cut
                if any(cut.values()):
                    tqdm.write(
                        f"{objective.kind} {config.name}: {split}: of {len(prompts.prompts)} prompts "
                        f"{sum(cut.values())} were longer than {config.batches.max_prompt_tokens} tokens: "
                        f"{cut['history']} lost only their oldest history, {cut['text']} also text of an utterance"
                    )
            if training.state.step:
                tqdm.write(
                    f"{objective.kind} {config.name}: resumed at step {training.state.step} of {len(data.steps)}"
                )
        record = functools.partial(tuning_record, config, objective.kind, objective.universe, work)
        with stage_upload(config.tracking, config.output, record, is_main=runtime.is_main) as upload:
            upload.sync()
            training.run(metrics, upload, stop, on_validation)
            if runtime.is_main:
                training.finish(family)
        if runtime.world_size > 1:
            dist.barrier()  # no rank may end the job while rank 0 writes the manifest
    return config.output


@contextlib.contextmanager
def lock_output(output: Path, runtime: Runtime) -> Iterator[None]:
    """Hold the directory: ranks of a killed launcher may still be at work there. Collective."""
    with contextlib.ExitStack() as stack:
        is_ours = True
        if runtime.is_main:
            waited_until = time.monotonic() + LOCK_WAIT_S
            is_ours = stack.enter_context(file_lock(output / LOCK_NAME, blocking=False))
            while not is_ours and time.monotonic() < waited_until:
                time.sleep(0.5)
                is_ours = stack.enter_context(file_lock(output / LOCK_NAME, blocking=False))
        if any_rank(not is_ours, runtime):
            raise ArtifactError(
                f"{output}: another training is at work in this directory; wait until it ends, or stop it"
            )
        yield
