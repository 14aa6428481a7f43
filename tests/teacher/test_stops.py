"""What ends a teacher's training early: a stop before the first step, and numbers that are not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import StopAfter

from kdecs.config import parse_config
from kdecs.errors import ConfigError, Stopped, TrainingError
from kdecs.runtime import Runtime
from kdecs.teacher import training
from kdecs.teacher.config import TeacherConfig, ZeroConfig
from kdecs.teacher.data import Unit
from kdecs.teacher.training import TeacherTraining, train_teacher, validation_steps


def checkpoints(config: TeacherConfig) -> list[str]:
    return sorted(path.name for path in (config.output / "checkpoints").glob("step-*"))


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("full", [False, True])
def test_a_stop_before_the_first_step_leaves_a_checkpoint_to_go_on_from(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None, full: bool
) -> None:
    changes: dict[str, Any] = {"optimization__epochs": 1} | ({"lora": None} if full else {})
    config = make_config(**changes)
    with pytest.raises(Stopped, match=r"stopped at step 0 of \d+, checkpoint written"):
        train_teacher(config, runtime, StopAfter(0))
    assert checkpoints(config) == ["step-0"]
    assert not (config.output / "checkpoints" / "step-0" / "product").exists()
    train_teacher(config, runtime, StopAfter())
    assert (config.output / "manifest.json").is_file()
    if not full:
        straight = make_config("straight", **changes)
        train_teacher(straight, runtime, StopAfter())
        expected, found = adapter(straight.output), adapter(config.output)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


class _Spoiled:
    """A loss of the real value whose gradient is NaN, from a step on."""

    def __init__(self, step: int) -> None:
        self.real_loss, self.real_step = training.connective_loss, TeacherTraining.step
        self.from_step, self.step = step, 0
        self.engine: Any = None

    def take_step(self, training: TeacherTraining, batch: list[Unit]) -> tuple[float, float]:
        self.engine, self.step = training.engine, training.state.step
        return self.real_step(training, batch)

    def loss(self, logits_PA: torch.Tensor, is_cause_P: torch.Tensor, gold: str) -> torch.Tensor:
        loss = self.real_loss(logits_PA, is_cause_P, gold)
        return loss + torch.sqrt(logits_PA.sum() * 0.0) if self.step >= self.from_step else loss


STAGES = [
    pytest.param(stage, dtype, marks=[] if (stage, dtype) == (0, "float32") else [pytest.mark.slow])
    for stage in (0, 1, 2, 3)
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_a_gradient_that_is_not_finite_stops_before_anything_is_saved(
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    dtype: str,
) -> None:
    config = make_config(zero__stage=stage, zero__dtype=dtype, checkpoint_every_steps=1, keep_last=5)
    spoiled = _Spoiled(2)
    monkeypatch.setattr(training, "connective_loss", spoiled.loss)
    monkeypatch.setattr(TeacherTraining, "step", lambda *a: spoiled.take_step(*a))
    with pytest.raises(TrainingError, match=r"gradient norm (nan|inf|-1\.0) at step 3"):
        train_teacher(config, runtime, StopAfter())
    assert checkpoints(config) == ["step-1", "step-2"]
    if stage == 0:
        trained = [p for p in spoiled.engine.module.parameters() if p.requires_grad]
        assert all(torch.isfinite(parameter).all() for parameter in trained)


def test_a_validation_loss_that_is_not_finite_stops_before_anything_is_saved(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint_every_steps=1, validate_per_epoch=1)
    real = training.connective_loss

    def nan_without_gradients(logits_PA: torch.Tensor, is_cause_P: torch.Tensor, gold: str) -> torch.Tensor:
        return real(logits_PA, is_cause_P, gold) * (1 if torch.is_grad_enabled() else torch.nan)

    monkeypatch.setattr(training, "connective_loss", nan_without_gradients)
    with pytest.raises(TrainingError, match="validation loss nan"):
        train_teacher(config, runtime, StopAfter())
    (kept,) = checkpoints(config)
    num_steps = int(kept.removeprefix("step-")) + 1  # the step before the validation
    monkeypatch.undo()
    with pytest.raises(Stopped, match=f"stopped at step {num_steps} of {2 * num_steps}"):
        train_teacher(config, runtime, StopAfter(1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(
    make_config: Callable[..., TeacherConfig],
    runtime: Runtime,
    group: None,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
) -> None:
    config = make_config(zero__stage=stage, checkpoint_every_steps=1, validate_per_epoch=1)
    real = TeacherTraining.step

    def spoil(training: TeacherTraining, batch: list[Unit]) -> tuple[float, float]:
        result = real(training, batch)
        if training.state.step == 2:
            weights = next(p for p in training.engine.module.parameters() if p.requires_grad)
            getattr(weights, "ds_tensor", weights).data.view(-1)[0] = torch.inf
        return result

    monkeypatch.setattr(TeacherTraining, "step", spoil)
    with pytest.raises(TrainingError, match="step 3: trained weights are not finite"):
        train_teacher(config, runtime, StopAfter())
    assert checkpoints(config) == ["step-2"]


def test_float16_without_loss_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs stage 1, 2 or 3, found stage 0.*set zero.stage=1"):
        parse_config(ZeroConfig, {"stage": 0, "dtype": "float16"}, source="test")
    assert parse_config(ZeroConfig, {"stage": 1, "dtype": "float16"}, source="test").dtype == "float16"


@pytest.mark.parametrize(("num_steps", "num_validations"), [(22, 5), (22, 1), (24, 6), (7, 9), (203, 12)])
def test_validations_are_spread_and_the_last_follows_the_last_step(
    num_steps: int, num_validations: int
) -> None:
    steps = sorted(validation_steps(num_steps, num_validations))
    assert len(steps) == min(num_steps, num_validations)
    assert steps[-1] == num_steps
    gaps = [right - left for left, right in zip([0, *steps[:-1]], steps, strict=True)]
    assert max(gaps) - min(gaps) <= 1
