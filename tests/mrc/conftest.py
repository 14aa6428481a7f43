"""A tiny BERT-like encoder with segments and its own word-piece tokenizer, and small labelled corpora."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import made_once, save_tiny_encoder

from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.mrc.config import MrcConfig
from kdecs.mrc.training import train_mrc
from kdecs.runtime import Runtime

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of 32 hidden units, saved as a masked language model without an answer head."""
    words = ["the", "target", "utterance", "is", "evidence", "span", "emotion", "relevant"]
    return made_once(tmp_path_factory, "mrc-base", lambda path: save_tiny_encoder(path, "bert", words))


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train and valid: the first few dialogues of the bundled sample, short enough for a test."""
    directory = tmp_path_factory.mktemp("corpus")
    files = {}
    for split, count in (("train", 6), ("valid", 4)):
        raw = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        files[split] = directory / f"{split}.json"
        files[split].write_text(json.dumps({key: [raw[key][0][:6]] for key in list(raw)[:count]}))
    return files


@pytest.fixture(scope="session")
def values(base: Path, corpus_files: dict[str, Path]) -> dict[str, object]:
    """A baseline's config over the tiny base, without its output."""
    return {
        "corpus": {name: str(path) for name, path in corpus_files.items()},
        "model": {"base": str(base), "max_tokens": 256},
        "optimization": {"learning_rate": 3e-3, "epochs": 2},
    }


@pytest.fixture
def make_config(tmp_path: Path, values: dict[str, object]) -> Callable[..., MrcConfig]:
    """A config of that baseline; keywords replace whole groups."""

    def make(output: str = "mrc", **groups: object) -> MrcConfig:
        return parse_config(MrcConfig, {**values, "output": str(tmp_path / output), **groups}, source="test")

    return make


@pytest.fixture
def runtime() -> Runtime:
    """One rank on the CPU."""
    return Runtime(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> Path:
    """The directory of a baseline trained once, for tests that only read it."""
    output = tmp_path_factory.mktemp("mrc") / "trained"
    config = parse_config(MrcConfig, {**values, "output": str(output)}, source="test")
    return train_mrc(config, Runtime(0, 0, 1, torch.device("cpu")))
