"""A tiny random LLaMA that reads and writes any text, and a config that trains it on a few short dialogues."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import made_once, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig

from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.runtime import Runtime, process_group

torch.set_num_threads(1)


def _save_decoder(directory: Path, config: PretrainedConfig) -> Path:
    """A decoder of random weights, large enough that every token matters, with a byte-level tokenizer."""
    tokenizer = tiny_tokenizer("roberta")
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.max_position_embeddings = 2048
    config.initializer_range = 0.15
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "generative-base", lambda path: _save_decoder(path, tiny_config("llama"))
    )


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[[PretrainedConfig], Path]:
    """A base of another architecture."""
    return lambda config: _save_decoder(tmp_path / "base", config)


def _short(path: Path, num_dialogues: int, num_turns: int) -> Path:
    raw = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: [raw[key][0][:num_turns]] for key in list(raw)[:num_dialogues]}))
    return path


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sample dialogues of four turns each."""
    return _short(tmp_path_factory.mktemp("few") / "few.json", 2, 4)


@pytest.fixture
def make_config(base: Path, few: Path, tmp_path: Path) -> Callable[..., GenerativeConfig]:
    def make(
        output: str = "out", corpus: Path = few, *, train: Path | None = None, **groups: Any
    ) -> GenerativeConfig:
        values: dict[str, Any] = {
            "name": "test",
            "output": str(tmp_path / output),
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


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def group(runtime: Runtime) -> Iterator[None]:
    """A process group of one, as every start of a single process makes it."""
    with process_group(runtime, single=True):
        yield
