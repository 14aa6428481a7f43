"""The GPU benchmark's own code path, over a tiny network on the CPU: what it compares there agrees."""

import importlib
from pathlib import Path

import pytest
import torch

from kdecs.teacher.plan.activations import Activations
from kdecs.teacher.plan.memory import StateBytes, peak_memory

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_smoke_run_compares_trees_with_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("gpu_teacher")
    records = bench.run("smoke", torch.device("cpu"), num_dialogues=2, rounds=1)
    for name in ("training", "scoring"):
        record = records[name]
        assert record["ratio"] > 0
        assert record["details"]["relative_difference_of_logits"] <= bench.TOLERANCE
    losses = records["training"]["details"]["mean_loss"]
    assert losses["trees"] == pytest.approx(losses["pairs"], rel=bench.TOLERANCE)
    memory = records["memory"]
    parts = memory["details"]["parts"]
    # A rank's LoRA in bfloat16 under ZeRO-2: 2 bytes of weight, 2 of gradient, 12 of master and moments.
    assert parts["gradients"] == parts["adapters"] == parts["optimizer"] / 6
    assert memory["ours"] > sum(parts[name] for name in ("weights", "adapters", "gradients", "optimizer"))
    assert 0 < memory["details"]["mean_loss"] < 10
    assert not list((BENCHMARKS / "results").rglob("*smoke*"))


@pytest.mark.parametrize(("share", "fails"), [(0.91, False), (1.09, False), (0.89, True), (1.11, True)])
def test_a_plan_beyond_10_percent_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, share: float, fails: bool
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("_gpu_peak")
    states = StateBytes(8.0, 1.0, 1.0, 2.0, buffers=0.0, gathered=0.0, step=0.0)
    planned = peak_memory(states, Activations(88, 88, 1))
    assert planned.total == 100
    if not fails:
        bench.check_peak("7b", planned, 100 / share)
        return
    with pytest.raises(SystemExit, match=r"7b: the plan says .* the engine took"):
        bench.check_peak("7b", planned, 100 / share)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no CUDA")
def test_without_cuda_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("sys.argv", ["gpu_teacher.py"])
    importlib.import_module("gpu_teacher").main()
    assert capsys.readouterr().out == "gpu_teacher: no CUDA device, skipped\n"
