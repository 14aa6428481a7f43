"""Configs: one clear line for what is wrong, the same hash for the same work, every committed YAML parses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from kdecs.cli import app
from kdecs.config import (
    COMMITTED,
    Config,
    config_hash,
    find_config,
    load_config,
    parse_config,
    set_dotted,
    write_config,
)
from kdecs.demo.config import BaseModelConfig
from kdecs.errors import ConfigError
from kdecs.mrc.config import MrcConfig
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.derive.config import CrossFitConfig
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig
from kdecs.teacher.config import TeacherConfig


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    for name in ("train.json", "valid.json"):
        (tmp_path / name).write_text(name)
    return {
        "name": "teacher",
        "output": str(tmp_path / "out"),
        "corpus": {"train": str(tmp_path / "train.json"), "valid": str(tmp_path / "valid.json")},
        "model": {"family": "causal", "base": "huggyllama/llama-7b"},
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimization.learning_rat", 1, "optimization.learning_rat: unknown key; known here: epochs"),
        ("model.bas", "x", "model.causal.bas: unknown key; known here: base, family"),
        ("zero.stage", 7, "zero.stage: found 7"),
        ("corpus.train_share", 2.0, "corpus.train_share: found 2.0"),
        ("lora.dropout", 0.1, "lora.dropout: found 0.1"),
        ("model.family", "gpt", "gpt"),
        ("optimization.learning_rate", float("nan"), "learning_rate"),
        ("zero.offload_parameters", True, "offload_parameters needs stage 3, found stage 2"),
    ],
)
def test_wrong_value_is_one_line_with_field_and_what_is_allowed(
    values: dict[str, Any], key: str, value: object, message: str
) -> None:
    set_dotted(values, key, value)
    with pytest.raises(ConfigError) as caught:
        parse_config(TeacherConfig, values, source="teacher.yaml")
    text = str(caught.value)
    assert text.startswith("teacher.yaml: ")
    assert message in text
    assert "\n" not in text


def test_missing_key_is_named(values: dict[str, Any]) -> None:
    del values["model"]
    with pytest.raises(ConfigError, match=r"model: Field required"):
        parse_config(TeacherConfig, values, source="x")


def test_set_overrides_the_file_and_paths_become_absolute(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values["corpus"]["train"] = "train.json"
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(TeacherConfig, path, ["optimization.epochs=7", "output=elsewhere"])
    assert config.optimization.epochs == 7
    assert config.output == tmp_path / "elsewhere"
    assert config.corpus.train == tmp_path / "train.json"


@pytest.mark.parametrize("override", ["optimization.epochs", "=3", "output=[", "name.x=1"])
def test_malformed_set_is_refused(values: dict[str, Any], tmp_path: Path, override: str) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError):
        load_config(TeacherConfig, path, [override])


def test_written_config_reads_back_equal(values: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(TeacherConfig, values, source="x")
    write_config(config, tmp_path)
    assert load_config(TeacherConfig, tmp_path / "config.json") == config


def test_hash_follows_content_not_place(values: dict[str, Any], tmp_path: Path) -> None:
    reference = config_hash(parse_config(TeacherConfig, values, source="x"))
    moved = tmp_path / "moved.json"
    moved.write_text("train.json")
    same = {**values, "output": "/elsewhere", "name": "other", "threads_per_rank": 3}
    same["corpus"] = {**values["corpus"], "train": str(moved)}
    assert config_hash(parse_config(TeacherConfig, same, source="x")) == reference
    moved.write_text("changed")
    assert config_hash(parse_config(TeacherConfig, same, source="x")) != reference


@pytest.mark.parametrize("key", ["optimization.seed", "batches.global_batch_pairs", "lora.rank"])
def test_hash_follows_every_setting_of_the_work(values: dict[str, Any], key: str) -> None:
    reference = config_hash(parse_config(TeacherConfig, values, source="x"))
    set_dotted(values, key, 9)
    assert config_hash(parse_config(TeacherConfig, values, source="x")) != reference


def test_hash_of_what_is_written_is_that_of_what_was_read(values: dict[str, Any]) -> None:
    values["lora"] = {"rank": 8}  # alpha stays the default, an integer in the source
    config = parse_config(TeacherConfig, values, source="x")
    written = TeacherConfig.model_validate_json(config.model_dump_json())
    assert config_hash(written) == config_hash(config)


def test_hash_names_a_missing_input(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "valid.json").unlink()
    with pytest.raises(ConfigError, match=r"valid\.json: no such file"):
        config_hash(parse_config(TeacherConfig, values, source="x"))


def _model_of(path: Path) -> type[Config] | None:
    folder = path.parent.name
    if folder == "demo" and path.parent.parent.name == "configs":
        kinds = {"base": BaseModelConfig, "teacher": TeacherConfig, "export": ExportConfig}
        return kinds[path.stem.split("_")[0]]
    kinds = {
        "teacher": TeacherConfig,
        "export": ExportConfig,
        "student": StudentConfig,
        "spaces": SweepConfig,
        "mrc": MrcConfig,
        "cross_fit": CrossFitConfig,
    }
    return kinds.get(folder)


def test_every_committed_config_parses() -> None:
    paths = sorted(COMMITTED.rglob("*.yaml"))
    assert len(paths) >= 40
    for path in paths:
        model = _model_of(path)
        assert model is not None, f"{path}: which config is it?"
        load_config(model, path)


def test_a_config_is_a_file_first_and_then_a_committed_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("student", "kd") == COMMITTED / "student" / "kd.yaml"
    assert find_config("teacher", "demo/teacher_llama") == COMMITTED / "demo" / "teacher_llama.yaml"
    (tmp_path / "kd").write_text("name: mine")
    assert find_config("student", "kd") == Path("kd")
    assert find_config("student", "missing.yaml") == Path("missing.yaml"), "reading it says what is wrong"
    with pytest.raises(ConfigError, match=r"nothing: neither .* of mrc; committed are: minilm, roberta-base"):
        find_config("mrc", "nothing")


def test_kdecs_configs_lists_and_prints(root: Path) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["configs", *arguments])

    assert "student/kd\n" in run().output
    assert set(run("mrc").output.split()) == {"mrc/minilm", "mrc/roberta-base", "mrc/spanbert"}
    assert run("mrc/minilm").output == (root / "kdecs/configs/mrc/minilm.yaml").read_text()
    for name in ("nothing", "mrc/nothing"):
        refusal = run(name).exception
        assert isinstance(refusal, ConfigError) and name in str(refusal)
