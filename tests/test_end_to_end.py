"""`make demo`'s pipeline as a newcomer runs it: to the end, again, and over damage and wrong input."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support import flip_bit

from kdecs.artifact import verify_artifact

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.dist]


def demo(output: Path, *, timeout_s: int = 3000, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        ["launch/demo.sh", str(output)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def kdecs(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kdecs.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished demo on the bundled sample, and the seconds that it took."""
    directory = tmp_path_factory.mktemp("demo")
    started = time.monotonic()
    done = demo(directory)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return directory, time.monotonic() - started


@pytest.fixture(scope="module")
def output(first: tuple[Path, float]) -> Path:
    """The directory of the finished demo."""
    return first[0]


@pytest.mark.timeout(3600)
def test_every_artifact_is_whole(output: Path) -> None:
    # MLflow's registry holds a copy of the winner: it is verified below with the others, but not counted.
    registered = set((output / "mlartifacts").rglob("manifest.json"))
    assert len(registered) == 1
    manifests = sorted(set(output.rglob("manifest.json")) - registered)
    kinds = [json.loads(path.read_text())["kind"] for path in manifests]
    assert kinds.count("teacher") == 2
    assert kinds.count("soft-labels") == 2
    assert kinds.count("student") == 8
    assert kinds.count("sweep") == kinds.count("report") == 1
    for path in [*manifests, *registered]:
        assert verify_artifact(path.parent) == []
    done = kdecs("verify", str(output / "sweep"))
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(3600)
def test_teachers_are_above_the_majority_and_deepspeed_ran_two_ranks(output: Path) -> None:
    for name in ("llama-tiny", "roberta-tiny"):
        details = json.loads((output / "teachers" / name / "manifest.json").read_text())["details"]
        assert details["valid"]["valid_macro_f1"] > details["majority_macro_f1"]
        assert details["world_size"] == 2
        log = (output / "logs" / f"teacher-{name}.log").read_text()
        assert "WORLD INFO DICT: {'localhost': [0, 1]}" in log


@pytest.mark.timeout(3600)
def test_mlflow_holds_the_teachers_and_a_run_for_each_setting_and_each_trial(output: Path) -> None:
    with sqlite3.connect(output / "mlflow.db") as database:
        parents = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        statuses = dict(database.execute("select run_uuid, status from runs"))
        epochs = database.execute(
            "select run_uuid, max(step) from metrics where key = 'epoch' group by run_uuid"
        ).fetchall()
        aliases = database.execute("select alias from registered_model_aliases").fetchall()
    # The sweep, its settings and their seeds; the teachers, each with its export below it.
    assert len(statuses) == 1 + 4 + 8 + 2 + 2
    assert sorted(Counter(parents.values()).values()) == [1, 1, 2, 2, 2, 2, 4]
    assert set(statuses.values()) == {"FINISHED"}
    assert {step for run, step in epochs if run in parents} == {2}
    assert ("champion",) in aliases


@pytest.mark.timeout(3600)
def test_second_demo_skips_what_is_complete(first: tuple[Path, float]) -> None:
    output, first_s = first
    before = {path: path.stat().st_mtime_ns for path in output.rglob("manifest.json")}
    started = time.monotonic()
    done = demo(output)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("complete.*skipped", done.stdout)) == 7, "bases, teachers, labels, sweep"
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = [path for path in before if before[path] != after[path]]
    assert all(path.parent.name == "report" for path in changed), changed
    # Generous for a busy machine, and more so for a slow one: training all again would take as long as the first.
    assert time.monotonic() - started < max(120, first_s / 2)


@pytest.mark.timeout(3600)
def test_prediction_file_is_scored_like_the_selection_says(output: Path) -> None:
    record = json.loads((output / "sweep" / "selection.json").read_text())
    sample = ROOT / "kdecs" / "corpus" / "sample" / "test.json"
    predictions = output / "sweep" / "test-predictions.jsonl"
    done = kdecs("evaluate", "--corpus", str(sample), "--predictions", str(predictions), "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["macro_f1"] == pytest.approx(record["test"]["macro_f1"])
    assert set(scores["baselines"]) >= {"j = i", "j >= i-1"}
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    unlabelled = json.loads((sample.parent / "unlabelled.json").read_text())
    pairs = sum(len(turns[0]) * (len(turns[0]) + 1) // 2 for turns in unlabelled.values())
    assert len(lines) == pairs


@pytest.mark.timeout(3600)
def test_flipped_byte_fails_verification_and_training(output: Path, tmp_path: Path) -> None:
    labels = output / "labels" / "llama-tiny"
    shard = next(labels.glob("*.parquet"))
    data = flip_bit(shard)
    try:
        done = kdecs("verify", str(labels))
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(f"kdecs: error: {shard}: sha256")
        student = subprocess.run(
            [
                sys.executable, "launch/train_student.py", "--config", "launch/configs/student/tiny.yaml",
                "--set", f"output={tmp_path / 'student'}", "--set", f"cache={tmp_path / 'cache'}",
                "--set", f"model.base={output / 'base' / 'roberta'}",
                "--set", "distillation.mode=kd", "--set", f"distillation.labels={labels}",
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        shard.write_bytes(data)
    assert student.returncode == 1
    assert shard.name in student.stderr
    assert "Traceback" not in student.stderr
    assert not (tmp_path / "student" / "manifest.json").exists()


@pytest.mark.timeout(3600)
def test_teacher_of_another_corpus_is_refused(output: Path, tmp_path: Path) -> None:
    sample = ROOT / "kdecs" / "corpus" / "sample"
    done = subprocess.run(
        [
            sys.executable, "launch/export_soft_labels.py", "--config", "launch/configs/demo/export.yaml",
            "--set", f"teacher={output / 'teachers' / 'llama-tiny'}", "--set", f"output={tmp_path / 'labels'}",
            "--set", f"corpus.train={sample / 'test.json'}",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "test.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_directory_is_one_line(tmp_path: Path) -> None:
    done = demo(tmp_path / "run", RECCON=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "dailydialog_train.json" in done.stderr
