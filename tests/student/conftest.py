"""A tiny RoBERTa with its own tokenizer, small labelled corpora, and soft labels for them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support import made_once, save_tiny_encoder
from transformers import AutoModelForMaskedLM, AutoTokenizer

from kdecs.artifact import write_manifest
from kdecs.config import parse_config
from kdecs.corpus.answer_words import CONNECTIVES, answer_words_digest
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import NEUTRAL
from kdecs.runtime import Runtime
from kdecs.soft_labels.format import ShardTable, encode_shard, shard_name
from kdecs.student.config import StudentConfig
from kdecs.student.model import TorchScorer, load_student
from kdecs.student.predict.predictor import Student
from kdecs.student.training import train_student

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train and valid: the first few dialogues of the bundled sample, short enough for a test."""
    directory = tmp_path_factory.mktemp("corpus")
    files = {}
    for split, count in (("train", 6), ("valid", 3)):
        raw = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        files[split] = directory / f"{split}.json"
        files[split].write_text(json.dumps({key: [raw[key][0][:6]] for key in list(raw)[:count]}))
    return files


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer RoBERTa of 32 hidden units."""
    return made_once(tmp_path_factory, "student-base", save_tiny_encoder)


@pytest.fixture(scope="session")
def write_labels() -> Callable[..., Path]:
    """Writes a soft-label directory for corpus files (split -> path), over given answer words."""
    return _write_labels


def _write_labels(
    directory: Path,
    files: dict[str, Path | list[Path]],
    words: tuple[str, ...] = CONNECTIVES,
    answer_ids: tuple[int, ...] = (),
    top_k: int = 0,
    top_id: int = 50,
    candidates_after: int = 0,
) -> Path:
    """Soft labels of a teacher that is right with some noise: one shard over the splits.

    With `top_k` they have top logits: the answer words' (`answer_ids`) and further tokens' from `top_id` on.
    """
    generator = np.random.default_rng(0)
    directory.mkdir(parents=True)
    pairs, splits = [], []
    for split, paths in files.items():
        found = [
            p
            for path in (paths if isinstance(paths, list) else [paths])
            for d in read_corpus(path).dialogues
            for p in pairs_of(d, "fold1+neutral", candidates_after)
        ]
        pairs += found
        splits += [split] * len(found)
    logits = generator.normal(size=(len(pairs), len(words))).astype(np.float32)
    logits[:, -1] += [-3.0 if pair.is_cause else 3.0 for pair in pairs]
    top: dict[str, np.ndarray] = {}
    if top_k:
        ids = [*answer_ids, *range(top_id, top_id + top_k - len(words))]
        more = generator.normal(-6, 1, size=(len(pairs), top_k - len(words))).astype(np.float32)
        top = {
            "top_ids": np.tile(np.array(ids, np.int32), (len(pairs), 1)),
            "top_logits": np.concatenate((logits, more), axis=1),
        }
    table = ShardTable(
        [p.id for p in pairs],
        [p.hash for p in pairs],
        splits,
        logits,
        np.full(len(pairs), -1.0, np.float32),
        **top,
    )
    (directory / shard_name(0)).write_bytes(encode_shard(table, words))
    write_manifest(
        directory,
        "soft-labels",
        config_hash="0" * 64,
        inputs={"teacher": "1" * 64},
        files=[shard_name(0)],
        rows={shard_name(0): len(pairs)},
        details={
            "answer_words": list(words),
            "lineage": {"teacher": "tiny"}
            | ({"answer_words": answer_words_digest(answer_ids)} if answer_ids else {}),
            **({"top_k": top_k} if top_k else {}),
        },
    )
    return directory


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory, corpus_files: dict[str, Path]) -> Path:
    return _write_labels(tmp_path_factory.mktemp("labels") / "soft", corpus_files)


@pytest.fixture(scope="session")
def node_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


MakeConfig = Callable[..., StudentConfig]


@pytest.fixture(scope="session")
def values(
    base: Path, corpus_files: dict[str, Path], labels: Path, node_cache: Path
) -> dict[str, dict[str, object] | str]:
    """A student's config over the tiny base, without its output."""
    return {
        "cache": str(node_cache),
        "corpus": {name: str(path) for name, path in corpus_files.items()},
        "model": {"base": str(base), "span_head": "pointer", "max_prompt_tokens": 256},
        "distillation": {"mode": "kd", "labels": str(labels)},
        "batches": {"global_batch_pairs": 16},
        "optimization": {"learning_rate": 1e-3, "epochs": 2},
    }


@pytest.fixture
def make_config(tmp_path: Path, values: dict[str, object]) -> MakeConfig:
    """A config of that student; keywords replace whole groups."""

    def make(output: str = "student", **groups: object) -> StudentConfig:
        return parse_config(
            StudentConfig, {**values, "output": str(tmp_path / output), **groups}, source="test"
        )

    return make


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Trained:
    """A complete training: its config and what `on_epoch` was given."""

    config: StudentConfig
    epochs: list[dict[str, float]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> Trained:
    """A student trained once, for tests that only read it."""
    output = tmp_path_factory.mktemp("student") / "trained"
    optimization = {"learning_rate": 3e-3, "epochs": 3}
    config = parse_config(
        StudentConfig, {**values, "output": str(output), "optimization": optimization}, source="test"
    )
    epochs: list[dict[str, float]] = []
    train_student(config, Runtime(0, 0, 1, torch.device("cpu")), on_epoch=epochs.append)
    return Trained(config, epochs)


@pytest.fixture(scope="session")
def directory(trained: Trained) -> Path:
    """The directory of the trained student."""
    return trained.config.output


@pytest.fixture(scope="session")
def student(directory: Path) -> Student:
    """The trained student, read once: predictions leave it as it is."""
    return Student.from_pretrained(directory)


@pytest.fixture
def eager(directory: Path) -> Student:
    """A student that finds a cause in every pair: no emotion of its is neutral, no score too low."""
    model, tokenizer, card = load_student(directory)
    emotions = tuple("fear" if emotion == NEUTRAL else emotion for emotion in card.emotions)
    card = card.model_copy(update={"emotions": emotions, "threshold": 0.0})
    scorer = TorchScorer(model, pad_id=tokenizer.pad_token_id, device=torch.device("cpu"))
    return Student(scorer, tokenizer, card)


@pytest.fixture
def plain_base(base, tmp_path):
    """The base without dropout: its draws would differ between the two."""
    directory = tmp_path / "plain_base"
    AutoModelForMaskedLM.from_pretrained(
        base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory
