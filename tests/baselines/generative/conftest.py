"""A tiny random LLaMA that reads and writes any text, and a config that trains it on a few short dialogues."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import made_once, save_tiny_decoder
from transformers import PretrainedConfig

from kdecs.baselines.generative.answers import labels_of
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.baselines.generative.network import AnswerFamily, AnswerNetwork
from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue
from kdecs.runtime import Runtime, process_group

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "generative-base", save_tiny_decoder)


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[[PretrainedConfig], Path]:
    """A base of another architecture."""
    return lambda config: save_tiny_decoder(tmp_path / "base", config)


def _short(path: Path, num_dialogues: int, num_turns: int) -> Path:
    raw = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: [raw[key][0][:num_turns]] for key in list(raw)[:num_dialogues]}))
    return path


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sample dialogues of four turns each."""
    return _short(tmp_path_factory.mktemp("few") / "few.json", 2, 4)


@pytest.fixture(scope="session")
def dialogues(few: Path) -> tuple[Dialogue, ...]:
    return read_corpus(few).dialogues


@pytest.fixture(scope="session")
def network_of(dialogues: tuple[Dialogue, ...]) -> Callable[..., AnswerNetwork]:
    """A base as `kdecs baseline answer` runs it, which is asked with the labels of the few dialogues."""

    def load(base: Path, *, max_prompt_tokens: int = 1024, max_answer_tokens: int = 5) -> AnswerNetwork:
        family = AnswerFamily(
            str(base),
            labels_of(dialogues),
            max_prompt_tokens=max_prompt_tokens,
            max_answer_tokens=max_answer_tokens,
        )
        network = family.load_network(str(base), dtype=torch.float32)
        return AnswerNetwork(family, network, use_tree=False, device=torch.device("cpu")).eval()

    return load


@pytest.fixture(scope="session")
def config_of(base: Path, few: Path) -> Callable[..., GenerativeConfig]:
    """The config of a training in a directory, of the few dialogues unless it is given others."""

    def make(
        output: Path, corpus: Path = few, *, train: Path | None = None, **groups: Any
    ) -> GenerativeConfig:
        values: dict[str, Any] = {
            "name": "test",
            "output": str(output),
            "corpus": {"train": str(train or corpus), "valid": str(corpus)},
            "model": {"family": "causal", "base": str(base)},
            "lora": {"rank": 4},
            "zero": {"stage": 2, "dtype": "float32"},
            "batches": {"global_batch_pairs": 4, "micro_batch_tokens": 1024, "max_prompt_tokens": 1024},
            "optimization": {"learning_rate": 0.005, "epochs": 2},
            "max_answer_tokens": 64,
            "validate_per_epoch": 1,
            "log_every_steps": 1,
            "threads_per_rank": 1,
        }
        return parse_config(GenerativeConfig, values | groups, source="test")

    return make


@pytest.fixture
def make_config(
    config_of: Callable[..., GenerativeConfig], tmp_path: Path
) -> Callable[..., GenerativeConfig]:
    """The same in a directory of this test's own."""
    return lambda output="out", *arguments, **groups: config_of(tmp_path / output, *arguments, **groups)


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def group(runtime: Runtime) -> Iterator[None]:
    """A process group of one, as every start of a single process makes it."""
    with process_group(runtime, single=True):
        yield
