"""Checkpoints that somebody changed: nothing in them runs, and no byte of another state is resumed from."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from support import Bomb, StopAfter, flip_bit

from kdecs.artifact import sha256_of_file
from kdecs.config import config_hash
from kdecs.errors import ArtifactError, Stopped
from kdecs.runtime import Runtime
from kdecs.teacher import checkpoint
from kdecs.teacher.checkpoint import best_product, resume
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.training import train_teacher


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopped") / "output"


@pytest.fixture
def stopped(
    make_config: Callable[..., TeacherConfig], runtime: Runtime, group: None, kept: Path
) -> Callable[..., TeacherConfig]:
    """Copies of a training that was stopped after two steps, both validated, for configs with other changes."""
    numbers = iter(range(1000))

    def copy(**changes: Any) -> TeacherConfig:
        changes = {"optimization__epochs": 1, "validate_per_epoch": 100} | changes
        config = make_config(f"copy-{next(numbers)}", **changes)
        if not kept.exists():
            with pytest.raises(Stopped):
                train_teacher(config, runtime, StopAfter(2))
            config.output.rename(kept)
        shutil.copytree(kept, config.output)
        return config

    return copy


def newest(config: TeacherConfig) -> Path:
    return max((config.output / "checkpoints").glob("step-*"))


def seal(folder: Path, **progress: int) -> None:
    """Make `state.json` list the folder's files as they are, as a forger would."""
    record = json.loads((folder / "state.json").read_text())
    record["progress"] |= progress
    record["files"] = [
        {
            "path": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": sha256_of_file(path),
            "rows": None,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "state.json"
    ]
    (folder / "state.json").write_text(json.dumps(record))


def refused(config: TeacherConfig, runtime: Runtime, message: str) -> None:
    """A resume refuses in one line, before it touches the engine, so that none is needed here."""
    with pytest.raises(ArtifactError, match=message) as caught:
        resume(None, config, config_hash(config), runtime, prime=lambda: pytest.fail("primed"))
    assert "\n" not in str(caught.value)


def test_a_pickle_with_code_is_refused_and_does_not_run(
    stopped: Callable[..., TeacherConfig], runtime: Runtime, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    names = [path.name for path in newest(stopped()).glob("*.pt")]
    assert len(names) == 2
    for name in [*names, "zero_pp_rank_1_mp_rank_00_optim_states.pt"]:
        for stage in (2, 3):  # as it was saved, and through the universal form
            config = stopped(zero__stage=stage)
            path = newest(config) / name
            torch.save({"module": Bomb(mark)}, path)
            seal(newest(config))
            refused(config, runtime, f"{name}: holds objects that could run code.*remove .*step-2$")
            path.write_bytes(pickle.dumps(Bomb(mark)))
            seal(newest(config))
            refused(config, runtime, f"{name}: (holds objects|the training state does not load)")
    assert not mark.exists()


def test_what_deepspeed_loads_by_itself_runs_nothing(
    stopped: Callable[..., TeacherConfig],
    runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that is exchanged after the checks."""
    mark = tmp_path / "ran"
    for stage in (2, 1):
        config = stopped(zero__stage=stage)
        record = newest_record(config)
        monkeypatch.setattr(checkpoint, "_newest", lambda config, work, record=record: record)
        for path in newest(config).glob("*.pt"):
            torch.save({"module": Bomb(mark)}, path)
        with pytest.raises(ArtifactError, match="holds objects that could run code"):
            train_teacher(config, runtime, StopAfter(0))
        monkeypatch.undo()
    assert not mark.exists()


def test_a_changed_byte_in_any_file_is_refused(
    stopped: Callable[..., TeacherConfig], runtime: Runtime
) -> None:
    config = stopped()
    folder = newest(config)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "state.json"]
    assert any("product" in path.parts for path in paths)
    for path in paths:
        before = flip_bit(path)
        refused(config, runtime, f"{path.name}: sha256 .* expected .* is damaged; remove {folder} to resume")
        if "product" in path.parts:
            with pytest.raises(ArtifactError, match=f"{path.name}: sha256"):
                best_product(config, 2)
        path.write_bytes(before)
    # A resume's best product may stand in an older folder.
    later = folder.with_name("step-3")
    shutil.copytree(folder, later, ignore=shutil.ignore_patterns("product"))
    seal(later, step=3)
    flip_bit(folder / "product" / "adapter_config.json")
    refused(config, runtime, f"{folder}/product/adapter_config.json: sha256")
    flip_bit(folder / "product" / "adapter_config.json")
    assert best_product(config, 2) == (
        folder / "product",
        ["adapter_config.json", "adapter_model.safetensors"],
    )


def test_a_record_that_is_not_the_training_s_own_is_refused(
    stopped: Callable[..., TeacherConfig], runtime: Runtime
) -> None:
    config = stopped()
    folder = newest(config)
    record = json.loads((folder / "state.json").read_text())
    outside = {"path": "../../config.json", "bytes": 1, "sha256": "0" * 64, "rows": None}
    older = {entry["path"]: entry["bytes"] for entry in record["files"]}
    for values, message in (
        (record | {"files": older}, "state.json: files: .* another version of kdecs wrote it; remove"),
        (record | {"files": [outside]}, "lies outside the directory"),
        (record | {"files": []}, "state.json does not list this file, but DeepSpeed would read it"),
        (record | {"progress": record["progress"] | {"step": 7}}, "is of step 7; remove"),
        (record | {"progress": record["progress"] | {"best_step": -1}}, "progress.best_step: "),
        (record | {"progress": record["progress"] | {"best_step": 1}}, "step-1/state.json: missing"),
        (record | {"work": "0" * 64}, "belong to other work"),
        ([], "state.json: the file: "),
    ):
        (folder / "state.json").write_text(json.dumps(values))
        refused(config, runtime, message)


def test_a_product_of_other_files_is_not_installed(stopped: Callable[..., TeacherConfig]) -> None:
    config = stopped()
    product = newest(config) / "product"
    for name in ("config.json", "model/modeling_evil.py", "adapter_model.bin", "model/deep/config.json"):
        (product / name).parent.mkdir(parents=True, exist_ok=True)
        (product / name).write_text("{}")
        seal(newest(config))
        with pytest.raises(
            ArtifactError, match=f"{name}: state.json lists this file, but no training writes it"
        ):
            best_product(config, 2)
        (product / name).unlink()
    (product / "valid-predictions.jsonl").write_text("{}")
    seal(newest(config))
    with pytest.raises(ArtifactError, match=r"valid-predictions\.jsonl: state\.json lists this file"):
        best_product(config, 2)
    assert "valid-predictions.jsonl" in best_product(config, 2, ("valid-predictions.jsonl",))[1]


def newest_record(config: TeacherConfig) -> Any:
    return checkpoint._newest(config, config_hash(config))


def test_links_and_strangers_beside_the_checkpoints_are_removed_themselves(
    stopped: Callable[..., TeacherConfig], runtime: Runtime, tmp_path: Path
) -> None:
    config = stopped()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "state.json").write_text("{}")
    root = config.output / "checkpoints"
    (root / "universal").symlink_to(elsewhere)
    (root / "step-x").symlink_to(elsewhere)
    assert newest_record(config).progress.step == 2
    assert (elsewhere / "state.json").is_file()
    assert {path.name for path in root.iterdir()} == {"step-2"}


def test_float16_s_loss_scale_is_a_plain_value(tmp_path: Path) -> None:
    """A GPU saves it as an object of DeepSpeed's."""
    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 1, False)
    torch.save({"loss_scaler": scaler}, tmp_path / "state.pt")
    with checkpoint._read_safely(tmp_path / "state.pt"):
        loaded = torch.load(tmp_path / "state.pt", weights_only=False)["loss_scaler"]
    assert vars(loaded) == vars(scaler)
