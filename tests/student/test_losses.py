"""Eq. 10-13 against values worked by hand, torch and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from kdecs.student.losses import (
    LossParts,
    batch_mean,
    classifier_loss,
    connective_loss,
    distillation_loss,
    dynamic_distillation_loss,
    emotion_loss,
    span_loss,
    teacher_gap,
    total_loss,
    vocabulary_distillation_loss,
)


def test_emotion_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [5.0, 1.0]])
    found = emotion_loss(logits, torch.tensor([1, 0, -1]))
    assert found.tolist() == pytest.approx([math.log(4 / 3), math.log(4.0), 0.0])


def test_span_loss_is_the_sum_of_start_and_end_over_the_allowed_places():
    start = torch.tensor([[0.0, 0.0, -torch.inf]])
    end = torch.tensor([[0.0, 0.0, 0.0]])
    found = span_loss(start, end, torch.tensor([1]), torch.tensor([2]))
    assert found.item() == pytest.approx(math.log(2) + math.log(3))
    assert span_loss(start, end, torch.tensor([-1]), torch.tensor([-1])).item() == 0.0


def test_connective_loss_sums_the_causal_words():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.4], [0.1, 0.2, 0.1, 0.2, 0.4]]))
    found = connective_loss(logits, torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([-math.log(0.6), -math.log(0.4)], abs=1e-6)


def test_distillation_loss_by_hand():
    """Two words in effect: q_t = (3/4, 1/4), q_s = (1/2, 1/2) at temperature 2."""
    low = -1e9
    teacher = torch.tensor([[2 * math.log(3.0), 0.0, low, low, low]])
    student = torch.tensor([[0.0, 0.0, low, low, low]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(teacher, student, 2.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_distillation_loss_equals_scipys_relative_entropy(temperature: float):
    generator = np.random.default_rng(1)
    teacher, student = generator.normal(size=(2, 9, 5)) * 4
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    found = distillation_loss(torch.tensor(teacher), torch.tensor(student), temperature)
    np.testing.assert_allclose(found.numpy(), rel_entr(p, q).sum(axis=1), rtol=2e-5, atol=1e-7)


def test_distillation_loss_of_equals_is_zero_and_ignores_a_shift():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) * 30
    assert distillation_loss(logits, logits, 2.0).abs().max() < 1e-6
    assert distillation_loss(logits, logits + 7.0, 2.0).abs().max() < 1e-5


def test_gradient_of_the_distillation_loss_is_q_s_minus_q_t_over_temperature():
    teacher, student = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2))
    student.requires_grad_()
    distillation_loss(teacher, student, 2.0).sum().backward()
    expected = (torch.softmax(student / 2, 1) - torch.softmax(teacher / 2, 1)).detach() / 2
    torch.testing.assert_close(student.grad, expected)
    inputs = (teacher.double(), student.detach().double().requires_grad_())
    # The loss works in float32, hence the wide step.
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(inputs[0], s, 2.0).double(), inputs[1:], eps=1e-2, atol=1e-3, rtol=1e-2
    )


def test_total_loss_of_kd_by_hand_and_of_joint():
    emotion, span, soft, hard = (torch.tensor(value) for value in (1.0, 2.0, 0.5, 0.25))
    kd = total_loss(LossParts(emotion, span, distillation=soft), alpha=0.6, temperature=2.0)
    assert kd.item() == pytest.approx(0.6 * 3.0 + 0.4 * 4.0 * 0.5)
    joint = total_loss(LossParts(emotion, span, cause=hard), alpha=0.6, temperature=2.0)
    assert joint.item() == pytest.approx(0.6 * 3.0 + 0.25)


def test_batch_mean_of_shares_averages_to_the_batch_mean():
    values = torch.arange(5.0)
    shares = [
        batch_mean(torch.tensor([0.0, 2.0, 4.0]), torch.ones(3), count=5, world_size=2),
        batch_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]), count=5, world_size=2),
    ]
    assert (sum(shares) / 2).item() == pytest.approx(values.mean().item())


def test_losses_are_float32_whatever_the_logits():
    logits = torch.randn(3, 5, dtype=torch.bfloat16)
    assert connective_loss(logits, torch.tensor([0, 1, 0])).dtype == torch.float32
    assert distillation_loss(logits, logits, 2.0).dtype == torch.float32
    expected = -log_softmax(logits.float().numpy(), axis=1)[range(3), [0, 1, 2]]
    np.testing.assert_allclose(emotion_loss(logits, torch.tensor([0, 1, 2])).numpy(), expected, rtol=1e-5)


def test_classifier_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    found = classifier_loss(logits, torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([math.log(4 / 3), math.log(4.0)])


def test_total_loss_of_the_other_modes_by_hand():
    emotion, span, soft, hard = (torch.tensor(value) for value in (1.0, 2.0, 0.5, 0.25))
    both = LossParts(emotion, span, distillation=soft, cause=hard)
    mixed = total_loss(both, alpha=0.6, temperature=2.0, cause_weight=0.5)
    assert mixed.item() == pytest.approx(0.6 * 3.0 + 0.4 * 4.0 * 0.5 + 0.5 * 0.25)
    assert total_loss(LossParts(emotion, span), alpha=0.6, temperature=2.0).item() == pytest.approx(1.8)
    given = total_loss(LossParts(span=span, distillation=soft), alpha=0.6, temperature=2.0)
    assert given.item() == pytest.approx(0.6 * 2.0 + 0.4 * 4.0 * 0.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_over_the_vocabulary_is_that_of_the_top_tokens_and_one_class_of_others(
    temperature: float,
):
    """Against scipy; with all tokens among the top ones it is Eq. 12 over the vocabulary."""
    generator = np.random.default_rng(2)
    teacher, student = generator.normal(size=(2, 7, 30)) * 3
    for num_top in (4, 30):
        top_ids = np.argsort(-teacher, axis=1)[:, :num_top]

        def classes(log_p: np.ndarray, ids: np.ndarray = top_ids) -> np.ndarray:
            top = np.take_along_axis(log_p, ids, axis=1)
            others = np.log(np.maximum(1 - np.exp(top).sum(axis=1, keepdims=True), 1e-30))
            return np.concatenate((top, others), axis=1)

        log_t, log_s = classes(log_softmax(teacher, axis=1)), classes(log_softmax(student, axis=1))
        found = vocabulary_distillation_loss(
            torch.tensor(log_t), torch.tensor(top_ids), torch.tensor(student), temperature
        )
        p, q = softmax(log_t / temperature, axis=1), softmax(log_s / temperature, axis=1)
        if num_top == 30:
            p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
        np.testing.assert_allclose(found.numpy(), rel_entr(p, q).sum(axis=1), rtol=1e-4, atol=1e-6)
    # Of a student that agrees, nothing is left to learn.
    same = vocabulary_distillation_loss(
        torch.tensor(classes(log_softmax(student, axis=1), top_ids[:, :5])),
        torch.tensor(top_ids[:, :5]),
        torch.tensor(student),
        temperature,
    )
    assert float(same.abs().max()) < 1e-5


def test_the_gap_by_hand_is_zero_for_equals_and_one_for_opposites():
    """q_t = (3/4, 1/4), q_s = (1/2, 1/2): half of 1/4 + 1/4."""
    low = -1e9
    teacher = torch.tensor([[math.log(3.0), 0.0, low, low, low]])
    student = torch.tensor([[0.0, 0.0, low, low, low]], requires_grad=True)
    gap = teacher_gap(teacher, student)
    assert gap.item() == pytest.approx(0.25)
    assert not gap.requires_grad
    assert teacher_gap(teacher, teacher).item() == 0
    opposite = torch.tensor([[low, low, low, low, 0.0]])
    assert teacher_gap(teacher, opposite).item() == pytest.approx(1.0)


def test_dynamic_distillation_is_the_plain_loss_at_its_own_temperature_or_weight():
    teacher, student = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(4)) * 3
    gap = teacher_gap(teacher, student)
    softened = dynamic_distillation_loss(teacher, student, 2.0, "temperature")
    weighed = dynamic_distillation_loss(teacher, student, 2.0, "weight")
    for row in range(6):
        pair = teacher[row : row + 1], student[row : row + 1]
        tau = 2.0 * (1 + gap[row].item())
        own = distillation_loss(*pair, tau).item()
        # The sum multiplies by 2², so tau² stands in all.
        assert 4 * softened[row].item() == pytest.approx(tau**2 * own, rel=1e-4)
        assert weighed[row].item() == pytest.approx(
            (1 - gap[row].item()) * distillation_loss(*pair, 2.0).item(), rel=1e-4
        )
    plain = dynamic_distillation_loss(teacher, student, 2.0, "none")
    assert torch.equal(plain, distillation_loss(teacher, student, 2.0))


@pytest.mark.parametrize("dynamic", ["none", "temperature", "weight"])
def test_every_distillation_of_equals_is_zero_with_zero_gradient(dynamic):
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(5)) * 3
    student = logits.clone().requires_grad_()
    loss = dynamic_distillation_loss(logits, student, 2.0, dynamic)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: emotion_loss(x, torch.tensor([0, 4, -1])),
        lambda x: connective_loss(x, torch.tensor([1, 0, 1])),
        lambda x: classifier_loss(x[:, :2], torch.tensor([1, 0, 1])),
        lambda x: span_loss(x, x.flip(1), torch.tensor([0, 2, 1]), torch.tensor([0, 3, -1])),
    ],
    ids=["emotion", "connective", "classifier", "span"],
)
def test_gradients_of_the_hard_losses(loss):
    inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    # The losses work in float32, hence the wide step.
    assert torch.autograd.gradcheck(
        lambda x: loss(x).double(), (inputs.requires_grad_(),), eps=1e-2, atol=1e-3, rtol=1e-2
    )
