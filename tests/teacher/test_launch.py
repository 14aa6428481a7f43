"""`launch/train_teacher.py` for real: two gloo ranks under the deepspeed launcher, every ZeRO stage, kills, damage."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import ArtifactError
from kdecs.runtime import Runtime, seed_everything
from kdecs.schedule import learning_rate_at
from kdecs.teacher.batches import share_among_ranks
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.data import prepare_data
from kdecs.teacher.families import make_family
from kdecs.teacher.network import TeacherNetwork, add_lora, trainable_parameters
from kdecs.teacher.objective import connective_loss
from kdecs.teacher.scoring import TeacherScorer

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--no_local_rank"]


def config_values(base: Path, output: Path, family: str = "causal", stage: int = 2) -> dict:
    """About 13 steps over the sample's validation split."""
    return {
        "name": "test",
        "output": str(output),
        "corpus": {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("valid"))},
        "model": {"family": family, "base": str(base)},
        "lora": {"rank": 4},
        "zero": {"stage": stage, "dtype": "float32"},
        "batches": {"global_batch_pairs": 16, "micro_batch_tokens": 512, "max_prompt_tokens": 400},
        "optimization": {"learning_rate": 0.01, "epochs": 1},
        "validate_per_epoch": 100,  # every step: metrics.jsonl then holds each step's loss
        "threads_per_rank": 1,
    }


def run(values: dict, directory: Path, launcher: list[str], **options: object) -> subprocess.CompletedProcess:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{Path(values['output']).name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return subprocess.run(
        [*launcher, "launch/train_teacher.py", "--config", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        **options,
    )


def losses(output: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def plain_torch(values: dict) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """The oracle: the same steps in one process, without DeepSpeed, pair by pair: loss and adapter of each step."""
    config = parse_config(TeacherConfig, values, source="test")
    seed_everything(config.optimization.seed)
    family = make_family(
        config.model, max_prompt_tokens=config.batches.max_prompt_tokens, emotions_shown="coarse"
    )
    data = prepare_data(config, family, use_tree=True, world_size=1, show_progress=False)
    base = family.load_network(config.model.base, dtype=torch.float32)
    adapted = add_lora(base, config.lora, family.lora_task)
    network = TeacherNetwork(family, adapted, use_tree=False, device=torch.device("cpu"))
    parameters = trainable_parameters(network)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    series, adapters = [], []
    for step, batch in enumerate(data.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, len(data.steps), config.optimization)
        indices = [
            n
            for micro in share_among_ranks(batch, world_size=1, micro_batch_tokens=10**9, padded=False)[0]
            for n in micro.pairs
        ]
        gold_P = torch.tensor([data.train.pairs[n].is_cause for n in indices])
        loss = connective_loss(network([data.train.prompts[n] for n in indices]), gold_P) / len(indices)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        series.append(float(loss.detach()))
        trained = {name: p for name, p in network.network.named_parameters() if p.requires_grad}
        adapters.append({name.replace(".default", ""): p.detach().clone() for name, p in trained.items()})
    return series, adapters


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("family", "stage"), [("causal", 0), ("causal", 2), ("causal", 3), ("masked", 3)])
def test_two_ranks_equal_one_plain_torch_process(
    family: str, stage: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    values = config_values(bases(family), tmp_path / "out", family, stage)
    done = run(values, tmp_path, LAUNCHER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"on 2 ranks, ZeRO-{stage}" in done.stdout
    series, adapters = plain_torch(values)
    np.testing.assert_allclose(losses(tmp_path / "out"), series, rtol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "out")[:5], series[:5], rtol=1e-5)
    details = json.loads((tmp_path / "out" / "manifest.json").read_text())["details"]
    adapter = adapters[details["best_step"] - 1]  # the kept one is the best, not always the last
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(ours) == set(adapter)
    difference = sum(float((ours[k] - adapter[k]).norm() ** 2) for k in ours) ** 0.5
    norm = sum(float(tensor.norm() ** 2) for tensor in adapter.values()) ** 0.5
    assert difference / norm < 1e-3


@pytest.fixture(scope="module")
def trained(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A teacher trained by plain python in one process."""
    directory = tmp_path_factory.mktemp("teacher")
    values = config_values(bases("causal"), directory / "out")
    values["validate_per_epoch"] = 2
    done = run(values, directory, [sys.executable])
    assert done.returncode == 0, done.stderr[-3000:]
    return values, directory


@pytest.mark.slow
def test_product_opens_in_plain_peft_with_the_same_logits(
    trained: tuple[dict, Path], runtime: Runtime, some_pairs: list
) -> None:
    values, directory = trained
    scorer = TeacherScorer.load(directory / "out", runtime=runtime, dtype="float32", micro_batch_tokens=512)
    logits, log_rest = scorer.score(some_pairs[:4])
    family = scorer.network.family
    network = PeftModel.from_pretrained(
        family.load_network(values["model"]["base"], dtype=torch.float32), directory / "out"
    )
    for row, pair in zip(logits, some_pairs[:4], strict=True):
        ids = torch.from_numpy(family.encode(pair).tokens.astype(np.int64))[None]
        with torch.no_grad():
            expected_V = network.eval()(input_ids=ids).logits[0, -1]
        np.testing.assert_allclose(row, expected_V[family.answer_ids].numpy(), atol=1e-4)
    assert np.isfinite(log_rest).all()
    assert (log_rest <= 0).all()


@pytest.mark.slow
def test_second_start_skips_and_another_config_is_refused(trained: tuple[dict, Path]) -> None:
    values, directory = trained
    again = run(values, directory, [sys.executable])
    assert again.returncode == 0
    assert "complete" in again.stdout
    assert "skipped" in again.stdout
    other = run({**values, "emotions_shown": "fine"}, directory, [sys.executable])
    assert other.returncode == 1
    assert other.stderr.strip().splitlines()[-1].startswith("kdecs: error: ")
    assert "holds another teacher" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_a_changed_base_is_refused(trained: tuple[dict, Path], runtime: Runtime) -> None:
    values, directory = trained
    manifest = Path(values["model"]["base"]) / "manifest.json"
    assert manifest.is_file()
    text = manifest.read_text()
    manifest.write_text(text.replace('"final_loss"', '"final_los"'))
    try:
        with pytest.raises(ArtifactError, match="was trained on a base with checksum"):
            TeacherScorer.load(directory / "out", runtime=runtime, dtype="float32", micro_batch_tokens=512)
    finally:
        manifest.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("of_base", [False, True])
def test_damaged_weights_are_refused(trained: tuple[dict, Path], runtime: Runtime, of_base: bool) -> None:
    values, directory = trained
    folder = Path(values["model"]["base"]) if of_base else directory / "out"
    weights = next(folder.glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    try:
        with pytest.raises(ArtifactError, match=rf"{weights.name}: sha256"):
            TeacherScorer.load(directory / "out", runtime=runtime, dtype="float32", micro_batch_tokens=512)
    finally:
        weights.write_bytes(data)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_training_goes_on_to_the_same_adapter(
    number: int, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    values = config_values(bases("causal"), tmp_path / "straight")
    values["optimization"]["epochs"] = 2
    values["checkpoint_every_steps"] = 3
    assert run(values, tmp_path, LAUNCHER).returncode == 0
    values["output"] = str(tmp_path / "killed")
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(values))
    process = subprocess.Popen(
        [*LAUNCHER, "launch/train_teacher.py", "--config", str(path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (
        metrics.is_file() and len(metrics.read_text().splitlines()) >= 5
    ):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.wait(timeout=60)
    time.sleep(3)  # ranks that got SIGTERM write their checkpoint after the launcher has gone
    assert not (tmp_path / "killed" / "manifest.json").exists()
    resumed = run(values, tmp_path, LAUNCHER)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed at step" in resumed.stdout + resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "killed")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
