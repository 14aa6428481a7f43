"""What a rank says of its device."""

import pytest
import torch

from kdecs.runtime import Runtime, warn_of_emulation


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
