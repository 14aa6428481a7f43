"""Batches of prompts: a budget of tokens, padding, transfers."""

import numpy as np
import pytest
import torch

from kdecs.corpus.pairs import batches_of_tokens
from kdecs.runtime import on_device
from kdecs.student.data import padded_batch


def lengths(num_rows: int = 500) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 400, size=num_rows)


def test_evaluation_batches_keep_their_token_budget():
    num_tokens = lengths()
    batches = batches_of_tokens(num_tokens, np.arange(500), 2000)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(b) == 1 or len(b) * num_tokens[b].max() <= 2000 for b in batches)
    assert batches_of_tokens(num_tokens, np.arange(0), 2000) == []
    assert [len(b) for b in batches_of_tokens(num_tokens, np.arange(3), 8)] == [1, 1, 1]


def test_padding():
    batch = padded_batch(
        [np.array([5, 6, 7]), np.arange(9)],
        np.array([[0, 1, 2, 2], [1, 2, 3, 4]]),
        np.array([1, 4]),
        np.array([1, 3]),
        np.array([0, 2]),
        pad_id=99,
    )
    assert batch.token_ids_RT.shape == (2, 16)
    assert batch.token_ids_RT[0].tolist() == [5, 6, 7] + [99] * 13
    assert batch.attention_RT.sum(dim=1).tolist() == [3, 9]
    assert batch.candidate_BM.tolist() == [[1, 0, 0], [4, 5, 6]]
    assert batch.candidate_mask_BM.tolist() == [[True, False, False], [True, True, True]]


def test_copies_to_a_gpu_are_from_pinned_memory_and_to_the_cpu_no_copies(monkeypatch):
    tensor, pinned, calls = torch.arange(4), torch.arange(4), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: calls.append((self, a, k)) or self)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert on_device(tensor, gpu) is pinned
    assert on_device(tensor, cpu) is tensor
    assert calls[0][0] is pinned and calls[0][1:] == ((gpu,), {"non_blocking": True})
    assert calls[1][0] is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_copy_does_not_wait_for_the_gpu():
    device = torch.device("cuda")
    square, small = torch.randn(8192, 8192, device=device), torch.arange(1 << 20)
    on_device(small, device)
    torch.cuda.synchronize()
    for _ in range(20):
        square = torch.tanh(square @ square)
    running = torch.cuda.Event()
    running.record()
    copy = on_device(small, device)
    assert not running.query()
    assert torch.equal(copy.cpu(), small)
