"""Same bytes whatever the division of the work and its interruptions; nothing damaged or foreign is kept."""

import contextlib
import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_teacher import FakeScorer, files_of, make_config, worker
from label_directories import read_shard
from support import StopAfter

from kdecs.artifact import read_manifest, verify_artifact, write_manifest
from kdecs.config import input_checksums
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ArtifactError, LabelError, Stopped
from kdecs.evaluation.counts import PairCounts
from kdecs.process import StopSignal
from kdecs.soft_labels import export as exporting
from kdecs.soft_labels.claims import publish
from kdecs.soft_labels.corpora import labelled_corpora
from kdecs.soft_labels.export import (
    ExportResult,
    Progress,
    export_shards,
    is_finished,
    long_shard_warning,
)


def export(teacher: Path, output: Path, **changes: object) -> ExportResult:
    return export_shards(make_config(teacher, output, **changes), FakeScorer(teacher), worker(), StopSignal())


def test_what_is_exported(finished: Path, teacher: Path) -> None:
    manifest = read_manifest(finished, "soft-labels")
    words = tuple(manifest.details["answer_words"])
    assert words == ("because", "as", "since", "thus", "other")
    tables = [read_shard(finished / entry.path, words) for entry in manifest.files]
    found = {
        (split, *row) for t in tables for split, *row in zip(t.splits, t.pair_ids, t.pair_hashes, strict=True)
    }
    expected = {
        (split, pair.id, pair.hash)
        for split in ("train", "valid", "test")
        for dialogue in read_corpus(bundled_sample(split)).dialogues
        for pair in pairs_of(dialogue, "fold1+neutral")
    }
    assert found == expected
    assert sum(entry.rows or 0 for entry in manifest.files) == len(expected)
    assert sum(manifest.details["num_pairs"].values()) == len(expected)
    assert set(manifest.inputs) == {"teacher", "corpus_train", "corpus_valid", "corpus_test"}
    assert manifest.details["agreement"]["valid"]["macro_f1"] > 80  # the stand-in leans towards gold
    assert manifest.details["devices"] == ["cpu"]
    assert is_finished(make_config(teacher, finished))


def test_later_candidates_are_labelled_and_the_others_keep_their_labels(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    export(teacher, tmp_path / "later", candidates={"after": 1})
    manifest = read_manifest(tmp_path / "later", "soft-labels")
    assert manifest.details["candidates_after"] == 1
    assert "candidates_after" not in read_manifest(finished, "soft-labels").details

    def labels(directory: Path) -> dict[tuple[str, ...], np.ndarray]:
        words = tuple(manifest.details["answer_words"])
        tables = [read_shard(file, words) for file in sorted(directory.glob("shard-*.parquet"))]
        return {
            (split, name, key): row
            for t in tables
            for split, name, key, row in zip(t.splits, t.pair_ids, t.pair_hashes, t.logits, strict=True)
        }

    before, found = labels(finished), labels(tmp_path / "later")
    # Up to rounding: the stand-in's last digits depend on what is scored together, as a teacher's do.
    assert all(np.allclose(found[key], before[key], atol=2e-3) for key in before)
    assert found.keys() - before.keys() == {
        (split, pair.id, pair.hash)
        for split in ("train", "valid", "test")
        for dialogue in read_corpus(bundled_sample(split)).dialogues
        for pair in pairs_of(dialogue, "fold1+neutral", 1)
        if pair.candidate > pair.target
    }


def test_stopped_at_every_look_gives_the_same_bytes(finished: Path, teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    config = make_config(teacher, output)
    stops = 0
    while not is_finished(config):
        with contextlib.suppress(Stopped):
            export_shards(config, FakeScorer(teacher), worker(), StopAfter(3))
            break
        stops += 1
    assert stops >= 2
    assert files_of(output) == files_of(finished)


def test_a_complete_export_is_left_alone(finished: Path, teacher: Path) -> None:
    def refuse() -> None:
        raise AssertionError("scored again")

    result = export_shards(
        make_config(teacher, finished), FakeScorer(teacher, on_batch=refuse), worker(), StopSignal()
    )
    assert result.num_new_pairs == 0
    assert result.manifest == read_manifest(finished)


def test_resume_redoes_missing_and_damaged_shards_alone(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    shutil.copytree(finished, output)
    (output / "manifest.json").unlink()
    (output / "shard-00001.parquet").unlink()
    _flip(output / "shard-00003.parquet", 1000)
    lines: list[str] = []

    def report(progress: Progress) -> None:
        lines.extend([progress.line] if progress.line else [])

    scorer, result = FakeScorer(teacher), None
    result = export_shards(make_config(teacher, output), scorer, worker(), StopSignal(), report=report)
    redone = [line.split(":")[0] for line in lines if "pairs per second" in line]
    assert redone == ["shard-00001.parquet", "shard-00003.parquet"]
    assert 0 < result.num_new_pairs < sum(entry.rows or 0 for entry in result.manifest.files)
    (aside,) = (output / "quarantine").iterdir()
    assert any("shard-00003.parquet: damaged" in line and str(aside) in line for line in lines)
    assert files_of(output) == files_of(finished)
    assert verify_artifact(output) == []


def test_a_shard_lost_after_completion_is_redone(finished: Path, teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    shutil.copytree(finished, output)
    (output / "shard-00002.parquet").unlink()
    assert not is_finished(make_config(teacher, output))
    export(teacher, output)
    assert files_of(output) == files_of(finished)


@pytest.mark.parametrize(
    "name",
    [
        "shard-00004.parquet",
        "manifest.json",
        ".work/shard-00002/*.json",
        ".work/plan/entries.bin",
        ".work/plan/plan.json",
    ],
)
def test_a_flipped_bit_is_repaired(finished: Path, teacher: Path, tmp_path: Path, name: str) -> None:
    """In any file of a finished export; one in a file that readers see is noticed before."""
    output = tmp_path / "labels"
    shutil.copytree(finished, output)
    config = make_config(teacher, output)
    (path,) = output.glob(name)
    data = path.read_bytes()
    _flip(path, data.index(b'"temperature": 1') + 15 if name == "manifest.json" else len(data) // 2)
    assert is_finished(config) == name.startswith(".work")
    if name.startswith("shard"):
        (fault,) = verify_artifact(output)
        assert f"{name}: sha256" in fault
        assert "the file is damaged" in fault
    export(teacher, output)
    assert files_of(output) == files_of(finished)
    assert is_finished(config)


def test_a_label_that_is_not_finite_stops_with_its_pair(teacher: Path, tmp_path: Path) -> None:
    pair = pairs_of(read_corpus(bundled_sample("valid")).dialogues[0], "fold1+neutral")[2]
    output = tmp_path / "labels"
    with pytest.raises(LabelError, match=f"pair {pair.id}: logits .*nan.* not all finite"):
        export_shards(
            make_config(teacher, output), FakeScorer(teacher, poison=pair.id), worker(), StopSignal()
        )
    assert not (output / "manifest.json").exists()


def test_a_teacher_of_another_corpus_is_refused(teacher: Path, tmp_path: Path) -> None:
    other = {"train": bundled_sample("test"), "valid": bundled_sample("valid")}
    with pytest.raises(ArtifactError, match=r"trained with another corpus_train .*allow_other_corpus: true"):
        export(teacher, tmp_path / "labels", corpus=other)
    assert not (tmp_path / "labels").exists()
    export(teacher, tmp_path / "labels", corpus=other, allow_other_corpus=True)


def test_a_teacher_of_several_training_files_labels_some_of_them(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    """Its labels of each file are those of an export of that file alone; `show` finds both files again."""
    joint = tmp_path / "joint"
    shutil.copytree(teacher, joint)
    files = (bundled_sample("train"), bundled_sample("test"))
    inputs = input_checksums(corpus_train=files, corpus_valid=bundled_sample("valid"))
    write_manifest(joint, "teacher", config_hash="0" * 64, inputs=inputs, files=["adapter.txt"])
    corpus = {"train": files, "valid": bundled_sample("valid")}
    export(joint, tmp_path / "both", corpus=corpus)
    manifest = read_manifest(tmp_path / "both", "soft-labels")
    assert set(manifest.inputs) == {"teacher", "corpus_train", "corpus_train_1", "corpus_valid"}
    assert labelled_corpora(tmp_path / "both", manifest) == [*files, bundled_sample("valid")]
    before = read_manifest(finished, "soft-labels").details["num_pairs"]
    assert manifest.details["num_pairs"]["train"] == before["train"] + before["test"]
    for file in files:
        export(joint, tmp_path / file.stem, corpus={"train": file, "valid": bundled_sample("valid")})
    with pytest.raises(ArtifactError, match="trained with another corpus_train"):
        export(teacher, tmp_path / "other", corpus=corpus)


def test_a_directory_of_other_work_is_refused(finished: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"soft-labels directory of another config .* choose another output"
    ):
        export(teacher, finished, num_shards=4)
    output = tmp_path / "unfinished"
    with pytest.raises(Stopped):
        export_shards(make_config(teacher, output), FakeScorer(teacher), worker(), StopAfter(3))
    with pytest.raises(ArtifactError, match=r"unfinished soft-labels of other work"):
        export(teacher, output, num_shards=4)
    scorer = FakeScorer(teacher, lineage={"prompt_version": "2", "teacher": "fake"})
    with pytest.raises(ArtifactError, match=r"other work \(another lineage\)"):
        export_shards(make_config(teacher, output), scorer, worker(), StopSignal())
    strange = tmp_path / "strange"
    strange.mkdir()
    shutil.copy(finished / "shard-00000.parquet", strange)
    with pytest.raises(
        ArtifactError, match=r"holds shard-00000.parquet but no record of the work that wrote it"
    ):
        export(teacher, strange)


def test_a_directory_of_another_kind_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    write_manifest(tmp_path, "student", config_hash="0", inputs={}, files=["a.txt"])
    with pytest.raises(ArtifactError, match="holds a student, expected a soft-labels"):
        export(teacher, tmp_path)


def test_a_full_disk_loses_nothing(
    finished: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "labels"
    written: list[Path] = []

    def full(temporary: Path, path: Path) -> bool:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        return publish(temporary, path)

    monkeypatch.setattr("kdecs.soft_labels.export.publish", full)
    with pytest.raises(OSError, match="No space left"):
        export(teacher, output)
    assert sorted(output.glob("shard-*.parquet")) == sorted(written)
    assert list(output.glob(".*.tmp")) == []
    monkeypatch.undo()
    result = export(teacher, output)
    assert result.num_new_pairs < sum(entry.rows or 0 for entry in result.manifest.files)
    assert files_of(output) == files_of(finished)


def test_the_same_pair_in_two_splits_is_exported_twice(teacher: Path, tmp_path: Path) -> None:
    paths = {"train": bundled_sample("valid"), "valid": bundled_sample("valid")}
    result = export(teacher, tmp_path / "labels", corpus=paths, allow_other_corpus=True)
    assert result.manifest.details["num_pairs"]["train"] == result.manifest.details["num_pairs"]["valid"]


def test_progress_counts_to_the_end(teacher: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    export_shards(
        make_config(teacher, tmp_path / "labels"),
        FakeScorer(teacher),
        worker(),
        StopSignal(),
        report=seen.append,
    )
    done = np.array([progress.pairs_done for progress in seen])
    assert (np.diff(done) >= 0).all()
    assert done[-1] == seen[-1].pairs_total
    assert sum(progress.line is not None for progress in seen) == 5


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def test_json_lines_give_the_labels_of_the_json_file(finished: Path, teacher: Path, tmp_path: Path) -> None:
    """Streamed, with memory for a block of dialogues alone; the config hash differs, the shards do not."""
    paths = {}
    for split in ("train", "valid", "test"):
        paths[split] = tmp_path / f"{split}.jsonl"
        value = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        paths[split].write_text(
            "".join(json.dumps({"id": k, "utterances": v[0]}) + "\n" for k, v in value.items())
        )
    output = tmp_path / "labels"
    export(teacher, output, corpus=paths, allow_other_corpus=True)
    found, expected = files_of(output), files_of(finished)
    del found["manifest.json"], expected["manifest.json"]
    assert found == expected


def test_a_shard_damaged_while_others_are_labelled_is_found_before_the_manifest(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels"
    flipped: list[int] = []

    def damage() -> None:
        last = output / ".work" / "shard-00003"
        if list(last.glob("*.json")) and not flipped:
            flipped.append(500)
            _flip(output / "shard-00001.parquet", 500)

    export_shards(make_config(teacher, output), FakeScorer(teacher, on_batch=damage), worker(), StopSignal())
    assert len(list((output / "quarantine").iterdir())) == 1
    assert files_of(output) == files_of(finished)


def test_every_flipped_byte_of_a_manifest_is_noticed(finished: Path, teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    shutil.copytree(finished, output)
    config = make_config(teacher, output)
    whole = (output / "manifest.json").read_bytes()
    rng = random.Random(1)
    for position in rng.sample(range(len(whole)), 60):
        _flip(output / "manifest.json", position)
        if is_finished(config):  # white space, or a hexadecimal digit's case
            assert read_manifest(output) == read_manifest(finished)
        (output / "manifest.json").write_bytes(whole)


def test_top_logits_are_exported_with_their_tokenizer(finished: Path, teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    result = export(teacher, output, top_k=3)
    details = result.manifest.details
    assert (details["top_k"], details["tokenizer_sha256"]) == (3, "f" * 64)
    words = tuple(details["answer_words"])
    scorer = FakeScorer(teacher)
    pairs = {p.id: p for split in ("train", "valid", "test") for d in read_corpus(bundled_sample(split)).dialogues
             for p in pairs_of(d, "fold1+neutral")}  # fmt: skip
    for entry in result.manifest.files:
        table, plain = read_shard(output / entry.path, words), read_shard(finished / entry.path, words)
        np.testing.assert_array_equal(table.logits, plain.logits)
        assert table.top_ids is not None
        assert table.top_logits is not None
        assert table.top_ids.shape == (len(table), 3)
        expected = scorer.score_with_top([pairs[pair_id] for pair_id in table.pair_ids], 3)
        np.testing.assert_array_equal(table.top_ids, expected[2])
        np.testing.assert_array_equal(table.top_logits, expected[3])


def test_the_agreement_is_that_of_the_labels_with_gold(finished: Path) -> None:
    """The counts that shards add up, against the scores over all valid pairs at once."""
    manifest = read_manifest(finished)
    words = tuple(manifest.details["answer_words"])
    tables = [read_shard(finished / entry.path, words) for entry in manifest.files]
    by_id = {
        (split, pair_id): logits_A
        for table in tables
        for split, pair_id, logits_A in zip(table.splits, table.pair_ids, table.logits, strict=True)
    }
    for split in ("train", "valid"):
        pairs = [p for d in read_corpus(bundled_sample(split)).dialogues for p in pairs_of(d, "fold1")]
        says = [
            np.exp(by_id[split, p.id][:4].astype(float)).sum() > np.exp(by_id[split, p.id][4]) for p in pairs
        ]
        counts = PairCounts.of([p.is_cause for p in pairs], says)
        assert manifest.details["agreement"][split] == counts.scores()


def test_the_warning_of_long_shards_names_a_number_of_shards() -> None:
    """At 5 pairs per second 36,000 pairs take two hours: twelve times ten minutes."""
    line = long_shard_warning(8, num_pairs=36_000, num_scored=500, seconds=100)
    assert "takes 2.0 hours" in str(line)
    assert "num_shards: 96 " in str(line)
    assert long_shard_warning(8, num_pairs=18_000, num_scored=500, seconds=100) is None  # an hour, not longer
    assert long_shard_warning(8, num_pairs=36_000, num_scored=256, seconds=59) is None  # too early to tell
    assert long_shard_warning(8, num_pairs=36_000, num_scored=0, seconds=100) is None
    many = long_shard_warning(60_000, num_pairs=36_000, num_scored=500, seconds=100)
    assert "num_shards: 100000 " in str(many)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_export_warns_once_per_launch(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(exporting, "MEASURED_AFTER_S", 0.0)
    monkeypatch.setattr(exporting, "LONG_SHARD_S", 1e-9)
    lines: list[str] = []

    def report(progress: Progress) -> None:
        lines.extend([progress.line] if progress.line else [])

    config = make_config(teacher, tmp_path / "labels", num_shards=2)
    export_shards(config, FakeScorer(teacher), worker(rank, 2), StopSignal(), report=report)
    assert sum(line.startswith("warning: at ") for line in lines) == (rank == 0)
