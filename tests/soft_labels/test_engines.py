"""The export command with a real tiny teacher: partitioned over two ranks, and with top logits."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fake_teacher import files_of
from label_directories import read_shard
from real_teacher import CORPUS, make_real_teacher, start_export, write_config
from support import free_port, made_once

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.soft_labels.format import published_record

pytestmark = [pytest.mark.slow, pytest.mark.dist]

TOP_K = 3


@pytest.fixture(scope="module")
def real_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "real-teacher", make_real_teacher) / "teacher"


@pytest.fixture(scope="module")
def replica(real_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of one rank that holds the whole teacher. Read-only."""
    directory = tmp_path_factory.mktemp("replica")
    config = write_config(directory / "e.yaml", real_teacher, directory / "labels", top_k=TOP_K)
    process = start_export(config)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return directory / "labels"


def test_a_partitioned_teacher_gives_the_labels_of_a_replica(
    real_teacher: Path, replica: Path, tmp_path: Path
) -> None:
    """Two ranks in step, every parameter partitioned; stopped once in the middle, then the same command."""
    output = tmp_path / "labels"
    settings = {"engine": "zero3", "persistence_threshold": 0, "top_k": TOP_K}
    config = write_config(tmp_path / "e.yaml", real_teacher, output, **settings)
    port = free_port()
    ranks = [start_export(config, rank=rank, world_size=2, port=port) for rank in range(2)]
    deadline = time.monotonic() + 600
    while not any(published_record(output / f"shard-{n:05d}.parquet") for n in range(4)):
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks), [r.communicate() for r in ranks]
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    ends = [rank.communicate(timeout=600) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], ends
    assert all("run the same command again to resume" in error for _, error in ends)
    kept = {
        path.name: path.stat().st_ino for path in output.glob("shard-*.parquet") if published_record(path)
    }
    assert 0 < len(kept) < 4

    port = free_port()
    ranks = [start_export(config, rank=rank, world_size=2, port=port) for rank in range(2)]
    ends = [rank.communicate(timeout=600) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    assert {name: (output / name).stat().st_ino for name in kept} == kept
    assert verify_artifact(output) == []
    manifest, expected = read_manifest(output), read_manifest(replica)
    assert (manifest.details["engine"], expected.details["engine"]) == ("zero3", "replica")
    assert manifest.details["lineage"] == expected.details["lineage"]
    words = tuple(manifest.details["answer_words"])
    for entry in expected.files:
        found, plain = read_shard(output / entry.path, words), read_shard(replica / entry.path, words)
        assert list(found.pair_ids) == list(plain.pair_ids)
        assert list(found.pair_hashes) == list(plain.pair_hashes)
        np.testing.assert_allclose(found.logits, plain.logits, atol=1e-5, rtol=0)
        np.testing.assert_allclose(found.log_rest_mass, plain.log_rest_mass, atol=1e-5, rtol=0)
        np.testing.assert_allclose(found.top_logits, plain.top_logits, atol=1e-5, rtol=0)


def test_top_logits_are_those_of_the_model_run_on_each_prompt_alone(
    real_teacher: Path, replica: Path
) -> None:
    """Against Transformers and PEFT themselves, one prompt at a time, over the whole vocabulary."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from kdecs.teacher.families import make_family
    from kdecs.teacher.product import read_teacher_config

    config = read_teacher_config(real_teacher)
    family = make_family(config.model, max_prompt_tokens=1000, emotions_shown=config.emotions_shown)
    base = AutoModelForCausalLM.from_pretrained(config.model.base)
    model = PeftModel.from_pretrained(base, str(real_teacher)).eval()
    pairs: dict[tuple[str, str], Pair] = {
        (split, pair.id): pair
        for split, path in CORPUS.items()
        for dialogue in read_corpus(path).dialogues
        for pair in pairs_of(dialogue, "fold1+neutral")
    }
    manifest = read_manifest(replica)
    assert manifest.details["top_k"] == TOP_K
    assert manifest.details["tokenizer_sha256"] == manifest.details["lineage"]["tokenizer"]
    table = read_shard(replica / "shard-00001.parquet", tuple(manifest.details["answer_words"]))
    assert table.top_ids is not None
    assert table.top_logits is not None
    for row in range(0, len(table), max(1, len(table) // 20)):
        prompt = family.encode(pairs[table.splits[row], table.pair_ids[row]])
        with torch.no_grad():
            output = model(torch.from_numpy(prompt.tokens.astype(np.int64))[None])
        logits_V = output.logits[0, prompt.answer].numpy()
        np.testing.assert_allclose(table.top_logits[row], np.sort(logits_V)[::-1][:TOP_K], atol=1e-4)
        np.testing.assert_allclose(logits_V[table.top_ids[row]], table.top_logits[row], atol=1e-4)
        np.testing.assert_allclose(logits_V[family.answer_ids], table.logits[row], atol=1e-4)


def test_two_ranks_give_the_bytes_of_one(real_teacher: Path, replica: Path, tmp_path: Path) -> None:
    """A real teacher on two ranks of one thread each, without any process group."""
    config = write_config(tmp_path / "e.yaml", real_teacher, tmp_path / "labels", top_k=TOP_K)
    ranks = [start_export(config, rank=rank, world_size=2) for rank in range(2)]
    ends = [rank.communicate(timeout=600) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    assert files_of(tmp_path / "labels") == files_of(replica)
