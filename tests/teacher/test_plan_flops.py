"""Counted operations against torch's own counter, for every family, trained how, and with checkpointing."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, LlamaConfig, RobertaConfig, T5Config

from kdecs.teacher.config import LoraConfig
from kdecs.teacher.families import FAMILIES
from kdecs.teacher.metering import (
    NUM_DECODER_TOKENS,
    network_flops,
)
from kdecs.teacher.network import add_lora, family_of, meta_network

PROMPTS, LENGTH = 3, 24
LORA = LoraConfig(rank=4)

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
    "roberta": RobertaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4
    ),
    "bert": BertConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    ),
    "t5": T5Config(vocab_size=97, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_heads=4),
}
# Each case traces a network: two of the four architectures run with the long tests.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in ("bert", "t5") else name for name in CONFIGS]


def _network(config: Any, *, full: bool) -> Any:
    family = FAMILIES[family_of(config)]
    # Eager attention is plain products, which the counter sees on every device.
    network = family.auto_model.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return network if full else add_lora(network, LORA, family.lora_task)


def _counted(config: Any, *, full: bool, checkpointing: bool) -> tuple[int, int]:
    """Operations of a forward and a backward over padded prompts, by torch's counter."""
    network = _network(config, full=full)
    base = network if full else network.get_base_model()
    base.enable_input_require_grads()
    if checkpointing:
        base.activation_checkpointing_enable()
    network.train()
    ids_PT = torch.randint(3, 90, (PROMPTS, LENGTH))
    extra = {"use_cache": False} if config.model_type in ("llama", "t5") else {}
    if config.model_type == "t5":
        extra["decoder_input_ids"] = torch.zeros(PROMPTS, NUM_DECODER_TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits = base(input_ids=ids_PT, **extra).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return counter.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_torchs(name: str, full: bool, checkpointing: bool) -> None:
    config = CONFIGS[name]
    forward, backward = _counted(config, full=full, checkpointing=checkpointing)
    flops = network_flops(meta_network(config, None if full else LORA), checkpointing=checkpointing)
    # The oracle runs its head at every position, a teacher once a prompt.
    head_rows = PROMPTS * (NUM_DECODER_TOKENS if name == "t5" else LENGTH)
    head_runs = head_rows - PROMPTS
    head = network_flops(_head_only(config, full=full), checkpointing=False).per_answer
    counted = (
        flops.of(tokens=PROMPTS * LENGTH, attended_pairs=PROMPTS * LENGTH**2, answers=PROMPTS)
        + head * head_runs
    )
    assert forward == counted.forward
    # Torch leaves a recomputed layer after the last tensor that it needs: its last product is spared.
    if checkpointing:
        assert 0.9 * counted.backward < backward <= counted.backward
    else:
        assert backward == counted.backward


def _head_only(config: Any, *, full: bool) -> Any:
    """The adapted network without its stack: what is left runs once an answer."""
    network = _network(config, full=full)
    base = network if full else network.get_base_model()
    for name, _ in list(base.named_children()):
        if name not in ("lm_head", "cls"):
            setattr(base, name, torch.nn.Identity())
    base.config = config.__class__(**{**config.to_dict(), "is_encoder_decoder": False})
    return base


def test_without_required_input_gradients_the_first_products_alone_differ() -> None:
    """Plain LoRA needs no gradient of the embeddings: the count is above torch's by at most one layer's share."""
    config = CONFIGS["llama"]
    network = _network(config, full=False)
    network.train()
    logits = network(input_ids=torch.randint(3, 90, (PROMPTS, LENGTH)), use_cache=False).logits
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    flops = network_flops(network, checkpointing=False)
    whole = flops.of(
        tokens=PROMPTS * LENGTH, attended_pairs=PROMPTS * LENGTH**2, answers=PROMPTS * LENGTH
    ).backward
    assert counter.get_total_flops() < whole <= counter.get_total_flops() * (1 + 1 / config.num_hidden_layers)


def test_an_attended_pair_costs_two_products_and_their_backward() -> None:
    config = CONFIGS["llama"]
    lora, full = (network_flops(meta_network(config, tuned), checkpointing=False) for tuned in (LORA, None))
    assert full.per_token.backward == 2 * full.per_token.forward
    assert full.per_token.forward < lora.per_token.forward
    layers, width = 3, 48
    assert full.of(tokens=0, attended_pairs=7, answers=0).total == 7 * 12 * layers * width


def test_counts_survive_empty_weights() -> None:
    """ZeRO-3 leaves empty tensors on a rank: shapes come from the modules."""
    network = _network(CONFIGS["llama"], full=False)
    whole = network_flops(network, checkpointing=True)
    for parameter in network.parameters():
        parameter.data = torch.empty(0)
    assert network_flops(network, checkpointing=True) == whole
