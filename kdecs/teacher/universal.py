"""A checkpoint under another world size, another ZeRO stage or another offload: DeepSpeed's universal form.

Rank 0 turns the ranks' parts into one folder a parameter (weights and AdamW's moments, float32, whole) with
`deepspeed.checkpoint.ds_to_universal`; every rank reads it back through DeepSpeed's accessors for whole parameters,
which know each stage's partition. AdamW works element by element, so the copies are exact: what differs afterwards
is the order in which ranks' gradients are summed.

DeepSpeed's own `load_universal` goes between world sizes of one stage and knows no stage 0; this goes between all.
"""

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from kdecs.errors import ArtifactError
from kdecs.runtime import Runtime, any_rank
from kdecs.teacher.config import TeacherConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
UNIVERSAL = "universal"


def save_layout(config: TeacherConfig, runtime: Runtime) -> dict[str, int | bool]:
    """What a plain load has to share with the save."""
    return {
        "world_size": runtime.world_size,
        "stage": config.zero.stage,
        "offload_optimizer": config.zero.offload_optimizer,
        "offload_parameters": config.zero.offload_parameters,
    }


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper, where there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def loss_scale_holder(engine: Any) -> Any:
    """What keeps float16's loss scale as `cur_scale`, under its stage's name; None for plain float32."""
    kept = (getattr(engine.optimizer, name, None) for name in ("loss_scaler", "loss_scale_config"))
    return next((holder for holder in kept if hasattr(holder, "cur_scale")), None)


def load_universal(engine: Any, folder: Path, state: dict[str, Any], runtime: Runtime) -> None:
    """Put a checkpoint's weights and moments into an engine of another layout. Collective.

    The engine's optimizer must have its states already (one step was taken). Raises ArtifactError where the
    checkpoint does not hold the engine's parameters.
    """
    target = folder / UNIVERSAL
    if runtime.is_main:
        _convert(engine, folder, target, stage=state["layout"]["stage"])
    any_rank(False, runtime)
    for name, parameter in _trainable(engine.module):
        path = target / "zero" / name
        if not (path / "fp32.pt").is_file():
            raise ArtifactError(f"{folder}: holds no parameter {name}; remove {folder.parent} to begin anew")
        _set(engine, parameter, *(_read(path / f"{key}.pt") for key in ("fp32", *MOMENTS)))
    for values in base_optimizer(engine).state.values():
        values["step"] = torch.full_like(values["step"], state["optimizer_steps"])
    holder = loss_scale_holder(engine)
    if holder is not None and state["loss_scale"] is not None:
        holder.cur_scale = state["loss_scale"]
    any_rank(False, runtime)
    if runtime.is_main:
        shutil.rmtree(target)


def _convert(engine: Any, folder: Path, target: Path, *, stage: int) -> None:
    shutil.rmtree(target, ignore_errors=True)
    if stage == 0:
        _convert_replicated(engine, folder, target)
        return
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: a forked one would share the ranks' sockets
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    (folder / "latest_universal").unlink(missing_ok=True)


def _convert_replicated(engine: Any, folder: Path, target: Path) -> None:
    """Stage 0 keeps torch's own optimizer state, by position; ds_to_universal only knows the sharded stages."""
    saved = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    optimizer = saved["optimizer"]
    in_half = "fp32_groups" in optimizer  # a bf16 or fp16 wrapper around AdamW
    states = (optimizer["optimizer_state_dict"] if in_half else optimizer)["state"]
    masters = [tensor for group in optimizer["fp32_groups"] for tensor in group] if in_half else None
    for number, (name, _) in enumerate(_trainable(engine.module)):
        weights = masters[number] if masters is not None else saved["module"][name]
        values = {"fp32": weights, **{key: states[number][key] for key in MOMENTS}}
        path = target / "zero" / name
        path.mkdir(parents=True)
        for key, tensor in values.items():
            torch.save({"param": tensor}, path / f"{key}.pt")


def _set(engine: Any, parameter: nn.Parameter, weights: Tensor, *moments: Tensor) -> None:
    if engine.zero_optimization_stage() == 0:
        master = _master_of(engine, parameter)
        master.data.copy_(weights.view_as(master))
        parameter.data.copy_(weights.view_as(parameter))
        for key, value in zip(MOMENTS, moments, strict=True):
            base_optimizer(engine).state[master][key].copy_(value.view_as(master))
        return
    safe_set_full_fp32_param(parameter, weights)
    for key, value in zip(MOMENTS, moments, strict=True):
        safe_set_full_optimizer_state(parameter, value, key)
    is_partitioned = engine.zero_optimization_stage() == 3
    gathered = (
        deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        if is_partitioned
        else contextlib.nullcontext()
    )
    with gathered, torch.no_grad():
        parameter.data.copy_(weights.view_as(parameter))


def _master_of(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Stage 0: the float32 copy of a half-precision parameter, or the parameter itself."""
    optimizer = engine.optimizer
    for half, masters in zip(
        getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True
    ):
        for low, master in zip(half, masters, strict=True):
            if low is parameter:
                return master
    return parameter


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _read(path: Path) -> Tensor:
    """One tensor that this job's rank 0 has just written."""
    value = torch.load(path, map_location="cpu", weights_only=False)
    return (value["param"] if isinstance(value, dict) else value).float()
