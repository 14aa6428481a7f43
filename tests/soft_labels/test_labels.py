import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_teacher import FakeScorer, make_config, worker
from label_directories import WORDS, make_labels, make_table, names_of, read_shard, sample_pairs

from kdecs.artifact import read_manifest, with_checksum
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import ArtifactError, LabelError
from kdecs.process import StopSignal
from kdecs.soft_labels.export import export_shards
from kdecs.soft_labels.format import ShardTable
from kdecs.soft_labels.labels import SoftLabels


def table(ids: list[str], splits: list[str], value: float = 0.5) -> ShardTable:
    return replace(make_table(ids, value=value), splits=splits)


def test_labels_are_those_of_the_shards_whatever_the_order(finished: Path, tmp_path: Path) -> None:
    """Oracle: a dict filled from the shards, row by row."""
    expected: dict[tuple[str, str], tuple[np.ndarray, float]] = {}
    for path in finished.glob("shard-*.parquet"):
        t = read_shard(path, WORDS)
        for row, key in enumerate(zip(t.pair_ids, t.pair_hashes, strict=True)):
            expected[key] = (t.logits[row], t.log_rest_mass[row])
    labels = SoftLabels.open(finished, tmp_path)
    wanted = [*sample_pairs("test"), *sample_pairs("train"), *sample_pairs("valid")]
    random.Random(0).shuffle(wanted)
    rows = labels.rows_of(*names_of(wanted))
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(labels.logits(rows), np.stack([expected[p.id, p.hash][0] for p in wanted]))
    np.testing.assert_array_equal(
        labels.log_rest_mass(rows), np.array([expected[p.id, p.hash][1] for p in wanted])
    )
    assert labels.answer_words == WORDS
    assert len(labels) == len(expected) == len(set(rows.tolist()))
    assert labels.logits(rows).flags.writeable


def test_missing_pairs_are_named_and_counted(finished: Path, tmp_path: Path) -> None:
    labels = SoftLabels.open(finished, tmp_path)
    some = sample_pairs()[:5]
    ids, hashes = [p.id for p in some], [p.hash for p in some]
    hashes[2], ids[4] = "f" * 32, "nobody/1/1"
    with pytest.raises(LabelError, match=f"no soft label for the pair {ids[2]} .*2 of 5 pairs are missing"):
        labels.rows_of(ids, hashes)
    with pytest.raises(LabelError, match="in the split test, 5 of 5"):
        labels.rows_of(*names_of(some), split="test")
    assert len(labels.rows_of([], [])) == 0


def test_other_answer_words_are_refused(finished: Path, tmp_path: Path) -> None:
    labels = SoftLabels.open(finished, tmp_path)
    labels.require_answer_words(WORDS)
    with pytest.raises(
        LabelError, match="over the answer words because, as, since, thus, other, expected so"
    ):
        labels.require_answer_words(("so",))


def test_a_pair_of_two_splits_is_told_apart(tmp_path: Path) -> None:
    directory = make_labels(
        tmp_path / "made", table(["d/1/1", "e/1/1"], ["test", "test"], 2.0), table(["d/1/1"], ["train"], 1.0)
    )
    labels = SoftLabels.open(directory, tmp_path / "cache")
    key = (["d/1/1"], ["0" * 32])
    assert labels.logits(labels.rows_of(*key))[0, 0] == 1.0
    assert labels.logits(labels.rows_of(*key, split="train"))[0, 0] == 1.0
    assert labels.logits(labels.rows_of(*key, split="test"))[0, 0] == 2.0
    assert labels.logits(labels.rows_of(["e/1/1"], ["0" * 32]))[0, 0] == 2.0


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            [table(["d/1/1"], ["train"]), table(["d/1/1"], ["train"])],
            "the pair d/1/1 occurs twice in one split",
        ),
        ([table(["d/1/1"], ["train"], np.inf)], "labels that are not finite"),
        ([table(["d/1/1"], ["dev"])], "a row of the split 'dev', expected one of train, valid, test"),
    ],
)
def test_labels_that_no_export_writes_are_refused(
    tmp_path: Path, tables: list[ShardTable], message: str
) -> None:
    with pytest.raises((LabelError, ArtifactError), match=message):
        SoftLabels.open(make_labels(tmp_path / "made", *tables), tmp_path / "cache")


def test_empty_labels_open(tmp_path: Path) -> None:
    labels = SoftLabels.open(make_labels(tmp_path / "made", table([], [])), tmp_path / "cache")
    assert len(labels) == 0
    with pytest.raises(LabelError, match="1 of 1 pairs are missing"):
        labels.rows_of(["d/1/1"], ["0" * 32])


def test_a_damaged_shard_is_refused_when_the_file_is_built(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "labels"
    shutil.copytree(finished, directory)
    path = directory / "shard-00002.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"shard-00002.parquet: sha256 .* the file is damaged"):
        SoftLabels.open(directory, tmp_path / "cache")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00002.parquet: missing"):
        SoftLabels.open(directory, tmp_path / "cache")


def test_wrong_directories_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds a teacher, expected a soft-labels"):
        SoftLabels.open(teacher, tmp_path)
    with pytest.raises(ArtifactError, match="no such directory"):
        SoftLabels.open(tmp_path / "nowhere", tmp_path)


def test_the_file_is_built_once_and_again_when_touched(finished: Path, tmp_path: Path) -> None:
    wanted = sample_pairs()[:50]
    first = SoftLabels.open(finished, tmp_path)
    rows = first.rows_of(*names_of(wanted))
    before = first.logits(rows)
    (arrow,) = tmp_path.glob("*.arrow")
    built = arrow.stat().st_mtime_ns
    SoftLabels.open(finished, tmp_path)
    assert arrow.stat().st_mtime_ns == built
    whole = arrow.read_bytes()
    for content in (b"", whole[:1000], whole[:-1], bytes(len(whole))):
        arrow.write_bytes(content)  # in place: another size or mtime
        again = SoftLabels.open(finished, tmp_path)
        np.testing.assert_array_equal(again.logits(again.rows_of(*names_of(wanted))), before)
        assert arrow.read_bytes() == whole
    arrow.with_suffix(".json").write_text("{}")
    assert len(SoftLabels.open(finished, tmp_path)) == len(first)


def test_a_silent_flip_in_the_built_file_is_found_on_request(finished: Path, tmp_path: Path) -> None:
    first = SoftLabels.open(finished, tmp_path)
    (arrow,) = tmp_path.glob("*.arrow")
    stat, whole = arrow.stat(), arrow.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    arrow.write_bytes(data)
    os.utime(arrow, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    SoftLabels.open(finished, tmp_path, verify_cache=True)
    assert arrow.read_bytes() == whole
    assert len(first) > 0


def _read(directory: Path, cache: Path, results: object) -> None:
    labels = SoftLabels.open(directory, cache)
    results.put(float(labels.logits(labels.rows_of(*names_of(sample_pairs()))).sum()))  # type: ignore[attr-defined]


def test_readers_that_start_together_build_one_file(finished: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [context.Process(target=_read, args=(finished, tmp_path, results)) for _ in range(4)]
    for reader in readers:
        reader.start()
    sums = {results.get(timeout=60) for _ in readers}
    for reader in readers:
        reader.join(60)
    assert len(sums) == 1
    assert len(list(tmp_path.glob("*.arrow"))) == 1
    assert list(tmp_path.glob(".*.tmp")) == []


def test_labels_are_mapped_and_not_copied(finished: Path, tmp_path: Path) -> None:
    labels = SoftLabels.open(finished, tmp_path)
    assert not labels._logits_NA.flags.writeable
    assert not labels._logits_NA.flags.owndata
    (arrow,) = tmp_path.glob("*.arrow")
    assert str(arrow) in Path("/proc/self/maps").read_text()


def test_labels_of_a_part_cover_the_part_alone(teacher: Path, tmp_path: Path) -> None:
    corpus = {s: bundled_sample(s) for s in ("train", "valid")} | {"train_share": 0.4}
    config = make_config(teacher, tmp_path / "labels", corpus=corpus)
    export_shards(config, FakeScorer(teacher), worker(), StopSignal())
    labels = SoftLabels.open(tmp_path / "labels", tmp_path / "cache")
    labels.rows_of(*names_of(sample_pairs("valid")))
    with pytest.raises(LabelError, match="no soft label for the pair"):
        labels.rows_of(*names_of(sample_pairs("train")))


def test_top_logits_are_joined_too(teacher: Path, tmp_path: Path) -> None:
    """Oracle: the shards, row by row; a combined directory has none."""
    config = make_config(teacher, tmp_path / "labels", top_k=3)
    export_shards(config, FakeScorer(teacher), worker(), StopSignal())
    expected = {}
    for path in (tmp_path / "labels").glob("shard-*.parquet"):
        t = read_shard(path, WORDS)
        expected |= {t.pair_ids[n]: (t.top_ids[n], t.top_logits[n]) for n in range(len(t))}
    labels = SoftLabels.open(tmp_path / "labels", tmp_path / "cache")
    wanted = [*sample_pairs("valid"), *sample_pairs("train")]
    ids, logits = labels.top(labels.rows_of(*names_of(wanted)))
    assert (labels.top_k, ids.dtype, logits.dtype) == (3, np.int32, np.float32)
    np.testing.assert_array_equal(ids, np.stack([expected[p.id][0] for p in wanted]))
    np.testing.assert_array_equal(logits, np.stack([expected[p.id][1] for p in wanted]))
    assert len(read_manifest(tmp_path / "labels").files) == 5


def test_top_logits_that_are_not_there_are_refused(finished: Path, tmp_path: Path) -> None:
    labels = SoftLabels.open(finished, tmp_path)
    with pytest.raises(LabelError, match="holds no top logits; export with top_k above 0"):
        labels.top(np.array([0]))
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    for top_k, message in (
        (4, "0 top logits per pair, the manifest says 4"),
        ("4", "details.top_k: found '4'"),
    ):
        manifest = read_manifest(directory)
        changed = with_checksum(manifest.model_copy(update={"details": manifest.details | {"top_k": top_k}}))
        (directory / "manifest.json").write_text(changed.model_dump_json())
        with pytest.raises(ArtifactError, match=message):
            SoftLabels.open(directory, tmp_path / "cache")


def test_a_reader_imports_neither_pandas_nor_torch(finished: Path, tmp_path: Path) -> None:
    """Either would cost every reader more memory than all labels of RECCON."""
    SoftLabels.open(finished, tmp_path)
    script = f"""
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from kdecs.soft_labels.labels import SoftLabels
labels = SoftLabels.open(Path({str(finished)!r}), Path({str(tmp_path)!r}))
labels.logits(labels.find(["d/1/1"], ["0" * 32]))
labels.logits(np.arange(len(labels)))
sys.exit("pandas" in sys.modules or "torch" in sys.modules)
"""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0
