"""`launch/cross_fit.py`: one command trains, exports and merges; signals reach the stage that runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from label_directories import names_of, sample_pairs

from kdecs.config import load_config, parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.soft_labels.derive.config import CrossFitConfig
from kdecs.soft_labels.derive.cross_fit import fold_of_dialogues
from kdecs.soft_labels.labels import SoftLabels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts the command; what still runs at the end of the test is stopped."""
    started = []

    def run(config: Path) -> subprocess.Popen[str]:
        environment = {
            "PYTHONPATH": str(ROOT),
            "KDECS_DEVICE": "cpu",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "cross_fit.py"), "--config", str(config)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.slow
def test_one_command_trains_exports_and_goes_on_after_a_stop(
    start: Callable[[Path], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Two real teachers, stopped in the second training; oracle: each teacher scores the pairs once more."""
    import torch

    from kdecs.demo.base_model import train_base_model
    from kdecs.demo.config import BaseModelConfig
    from kdecs.process import StopSignal
    from kdecs.runtime import Runtime
    from kdecs.teacher.scoring import TeacherScorer

    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    corpus = {split: str(bundled_sample(split)) for split in ("train", "valid")}
    base = {"name": "base", "output": str(tmp_path / "base"), "corpus": corpus, "architecture": "llama"}
    base |= {"vocabulary_size": 800, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": 512}
    base |= {"max_steps": 3, "batch_size": 4, "sequence_tokens": 64}
    train_base_model(parse_config(BaseModelConfig, base, source="test"), runtime, StopSignal())
    teacher = {
        "model": {"family": "causal", "base": str(tmp_path / "base")},
        "zero": {"stage": 0, "dtype": "float32"},
        "batches": {"global_batch_pairs": 64, "max_prompt_tokens": 512},
        "optimization": {"learning_rate": 0.01, "epochs": 1},
    }
    values = {"name": "cross", "output": str(tmp_path / "labels"), "corpus": corpus, "num_folds": 2}
    values |= {"teacher": teacher, "export": {"num_shards": 2}}
    path = tmp_path / "cross.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(CrossFitConfig, path)

    process = start(path)
    deadline = time.monotonic() + 600
    while not (config.fold_directory(1) / "teacher-config" / "config.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 143, (out, err)
    assert "run the same command again to resume" in err
    process = start(path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    assert "teacher of fold 1 of 2: complete, skipped" in out
    assert "held-out train macro F1" in out

    labels = SoftLabels.open(config.output, tmp_path / "cache")
    folds = fold_of_dialogues(config)
    scorers = [
        TeacherScorer.load(
            config.fold_directory(fold) / "teacher", runtime=runtime, dtype="float32", micro_batch_tokens=4096
        )
        for fold in range(2)
    ]
    for fold in range(2):
        pairs = [pair for pair in sample_pairs("train") if folds[pair.dialogue.id] == fold]
        found = labels.logits(labels.rows_of(*names_of(pairs), split="train"))
        np.testing.assert_allclose(found, scorers[fold].score(pairs)[0], atol=1e-4)
        assert np.abs(found - scorers[1 - fold].score(pairs)[0]).max() > 1e-3
    process = start(path)
    out, _ = process.communicate(timeout=240)
    assert "complete at" in out
