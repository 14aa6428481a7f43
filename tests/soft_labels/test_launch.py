"""The entry script: skip without torch, refusals in one line, SIGTERM, two ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_teacher import files_of, make_config
from stand_in import run_command, run_script

from kdecs.artifact import read_manifest
from kdecs.config import load_config
from kdecs.corpus.reading import bundled_sample
from kdecs.soft_labels.config import ExportConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "export_soft_labels.py"
# Runs the script with the stand-in teacher in the place of the real one.
STAND_IN = f"""
import runpy, sys, time, types
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_teacher import FakeScorer
class TeacherScorer:
    @classmethod
    def load(cls, directory, *, runtime, dtype, micro_batch_tokens, base):
        return FakeScorer(directory, on_batch=lambda: time.sleep(0.2))
scoring = types.ModuleType("kdecs.teacher.scoring")
scoring.TeacherScorer = TeacherScorer
sys.modules["kdecs.teacher.scoring"] = scoring
sys.argv = ["export_soft_labels.py", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def write_yaml(path: Path, teacher: Path, output: Path, changes: dict[str, object] | None = None) -> Path:
    corpus = {split: str(bundled_sample(split)) for split in ("train", "valid", "test")}
    values = {"teacher": str(teacher), "output": str(output), "corpus": corpus, "num_shards": 5}
    path.write_text(yaml.safe_dump(values | (changes or {})))
    return path


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "KDECS_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_complete_export_is_skipped_without_torch(finished: Path, teacher: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "export.yaml", teacher, finished)
    without_torch = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["export_soft_labels.py", "--config", {str(config)!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    process = start("-c", without_torch)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, "")
    assert out == f"soft labels {finished.name}: complete at {finished}, skipped\n"


def test_a_damaged_finished_export_is_mended_by_its_own_command(
    finished: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The manifest stands and every size is right: only the bytes of one shard are not those written."""
    output = tmp_path / "labels"
    shutil.copytree(finished, output)
    config = make_config(teacher, output)
    others = {path: path.stat().st_ino for path in output.glob("shard-*") if "3" not in path.name}
    damaged = bytearray((output / "shard-00003.parquet").read_bytes())
    damaged[400] ^= 1
    (output / "shard-00003.parquet").write_bytes(damaged)
    assert run_command(config, tmp_path) == 0
    assert "shard-00003.parquet: damaged" in capfd.readouterr().out
    assert files_of(output) == files_of(finished)
    assert {path: path.stat().st_ino for path in others} == others
    assert run_command(config, tmp_path) == 0
    assert "complete at" in capfd.readouterr().out


def test_a_damaged_copy_without_working_files_is_mended(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    shutil.copytree(finished, output, ignore=shutil.ignore_patterns(".work"))
    os.truncate(output / "shard-00003.parquet", 400)
    assert run_command(make_config(teacher, output), tmp_path) == 0
    assert files_of(output) == files_of(finished)


def test_refusals_are_one_line(
    finished: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"num_shards": 3}, "holds a finished soft-labels directory of another config"),
        ({"teacher": str(tmp_path / "empty"), "output": str(tmp_path / "o")}, "no manifest.json"),
        ({"teacher": str(teacher), "output": str(teacher / "o")}, "which is an input and must not change"),
        ({"shards": 3}, "shards: unknown key; known here: allow_other_corpus"),
    ):
        path = write_yaml(tmp_path / "e.yaml", teacher, finished, changes)
        code = run_script(path)
        out, err = capfd.readouterr()
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err
    process = start(str(SCRIPT), "--config", str(path))
    assert process.communicate(timeout=240) == ("", err)
    assert process.returncode == 1


@pytest.mark.slow
def test_a_rank_is_terminated_and_another_takes_over(finished: Path, teacher: Path, tmp_path: Path) -> None:
    """Rank 1 of two stops with exit 143; rank 0 labels the rest: the bytes of an undisturbed run."""
    output = tmp_path / "labels"
    config = str(write_yaml(tmp_path / "export.yaml", teacher, output))
    stopped = start("-c", STAND_IN, "--config", config, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    deadline = time.monotonic() + 240
    while not (output / ".work" / "job.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    other = start("-c", STAND_IN, "--config", config, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    _, error = stopped.communicate(timeout=240)
    assert stopped.returncode == 143
    assert "of 5 shards finished; run the same command again to resume" in error
    out, _ = other.communicate(timeout=240)
    assert other.returncode == 0
    assert files_of(output) == files_of(finished)
    num_pairs = sum(entry.rows or 0 for entry in read_manifest(output).files)
    assert f"soft labels labels: {num_pairs:,} pairs in 5 shards" in out
    assert "agreement with gold on valid: macro F1" in out


def test_committed_configs_parse() -> None:
    paths = sorted((ROOT / "launch" / "configs" / "export").glob("*.yaml"))
    assert paths
    for path in paths:
        config = load_config(ExportConfig, path)
        assert config.corpus.test is not None
