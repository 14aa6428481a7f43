"""A tiny BERT-like encoder with segments and a word-piece tokenizer, and an MRC baseline that was trained on it."""

from pathlib import Path

import pytest
import torch
from support import made_once, save_tiny_encoder

from kdecs.baselines.config import MrcConfig
from kdecs.baselines.training import train_baseline
from kdecs.config import parse_config
from kdecs.runtime import Runtime


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of 32 hidden units, saved as a masked language model without an answer head."""
    words = ["the", "target", "utterance", "is", "evidence", "span", "emotion", "relevant"]
    return made_once(tmp_path_factory, "mrc-base", lambda path: save_tiny_encoder(path, "bert", words))


@pytest.fixture(scope="session")
def values(base: Path, corpus_files: dict[str, Path]) -> dict[str, object]:
    """A baseline's config over the tiny base, without its output."""
    return {
        "corpus": {name: str(path) for name, path in corpus_files.items()},
        "system": "mrc",
        "model": {"base": str(base), "max_tokens": 256},
        "optimization": {"learning_rate": 3e-3, "epochs": 2},
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> Path:
    """The directory of a baseline trained once, for tests that only read it."""
    output = tmp_path_factory.mktemp("mrc") / "trained"
    config = parse_config(MrcConfig, {**values, "output": str(output)}, source="test")
    return train_baseline(config, Runtime(0, 0, 1, torch.device("cpu")))
