"""JSON lines larger than memory: no stage that passes over a corpus keeps its dialogues."""

import json
import tracemalloc
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdecs.artifact import Manifest, read_manifest, write_manifest
from kdecs.config import parse_config
from kdecs.corpus import cache as cache_module
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.checking import Checker
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, find_faults, iter_dialogues, open_dialogues, read_corpus
from kdecs.corpus.splits import training_split
from kdecs.process import StopSignal
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.export import export_shards

NUM_DIALOGUES = 3_000


@pytest.fixture(scope="module")
def lines_file(tmp_path_factory, make_valid_document):
    path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
    utterances = make_valid_document()["tr_1"][0]
    for utterance in utterances:
        utterance["free"] = "x" * 400
    with path.open("w") as file:
        for n in range(NUM_DIALOGUES):
            file.write(json.dumps({"id": f"d_{n}", "utterances": utterances}) + "\n")
    return path


def count(dialogues) -> int:
    return sum(1 for _ in dialogues)


@pytest.mark.parametrize(
    "consume",
    [lambda path: count(iter_dialogues(path)), lambda path: count(open_dialogues(path)), find_faults],
    ids=["iter_dialogues", "open_dialogues", "find_faults"],
)
def test_streaming_keeps_no_dialogue(lines_file, consume):
    tracemalloc.start()
    consume(lines_file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lines_file.stat().st_size > 8e6
    assert peak < 2e6


def test_lines_are_a_sequence_of_the_dialogues_of_the_file(write, valid_document):
    expected = read_corpus(write(valid_document)).dialogues
    lines = [json.dumps({"id": key, "utterances": value[0]}) for key, value in valid_document.items()]
    for text in ("\n".join(lines), "\ufeff" + "\r\n\r\n".join(lines) + "\r\n", "\n\n" + "\n".join(lines)):
        found = open_dialogues(write(text, "corpus.jsonl"))
        assert [found[1], found[0]] == [expected[1], expected[0]]
        assert tuple(found) == expected
        assert len(found) == len(expected)


class Scorer:
    """A teacher that says by a pair's id what it scored."""

    answer_words = CONNECTIVES
    lineage = {"teacher": "stub", "prompt_version": "1"}  # noqa: RUF012

    def __init__(self, directory: Path) -> None:
        write_manifest(directory, "teacher", config_hash="0" * 64, inputs={}, files=[])
        self.manifest: Manifest = read_manifest(directory, "teacher")

    def score(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Five numbers of the pair's id."""
        rows = [[hash_of(pair.id, word) for word in CONNECTIVES] for pair in pairs]
        return np.array(rows, np.float32), np.full(len(pairs), -1, np.float32)


def hash_of(pair_id: str, word: str) -> float:
    return sum(map(ord, pair_id + word)) % 97 / 10


@pytest.fixture
def corpus_of_lines(tmp_path) -> dict[str, str]:
    """320 training dialogues as JSON lines, one of them also in the validation split."""
    train = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    valid = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    utterances = [nested[0][:5] for nested in train.values()]
    items = [{"id": f"d{n}", "utterances": utterances[n % len(utterances)]} for n in range(320)]
    twin = next(iter(valid.values()))[0][:5]
    files = {
        "train": [*items, {"id": "twin", "utterances": twin}],
        "valid": [{"id": "v", "utterances": twin}],
    }
    for split, values in files.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return {split: str(tmp_path / f"{split}.jsonl") for split in files}


def test_a_corpus_that_can_be_labelled_can_be_trained_on(tmp_path, base, corpus_of_lines, monkeypatch):
    """From the export's plan to a student's batch, a handful of the training dialogues is in memory at a time."""
    from transformers import AutoTokenizer

    from kdecs.student.config import StudentConfig
    from kdecs.student.data import load_training_data

    alive, most_alive = set(), [0]
    original = Checker.dialogue

    def parse(checker, *arguments):
        dialogue = original(checker, *arguments)
        alive.add(id(dialogue))
        weakref.finalize(dialogue, alive.discard, id(dialogue))
        most_alive[0] = max(most_alive[0], len(alive))
        return dialogue

    monkeypatch.setattr(Checker, "dialogue", parse)
    monkeypatch.setattr(cache_module, "_ROWS_PER_BATCH", 200)
    selection = {**corpus_of_lines, "train_share": 0.5, "drop_cross_split": True}
    labels = tmp_path / "labels"
    values = {
        "teacher": str(tmp_path / "teacher"),
        "output": str(labels),
        "corpus": selection,
        "num_shards": 3,
    }
    export = parse_config(ExportConfig, {**values, "allow_other_corpus": True}, source="test")
    worker = SimpleNamespace(rank=0, world_size=1, device=SimpleNamespace(type="cpu"))
    export_shards(export, Scorer(tmp_path / "teacher"), worker, StopSignal())

    values = {
        "output": str(tmp_path / "student"),
        "cache": str(tmp_path / "cache"),
        "corpus": selection,
        "model": {"base": str(base), "max_prompt_tokens": 256},
        "distillation": {"mode": "kd", "labels": str(labels), "hard_share": 0.5},
    }
    config = parse_config(StudentConfig, values, source="test")
    data = load_training_data(config, AutoTokenizer.from_pretrained(base), 256)
    assert most_alive[0] < 100

    pairs = [
        pair for dialogue in training_split(export.corpus) for pair in pairs_of(dialogue, "fold1+neutral")
    ]
    assert len({pair.dialogue.id for pair in pairs}) == 160
    ids, _ = data.train.identities(data.rows)
    assert ids == [pair.id for pair in pairs]
    gold = {
        pair.dialogue.id for pair, is_gold in zip(pairs, data.is_gold_P[data.rows], strict=True) if is_gold
    }
    assert len(gold) == 80
    _, targets = data.batch(data.rows, np.ones(len(data.rows), np.float32))
    expected = [[hash_of(pair.id, word) for word in CONNECTIVES] for pair in pairs]
    np.testing.assert_array_equal(targets.teacher_BA.numpy(), np.array(expected, np.float32))
