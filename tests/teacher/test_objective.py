"""The teacher's loss against values worked by hand and a slow loop."""

import math

import pytest
import torch

from kdecs.corpus.answer_words import CAUSAL_CONNECTIVES
from kdecs.teacher.network import connective_loss, is_causal, target_loss


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


def test_a_target_of_three_equal_candidates() -> None:
    """By hand: each has a third, so one or two causes cost log 3, and without a cause nothing is lost."""
    logits = torch.zeros(3, 5)
    numbers = torch.zeros(3, dtype=torch.int64)
    for causes, expected in (([True, False, False], math.log(3)), ([True, True, False], math.log(3))):
        assert target_loss(logits, torch.tensor(causes), numbers).item() == pytest.approx(expected)
    assert target_loss(logits, torch.tensor([False] * 3), numbers).item() == 0
    # Odds of 4, 4 and 8 to 1: the only cause has half of them.
    logits[2, :4] = math.log(2)
    assert target_loss(logits, torch.tensor([False, False, True]), numbers).item() == pytest.approx(
        math.log(2)
    )
    # The only candidate of its target is no choice.
    assert target_loss(logits, torch.ones(3, dtype=torch.bool), torch.arange(3)).item() == pytest.approx(0)


def test_targets_against_a_slow_loop() -> None:
    """Loss and gradient, worked out target by target, however the prompts are ordered and numbered."""
    torch.manual_seed(1)
    logits = (torch.randn(60, 5) * 3).requires_grad_()
    gold = torch.rand(60) < 0.3
    numbers = torch.randint(0, 15, (60,)) * 7
    loss = target_loss(logits, gold, numbers)
    loss.backward()
    total, gradient = 0.0, torch.zeros(60, 5, dtype=torch.float64)
    num_without = 0
    for number in set(numbers.tolist()):
        rows = [n for n in range(60) if numbers[n] == number]
        causes = [n for n in rows if gold[n]]
        num_without += not causes
        if not causes:
            continue
        weights = {n: [math.exp(x) for x in logits[n].tolist()] for n in rows}
        odds = {n: sum(weights[n][:4]) / weights[n][4] for n in rows}
        for n in causes:
            total -= math.log(odds[n] / sum(odds.values())) / len(causes)
        for n in rows:
            of_score = odds[n] / sum(odds.values()) - (n in causes) / len(causes)
            for word in range(4):
                gradient[n, word] = of_score * weights[n][word] / sum(weights[n][:4])
            gradient[n, 4] = -of_score
    assert num_without > 0
    assert loss.item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), gradient, atol=1e-5, rtol=1e-4)


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.randn(8, 5).bfloat16()
    causes = torch.ones(8, dtype=torch.bool)
    assert connective_loss(logits, causes).dtype == torch.float32
    of_targets = target_loss(logits, causes, torch.arange(8) // 2)
    assert of_targets.dtype == torch.float32
    assert of_targets.item() == target_loss(logits.float(), causes, torch.arange(8) // 2).item()
