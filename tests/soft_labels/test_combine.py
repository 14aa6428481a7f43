"""Several teachers as one: every rule against a loop over pairs, refusals, and a reader of the result."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from label_directories import (
    WORDS,
    by_pair,
    make_labels,
    make_table,
    names_of,
    read_shard,
    sample_labels,
    sample_pairs,
)
from typer.testing import CliRunner

from kdecs.artifact import content_checksum, read_manifest, verify_artifact
from kdecs.cli import app
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import ArtifactError, ConfigError, LabelError
from kdecs.soft_labels.derive.combine import combine, combined_labels
from kdecs.soft_labels.derive.config import CombineConfig
from kdecs.soft_labels.labels import SoftLabels


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("parents")
    return [sample_labels(root / f"teacher-{seed}", seed=seed, tilt=seed / 2) for seed in range(3)]


def softmax(logits: np.ndarray) -> list[float]:
    powers = [math.exp(float(x)) for x in logits]
    return [power / sum(powers) for power in powers]


def expected(
    rule: str, logits: list[np.ndarray], rest: list[float], weights: list[float], split: str, is_cause: bool
) -> tuple[list[float], float]:
    """Probabilities and rest mass of one pair, as the module's head defines them."""
    p = [softmax(row) for row in logits]
    if rule == "most-confident":
        entropy = [-sum(x * math.log(x) for x in row) for row in p]
        best = entropy.index(min(entropy))
        return p[best], math.exp(rest[best])
    teachers = list(range(len(p)))
    if rule == "gold-correct" and split == "train":
        right = [k for k in teachers if (sum(p[k][:4]) > p[k][4]) == is_cause]
        teachers = right or teachers
    total = sum(weights[k] for k in teachers)
    w = {k: weights[k] / total for k in teachers}
    mass = sum(w[k] * math.exp(rest[k]) for k in teachers)
    if rule == "mean-logit":
        powers = [math.exp(sum(w[k] * math.log(p[k][a]) for k in teachers)) for a in range(5)]
        return [x / sum(powers) for x in powers], mass
    return [sum(w[k] * p[k][a] for k in teachers) for a in range(5)], mass


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("mean-probability", ()),
        ("mean-probability", (1.0, 2.0, 5.0)),
        ("mean-logit", ()),
        ("mean-logit", (3.0, 1.0, 1.0)),
        ("most-confident", ()),
        ("gold-correct", ()),
        ("gold-correct", (1.0, 4.0, 1.0)),
    ],
)
def test_each_rule_is_its_definition(
    parents: list[Path], tmp_path: Path, rule: str, weights: tuple[float, ...]
) -> None:
    train = bundled_sample("train") if rule == "gold-correct" else None
    config = CombineConfig(
        labels=tuple(parents), rule=rule, weights=weights, train=train, output=tmp_path / "out"
    )
    combine(config, cache_dir=tmp_path / "cache")
    rows = [by_pair([read_shard(p / f"shard-{n:05d}.parquet", WORDS) for n in (0, 1)]) for p in parents]
    gold = {p.id: p.is_cause for split in ("train", "valid") for p in sample_pairs(split)}
    found = by_pair([read_shard(tmp_path / "out" / "shard-00000.parquet", WORDS)])
    assert found.keys() == rows[0].keys()
    for key, (logits, log_rest) in found.items():
        wanted, mass = expected(
            rule,
            [r[key][0] for r in rows],
            [r[key][1] for r in rows],
            list(weights) or [1.0] * 3,
            key[0],
            gold[key[1]],
        )
        np.testing.assert_allclose(softmax(logits), wanted, rtol=2e-5)
        assert math.exp(log_rest) == pytest.approx(mass, rel=2e-5)


def test_the_result_is_a_directory_like_any_other(parents: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "both"
    arguments = ["soft-labels", "combine", *map(str, parents[:2]), "--output", str(output)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, ["verify", str(output)]).exit_code == 0
    labels = SoftLabels.open(output, tmp_path / "cache")
    labels.require_answer_words(WORDS)
    assert len(labels.rows_of(*names_of(sample_pairs("train")), split="train")) == len(sample_pairs("train"))
    manifest = read_manifest(output, "soft-labels")
    assert manifest.inputs == {
        "labels_0": content_checksum(parents[0]),
        "labels_1": content_checksum(parents[1]),
    }
    assert [parent["lineage"] for parent in manifest.details["parents"]] == [
        {"teacher": "teacher-0"},
        {"teacher": "teacher-1"},
    ]
    before = (output / "manifest.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, arguments).exit_code == 0  # the same command again: complete
    assert (output / "manifest.json").stat().st_mtime_ns == before
    other = CliRunner().invoke(app, [*arguments, "--rule", "mean-logit"])
    assert isinstance(other.exception, ArtifactError)
    assert verify_artifact(output) == []


def test_damaged_labels_are_written_again_by_the_same_command(parents: list[Path], tmp_path: Path) -> None:
    config = CombineConfig(labels=tuple(parents[:2]), output=tmp_path / "both")
    combine(config, cache_dir=tmp_path / "cache")
    shard = config.output / "shard-00000.parquet"
    whole = shard.read_bytes()
    for damaged in (whole[:400] + bytes([whole[400] ^ 1]) + whole[401:], whole[:400]):
        shard.write_bytes(damaged)
        combine(config, cache_dir=tmp_path / "cache")
        assert shard.read_bytes() == whole
        assert verify_artifact(config.output) == []


def test_shards_of_unknown_origin_are_left_alone(parents: list[Path], tmp_path: Path) -> None:
    """As an export leaves them: what lies in the output may be somebody's only copy."""
    output = tmp_path / "mine"
    output.mkdir()
    shutil.copy(parents[0] / "shard-00000.parquet", output / "shard-00007.parquet")
    config = CombineConfig(labels=tuple(parents[:2]), output=output)
    with pytest.raises(ArtifactError, match=r"holds shard-00007\.parquet but no record of the work"):
        combine(config, cache_dir=tmp_path / "cache")
    assert [path.name for path in output.iterdir()] == ["shard-00007.parquet"]


def test_gold_decides_nothing_outside_training(parents: list[Path]) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 50, 5)).astype(np.float32)
    rest = np.full((3, 50), -1, np.float32)
    blind, _ = combined_labels("gold-correct", logits, rest, [1, 1, 1], np.full(50, -1))
    mean, _ = combined_labels("mean-probability", logits, rest, [1, 1, 1])
    np.testing.assert_array_equal(blind, mean)
    seen, _ = combined_labels("gold-correct", logits, rest, [1, 1, 1], rng.integers(0, 2, 50))
    assert not np.array_equal(seen, mean)


def test_equal_teachers_give_themselves() -> None:
    logits = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    rest = np.full(20, -0.5, np.float32)
    for rule in ("mean-probability", "mean-logit", "most-confident"):
        mixed, mass = combined_labels(rule, np.stack([logits] * 3), np.stack([rest] * 3), [1, 2, 3])
        np.testing.assert_allclose([softmax(r) for r in mixed], [softmax(r) for r in logits], rtol=1e-6)
        np.testing.assert_allclose(mass, rest, rtol=1e-6)


def test_directories_of_other_pairs_or_words_are_refused(tmp_path: Path) -> None:
    a = make_labels(tmp_path / "a", make_table(["d/1/1", "d/2/1"]))
    fewer = make_labels(tmp_path / "fewer", make_table(["d/1/1"]))
    other_split = make_labels(tmp_path / "split", make_table(["d/1/1", "d/2/1"], split="test"))
    words = make_labels(tmp_path / "words", make_table(["d/1/1", "d/2/1"]), words=("so", *WORDS[1:]))
    for second, message in (
        (fewer, f"{fewer}: no soft label for the pair d/2/1"),
        (other_split, "in the split train, 2 of 2"),
        (words, "over the answer words so"),
    ):
        for pair in ((a, second), (second, a)):
            config = CombineConfig(labels=pair, output=tmp_path / "out")
            with pytest.raises(
                LabelError, match=message if second in pair[1:] else "answer words|no soft label"
            ):
                combine(config, cache_dir=tmp_path / "cache")
            assert list((tmp_path / "out").glob("*")) == []


def test_rules_that_lack_something_are_refused(parents: list[Path], tmp_path: Path) -> None:
    base = ["soft-labels", "combine", *map(str, parents), "--output", str(tmp_path / "out")]
    for extra, message in (
        (["--rule", "gold-correct"], "needs the training corpus"),
        (["--train", str(bundled_sample("train"))], "no other rule takes one"),
        (["--weight", "1"], "1 weights for 3 directories"),
        (["--rule", "most-confident", *["--weight", "1"] * 3], "weights have no effect"),
    ):
        result = CliRunner().invoke(app, [*base, *extra])
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)
    alone = CliRunner().invoke(
        app, ["soft-labels", "combine", str(parents[0]), "--output", str(tmp_path / "out")]
    )
    assert alone.exit_code == 2 and "expected two or more" in alone.output
    config = CombineConfig(
        labels=tuple(parents), rule="gold-correct", train=bundled_sample("valid"), output=tmp_path / "out"
    )
    with pytest.raises(LabelError, match="is not in the training corpus"):
        combine(config, cache_dir=tmp_path / "cache")
