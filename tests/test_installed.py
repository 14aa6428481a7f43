"""The installed package, away from any checkout: every stage starts by module, and committed configs go by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT, free_port

from kdecs.artifact import read_manifest

pytestmark = pytest.mark.slow

# What `make demo` trains, cut to a few steps: this test is about how stages start.
FEW_STEPS = ["--set", "hidden_size=32", "--set", "num_layers=2", "--set", "max_steps=3"]
SHORT = {"optimization.epochs": 1, "corpus.train_share": 0.1}


class Installed:
    """A directory with the wheel's content and a working directory beside it."""

    def __init__(self, directory: Path) -> None:
        source, self.site, self.work = (directory / name for name in ("source", "site", "work"))
        self.work.mkdir()
        shutil.copytree(ROOT / "kdecs", source / "kdecs", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source / name)
        pip = [sys.executable, "-m", "pip", "--quiet"]
        wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(source)]
        subprocess.run([*pip, *wheel], check=True)
        (file,) = directory.glob("*.whl")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(self.site), str(file)], check=True)
        self.sample = self.site / "kdecs" / "corpus" / "sample"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        on_cpu = {
            "KDECS_DEVICE": "cpu",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            command,
            cwd=self.work,
            env=os.environ | on_cpu | {"PYTHONPATH": str(self.site), "PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def corpus(self, prefix: str, *splits: str) -> list[str]:
        return [
            part for split in splits for part in ("--set", f"{prefix}.{split}={self.sample / split}.json")
        ]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("setuptools", "77")
    return Installed(tmp_path_factory.mktemp("installed"))


def test_committed_configs_are_listed_and_printed(installed: Installed) -> None:
    listed = installed.run(sys.executable, "-m", "kdecs.cli", "configs")
    names = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "kdecs" / "configs").glob("*/*.yaml")}
    assert set(listed.stdout.split()) == names
    printed = installed.run(sys.executable, "-m", "kdecs.cli", "configs", "student/kd")
    assert printed.stdout == (ROOT / "kdecs" / "configs" / "student" / "kd.yaml").read_text()


@pytest.mark.parametrize(
    "entry", ["train_student", "train_teacher", "train_baseline", "export_soft_labels", "cross_fit"]
)
def test_a_name_that_is_not_there_lists_those_that_are(installed: Installed, entry: str) -> None:
    done = installed.run(sys.executable, "-m", f"kdecs.launch.{entry}", "--config", "nothing")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nothing: found no such file and no config of this name" in done.stderr


def test_a_committed_space_plans_its_teachers_by_module(installed: Installed) -> None:
    done = installed.run(sys.executable, "-m", "kdecs.launch.sweep", "main", "--dry-run")
    assert done.returncode == 0, done.stderr
    config = installed.site / "kdecs" / "configs" / "teacher" / "llama-7b.yaml"
    assert f"-m kdecs.launch.train_teacher --config {config}" in done.stdout


@pytest.mark.dist
def test_a_teacher_under_deepspeed_then_a_sweep_that_builds_another(installed: Installed) -> None:
    python, corpus = [sys.executable, "-m"], installed.corpus
    done = installed.run(
        *(*python, "kdecs.launch.pretrain_base", "--config", "base_roberta"),
        *(*FEW_STEPS, "--set", "output=base", *corpus("corpus", "train", "valid")),
    )
    assert done.returncode == 0, done.stderr
    short = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    done = installed.run(
        *("deepspeed", "--num_accelerators", "1", "--master_port", str(free_port())),
        *("--module", "kdecs.launch.train_teacher", "--config", "demo/teacher_roberta"),
        *("--set", "output=teacher", "--set", "model.base=base", *short, *corpus("corpus", "train", "valid")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(installed.work / "teacher", "teacher").details["world_size"] == 1

    files = {split: str(installed.sample / f"{split}.json") for split in ("train", "valid", "test")}
    train = {f"corpus.{split}": files[split] for split in ("train", "valid")}
    export = {f"corpus.{split}": path for split, path in files.items()}
    space = yaml.safe_load((installed.site / "kdecs" / "configs" / "spaces" / "demo.yaml").read_text())
    space["output"], space["student"]["cache"] = "sweep", "cache"
    space["student"]["corpus"] = files | {"train_share": 0.1}
    space["student"]["model"]["base"] = "base"
    space["student"]["optimization"]["epochs"] = 1
    built = {"output": "built", "model.base": "base", **SHORT, **train}
    space["teachers"] = {
        "built": {
            "labels": "labels",
            "train": {"config": "demo/teacher_roberta", "set": built},
            "export": {
                "config": "demo/export",
                "set": {"teacher": "built", "corpus.train_share": 0.1, **export},
            },
        }
    }
    space["space"] = {"teacher": {"grid": ["built"]}, "optimization.seed": {"grid": [0]}}
    (installed.work / "space.yaml").write_text(yaml.safe_dump(space))
    done = installed.run(*python, "kdecs.launch.sweep", "space.yaml", "--build")
    assert done.returncode == 0, done.stdout + done.stderr
    done = installed.run(*python, "kdecs.launch.select_student", "--sweep", "sweep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (installed.work / "sweep" / "selection.json").is_file()
