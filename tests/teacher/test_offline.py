"""HF_HUB_OFFLINE=1: a base in a local directory trains, a hub name that is not in the cache is one clear line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdecs.teacher.config import TeacherConfig


def start(config: TeacherConfig, base: str, directory: Path, root: Path) -> subprocess.CompletedProcess:
    values = json.loads(config.model_dump_json())
    values["model"]["base"] = base
    path = directory / "offline.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "hub"),
        "PYTHONPATH": str(root),
    }
    # Should anything look for the network all the same, it finds nobody there.
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "launch/train_teacher.py", "--config", str(path)],
        cwd=root,
        env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_local_base_trains(
    make_config: Callable[..., TeacherConfig], bases: Callable[[str], Path], tmp_path: Path, root: Path
) -> None:
    config = make_config(optimization__epochs=1, validate_per_epoch=1)
    done = start(config, str(bases("causal")), tmp_path, root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (config.output / "manifest.json").is_file()


@pytest.mark.slow
def test_a_hub_name_is_one_clear_line(
    make_config: Callable[..., TeacherConfig], tmp_path: Path, root: Path
) -> None:
    done = start(make_config(), "nobody/no-such-model", tmp_path, root)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kdecs: error: ")]
    assert "nobody/no-such-model" in line
    assert "HF_HUB_OFFLINE" in line
