"""`kdecs soft-labels show`: figures against slow loops, files that other tools open, refusals."""

import gc
import itertools
import json
import math
import shutil
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_teacher import FakeScorer, make_config, worker
from label_directories import (
    WORDS,
    make_labels,
    make_table,
    read_shard,
    sample_labels,
    sample_pairs,
    write_label_manifest,
)
from typer.testing import CliRunner

from kdecs.cli import app
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import DependencyError, LabelError
from kdecs.evaluation.counts import PairCounts
from kdecs.process import StopSignal
from kdecs.soft_labels.corpora import pair_batches
from kdecs.soft_labels.export import export_shards
from kdecs.soft_labels.inspect.calibration import NUM_BINS, SCORES, TEMPERATURES, GoldSums, LabelSums


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_labels(tmp_path_factory.mktemp("show") / "labels", seed=3)


def softmax(logits: np.ndarray, tau: float) -> list[float]:
    powers = [math.exp(float(x) / tau) for x in logits]
    return [power / sum(powers) for power in powers]


def test_figures_are_those_of_a_loop(labels: Path) -> None:
    """Oracle: every pair on its own in plain Python."""
    result = CliRunner().invoke(
        app, ["soft-labels", "show", str(labels), "--corpus", str(bundled_sample("valid")), "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    table = read_shard(labels / "shard-00001.parquet", WORDS)
    assert found["splits"]["valid"]["num_pairs"] == len(table)
    for tau in TEMPERATURES:
        entropy = [-sum(p * math.log(p) for p in softmax(row, tau)) for row in table.logits]
        assert found["splits"]["valid"]["entropy"][str(tau)] == pytest.approx(np.mean(entropy), rel=1e-6)
    rows = dict(zip(table.pair_ids, table.logits, strict=True))
    pairs = [
        pair
        for pair in sample_pairs("valid")
        if pair.dialogue.utterances[pair.target - 1].evidence is not None
    ]
    gold = found["gold"][str(bundled_sample("valid"))]
    assert (gold["num_pairs"], gold["missing"]) == (len(pairs), 0)
    for tau in TEMPERATURES:
        p_cause = [sum(softmax(rows[pair.id], tau)[:4]) for pair in pairs]
        bins: dict[int, list[int]] = {}
        for n, p in enumerate(p_cause):
            bins.setdefault(min(int(p * NUM_BINS), NUM_BINS - 1), []).append(n)
        ece = sum(
            len(b)
            / len(pairs)
            * abs(np.mean([p_cause[n] for n in b]) - np.mean([pairs[n].is_cause for n in b]))
            for b in bins.values()
        )
        nll = -np.mean(
            [math.log(p if pair.is_cause else 1 - p) for p, pair in zip(p_cause, pairs, strict=True)]
        )
        assert gold["calibration"][str(tau)]["ece"] == pytest.approx(ece, abs=1e-9)
        assert gold["calibration"][str(tau)]["nll"] == pytest.approx(nll, rel=1e-6)
        if tau == 1:
            assert [row["pairs"] for row in gold["reliability"]] == [len(bins[b]) for b in sorted(bins)]
            counts = PairCounts.of([pair.is_cause for pair in pairs], [p > 0.5 for p in p_cause])
            assert gold["agreement"]["macro_f1"] == pytest.approx(counts.scores()["macro_f1"])
    first = [int(np.argmax(rows[pair.id])) for pair in pairs]
    for place, word in enumerate(WORDS):
        hits = [pair.is_cause for pair, a in zip(pairs, first, strict=True) if a == place]
        assert gold["words"][word]["most_likely"] == len(hits)
        assert gold["words"][word]["most_likely_causes"] == sum(hits)


def test_perfect_and_hopeless_labels_have_known_calibration() -> None:
    sums = GoldSums(WORDS)
    sure = np.zeros((10, 5), np.float32)
    sure[:, 4] = -200.0  # p(cause) = 1
    sums.add(sure, np.array([True] * 10))
    assert sums.as_dict()["calibration"]["1.0"]["ece"] == pytest.approx(0)
    sums.add(sure, np.array([False] * 10))
    assert sums.as_dict()["calibration"]["1.0"]["ece"] == pytest.approx(0.5)
    uniform = LabelSums(WORDS)
    uniform.add(np.zeros((3, 5), np.float32), np.full(3, math.log(0.25), np.float32))
    found = uniform.as_dict()
    assert found["entropy"]["8.0"] == pytest.approx(math.log(5)) == found["max_entropy"]
    assert found["rest_mass"] == pytest.approx(0.25)


def test_batches_do_not_change_the_sums() -> None:
    rng = np.random.default_rng(0)
    logits, gold = rng.normal(size=(1000, 5)).astype(np.float32), rng.random(1000) < 0.4
    whole, parts = GoldSums(WORDS), GoldSums(WORDS)
    whole.add(logits, gold)
    for start in range(0, 1000, 77):
        parts.add(logits[start : start + 77], gold[start : start + 77])
    assert json.dumps(parts.as_dict())[:200] == json.dumps(whole.as_dict())[:200]
    assert parts.reliability.ece == pytest.approx(whole.reliability.ece)


def test_tables_and_plot(labels: Path, tmp_path: Path) -> None:
    plot = tmp_path / "reliability.png"
    arguments = ["soft-labels", "show", str(labels), "--corpus", str(bundled_sample("train"))]
    result = CliRunner().invoke(app, [*arguments, "--output", str(plot)])
    assert result.exit_code == 0, result.output
    for text in ("because", "macro F1", "Reliability at τ = 1", "entropy", "ECE", "lineage: teacher labels"):
        assert text in result.output
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_plot_names_what_is_missing(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["soft-labels", "show", str(labels), "--corpus", str(bundled_sample("valid"))]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "r.png")])
    assert isinstance(result.exception, DependencyError)
    assert "pip install" in str(result.exception)
    usage = CliRunner().invoke(app, ["soft-labels", "show", str(labels), "--output", str(tmp_path / "r.png")])
    assert usage.exit_code == 2


def test_labels_of_another_corpus_are_refused(tmp_path: Path) -> None:
    make_labels(tmp_path / "other", make_table(["nobody/1/1"]))
    result = CliRunner().invoke(
        app, ["soft-labels", "show", str(tmp_path / "other"), "--corpus", str(bundled_sample("valid"))]
    )
    assert isinstance(result.exception, LabelError)
    assert "labels none of the" in str(result.exception)


def show(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["soft-labels", "show", *map(str, arguments)])


def test_alone_it_compares_with_the_corpora_that_were_labelled(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of config.json, as long as they are the very files; and what the export itself counted."""
    paths = {split: tmp_path / f"{split}.json" for split in ("train", "valid")}
    for split, path in paths.items():
        shutil.copy(bundled_sample(split), path)
    output = tmp_path / "labels"
    config = make_config(teacher, output, corpus=paths)
    export_shards(config, FakeScorer(teacher), worker(), StopSignal())
    found = json.loads(show(output, "--json").stdout)
    assert found["gold"].keys() == {str(path) for path in paths.values()}
    agreement = {split: found["gold"][str(path)]["agreement"] for split, path in paths.items()}
    assert found["agreement"] == {split: pytest.approx(item) for split, item in agreement.items()}
    assert show(output, "--output", tmp_path / "r.png").exit_code == 0
    paths["train"].write_text(paths["train"].read_text() + "\n")
    paths["valid"].unlink()
    result = show(output)
    assert result.exit_code == 0
    assert "pass --corpus FILE" in result.output
    macro_f1 = agreement["valid"]["macro_f1"]
    assert "valid, agreement with gold at export: positive F1" in result.output
    assert f"macro F1 {macro_f1:.2f}" in result.output


def test_a_table_maps_labels_of_the_corpus_own(labels: Path, tmp_path: Path) -> None:
    corpus, table = tmp_path / "own.json", tmp_path / "table.json"
    corpus.write_text(bundled_sample("valid").read_text().replace('"happiness"', '"joy"'))
    table.write_text('{"joy": "happiness"}')
    assert "found 'joy'" in str(show(labels, "--corpus", corpus).exception)
    mapped, plain = (
        json.loads(show(labels, "--corpus", *arguments, "--json").stdout)["gold"]
        for arguments in ((corpus, "--table", table), (bundled_sample("valid"),))
    )
    assert list(mapped.values()) == list(plain.values())


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"corpus": {"train": 7, "valid": "/dev/zero"}}', '{"train": "\\u0000"}', "\0", "[]"],
)
def test_no_config_of_a_stranger_stops_it(labels: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(labels, tmp_path / "labels")
    (tmp_path / "labels" / "config.json").write_text(text)
    assert show(tmp_path / "labels", "--json").exit_code == 0


@pytest.mark.parametrize("words", [("yes", "no"), (*WORDS, "so"), (*WORDS[:4], "because")])
def test_words_that_cannot_be_compared_with_gold_are_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    logits = np.zeros((2, len(words)), np.float32)
    table = replace(make_table(["d/1/1", "d/2/1"]), logits=logits)
    directory = make_labels(tmp_path / "labels", table, words=words)
    result = show(directory)
    assert isinstance(result.exception, LabelError)
    assert f"labels over {len(words)} answer words, expected 5 different ones" in str(result.exception)


def test_what_a_directory_says_steers_no_terminal(tmp_path: Path) -> None:
    words = ("[/x]", "[red]as", "\x1b[2J", "thus", "other")
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]), words=words)
    result = show(directory)
    assert result.exit_code == 0, result.exception
    assert "[/x]" in result.output
    assert "[red]as" in result.output
    assert "\x1b" not in result.output


def test_scores_that_are_none_are_refused(tmp_path: Path) -> None:
    directory = make_labels(tmp_path / "labels", make_table(["d/1/1"]))
    for agreement in (7, {"valid": 7}, {"valid": {"macro_f1": 1}}, {"valid": dict.fromkeys(SCORES, "x")}):
        details = {"answer_words": list(WORDS), "num_pairs": {"train": 1}, "agreement": agreement}
        write_label_manifest(directory, {"shard-00000.parquet": 1}, details)
        assert "details.agreement: expected scores by split" in str(show(directory).exception)


def test_memory_does_not_grow_with_json_lines(tmp_path: Path) -> None:
    """What is held far into a file, and not yet far; ids are not kept either."""
    value = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    utterances = next(iter(value.values()))[0]

    path = tmp_path / "train.jsonl"
    with path.open("w") as file:
        for number in range(2000):
            name = f"{number:05d}" + "x" * 200
            file.write(json.dumps({"id": name, "utterances": utterances}) + "\n")
    pairs = itertools.chain.from_iterable(pair_batches(path, "fold1"))

    def held_after(num_pairs: int) -> int:
        assert len(list(itertools.islice((pair.target for pair in pairs), num_pairs))) == num_pairs
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    early, late = held_after(200), held_after(2000)
    tracemalloc.stop()
    # 1,800 ids would be 457,000 bytes; what other threads of the process allocate meanwhile is counted too.
    assert late - early < 150_000


def test_pandas_opens_a_directory(labels: Path) -> None:
    frame = pd.concat(map(pd.read_parquet, sorted(labels.glob("shard-*.parquet"))))
    assert len(frame) == len(sample_pairs("train")) + len(sample_pairs("valid"))
    p = np.exp(np.stack(frame["logits"]))
    assert (p / p.sum(axis=1, keepdims=True)).shape == (len(frame), 5)
    assert set(frame["split"]) == {"train", "valid"}


def test_duckdb_opens_a_directory(labels: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    query = f"""
        SELECT split, count(*), avg(exp(log_rest_mass)), avg(logits[5])
        FROM read_parquet('{labels}/shard-*.parquet') GROUP BY split ORDER BY split
    """
    rows = duckdb.sql(query).fetchall()
    frame = pd.concat(map(pd.read_parquet, sorted(labels.glob("shard-*.parquet"))))
    for split, count, mass, other in rows:
        part = frame[frame["split"] == split]
        assert count == len(part)
        assert mass == pytest.approx(np.exp(part["log_rest_mass"]).mean(), rel=1e-6)
        assert other == pytest.approx(np.stack(part["logits"])[:, 4].mean(), rel=1e-5)
