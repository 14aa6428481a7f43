"""Tiny bases of the three families, made by the project's own pretraining in a few steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdecs.base_model.config import BaseModelConfig
from kdecs.base_model.pretraining import train_base_model
from kdecs.config import parse_config
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.runtime import Runtime, StopSignal
from kdecs.teacher.config import ModelConfig, TeacherConfig
from kdecs.teacher.families import Family, make_family

ARCHITECTURES = {"causal": "llama", "seq2seq": "t5", "masked": "roberta"}

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Callable[[str], Path]:
    """Directory of a family's tiny base, made once a session."""
    directory = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        output = directory / family
        if not output.exists():
            values = {
                "name": family,
                "output": str(output),
                "corpus": {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("test"))},
                "architecture": ARCHITECTURES[family],
                "vocabulary_size": 800,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "max_positions": 512,
                "max_steps": 3,
                "batch_size": 4,
                "sequence_tokens": 64,
            }
            config = parse_config(BaseModelConfig, values, source="test")
            train_base_model(config, runtime, StopSignal())
        return output

    return base


@pytest.fixture(scope="session")
def families(bases: Callable[[str], Path]) -> Callable[[str], Family]:
    """A family over its tiny base."""

    def family(name: str, *, max_prompt_tokens: int = 512) -> Family:
        model = parse_config(
            TeacherConfig,
            {
                "name": "x",
                "output": "x",
                "corpus": {"train": "x", "valid": "x"},
                "model": {"family": name, "base": str(bases(name))},
            },
            source="test",
        ).model
        assert isinstance(model, ModelConfig.__origin__)  # the discriminated union took its member
        return make_family(model, max_prompt_tokens=max_prompt_tokens, emotions_shown="coarse")

    return family


@pytest.fixture(scope="session")
def some_pairs() -> list[Pair]:
    """All fold1 pairs of two sample dialogues."""
    dialogues = read_corpus(bundled_sample("valid")).dialogues[:2]
    return [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1")]
