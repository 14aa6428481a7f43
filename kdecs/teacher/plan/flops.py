"""Floating-point operations of a teacher's forward and backward, counted from its modules' shapes.

A matrix product of n rows counts 2·n·in·out. The backward of a frozen matrix computes the gradient of its input
alone (as much again), that of a trained one also the gradient of its weight (twice as much). Attention counts, a
layer and an attended (query, key) pair, 4·heads·head size forward and 8 backward. Norms, activations, softmax and
embedding look-ups are left out, as is usual for MFU; so is recomputation unless checkpointing is asked for.

*Tokens* are those that the main stack computes: packed tokens of trees, or prompts with their padding. *Answers*
are prompts: the head, and a seq2seq's decoder over its two tokens, run once a prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from kdecs.teacher.config import LoraConfig

NUM_DECODER_TOKENS = 2
"""Decoder input of a seq2seq teacher: the start token and `<extra_id_0>`."""


@dataclass(frozen=True)
class Flops:
    """Forward and backward of one unit (a token, an attended pair, an answer)."""

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
    """What one token, one attended (query, key) pair over all layers, and one answer cost."""

    per_token: Flops = field(default_factory=Flops)
    per_attended_pair: Flops = field(default_factory=Flops)
    per_answer: Flops = field(default_factory=Flops)

    def of(self, *, tokens: float, attended_pairs: float, answers: float) -> Flops:
        """Cost of a batch. `attended_pairs`: the sum over queries of the keys each one looks at."""
        return self.per_token * tokens + self.per_attended_pair * attended_pairs + self.per_answer * answers


def network_flops(network: nn.Module, *, checkpointing: bool) -> NetworkFlops:
    """The costs of a network, adapted or not, on any device (meta, or partitioned by ZeRO-3).

    `checkpointing` adds the recomputed forward of the main stack to the backward: operations of the hardware (torch
    spares the last product of each recomputed layer, which is not subtracted). For MFU (Chowdhery et al. 2022)
    leave it False. Trained are the modules whose weights require a gradient. The gradient of the stack's first
    input is counted, although only checkpointing or full tuning needs it.
    """
    config = network.config
    per_token = Flops()
    per_answer = Flops()
    for name, rows_in, rows_out, is_trained in _matrices(network):
        forward = 2.0 * rows_in * rows_out
        backward = forward * (2 if is_trained else 1)
        runs = _runs_per_answer(name, config)
        if runs == 0:
            per_token += Flops(forward, backward + forward * checkpointing)
        else:
            recomputed = checkpointing and ".decoder." in name and "lm_head" not in name
            per_answer += Flops(forward, backward + forward * recomputed) * runs
    width = attention_width(config)
    attention = Flops(4.0 * width, (8.0 + 4.0 * checkpointing) * width)
    if getattr(config, "is_encoder_decoder", False):
        layers = config.num_decoder_layers
        per_token += attention * (layers * NUM_DECODER_TOKENS)  # the decoder looks at every encoder token
        per_answer += attention * (layers * NUM_DECODER_TOKENS**2)
    return NetworkFlops(per_token, attention * config.num_hidden_layers, per_answer)


def model_flops_per_token(
    config: Any,
    *,
    trainable: Literal["lora", "full"],
    checkpointing: bool,
    lora: LoraConfig | None = None,
) -> tuple[float, float]:
    """(forward, backward) of one token of the main stack without attention, from a Transformers config alone.

    `lora` (default: rank 16 on all linear layers) counts where trainable is "lora".
    """
    flops = flops_of_config(config, trainable=trainable, checkpointing=checkpointing, lora=lora).per_token
    return flops.forward, flops.backward


def training_flops(
    config: Any,
    lora: LoraConfig | None,
    *,
    tokens: float,
    attended_pairs: float,
    answers: float,
    checkpointing: bool = False,
) -> float:
    """Operations of forward and backward over a batch; `lora` None is full fine-tuning.

    `attended_pairs` is the number of ancestors (each token is its own) of a tree's tokens for what the task needs,
    N² for what a dense mask computes, and the sum of T² over padded prompts for encoders.
    """
    trainable: Literal["lora", "full"] = "full" if lora is None else "lora"
    flops = flops_of_config(config, trainable=trainable, checkpointing=checkpointing, lora=lora)
    return flops.of(tokens=tokens, attended_pairs=attended_pairs, answers=answers).total


def flops_of_config(
    config: Any, *, trainable: Literal["lora", "full"], checkpointing: bool, lora: LoraConfig | None = None
) -> NetworkFlops:
    """As `network_flops`, over a network built on the meta device (under a second for 13 B parameters)."""
    from kdecs.teacher.plan.meta_network import meta_network

    wanted = (lora or LoraConfig()) if trainable == "lora" else None
    return network_flops(meta_network(config, wanted), checkpointing=checkpointing)


def attention_width(config: Any) -> int:
    """Heads times head size, as the attention products see it."""
    if hasattr(config, "d_kv"):
        return config.num_heads * config.d_kv
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_size


def _matrices(network: nn.Module) -> Iterator[tuple[str, int, int, bool]]:
    """Name, inputs, outputs and whether it is trained, of every matrix product; heads included."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            # Attributes, not the weight's shape: ZeRO-3 leaves an empty tensor, 4-bit a packed one.
            yield f".{name}", module.in_features, module.out_features, module.weight.requires_grad
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
            yield f".{name}", module.nx, module.nf, module.weight.requires_grad


def _runs_per_answer(name: str, config: Any) -> int:
    """How often a matrix runs a prompt; 0 for those of the main stack, which run once a token."""
    if ".lm_head" in name or ".cls." in name or ".embed_out" in name:
        return 1
    if not getattr(config, "is_encoder_decoder", False) or ".decoder." not in name:
        return 0
    # Keys and values of the cross-attention are computed from the encoder's tokens.
    is_cross = any(f".EncDecAttention.{part}" in name or f".encoder_attn.{part}" in name for part in _CROSS)
    return 0 if is_cross else NUM_DECODER_TOKENS


_CROSS = ("k", "v", "k_proj", "v_proj")
