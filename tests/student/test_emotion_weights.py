"""What a pair weighs in the emotion loss: by pair (Eq. 10) or by target."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kdecs.corpus.cache import open_cache
from kdecs.corpus.encoding import PairEncoder
from kdecs.student.data import emotion_weights
from kdecs.student.losses import batch_mean


@pytest.fixture
def cache(corpus_files: dict[str, Path], base: Path, tmp_path: Path):
    return open_cache(corpus_files["valid"], PairEncoder(AutoTokenizer.from_pretrained(base), 128), tmp_path)


def test_by_pair_every_weight_is_one(cache) -> None:
    rows = np.arange(len(cache))
    assert (emotion_weights("pair", cache, rows) == 1).all()


@pytest.mark.parametrize("choose", [lambda rows: rows, lambda rows: rows[::2]])
def test_by_target_every_target_weighs_the_same(cache, choose: Callable) -> None:
    rows = choose(np.arange(len(cache)))
    weights = emotion_weights("target", cache, rows)
    sums: dict[tuple[int, int], float] = {}
    for row in rows:
        key = (int(cache.column("dialogue")[row]), int(cache.column("target")[row]))
        sums[key] = sums.get(key, 0.0) + float(weights[row])
    np.testing.assert_allclose(list(sums.values()), len(rows) / len(sums), rtol=1e-5)
    assert weights[rows].mean() == pytest.approx(1.0, rel=1e-5)


def test_weighted_batch_mean() -> None:
    values, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 2.0, 0.5])
    assert float(batch_mean(weights * values, torch.tensor([1.0, 1.0, 0.0]), 2)) == pytest.approx(2.25)
