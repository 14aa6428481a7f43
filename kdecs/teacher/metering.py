"""What a training costs: operations of a network, throughput, memory, MFU, and `metrics.jsonl`, which records them.

`metrics.jsonl` has a JSON object per line, every `log_every_steps` steps and at every validation:

    step, epoch, time (unix seconds), learning_rate
    train_loss                             of this step
    pairs_seen, tokens_seen                since the first step
    pairs_per_second, tokens_per_second    of training alone, since the line before, over all ranks
    memory_peak_gib                        the greatest of any rank: of its GPU, or of its process on a CPU
    mfu                                    share of the devices' peak (Chowdhery et al. 2022); null if that is unknown
    valid_loss, valid_*_f1                 at validations; of a generative baseline the scores of its answers instead

A resume cuts the file back to its checkpoint, so that each step has one line.

Operations are counted by our own rules rather than by torch's FlopCounterMode. A training needs the cost per token, per
attended pair and per answer, of a live network whose weights may be partitioned or packed in 4 bits, without running
it. Tests hold both counts equal.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kdecs.artifact import write_text
from kdecs.runtime import Runtime
from kdecs.teacher.config import TuningConfig
from kdecs.teacher.data import PromptSet, Unit
from kdecs.teacher.plan.hardware import gpu_of_device
from kdecs.teacher.tree.prefix_tree import pack
from kdecs.tracking.datasets import corpus_datasets
from kdecs.tracking.record import METRICS_NAME, RunRecord, read_points
from kdecs.tracking.stage import Kind, stage_record

NUM_DECODER_TOKENS = 2
"""Decoder input of a seq2seq teacher: the start token and `<extra_id_0>`."""


@dataclass(frozen=True)
class Flops:
    """Operations of a forward and of a backward, per unit (a token, an attended pair, an answer)."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: float) -> "Flops":
        return Flops(self.forward * count, self.backward * count)

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


@dataclass(frozen=True)
class NetworkFlops:
    """What a token, an attended (query, key) pair over all layers, and an answer cost."""

    per_token: Flops = field(default_factory=Flops)
    per_attended_pair: Flops = field(default_factory=Flops)
    per_answer: Flops = field(default_factory=Flops)

    def of(self, *, tokens: float, attended_pairs: float, answers: float) -> Flops:
        """Cost of a batch. `attended_pairs` is the sum over queries of the keys that each one attends to.

        In a tree these are a token's ancestors and itself, under a dense mask all N², and for an encoder T² per prompt.
        """
        return self.per_token * tokens + self.per_attended_pair * attended_pairs + self.per_answer * answers


def network_flops(network: nn.Module, *, checkpointing: bool) -> NetworkFlops:
    """Count a network's operations, with or without LoRA, on any device (meta, or partitioned by ZeRO-3).

    A module counts as trained if its weights require a gradient. `checkpointing` adds the recomputed forward of the
    main stack to the backward; leave it False for MFU, which counts what the task needs. The count is slightly high in
    two places: torch skips the last product of each recomputed layer, and plain LoRA needs no gradient of the first
    input.
    """
    config = network.config
    per_token = Flops()
    per_answer = Flops()
    for name, rows_in, rows_out, is_trained in _matrices(network):
        # A multiplication and an addition per weight. Norms, activations, softmax and look-ups are not counted, as is
        # usual for MFU.
        forward = 2.0 * rows_in * rows_out
        # A frozen matrix passes on the gradient of its input; a trained one costs its weights' gradient as well.
        backward = forward * (2 if is_trained else 1)
        runs = _runs_per_answer(name, config)
        if runs == 0:
            per_token += Flops(forward, backward + forward * checkpointing)
        else:
            # Checkpointing recomputes the layers of the decoder, but not the head.
            recomputed = checkpointing and ".decoder." in name and "lm_head" not in name
            per_answer += Flops(forward, backward + forward * recomputed) * runs
    width = attention_width(config)
    # Two products (scores, and the sum of values) of 2 · width each; the backward takes two for each of them.
    attention = Flops(4.0 * width, (8.0 + 4.0 * checkpointing) * width)
    if getattr(config, "is_encoder_decoder", False):
        layers = config.num_decoder_layers
        per_token += attention * (layers * NUM_DECODER_TOKENS)  # the decoder attends to every encoder token
        per_answer += attention * (layers * NUM_DECODER_TOKENS**2)
    return NetworkFlops(per_token, attention * config.num_hidden_layers, per_answer)


def attention_width(config: Any) -> int:
    """Heads times head size, the width of the attention products."""
    if hasattr(config, "d_kv"):
        return config.num_heads * config.d_kv
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_size


def _matrices(network: nn.Module) -> Iterator[tuple[str, int, int, bool]]:
    """Name, inputs, outputs, and whether it is trained, of every linear layer including heads."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            # Attributes, not the weight's shape: ZeRO-3 leaves an empty tensor, 4 bits leave a packed one.
            yield f".{name}", module.in_features, module.out_features, module.weight.requires_grad
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
            yield f".{name}", module.nx, module.nf, module.weight.requires_grad


def _runs_per_answer(name: str, config: Any) -> int:
    """How many rows of a layer run per answer; 0 for the main stack, which runs a row per token."""
    if ".lm_head" in name or ".cls." in name or ".embed_out" in name:
        return 1
    if not getattr(config, "is_encoder_decoder", False) or ".decoder." not in name:
        return 0
    # Keys and values of the cross-attention are computed from the encoder's tokens.
    is_cross = any(f".EncDecAttention.{part}" in name or f".encoder_attn.{part}" in name for part in _CROSS)
    return 0 if is_cross else NUM_DECODER_TOKENS


_CROSS = ("k", "v", "k_proj", "v_proj")


def peak_flops(config: TuningConfig, device: torch.device) -> float | None:
    """Peak FLOP/s of one device at the config's dtype, from the config or the table of GPUs; None if unknown."""
    if config.device_peak_tflops is not None:
        return config.device_peak_tflops * 1e12
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu = gpu_of_device(properties.name, properties.total_memory / 2**30)
    return None if gpu is None else gpu.peak_at(config.zero.dtype) * 1e12


def memory_peak_gib(runtime: Runtime) -> float:
    """The greatest peak of any rank: allocated on its GPU, or resident in its process. Collective."""
    if runtime.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(runtime.device) / 2**30
    else:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        # In KiB, the highest resident size since the process started.
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    value = torch.tensor([peak], device=runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


class Meter:
    """Counts training time, pairs, tokens and operations between two lines of `metrics.jsonl`."""

    def __init__(self, config: TuningConfig, network: nn.Module, train: PromptSet, runtime: Runtime) -> None:
        self._peak = peak_flops(config, runtime.device)
        self._costs = network_flops(network, checkpointing=False) if self._peak else None
        self._train = train
        self._is_causal = config.model.family == "causal"
        self._runtime = runtime
        self._attended: dict[tuple[int, ...], int] = {}
        self._clear()

    def add(self, units: list[Unit], seconds: float) -> None:
        """Count one step over a global batch."""
        self._seconds += seconds
        self._pairs += sum(len(unit.pairs) for unit in units)
        self._tokens += sum(unit.tokens for unit in units)
        if self._costs:
            tokens, pairs = sum(unit.tokens for unit in units), sum(len(unit.pairs) for unit in units)
            attended = sum(self._attended_pairs(unit) for unit in units)
            self._flops += self._costs.of(tokens=tokens, attended_pairs=attended, answers=pairs).total

    @property
    def pairs_per_second(self) -> float:
        """Speed of the training since the last line."""
        return self._pairs / self._seconds if self._seconds else 0.0

    def line(self) -> dict[str, float | None]:
        """Throughput, memory and MFU since the last line; starts the next one. Collective."""
        seconds = max(self._seconds, 1e-9)
        available = (self._peak or 0.0) * seconds * self._runtime.world_size
        line: dict[str, float | None] = {
            "pairs_per_second": self._pairs / seconds,
            "tokens_per_second": self._tokens / seconds,
            "memory_peak_gib": memory_peak_gib(self._runtime),
            "mfu": self._flops / available if available else None,
        }
        self._clear()
        return line

    def _clear(self) -> None:
        self._seconds, self._pairs, self._tokens, self._flops = 0.0, 0, 0, 0.0

    def _attended_pairs(self, unit: Unit) -> int:
        """(query, key) pairs that the mask lets through: ancestors in a tree, all of a prompt for an encoder.

        In an encoder's tree the trunk attends to itself, and a branch to the trunk and itself.
        """
        if not self._is_causal:
            prompts = [self._train.prompts[n] for n in unit.pairs]
            if num_trunk := prompts[0].num_trunk:
                branches = [len(prompt.tokens) - num_trunk for prompt in prompts]
                return num_trunk**2 + sum(size * (num_trunk + size) for size in branches)
            return sum(len(prompt.tokens) ** 2 for prompt in prompts)
        if unit.pairs not in self._attended:  # the same trees come again in every epoch
            tree = pack([self._train.prompts[n].tokens for n in unit.pairs])
            # A position in the walk is a depth: the number of a token's ancestors, to which the token itself comes.
            self._attended[unit.pairs] = int(np.sum(tree.positions_N + 1))
        return self._attended[unit.pairs]


class MetricsFile:
    """`metrics.jsonl` of a run that may be resumed."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS_NAME

    def cut_back(self, step: int) -> None:
        """Keep the lines up to a step: what an attempt wrote after its last checkpoint will be written again."""
        if self.path.is_file():
            # Written anew as a whole: a kill in the middle leaves either the old file or the new one.
            kept = [point for point in read_points(self.path) if point["step"] <= step]
            write_text(self.path, "".join(json.dumps(point) + "\n" for point in kept))

    def add(self, point: dict[str, float | None]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            # NaN would make the line unreadable for JSON parsers.
            file.write(json.dumps(point, allow_nan=False) + "\n")


def tuning_record(config: TuningConfig, kind: Kind, universe: str, work: str) -> RunRecord:
    """What MLflow shows of a training, as its files are now. `work` is the config's hash.

    MLflow counts epochs; a teacher's lines are counted by step, so the step takes the epoch's place. Validation scores
    also have the names that students and baselines give them, so that all of them are found and compared by one name.
    """
    points = [
        {
            **point,
            **{
                f"utterance_{key.removeprefix('valid_')}": value
                for key, value in point.items()
                if key.startswith("valid_") and key.endswith("_f1")
            },
            "epoch": point["step"],
            "epochs": point["epoch"],
        }
        for point in read_points(config.output / METRICS_NAME)
    ]
    datasets = corpus_datasets(config.corpus, universe=universe)
    return stage_record(
        config,
        kind,
        output=config.output,
        name=config.name,
        config_hash=work,
        datasets=datasets,
        points=points,
    )
