"""A trial with a part of a GPU cannot take more of its memory than that."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

PROGRAM = """
import torch
from kdecs.sweep.ray import limit_gpu_memory
limit_gpu_memory(0.25)
total = torch.cuda.get_device_properties(0).total_memory
block = torch.empty(int(0.2 * total), dtype=torch.uint8, device="cuda")
try:
    torch.empty(int(0.06 * total), dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("refused", flush=True)
free, total = torch.cuda.mem_get_info()
assert total - free < 0.25 * total, "the CUDA context lies within the share"
"""


def test_more_than_the_share_is_refused():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["refused"]
