"""Tables made elsewhere: accepted whole, refused in one line, row and pair named."""

import json
import resource
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_directories import WORDS, names_of, sample_pairs
from scipy.special import log_softmax
from typer.testing import CliRunner

from kdecs.artifact import content_checksum, read_manifest
from kdecs.cli import app
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import KdecsError
from kdecs.soft_labels.derive import importing
from kdecs.soft_labels.labels import SoftLabels

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(5)
    return [
        {"pair_id": pair.id, "logits": [float(x) for x in rng.normal(size=5)]}
        for pair in sample_pairs("train")
    ]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(table: Path, output: Path, *extra: str, corpus: str = str(bundled_sample("train"))) -> Any:
    arguments = ["soft-labels", "import", str(table), "--output", str(output), "--corpus", corpus, *extra]
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_table_becomes_a_directory_like_any_other(rows: Rows, tmp_path: Path, suffix: str) -> None:
    shuffled = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))]
    table = write(tmp_path / f"table.{suffix}", shuffled)
    result = run(table, tmp_path / "labels")
    assert result.exit_code == 0, result.exception
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "labels")]).exit_code == 0
    labels = SoftLabels.open(tmp_path / "labels", tmp_path / "cache")
    labels.require_answer_words(WORDS)
    found = labels.logits(labels.rows_of(*names_of(sample_pairs("train")), split="train"))
    np.testing.assert_array_equal(found, np.array([row["logits"] for row in rows], np.float32))
    manifest = read_manifest(tmp_path / "labels")
    assert manifest.inputs["table"] == content_checksum(table) == manifest.details["lineage"]["imported"]
    assert run(table, tmp_path / "labels").exit_code == 0


def test_later_candidates_of_several_training_files(tmp_path: Path) -> None:
    """Imported, combined by gold, and compared with gold: with each pair that a teacher with this reach labels."""
    files = [str(bundled_sample(split)) for split in ("train", "test")]
    dialogues = [d for path in files for d in read_corpus(path).dialogues]
    pairs = [pair for d in dialogues for pair in pairs_of(d, "fold1+neutral", 1)]
    later = [pair.candidate > pair.target for pair in pairs]
    rng = np.random.default_rng(0)
    scores = [[float(x) for x in rng.normal(size=5)] for _ in pairs]
    table = write(
        tmp_path / "table.parquet",
        [{"pair_id": p.id, "logits": s} for p, s in zip(pairs, scores, strict=True)],
    )
    more = ("--corpus", f"train={files[1]}")
    refused = run(table, tmp_path / "labels", *more, corpus=files[0])
    assert f"{sum(later)} rows refer to pairs that are in none" in str(refused.exception)
    shutil.rmtree(tmp_path / "labels")
    made = [tmp_path / "labels", tmp_path / "again"]
    for output in made:
        result = run(table, output, *more, "--after", "1", corpus=files[0])
        assert result.exit_code == 0, result.exception
    assert read_manifest(made[0]).details["candidates_after"] == 1
    arguments = [*map(str, made), "--rule", "gold-correct", "--output", str(tmp_path / "both")]
    arguments += [part for path in files for part in ("--train", path)]
    result = CliRunner().invoke(app, ["soft-labels", "combine", *arguments])
    assert result.exit_code == 0, result.exception
    labels = SoftLabels.open(tmp_path / "both", tmp_path / "cache")
    found = labels.logits(labels.rows_of(*names_of(pairs), split="train"))
    np.testing.assert_allclose(found, log_softmax(np.array(scores), axis=1), atol=1e-5)
    shown = CliRunner().invoke(app, ["soft-labels", "show", str(tmp_path / "both"), "--json"])
    gold = json.loads(shown.stdout)["gold"]
    assert gold.keys() == set(files) and all(scored["missing"] == 0 for scored in gold.values())
    num_pairs = sum(len(pairs_of(d, "fold1", 1)) for d in read_corpus(files[0]).dialogues)
    assert gold[files[0]]["num_pairs"] == num_pairs
    far = run(table, tmp_path / "far", *more, "--after", "2", corpus=files[0])
    assert "--universe fold1+neutral --after 2 lists them" in str(far.exception)


def test_columns_of_probabilities_of_two_splits_with_hashes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    given = []
    for split in ("train", "valid"):
        for pair in sample_pairs(split):
            p = rng.dirichlet(np.ones(5)) * 0.999 + 0.0002
            given.append({"pair_id": pair.id, "pair_hash": pair.hash, "split": split, "log_rest_mass": -2.5})
            given[-1] |= dict(zip(WORDS, p.tolist(), strict=True))
    table = write(tmp_path / "table.parquet", given)
    result = run(
        table,
        tmp_path / "labels",
        "--scores",
        "probabilities",
        "--corpus",
        f"valid={bundled_sample('valid')}",
        corpus=f"train={bundled_sample('train')}",
    )
    assert result.exit_code == 0, result.exception
    labels = SoftLabels.open(tmp_path / "labels", tmp_path / "cache")
    pairs = sample_pairs("valid")
    rows_n = labels.rows_of(*names_of(pairs), split="valid")
    by_id = {(row["split"], row["pair_id"]): row for row in given}
    expected = [[by_id["valid", pair.id][word] for word in WORDS] for pair in pairs]
    np.testing.assert_allclose(np.exp(labels.logits(rows_n)), expected, rtol=1e-5)
    assert set(labels.log_rest_mass(rows_n).tolist()) == {-2.5}


def change(place: int, **values: Any) -> Any:
    return lambda rows: [*rows[:place], rows[place] | values, *rows[place + 1 :]]


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (change(7, logits=[0.0, 1.0]), r"row 8: the pair \S+ has a list of 2, expected 5 scores"),
        (change(7, logits=[0.0, 1.0, 2.0, float("nan"), 1.0]), r"row 8: the pair \S+ has the score nan"),
        (change(7, logits=[0.0, 1.0, 2.0, 1e39, 1.0]), r"row 8: .* has the score 1e\+39"),
        (change(7, logits=[0.0, 1.0, 2.0, True, 1.0]), r"row 8: .* has the score true"),
        (change(7, pair_id=7), "row 8: pair_id is 7, expected text"),
        (lambda rows: rows[:-1], r"lacks the pair \S+ of .*train.json, and 0 more"),
        (lambda rows: [*rows, rows[3]], r"the pair \S+ occurs twice"),
        (
            lambda rows: [*rows, rows[3] | {"pair_id": "x/1/1"}],
            r"1 rows refer to pairs that are in none .* \(first: row \d+, x/1/1\)",
        ),
        (lambda rows: [{"id": row["pair_id"]} for row in rows], "no column pair_id; its columns are id"),
        (lambda rows: [{"pair_id": row["pair_id"]} for row in rows], "no scores, expected a column logits"),
        (lambda rows: [row | {"split": "dev"} for row in rows], "split is 'dev'"),
        (lambda rows: [row | {"log_rest_mass": 1.0} for row in rows], "log_rest_mass is 1.0"),
        (lambda rows: [row | {"pair_hash": "0" * 32} for row in rows], r"lacks the pair \S+ with the hash"),
        (change(7, logits=[0.0, 10**400, 0.0, 0.0, 0.0]), r"row 8: .* has the score 10+…, expected a finite"),
        (lambda rows: [row | {"log_rest_mass": -(10**400)} for row in rows], r"log_rest_mass is -10+…"),
        (lambda rows: [row | {"log_rest_mass": -1e300} for row in rows], r"row 1: log_rest_mass is -1e\+300"),
        (change(7, pair_id="d\ud800/1/1"), r"row 8: pair_id is 'd\\ud800/1/1', expected text"),
        (lambda rows: [{"\udfff": 1} for row in rows], r"no column pair_id; its columns are '\\udfff'"),
        (
            lambda rows: [*rows[:5], {"pair_id": "a"}, *rows[5:]],
            "line 6: has other keys than the line before",
        ),
        (lambda rows: [], "holds no row"),
    ],
)
def test_faulty_tables_are_refused_in_one_line(rows: Rows, tmp_path: Path, alter: Any, message: str) -> None:
    table = write(tmp_path / "table.jsonl", alter(rows))
    result = run(table, tmp_path / "labels")
    assert isinstance(result.exception, KdecsError), result.output
    assert str(table) in str(result.exception)
    assert "\n" not in str(result.exception)
    with pytest.raises(KdecsError, match=message):
        raise result.exception
    assert not (tmp_path / "labels" / "manifest.json").exists()
    assert run(write(table, rows), tmp_path / "labels").exit_code == 0  # mended, the same command


def test_unknown_pairs_are_left_out_on_request(rows: Rows, tmp_path: Path) -> None:
    table = write(tmp_path / "table.jsonl", [*rows, rows[0] | {"pair_id": "x/1/1"}])
    assert run(table, tmp_path / "labels", "--ignore-unknown").exit_code == 0
    assert read_manifest(tmp_path / "labels").details["left_out"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 and then nothing", "not a readable Parquet table"),
        (b"\x80\x04\x95 a pickle", "line 1: not a JSON object"),
        (b"[1, 2]\n", "line 1: not a JSON object"),
        (b'{"pair_id": "a"\n', "line 1: not a JSON object"),
        (b'{"pair_id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1: not a JSON object"),
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    table = tmp_path / "table"
    table.write_bytes(content)
    assert message in str(run(table, tmp_path / "labels").exception)


def test_no_such_files(rows: Rows, tmp_path: Path) -> None:
    assert "no such file" in str(run(tmp_path / "none", tmp_path / "labels").exception)
    table = write(tmp_path / "table.jsonl", rows)
    assert "no such file" in str(run(table, tmp_path / "labels", corpus="none.json").exception)
    again = run(table, tmp_path / "labels", "--corpus", str(bundled_sample("train")))
    assert "is named twice" in str(again.exception)


def test_a_table_in_its_own_output_is_left_alone(rows: Rows, tmp_path: Path) -> None:
    """`import X/shard-00000.parquet --output X` would write over the table; also after an attempt that failed."""
    table = write(tmp_path / "labels" / "shard-00000.parquet", rows)
    before = table.read_bytes()
    assert run(write(tmp_path / "other.parquet", rows), tmp_path / "other").exit_code == 0
    assert "which is an input and might be overwritten" in str(run(table, tmp_path / "labels").exception)
    elsewhere = write(tmp_path / "table.parquet", rows)
    assert "holds shard-00000.parquet but no record of the work" in str(
        run(elsewhere, tmp_path / "labels").exception
    )
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "labels")
    assert "which is an input and might be overwritten" in str(run(table, tmp_path / "labels").exception)
    assert table.read_bytes() == before


def test_a_corpus_may_have_any_name(rows: Rows, tmp_path: Path) -> None:
    corpus = tmp_path / "run=1" / "train.json"
    corpus.parent.mkdir()
    shutil.copy(bundled_sample("train"), corpus)
    table = write(tmp_path / "table.jsonl", rows)
    assert run(table, tmp_path / "labels", corpus=f"train={corpus}").exit_code == 0


def test_an_id_of_two_splits_needs_the_column(rows: Rows, tmp_path: Path) -> None:
    table = write(tmp_path / "table.jsonl", rows)
    result = run(table, tmp_path / "labels", "--corpus", f"test={bundled_sample('train')}")
    assert "is in train and in test; add the column" in str(result.exception)


def test_a_dialogue_that_stands_twice_is_refused(rows: Rows, tmp_path: Path) -> None:
    """Its pairs would stand twice in the labels."""
    value = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    lines = [json.dumps({"id": name, "utterances": nested[0]}) for name, nested in value.items()]
    corpus = tmp_path / "train.jsonl"
    corpus.write_text("\n".join([*lines, lines[3]]))
    result = run(write(tmp_path / "t.jsonl", rows), tmp_path / "labels", corpus=str(corpus))
    assert f"dialogue {list(value)[3]}, field id: found a second dialogue of this id" in str(result.exception)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda line: line.replace('{"pair_id": ', '{"pair_id": "x/1/1", "pair_id": ', 1),
            "key 'pair_id' more than once",
        ),
        (lambda line: line.replace('"logits"', '"logit"', 1), "its columns are pair_id, logit"),
    ],
)
def test_keys_of_json_lines_are_named(rows: Rows, tmp_path: Path, alter: Any, message: str) -> None:
    table = write(tmp_path / "t.jsonl", rows[:1])
    table.write_text(alter(table.read_text()))
    assert message in str(run(table, tmp_path / "labels").exception)


def test_a_place_that_is_no_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.mkdir()
    message = f"{table}: is a directory, expected a Parquet or JSON-lines table"
    assert message in str(run(table, tmp_path / "labels").exception)


def test_parquet_names_the_columns_that_are_there_and_takes_decimals(rows: Rows, tmp_path: Path) -> None:
    frame = pd.DataFrame([{"pair": row["pair_id"], "score": 1.0} for row in rows])
    frame.to_parquet(tmp_path / "odd.parquet")
    assert "no column pair_id; its columns are pair, score" in str(
        run(tmp_path / "odd.parquet", tmp_path / "labels").exception
    )
    ids = pa.array([row["pair_id"] for row in rows])
    for kind in (pa.decimal128(6, 3), pa.float16(), pa.int8()):
        values = [
            Decimal(n % 3) if pa.types.is_decimal(kind) else np.float16(n % 3) for n in range(len(rows))
        ]
        values = [int(v) for v in values] if pa.types.is_integer(kind) else values
        columns = {"pair_id": ids, **{word: pa.array(values, kind) for word in WORDS}}
        pq.write_table(pa.table(columns), tmp_path / f"{kind.id}.parquet")
        result = run(tmp_path / f"{kind.id}.parquet", tmp_path / f"labels-{kind.id}")
        assert result.exit_code == 0, result.exception


def bomb(kind: str) -> pa.Table:
    """A table of a few KB whose plain form would take gigabytes."""
    if kind == "rows":
        return pa.table({"pair_id": ["d/1/1"] * 1_000_000, **{word: [0.0] * 1_000_000 for word in WORDS}})
    if kind == "texts":
        ids = pa.DictionaryArray.from_arrays(np.zeros(8192, dtype=np.int32), ["x" * 1_000_000])
        return pa.table({"pair_id": ids, **{word: [0.0] * 8192 for word in WORDS}})
    return pa.table({"pair_id": [f"d/{n}/1" for n in range(64)], "logits": [[0.0] * 100_000] * 64})


@pytest.mark.parametrize("kind", ["rows", "texts", "lists"])
def test_a_small_file_cannot_fill_the_memory(tmp_path: Path, kind: str) -> None:
    table = tmp_path / "bomb.parquet"
    pq.write_table(bomb(kind), table, compression="zstd")
    assert table.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run(table, tmp_path / "labels")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "KiB"
    assert isinstance(result.exception, KdecsError) and "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("given", "share"),
    [([0.2, 0.1, 0.1, 0.1, 0.25], 0.25), ([1e-4, 1e-4, 1e-4, 2e-4, 2e-4], 0.9993), ([0.2] * 5, 0.0)],
)
def test_what_probabilities_leave_of_1_is_outside_the_answer_words(
    rows: Rows, tmp_path: Path, given: list[float], share: float
) -> None:
    table = write(tmp_path / "t.jsonl", [row | {"logits": given} for row in rows])
    assert run(table, tmp_path / "labels", "--scores", "probabilities").exit_code == 0
    shown = CliRunner().invoke(app, ["soft-labels", "show", str(tmp_path / "labels")]).output
    assert f"probability outside the answer words: {100 * share:.2f}%" in " ".join(shown.split())


def test_what_is_outside_logits_is_not_known(rows: Rows, tmp_path: Path) -> None:
    table = write(tmp_path / "t.jsonl", rows)
    for name in ("a", "b"):
        assert run(table, tmp_path / name).exit_code == 0
    both = [str(tmp_path / name) for name in ("a", "b")]
    combined = CliRunner().invoke(app, ["soft-labels", "combine", *both, "--output", str(tmp_path / "c")])
    assert combined.exit_code == 0, combined.exception
    for name in ("a", "c"):
        shown = CliRunner().invoke(app, ["soft-labels", "show", str(tmp_path / name)]).output
        assert "probability outside the answer words: not known" in " ".join(shown.split()), name


def test_probabilities_that_add_up_to_more_than_1_are_refused(rows: Rows, tmp_path: Path) -> None:
    table = write(tmp_path / "t.jsonl", [row | {"logits": [0.9, 0.9, 0.8, 0.8, 0.8]} for row in rows])
    result = run(table, tmp_path / "labels", "--scores", "probabilities")
    assert "row 1: the probabilities of the pair" in str(result.exception)
    assert "add up to 4.2, expected at most 1" in str(result.exception)


def test_probabilities_of_zero_are_refused(rows: Rows, tmp_path: Path) -> None:
    table = write(tmp_path / "t.jsonl", [row | {"logits": [0.5, 0.5, 0.0, 0.0, 0.0]} for row in rows])
    result = run(table, tmp_path / "labels", "--scores", "probabilities")
    assert "has the probability 0.0, expected above 0 and up to 1" in str(result.exception)


def test_batches_do_not_change_the_labels(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write(tmp_path / "table.jsonl", rows)
    assert run(table, tmp_path / "one").exit_code == 0
    monkeypatch.setattr(importing, "_BATCH_ROWS", 17)
    assert run(table, tmp_path / "two").exit_code == 0
    shards = [(tmp_path / name / "shard-00000.parquet").read_bytes() for name in ("one", "two")]
    assert shards[0] == shards[1]
