"""A deterministic stand-in for a teacher, a small corpus, and workers in processes of their own."""

import hashlib
import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from kdecs.artifact import Manifest, read_manifest, write_manifest
from kdecs.config import input_checksums
from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL
from kdecs.corpus.pairs import Pair
from kdecs.corpus.reading import bundled_sample
from kdecs.process import StopSignal
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.export import export_shards


@dataclass
class FakeScorer:
    """Logits from a hash of the pair, tilted towards the gold label; the sum over the batch shows in the last
    bits, as in a real network, so that batches that depend on the work's division would change the bytes."""

    directory: Path
    answer_words: tuple[str, ...] = CONNECTIVES
    lineage: dict[str, str] = field(default_factory=lambda: {"prompt_version": "1", "teacher": "fake"})
    on_batch: object = None
    poison: str = ""
    tokenizer_sha256: str = "f" * 64

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.directory, "teacher")

    def score(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        if callable(self.on_batch):
            self.on_batch()
        digests = [hashlib.sha256(f"{pair.id} {pair.hash}".encode()).digest() for pair in pairs]
        raw = np.array([np.frombuffer(digest[:24], dtype=np.uint32) for digest in digests], dtype=np.float64)
        logits = (raw[:, : len(self.answer_words)] / 2**32 * 4).astype(np.float32)
        logits[np.arange(len(pairs)), [0 if pair.is_cause else NUM_CAUSAL for pair in pairs]] += 6
        logits += np.float32(raw.sum() % 997 * 1e-6)
        for row, pair in enumerate(pairs):
            if pair.id == self.poison:
                logits[row, 2] = np.nan
        return logits, -(raw[:, 5] / 2**32).astype(np.float32)

    def score_with_top(
        self, pairs: list[Pair], top_k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and logits that depend on the pair alone."""
        rows = [np.frombuffer(hashlib.sha512(pair.id.encode()).digest(), np.uint32)[:top_k] for pair in pairs]
        top = np.array(rows, dtype=np.uint32).reshape(len(pairs), top_k)
        ids, logits = (top % 32_000).astype(np.int32), (top / 2**31).astype(np.float32)
        return *self.score(pairs), ids, np.sort(logits, axis=1)[:, ::-1]


def worker(rank: int = 0, world_size: int = 1, device: str = "cpu") -> SimpleNamespace:
    """What an export uses of a Runtime, without torch."""
    return SimpleNamespace(rank=rank, world_size=world_size, device=SimpleNamespace(type=device))


def make_teacher(directory: Path) -> Path:
    """A directory of kind teacher, trained (says its manifest) on the bundled sample."""
    directory.mkdir(parents=True)
    (directory / "adapter.txt").write_text("weights")
    inputs = input_checksums(corpus_train=bundled_sample("train"), corpus_valid=bundled_sample("valid"))
    write_manifest(directory, "teacher", config_hash="0" * 64, inputs=inputs, files=["adapter.txt"])
    return directory


def make_config(teacher: Path, output: Path, **changes: object) -> ExportConfig:
    corpus = {split: bundled_sample(split) for split in ("train", "valid", "test")}
    values = {"teacher": teacher, "output": output, "corpus": corpus, "num_shards": 5} | changes
    return ExportConfig.model_validate(values)


def files_of(output: Path) -> dict[str, bytes]:
    """What a finished directory consists of: shards and manifest."""
    return {p.name: p.read_bytes() for p in sorted(output.glob("*")) if p.suffix == ".parquet"} | {
        "manifest.json": (output / "manifest.json").read_bytes()
    }


def export_in_process(
    teacher: Path, output: Path, rank: int, world_size: int, batch_s: float = 0.0, changes: dict | None = None
) -> None:
    """What a worker process runs; `batch_s` makes it slow enough to be killed in the middle."""
    config = make_config(teacher, output, **(changes or {}))
    scorer = FakeScorer(teacher, on_batch=lambda: time.sleep(batch_s))
    export_shards(config, scorer, worker(rank, world_size), StopSignal(), poll_s=0.02)


def start_worker(*arguments: object) -> multiprocessing.Process:
    """A started process that runs `export_in_process`."""
    process = multiprocessing.get_context("spawn").Process(target=export_in_process, args=arguments)
    process.start()
    return process
