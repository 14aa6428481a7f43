"""Priors: what a student says before it has learnt anything is what was counted."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from kdecs.errors import ArtifactError
from kdecs.models import load_tokenizer
from kdecs.runtime import Runtime
from kdecs.student.config import Outputs
from kdecs.student.decision import cause_scores
from kdecs.student.model import (
    StudentModel,
    StudentOutput,
    load_language_model,
    load_student,
    student_answer_ids,
)
from kdecs.student.priors import NUM_DISTANCES, Priors, TrainingCounts, begin_at_counts, count_training
from kdecs.student.training import StudentTask, train_student

COUNTS = TrainingCounts(
    emotions_E=np.array([8, 1, 1]),
    causes_D=np.array([40, 20, 5, 0, 0, 0, 0, 0]),
    pairs_D=np.array([80, 60, 50, 10, 0, 0, 0, 0]),
    whole_start=0.8,
    whole_end=0.5,
    num_tokens=7.0,
)


def smoothed_odds(distance: int) -> float:
    causes, pairs = COUNTS.causes_D[distance], COUNTS.pairs_D[distance]
    return (causes + 1) / (pairs - causes + 1)


def test_probability_of_a_span_does_not_depend_on_the_number_of_tokens():
    priors = Priors(3, 5)
    begin_at_counts(priors, COUNTS, None, None, is_classifier=False)
    mask = torch.arange(12) < torch.tensor([[1], [5], [12]])
    for distance in (0, 1, 3):
        start, end = priors.span_shift(torch.full((3,), distance), mask)
        absent = functional.pad(~mask, (1, 0))
        for logits in (start, end):
            none = torch.softmax(logits.masked_fill(absent, -torch.inf), dim=1)[:, 0]
            odds = smoothed_odds(distance)
            assert (1 - none).tolist() == pytest.approx([odds / (1 + odds)] * 3, rel=1e-4)


def test_edges_get_their_shares_at_the_mean_length():
    priors = Priors(3, 5)
    begin_at_counts(priors, COUNTS, None, None, is_classifier=False)
    start, end = priors.span_shift(torch.zeros(1, dtype=torch.long), torch.ones(1, 7, dtype=torch.bool))
    assert torch.softmax(start[0, 1:], dim=0)[0].item() == pytest.approx(0.8, rel=1e-4)
    assert torch.softmax(end[0, 1:], dim=0)[-1].item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("is_classifier", [False, True])
def test_words_begin_at_the_counts_whatever_the_untrained_logits(is_classifier):
    priors = Priors(3, 5)
    emotion, connective = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[3.0, 1.0, -2.0, 0.0, 4.0]])
    begin_at_counts(
        priors, COUNTS, emotion, None if is_classifier else connective, is_classifier=is_classifier
    )
    shares = torch.softmax(emotion[0] + priors.emotion, dim=0)
    assert shares.tolist() == pytest.approx([9 / 13, 2 / 13, 2 / 13], rel=1e-5)
    for distance in range(NUM_DISTANCES):
        shift = priors.cause_shift(torch.tensor([distance]))
        if is_classifier:
            causal = torch.softmax(torch.tensor([0.0, shift.item()]), dim=0)[1]
        else:
            logits = connective[0] + priors.connective + functional.pad(shift.expand(4), (0, 1))
            causal = torch.softmax(logits, dim=0)[:4].sum()
        odds = smoothed_odds(distance)
        assert causal.item() == pytest.approx(odds / (1 + odds), rel=1e-4)


def test_counts_of_rows():
    found = count_training(
        emotion_N=np.array([0, 1, 1, 2]),
        is_own_N=np.array([True, True, False, True]),
        distance_N=np.array([0, 0, 1, 20]),
        is_cause_N=np.array([0, 1, 1, 1]),
        start_N=np.array([0, 1, 2, -1]),
        end_N=np.array([0, 5, 3, -1]),
        num_tokens_N=np.array([9, 5, 4, 6]),
        num_emotions=3,
    )
    assert found.emotions_E.tolist() == [1, 1, 1]
    assert found.causes_D.tolist() == [1, 1, 0, 0, 0, 0, 0, 1]
    assert found.pairs_D.tolist() == [2, 1, 0, 0, 0, 0, 0, 1]
    assert (found.whole_start, found.whole_end) == (0.5, 0.5)
    assert found.num_tokens == 4.5


def test_an_untrained_student_ranks_pairs_by_distance_as_training_does(make_config, base):
    config = make_config(
        model={"base": str(base), "span_head": "position", "priors": "training"},
        distillation={"mode": "joint"},
    )
    runtime = Runtime(0, 0, 1, torch.device("cpu"))
    prepared = StudentTask(config, runtime)
    prepared.begin_at_training_counts()
    rows = prepared.data.rows
    batch, targets = prepared.data.batch(rows, np.ones(len(rows), dtype=np.float32))
    with torch.no_grad():
        output: StudentOutput = prepared.model.eval()(batch)
    scores, counts = cause_scores(output.arrays()), prepared.data.counts()
    for distance in range(3):
        expected = (counts.causes_D[distance] + 1) / (counts.pairs_D[distance] + 2)
        chosen = (batch.distance_B == distance).numpy()
        assert scores[chosen].mean().item() == pytest.approx(expected, abs=0.03)
        assert counts.causes_D[distance] == (targets.is_cause_B.numpy()[chosen]).sum()


OUTPUTS = [
    Outputs(cause_by, emotions, spans, priors=True)
    for cause_by in ("connective", "cls", "none")
    for emotions in (True, False)
    for spans in (True, False)
    if spans or cause_by != "none"
]


@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
def test_a_mode_has_no_prior_that_it_does_not_use(make_config, base, outputs):
    """Ranks that train together wait for the gradient of every parameter."""
    config = make_config(model={"base": str(base), "span_head": "pointer"}, distillation={"mode": "joint"})
    data = StudentTask(config, Runtime(0, 0, 1, torch.device("cpu"))).data
    answers = student_answer_ids(load_tokenizer(str(base)), data.emotions)
    model = StudentModel(
        load_language_model(base), answers, span_head="pointer", max_prompt_tokens=256, outputs=outputs
    )
    batch, _ = data.batch(data.rows[:6], np.ones(6, dtype=np.float32))
    found = [logits for logits in model(batch) if logits is not None]
    sum(logits[torch.isfinite(logits)].square().sum() for logits in found).backward()
    heads = {f"{name}.{key}": p for name, head in model.heads.items() for key, p in head.named_parameters()}
    assert [name for name, parameter in heads.items() if parameter.grad is None] == []
    assert any(name.startswith("priors.") for name in heads)


def test_a_student_with_priors_that_its_mode_does_not_use_is_still_read(make_config, runtime, base):
    config = make_config(
        model={"base": str(base), "span_head": "pointer", "priors": "training"},
        distillation={"mode": "span_only"},
        optimization={"epochs": 1},
    )
    directory = train_student(config, runtime)
    path = directory / "heads.safetensors"
    tensors = load_file(path)
    assert "priors.connective" not in tensors and "priors.span" in tensors
    save_file({**tensors, "priors.connective": torch.ones(5)}, path)
    assert torch.equal(load_student(directory)[0].priors.span, tensors["priors.span"])
    save_file({**tensors, "priors.other": torch.ones(5)}, path)
    with pytest.raises(ArtifactError, match=r"unexpected tensor priors\.other"):
        load_student(directory)
