"""Scoring's shortcuts against the plain network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdecs.corpus.pairs import Pair
from kdecs.teacher.config import LoraConfig
from kdecs.teacher.families import Family
from kdecs.teacher.network import TeacherNetwork, add_lora
from kdecs.teacher.scoring import fold_adapter

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["causal", "seq2seq", "masked"])
def test_folded_adapter_gives_the_logits_of_base_and_adapter(
    name: str, families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families(name)
    torch.manual_seed(0)
    base = family.load_network(str(bases(name)), dtype=torch.float32)
    adapted = add_lora(base, LoraConfig(rank=4), family.lora_task)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    prompts = [family.encode(pair) for pair in some_pairs[:6]]

    def logits_and_rest(network: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return TeacherNetwork(family, network, use_tree=True, device=CPU).eval().answers_and_rest(prompts)

    before = logits_and_rest(adapted)
    with torch.no_grad(), adapted.disable_adapter():
        without = TeacherNetwork(family, adapted, use_tree=True, device=CPU).eval()(prompts)
    folded = fold_adapter(adapted)
    assert not any("lora" in parameter_name for parameter_name, _ in folded.named_parameters())
    for found, expected in zip(logits_and_rest(folded), before, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert float((without - before[0]).abs().max()) > 1e-2  # the adapter does something that could be lost
