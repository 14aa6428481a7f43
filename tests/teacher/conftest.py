"""Tiny bases of the three families, made by the project's own pretraining in a few steps."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import made_once
from transformers import AutoModelForCausalLM, PretrainedConfig

from kdecs.config import parse_config
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.demo.base_model import train_base_model
from kdecs.demo.config import BaseModelConfig
from kdecs.process import StopSignal
from kdecs.runtime import Runtime, process_group
from kdecs.teacher.config import ModelConfig, TeacherConfig
from kdecs.teacher.families import Family, make_family
from kdecs.teacher.network import meta_network
from kdecs.teacher.plan import search
from kdecs.teacher.plan.activations import Activations, ActivationTracer, Shape

sys.path.insert(0, str(Path(__file__).parent))  # for many_starts, which a launcher starts too

ARCHITECTURES = {"causal": "llama", "seq2seq": "t5", "masked": "roberta"}

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Callable[[str], Path]:
    """Directory of a family's tiny base. Read-only: copy it before damaging it."""

    def make(output: Path) -> None:
        values = {
            "name": output.name,
            "output": str(output),
            "corpus": {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("test"))},
            "architecture": ARCHITECTURES[output.name],
            "vocabulary_size": 800,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "max_positions": 512,
            "max_steps": 3,
            "batch_size": 4,
            "sequence_tokens": 64,
        }
        train_base_model(parse_config(BaseModelConfig, values, source="test"), runtime, StopSignal())

    return lambda family: made_once(tmp_path_factory, family, make)


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


@pytest.fixture(scope="module")
def group(runtime: Runtime) -> Iterator[None]:
    """A process group of one, as every start of a single process makes it."""
    with process_group(runtime, single=True):
        yield


@pytest.fixture(scope="module")
def planned_once() -> Iterator[None]:
    """Plans of one teacher share its networks on the meta device and their traces, which take most of a plan's time."""
    made: dict[object, Any] = {}

    def once(key: object, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    class Tracer(ActivationTracer):
        def memory(self, shape: Shape, *, checkpointing: bool) -> Activations:
            key = (id(self), pickle.dumps(shape), checkpointing)
            return once(key, lambda: super(Tracer, self).memory(shape, checkpointing=checkpointing))

    def whole(config: Any, lora: Any) -> Any:
        return once((config.to_json_string(), repr(lora)), lambda: meta_network(config, lora))

    def traced(config: Any, lora: Any, **options: Any) -> Tracer:
        key = (config.to_json_string(), repr(lora), repr(options))
        return once(key, lambda: Tracer(config, lora, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "meta_network", whole)
        patch.setattr(search, "ActivationTracer", traced)
        yield


@pytest.fixture(scope="session")
def few_dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sample dialogues, so that a training takes seconds."""
    whole = json.loads(bundled_sample("valid").read_text())
    path = tmp_path_factory.mktemp("few") / "few.json"
    path.write_text(json.dumps(dict(list(whole.items())[:4])))
    return path


@pytest.fixture
def make_config(
    bases: Callable[[str], Path], few_dialogues: Path, tmp_path: Path
) -> Callable[..., TeacherConfig]:
    def make(output: str = "out", family: str = "causal", **changes: Any) -> TeacherConfig:
        values: dict[str, Any] = {
            "name": "test",
            "output": str(tmp_path / output),
            "corpus": {"train": str(few_dialogues), "valid": str(few_dialogues)},
            "model": {"family": family, "base": str(bases(family))},
            "lora": {"rank": 4},
            "zero": {"stage": 2, "dtype": "float32"},
            "batches": {"global_batch_pairs": 12, "micro_batch_tokens": 256, "max_prompt_tokens": 400},
            "optimization": {"learning_rate": 0.005, "epochs": 2},
            "validate_per_epoch": 3,
            "log_every_steps": 1,
            "threads_per_rank": 1,
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            held = values
            for parent in parents:
                held = held[parent]
            held[last] = value
        return parse_config(TeacherConfig, values, source="test")

    return make


@pytest.fixture
def make_base(bases: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A directory with the tiny causal tokenizer and a network of random weights of some architecture."""

    def make(kind: type[PretrainedConfig], **values: Any) -> Path:
        directory = tmp_path / kind.model_type
        shutil.copytree(
            bases("causal"), directory, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json")
        )
        size = json.loads((directory / "config.json").read_text())["vocab_size"]
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(kind(vocab_size=size, **SHAPE, **values))
        network.save_pretrained(directory)
        return directory

    return make
