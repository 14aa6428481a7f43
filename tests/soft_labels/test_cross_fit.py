"""Cross-fitting: each training pair's label is that of the teacher that did not see its dialogue."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cross_fit_configs import config_of
from fake_teacher import FakeScorer, worker
from label_directories import WORDS, by_pair, names_of, read_shard, sample_pairs

from kdecs.artifact import content_checksum, read_manifest, write_manifest
from kdecs.config import ConfigError, config_hash, input_checksums, load_config, write_config
from kdecs.corpus.checking import Checker
from kdecs.corpus.formats.writing import DialogueWriter
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, iter_raw, read_corpus
from kdecs.corpus.splits import text_digest
from kdecs.errors import ArtifactError, CorpusError
from kdecs.launch.cross_fit import is_done
from kdecs.process import StopSignal
from kdecs.soft_labels.derive.config import CrossFitConfig, FoldExport
from kdecs.soft_labels.derive.cross_fit import check_apart, fold_of_dialogues, merge_folds, write_folds
from kdecs.soft_labels.export import export_shards
from kdecs.soft_labels.labels import SoftLabels

ROOT = Path(__file__).resolve().parents[2]


class FoldScorer(FakeScorer):
    """Labels that tell which fold's teacher made them: the first logit is its number."""

    fold = 0

    def score(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        logits, rest = super().score(pairs)
        logits[:, 0] = self.fold
        return logits, rest


def make_fold(config: CrossFitConfig, fold: int) -> None:
    """A stand-in for the stages: a teacher directory of the fold's training file, and its real export."""
    directory = config.fold_directory(fold) / "teacher"
    directory.mkdir()
    (directory / "adapter.txt").write_text(f"weights {fold}")
    inputs = input_checksums(corpus_train=config.fold_corpus(fold, "train"), corpus_valid=config.corpus.valid)
    write_manifest(directory, "teacher", config_hash="0" * 64, inputs=inputs, files=["adapter.txt"])
    scorer = FoldScorer(directory)
    scorer.fold = fold
    export_shards(config.export_config(fold), scorer, worker(), StopSignal())


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> CrossFitConfig:
    config = config_of(tmp_path_factory.mktemp("cross") / "labels")
    write_folds(config)
    for fold in range(3):
        make_fold(config, fold)
    merge_folds(config)
    return config


def test_each_training_pair_is_labelled_by_its_own_fold_s_teacher(
    merged: CrossFitConfig, tmp_path: Path
) -> None:
    folds = fold_of_dialogues(merged)
    labels = SoftLabels.open(merged.output, tmp_path)
    pairs = sample_pairs("train")
    found = labels.logits(labels.rows_of(*names_of(pairs), split="train"))[:, 0]
    np.testing.assert_array_equal(found, [folds[pair.dialogue.id] for pair in pairs])
    assert set(found.tolist()) == {0, 1, 2}


def test_lineage_proves_it(merged: CrossFitConfig) -> None:
    """From the manifest alone and the files it names by checksum: no need to believe the order of the rows."""
    manifest = read_manifest(merged.output, "soft-labels")
    for fold, fact in enumerate(manifest.details["folds"]):
        train, held_out = merged.fold_corpus(fold, "train"), merged.fold_corpus(fold, "held-out")
        assert (fact["train"], fact["held_out"]) == (content_checksum(train), content_checksum(held_out))
        teacher = merged.fold_directory(fold) / "teacher"
        assert fact["teacher"] == content_checksum(teacher) == manifest.inputs[f"teacher_{fold}"]
        assert read_manifest(teacher).inputs["corpus_train"] == fact["train"]
        held = {dialogue.id for dialogue in read_corpus(held_out).dialogues}
        assert not held & {dialogue.id for dialogue in read_corpus(train).dialogues}
        for name in fact["shards"]:
            ids = read_shard(merged.output / name, WORDS).pair_ids
            assert {pair_id.split("/")[0] for pair_id in ids} <= held


def test_evaluation_labels_are_the_mean_of_all_teachers(merged: CrossFitConfig, tmp_path: Path) -> None:
    labels = SoftLabels.open(merged.output, tmp_path)
    for split in ("valid", "test"):
        pairs = sample_pairs(split)
        found = labels.logits(labels.rows_of(*names_of(pairs), split=split))
        mean = np.zeros_like(found)
        for fold in range(3):
            tables = [read_shard(p, WORDS) for p in (merged.fold_directory(fold) / "labels").glob("shard-*")]
            rows = by_pair(tables)
            raw = np.stack([rows[split, pair.id, pair.hash][0] for pair in pairs]).astype(np.float64)
            mean += np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True) / 3
        np.testing.assert_allclose(np.exp(found), mean, rtol=1e-5)


def test_or_those_of_a_chosen_one(merged: CrossFitConfig, tmp_path: Path) -> None:
    config = config_of(tmp_path / "labels", evaluation_labels=1, work=str(tmp_path / "work"))
    write_folds(config)
    for fold in range(3):
        make_fold(config, fold)
    merge_folds(config)
    labels = SoftLabels.open(config.output, tmp_path)
    assert set(
        labels.logits(labels.rows_of(*names_of(sample_pairs("test")), split="test"))[:, 0].tolist()
    ) == {1}
    with pytest.raises(ConfigError, match="expected mean or a fold up to 2"):
        config_of(tmp_path / "x", evaluation_labels=3)


def test_a_teacher_that_saw_its_fold_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "labels", num_folds=2)
    write_folds(config)
    for fold in range(2):
        make_fold(config, fold)
    teacher = config.fold_directory(1) / "teacher"
    inputs = input_checksums(corpus_train=config.corpus.train)  # trained on everything
    write_manifest(teacher, "teacher", config_hash="0" * 64, inputs=inputs, files=["adapter.txt"])
    with pytest.raises(ArtifactError, match="fold-1/teacher: made with another corpus_train"):
        merge_folds(config)
    with pytest.raises(ArtifactError, match="is also held out in"):
        check_apart(config.corpus.train, config.fold_corpus(0, "held-out"))
    assert not (config.output / "manifest.json").exists()


@pytest.mark.parametrize("form", ["reccon", "jsonl", "semeval"])
def test_folds_cover_the_corpus_and_keep_equal_texts_together(tmp_path: Path, form: str) -> None:
    values = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    twin = next(iter(values))
    values["twin"] = values[twin]
    train = tmp_path / ("train.jsonl" if form == "jsonl" else "train.json")
    if form == "jsonl":
        lines = [json.dumps({"id": name, "utterances": value[0]}) for name, value in values.items()]
        train.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    else:
        train.write_text(json.dumps(values), encoding="utf-8")
    if form == "semeval":
        text = "".join(DialogueWriter("semeval").text(iter_raw(train, Checker(str(train)))))
        train.write_text(text, encoding="utf-8")
    corpus = {"train": str(train), "valid": str(bundled_sample("valid"))}
    config = config_of(tmp_path / "labels", corpus=corpus)
    sizes = write_folds(config)
    assert sum(sizes.values()) == len(values)
    assert max(sizes.values()) - min(sizes.values()) <= 2
    folds = fold_of_dialogues(config)
    assert folds["twin"] == folds[twin]
    whole = {d.id: d for d in read_corpus(train).dialogues}
    for fold in range(3):
        held = read_corpus(config.fold_corpus(fold, "held-out")).dialogues
        rest = read_corpus(config.fold_corpus(fold, "train")).dialogues
        assert {d.id for d in held} | {d.id for d in rest} == whole.keys()
        assert {d.id for d in held} == {name for name, number in folds.items() if number == fold}
        assert all(d == whole[d.id] for d in (*held, *rest))
        assert not {text_digest(d) for d in held} & {text_digest(d) for d in rest}
    before = {p: p.read_bytes() for p in config.work_directory.rglob("*.json*")}
    write_folds(config)
    assert {p: p.read_bytes() for p in config.work_directory.rglob("*.json*")} == before
    other = config_of(tmp_path / "labels", corpus=corpus, fold_seed=1)
    assert fold_of_dialogues(other) != folds


def test_folds_of_several_files_divide_all_of_their_dialogues(tmp_path: Path) -> None:
    files = [bundled_sample("train"), bundled_sample("test")]
    corpus = {"train": [str(path) for path in files], "valid": str(bundled_sample("valid"))}
    teacher = {"model": {"family": "causal", "base": "some/hub-name"}, "candidates": {"after": 1}}
    config = config_of(tmp_path / "labels", corpus=corpus, teacher=teacher)
    write_folds(config)
    whole = {d.id: d for path in files for d in read_corpus(path).dialogues}
    held = [d for fold in range(3) for d in read_corpus(config.fold_corpus(fold, "held-out")).dialogues]
    assert sorted(d.id for d in held) == sorted(whole) and all(d == whole[d.id] for d in held)
    for fold in range(3):
        make_fold(config, fold)
    merged = merge_folds(config)
    inputs = [merged.inputs["corpus_train"], merged.inputs["corpus_train_1"]]
    assert inputs == [content_checksum(path) for path in files]
    # Its teachers look one turn ahead, so their labels do, too.
    assert merged.details["candidates_after"] == 1
    pairs = [pair for d in whole.values() for pair in pairs_of(d, "fold1+neutral", 1)]
    assert merged.details["num_pairs"]["train"] == len(pairs)


def test_holding_files_apart_keeps_no_dialogue(tmp_path: Path) -> None:
    """Ids and digests alone: the peak is far below the texts'."""
    value = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    utterances = next(iter(value.values()))[0]
    for part, count in (("held", 3000), ("train", 10)):
        with (tmp_path / f"{part}.jsonl").open("w") as file:
            for number in range(count):
                utterances[0]["utterance"] = f"{part} {number}"
                file.write(json.dumps({"id": f"{part}{number}", "utterances": utterances}) + "\n")
    tracemalloc.start()
    assert check_apart(tmp_path / "train.jsonl", tmp_path / "held.jsonl") == 3000
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert highest < 0.3 * (tmp_path / "held.jsonl").stat().st_size


def test_share_and_faults_of_the_config(tmp_path: Path) -> None:
    corpus = {s: str(bundled_sample(s)) for s in ("train", "valid")} | {"train_share": 0.5}
    config = config_of(tmp_path / "labels", corpus=corpus)
    num_dialogues = len(read_corpus(bundled_sample("train")).dialogues)
    assert len(fold_of_dialogues(config)) == -(-num_dialogues // 2)
    assert config.teacher_config(0).corpus.train_share == 1
    with pytest.raises(CorpusError, match="dialogues for 100 folds; lower num_folds"):
        fold_of_dialogues(config_of(tmp_path / "labels", num_folds=100))
    with pytest.raises(ConfigError, match=r"teacher\.output cannot be set here"):
        config_of(tmp_path / "x", teacher={"model": {"family": "causal", "base": "b"}, "output": "y"})
    elsewhere = config_of(tmp_path / "other", work=str(tmp_path / "w"), launcher=["deepspeed"], corpus=corpus)
    assert config_hash(elsewhere) == config_hash(config)


def test_a_stage_has_one_hash_here_and_in_its_process(tmp_path: Path) -> None:
    """Else a finished stage would be run again; the stage reads its config from the file."""
    config = config_of(tmp_path / "labels")
    write_folds(config)
    (config.fold_directory(0) / "teacher").mkdir()
    for stage in (config.teacher_config(0), config.export_config(0)):
        write_config(stage, tmp_path / "stage")
        read = load_config(type(stage), tmp_path / "stage" / "config.json")
        assert config_hash(read) == config_hash(stage)


def test_committed_configs_parse() -> None:
    paths = sorted((ROOT / "launch" / "configs" / "cross_fit").glob("*.yaml"))
    assert len(paths) == 2
    for path in paths:
        config = load_config(CrossFitConfig, path)
        assert config.teacher_config(0).corpus.train != config.corpus.train


def test_a_damaged_fold_is_not_skipped(merged: CrossFitConfig, tmp_path: Path) -> None:
    """Its own command mends it; else the merge would refuse it for ever."""
    stage = merged.export_config(1)
    assert is_done(stage, stage.output, "soft-labels")
    shard = stage.output / "shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    assert not is_done(stage, stage.output, "soft-labels")
    shard.write_bytes(whole)


def test_a_fold_s_export_is_told_what_an_export_can_be_told(tmp_path: Path) -> None:
    """All but what the folds decide and the top logits, which no merge carries."""
    told = {"num_shards", "micro_batch_tokens", "dtype", "threads_per_worker", "engine"}
    told |= {"persistence_threshold", "lease_s", "lost_rank_s"}
    assert FoldExport.model_fields.keys() == told
    config = config_of(tmp_path / "labels", export={"num_shards": 2, "lease_s": 7})
    write_folds(config)
    (config.fold_directory(0) / "teacher").mkdir()
    assert config.export_config(0).lease_s == 7
    assert config_hash(config) == config_hash(config_of(tmp_path / "labels"))
    with pytest.raises(ConfigError, match="top_k is not supported: merged labels hold"):
        config_of(tmp_path / "labels", export={"top_k": 5})
