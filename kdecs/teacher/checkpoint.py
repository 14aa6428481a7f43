"""Training states of a teacher, each with the product if that step was the best so far.

    checkpoints/step-N/
        *_model_states.pt, *_optim_states.pt   DeepSpeed's format without frozen weights; each rank writes its part
        product/                               the adapter or model, if step N is the best on validation so far, and
                                               what its objective writes beside the weights
        state.json                             step, best so far, world size, ZeRO stage, config hash, files with sha256

`state.json` is written last, by rename, and a folder without one does not count: so training state and best product are
one unit at every moment. The newest `keep_last` folders are kept, and the best of each. A start with another number of
ranks, stage or offload goes through DeepSpeed's universal checkpoint (`load_universal`).

DeepSpeed's files are pickles, and a checkpoint may come from anywhere. So a resume compares every file with its sha256
first, and nothing in them becomes an object that could run code (`_read_safely`).
There are no random states: batches depend on (seed, epoch), dropout on (seed, step, rank).
"""

import argparse
import contextlib
import io
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from deepspeed.utils.tensor_fragment import fragment_address
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor, nn

from kdecs.artifact import FileEntry, file_entries, file_faults, read_record, write_json
from kdecs.errors import ArtifactError, KdecsError, TrainingError, explain_library_error, first_line
from kdecs.runtime import Runtime, any_rank, on_main, plain_torch_loads
from kdecs.teacher.config import TuningConfig
from kdecs.teacher.network import trainable_parameters
from kdecs.teacher.product import ADAPTER_CONFIG, ADAPTER_FILE, MODEL_FOLDER, save_product

CHECKPOINTS = "checkpoints"
PRODUCT = "product"
STATE = "state.json"
UNIVERSAL = "universal"
_PRODUCT_FILES = re.compile(
    rf"{PRODUCT}/({re.escape(ADAPTER_FILE)}|{ADAPTER_CONFIG}|{MODEL_FOLDER}/[\w.-]+\.(safetensors|json))"
)
_STEP_FOLDER = re.compile(r"step-(\d+)")
_DEEPSPEED_VALUES = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
"""What DeepSpeed saves besides tensors and plain values: enumerations and records, whose making runs no code."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a parameter."""


@dataclass
class TeacherState:
    """All that a resume needs besides DeepSpeed's own state: finished steps, what they saw, the best validation."""

    step: NonNegativeInt = 0
    pairs_seen: NonNegativeInt = 0
    tokens_seen: NonNegativeInt = 0
    best_step: NonNegativeInt = 0
    best: dict[str, float] = field(default_factory=dict)

    def keep_if_best(self, scores: dict[str, float], criterion: str) -> None:
        """Record a validation after `step` if its criterion is the highest so far; a lower loss breaks ties.

        A model that decides nothing while it trains has no such score, so that its loss alone counts.
        """

        def rank(each: dict[str, float]) -> tuple[float, float]:
            return each.get(criterion, 0.0), -each["valid_loss"]

        if not self.best or rank(scores) > rank(self.best):
            self.best_step, self.best = self.step, scores


class _Record(BaseModel):
    """`state.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    work: str
    layout: dict[str, int | bool]
    optimizer_steps: float
    loss_scale: float | None
    progress: TeacherState
    files: tuple[FileEntry, ...]

    @property
    def product(self) -> list[FileEntry]:
        """The files of the product, if the step was the best so far."""
        return [entry for entry in self.files if entry.path.startswith(f"{PRODUCT}/")]


def best_product(config: TuningConfig, step: int, beside: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """Where the product of a step is kept that was the best on validation, and its files' relative paths.

    `beside` names the files that may stand there besides the weights. Raises ArtifactError if a file is not the one
    that the training wrote.
    """
    folder = _folder(config, step)
    product = _read_record(folder).product
    _check_files(folder, product)
    # Every file of a product is copied, and would take the place of another one in the teacher directory.
    for entry in product:
        is_beside = entry.path.removeprefix(f"{PRODUCT}/") in beside
        if not is_beside and not _PRODUCT_FILES.fullmatch(entry.path):
            raise ArtifactError(
                f"{folder / entry.path}: {STATE} lists this file, but no training writes it; remove {folder}"
            )
    return folder / PRODUCT, [entry.path.removeprefix(f"{PRODUCT}/") for entry in product]


def save_checkpoint(
    engine: Any,
    config: TuningConfig,
    state: TeacherState,
    work: str,
    runtime: Runtime,
    save_beside: Callable[[Path], object] | None = None,
) -> None:
    """Write the state after `state.step`, with the product if that step is the best. Collective.

    `save_beside` writes into the product's folder what belongs to it besides the weights; rank 0 calls it. If trained
    weights are not finite, raises TrainingError on every rank and leaves older checkpoints untouched.
    """
    folder = _folder(config, state.step)
    if any_rank(runtime.is_main and _is_finished(folder), runtime):
        return  # stopped again before the first step of a resume
    if any_rank(not _are_finite(engine.module, runtime.rank), runtime):
        raise TrainingError(
            f"step {state.step}: trained weights are not finite: training stopped before it wrote the checkpoint; "
            "lower optimization.learning_rate"
        )
    if runtime.is_main and folder.exists():
        shutil.rmtree(folder)  # unfinished: the parts of another world size must not mix with these
    any_rank(False, runtime)  # a barrier: no rank may write its part before the old folder is gone
    if state.best and state.best_step == state.step:  # before the first validation there is no best
        save_product(
            engine.module.network, folder / PRODUCT, runtime, zero_stage=engine.zero_optimization_stage()
        )
        if save_beside is not None and runtime.is_main:
            save_beside(folder / PRODUCT)
    # save_latest would name this folder the newest before the other ranks' files are complete. state.json names it,
    # after the barrier below.
    engine.save_checkpoint(
        str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
    )
    any_rank(False, runtime)  # a barrier: state.json may only name files that are complete
    if runtime.is_main:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        # On disk before state.json: after a power failure a finished state must not name files that were never written.
        files = file_entries(folder, names)
        # What AdamW corrects its bias by. It is below `state.step` if a float16 training has skipped steps.
        steps = next((float(values["step"]) for values in base_optimizer(engine).state.values()), 0.0)
        holder = loss_scale_holder(engine)
        record = _Record(
            work=work,
            layout=save_layout(config, runtime),
            optimizer_steps=steps,
            loss_scale=float(holder.cur_scale) if holder is not None else None,
            progress=state,
            files=tuple(files),
        )
        write_json(folder / STATE, record.model_dump(mode="json"))
        _prune(folder.parent, config.keep_last)
    any_rank(False, runtime)  # no rank may end the job while rank 0 removes old checkpoints


def resume(
    engine: Any, config: TuningConfig, work: str, runtime: Runtime, *, prime: Callable[[], None]
) -> TeacherState:
    """Load the newest finished checkpoint into the engine, or return a new state if there is none. Collective.

    `prime` makes the engine take a step that moves nothing, so that its optimizer has its states. Raises ArtifactError
    for a checkpoint of other work, or if a file is missing, damaged, or could run code.
    """
    record = on_main(lambda: _newest(config, work), runtime)
    if record is None:
        return TeacherState()
    folder = _folder(config, record.progress.step)
    is_same_layout = record.layout == save_layout(config, runtime)
    if not is_same_layout:
        prime()
    with _read_safely(folder):
        if is_same_layout:
            # Not strict, since the frozen weights are not in the checkpoint.
            found, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
            if found is None:  # DeepSpeed only warns
                raise ValueError("a file of DeepSpeed's is missing")
        else:
            load_universal(engine, folder, record, runtime)
    return record.progress


def _newest(config: TuningConfig, work: str) -> _Record | None:
    """The record of the newest finished checkpoint, after every file that a resume or the end will read is checked."""
    root = config.output / CHECKPOINTS
    if root.is_dir():
        _prune(root, config.keep_last)  # a killed save may have left an unfinished folder
    finished = _finished(root)
    if not finished:
        return None
    folder = finished[-1]
    record = _read_record(folder)
    if record.work != work:
        raise ArtifactError(
            f"{root}: these checkpoints belong to other work (the config or its inputs changed); "
            "choose another output, or remove them"
        )
    _check_files(folder, record.files)
    # DeepSpeed finds its files by their names, so one that nobody listed would be read, too.
    states = sorted(folder.glob("*.pt"))
    listed = {entry.path for entry in record.files}
    if strangers := [path for path in states if path.name not in listed]:
        raise ArtifactError(
            f"{strangers[0]}: {STATE} does not list this file, but DeepSpeed would read it; remove the file"
        )
    for path in states:
        with _read_safely(path):
            torch.load(
                path, map_location="cpu", weights_only=True, mmap=True
            )  # mapped: this reads no tensors
    if record.progress.best and record.progress.best_step != record.progress.step:
        best = _folder(config, record.progress.best_step)
        _check_files(best, _read_record(best).product)
    return record


def _read_record(folder: Path) -> _Record:
    """A folder's `state.json`. Raises ArtifactError, one line, if it is not what a training of this version writes."""
    path = folder / STATE
    remedy = (
        f"it is damaged, or another version of kdecs wrote it; remove {folder} to resume from an older checkpoint if "
        "one was kept, or from the start"
    )
    try:
        record = read_record(_Record, path, remedy)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; remove {folder.parent} to start over") from None
    if folder.name != f"step-{record.progress.step}":
        raise ArtifactError(
            f"{path}: is of step {record.progress.step}; remove {folder}, which holds another checkpoint's record"
        )
    return record


def _check_files(folder: Path, entries: Sequence[FileEntry]) -> None:
    for fault in file_faults(folder, entries, says="expected"):
        raise ArtifactError(
            f"{fault}: the checkpoint is damaged; remove {folder} to resume from an older one if it was kept, or from "
            "the start"
        )


@contextlib.contextmanager
def _read_safely(path: Path) -> Iterator[None]:
    """Let torch make only tensors, plain values and DeepSpeed's own records of what is read inside the block.

    Raises ArtifactError for what it refuses, and for values that are not those of a checkpoint.
    """
    folder = path if path.is_dir() else path.parent
    try:
        with plain_torch_loads(), torch.serialization.safe_globals(_DEEPSPEED_VALUES):
            yield
    except (KdecsError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError:
        raise ArtifactError(
            f"{path}: holds objects that could run code, whereas a training state holds tensors and plain values "
            f"alone; kdecs did not write it: remove {folder}"
        ) from None
    # Whatever DeepSpeed raises over values of another shape or type than it saved.
    except (
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        EOFError,
    ) as error:
        if explain_library_error(error):
            raise
        # Another rank may be the cause, so the files may be sound.
        raise ArtifactError(
            f"{path}: the training state does not load ({type(error).__name__}: {first_line(error)}); if its files "
            f"are those that the training wrote, run the same command again, otherwise remove {folder}"
        ) from None


def _are_finite(module: nn.Module, rank: int) -> bool:
    """Whether the trained weights that this rank holds are finite."""
    for parameter in trainable_parameters(module):
        held = parameter
        if hasattr(parameter, "ds_tensor"):
            # ZeRO-3's part of the parameter. The last rank's is padded with whatever the memory held.
            part = parameter.ds_tensor
            held = part.flatten()[: max(0, min(part.numel(), parameter.ds_numel - rank * part.numel()))]
        if not torch.isfinite(held).all():
            return False
    return True


def _folder(config: TuningConfig, step: int) -> Path:
    return config.output / CHECKPOINTS / f"step-{step}"


def _is_finished(folder: Path) -> bool:
    return (folder / STATE).is_file()


def _finished(root: Path) -> list[Path]:
    """Finished folders, by step."""
    steps = {
        int(match[1]): folder
        for folder in root.glob("step-*")
        if (match := _STEP_FOLDER.fullmatch(folder.name)) and _is_finished(folder)
    }
    return [steps[step] for step in sorted(steps)]


def _prune(root: Path, keep_last: int) -> None:
    kept = _finished(root)[-keep_last:]
    # A resume may start from any kept state, and each needs its own best product.
    names = {folder.name for folder in kept} | {
        f"step-{_read_record(folder).progress.best_step}" for folder in kept
    }
    for path in root.iterdir():
        if path.name not in names:
            # A link is removed, not what it leads to.
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# Loading under another number of ranks, stage or offload. DeepSpeed's own universal load keeps the stage and knows no
# stage 0. AdamW works element by element, so whole copies of weights and moments are exact in any layout: afterwards
# only the order differs in which the gradients of the ranks are summed.


def save_layout(config: TuningConfig, runtime: Runtime) -> dict[str, int | bool]:
    """The settings under which DeepSpeed can load a checkpoint directly: they must equal those of the save."""
    return {
        "world_size": runtime.world_size,
        "stage": config.zero.stage,
        "offload_optimizer": config.zero.offload_optimizer,
        "offload_parameters": config.zero.offload_parameters,
    }


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper, or the optimizer itself if there is no wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def loss_scale_holder(engine: Any) -> Any:
    """The object whose `cur_scale` is float16's loss scale (stages name it differently); None in plain float32."""
    kept = (getattr(engine.optimizer, name, None) for name in ("loss_scaler", "loss_scale_config"))
    return next((holder for holder in kept if hasattr(holder, "cur_scale")), None)


def load_universal(engine: Any, folder: Path, record: _Record, runtime: Runtime) -> None:
    """Load a checkpoint's weights and moments into an engine of another layout. Collective.

    The engine's optimizer must have its states already (after one step). Raises ArtifactError if the checkpoint lacks
    one of the engine's parameters.
    """
    # Beside the checkpoints, which hold what their records list and no more. The next start removes what a kill leaves.
    target = folder.parent / UNIVERSAL
    if runtime.is_main:
        _convert(engine, folder, target, stage=record.layout["stage"])
    any_rank(False, runtime)
    for name, parameter in _trainable(engine.module):
        path = target / "zero" / name
        if not (path / "fp32.pt").is_file():
            raise ArtifactError(
                f"{folder}: has no parameter {name}, which this training needs; remove {folder.parent} to start over"
            )
        _set(engine, parameter, *(_read(path / f"{key}.pt") for key in ("fp32", *MOMENTS)))
    for values in base_optimizer(engine).state.values():
        values["step"] = torch.full_like(values["step"], record.optimizer_steps)
    holder = loss_scale_holder(engine)
    if holder is not None and record.loss_scale is not None:
        holder.cur_scale = record.loss_scale
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
        num_extract_workers=1,  # in this process, since a forked one would share the ranks' sockets
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # Checkpoints of stage 2 lack an entry that the converter insists on.
        inject_missing_state=True,
    )
    # It prints a line and a bar per file.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    (target.parent / "latest_universal").unlink(missing_ok=True)


def _convert_replicated(engine: Any, folder: Path, target: Path) -> None:
    """Convert a checkpoint of stage 0, which keeps torch's own optimizer state by position.

    ds_to_universal only knows the sharded stages.
    """
    saved = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
    optimizer = saved["optimizer"]
    in_half = "fp32_groups" in optimizer  # a bf16 or fp16 wrapper around AdamW
    states = (optimizer["optimizer_state_dict"] if in_half else optimizer)["state"]
    # In half precision training goes on from the wrapper's float32 copies, not from the rounded weights of the module.
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
        # Both are set: the optimizer steps the master, and the forward reads the parameter.
        master = _master_of(engine, parameter)
        master.data.copy_(weights.view_as(master))
        parameter.data.copy_(weights.view_as(parameter))
        for key, value in zip(MOMENTS, moments, strict=True):
            base_optimizer(engine).state[master][key].copy_(value.view_as(master))
        return
    safe_set_full_fp32_param(parameter, weights)
    for key, value in zip(MOMENTS, moments, strict=True):
        safe_set_full_optimizer_state(parameter, value, key)
    # The calls above set the fp32 master. The copy that computes would follow only in the next step.
    is_partitioned = engine.zero_optimization_stage() == 3
    gathered = (
        deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        if is_partitioned
        else contextlib.nullcontext()
    )
    with gathered, torch.no_grad():
        parameter.data.copy_(weights.view_as(parameter))


def _master_of(engine: Any, parameter: nn.Parameter) -> Tensor:
    """At stage 0: the float32 copy of a half-precision parameter, or the parameter itself."""
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
    """A tensor of the universal form."""
    value = torch.load(path, map_location="cpu", weights_only=True)
    return (value["param"] if isinstance(value, dict) else value).float()
