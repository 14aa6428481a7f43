"""The teacher's loss against values worked by hand and a slow loop."""

import math

import pytest
import torch

from kdecs.corpus.answer_words import CAUSAL_CONNECTIVES
from kdecs.teacher.network import connective_loss, is_causal


def test_uniform_logits() -> None:
    logits = torch.zeros(2, 5)
    assert connective_loss(logits, torch.tensor([True, True])).item() == pytest.approx(-2 * math.log(4 / 5))
    assert connective_loss(logits, torch.tensor([False, True])).item() == pytest.approx(
        -math.log(1 / 5) - math.log(4 / 5)
    )


def test_against_a_slow_loop() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 5) * 3
    gold = torch.rand(50) < 0.4
    total = 0.0
    for row, causal in zip(logits.tolist(), gold.tolist(), strict=True):
        weights = [math.exp(x) for x in row]
        p = sum(weights[:4]) / sum(weights) if causal else weights[4] / sum(weights)
        total -= math.log(p)
    assert connective_loss(logits, gold).item() == pytest.approx(total, rel=1e-5)
    expected = [sum(math.exp(x) for x in row[:4]) > math.exp(row[4]) for row in logits.tolist()]
    assert is_causal(logits).tolist() == expected


@pytest.mark.parametrize("word", CAUSAL_CONNECTIVES)
def test_one_fixed_word_is_the_gold_of_every_causal_pair(word: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 5) * 3
    gold = torch.rand(50) < 0.4
    classes = torch.where(gold, CAUSAL_CONNECTIVES.index(word), 4)
    expected = torch.nn.functional.cross_entropy(logits, classes, reduction="sum")
    assert connective_loss(logits, gold, word).item() == pytest.approx(expected.item(), rel=1e-5)
    assert connective_loss(logits, gold, word).item() > connective_loss(logits, gold).item()


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.randn(8, 5).bfloat16()
    loss = connective_loss(logits, torch.ones(8, dtype=torch.bool))
    assert loss.dtype == torch.float32
