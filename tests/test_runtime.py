"""What a rank says of its device, and how it imports DeepSpeed."""

import importlib
import sys

import pytest
import torch

from kdecs.runtime import Runtime, import_deepspeed, warn_of_emulation


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "rank", "warns"),
    [
        ("AVX2", "cpu", "bfloat16", 0, True),
        ("AVX2", "cpu", "bfloat16", 1, False),
        ("AVX2", "cpu", "float32", 0, False),
        ("AVX2", "cuda", "bfloat16", 0, False),
        ("AVX512", "cpu", "bfloat16", 0, False),
        ("DEFAULT", "cpu", "bfloat16", 0, False),  # ARM
    ],
)
def test_an_emulated_bfloat16_is_told_once(monkeypatch, capsys, capability, device, dtype, rank, warns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    runtime = Runtime(rank=rank, local_rank=rank, world_size=2, device=torch.device(device))
    warn_of_emulation(runtime, dtype, "zero.dtype")
    shown = capsys.readouterr().err
    assert ("--set zero.dtype=float32" in shown) == warns
    assert shown.count("\n") == warns


@pytest.mark.parametrize("is_imported", [False, True])
def test_deepspeed_is_imported_without_mlflow(tmp_path, monkeypatch, is_imported):
    (tmp_path / "mlflow.py").touch()
    # As its autotuner does.
    (tmp_path / "deepspeed.py").write_text(
        "try:\n    import mlflow\n    has_mlflow = True\nexcept Exception:\n    has_mlflow = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("deepspeed", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, None)  # so that it is removed at the end
        del sys.modules[name]
    if is_imported:
        importlib.import_module("mlflow")
    import_deepspeed()
    assert sys.modules["deepspeed"].has_mlflow == is_imported
    assert importlib.import_module("mlflow").__file__ == str(tmp_path / "mlflow.py")
