import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import CorpusError, KdecsError, PredictionError
from kdecs.evaluation.commands import compare, evaluate
from kdecs.evaluation.metrics import SCORE_KEYS
from kdecs.evaluation.predictions import Prediction, write_predictions

app = typer.Typer()
app.command("evaluate")(evaluate)
app.command("compare")(compare)

TEST = bundled_sample("test")
UTTERANCE = {"utterance_positive_f1", "utterance_negative_f1", "utterance_macro_f1"}
ROW = {"exact_match", "positive_f1", "negative_f1", "macro_f1"} | UTTERANCE


def run(*arguments: object, refused: type[KdecsError] | None = None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if refused:
        assert isinstance(result.exception, refused), (result.output, result.exception)
        assert "\n" not in str(result.exception)
    else:
        assert result.exit_code == 0, (result.output, result.exception)
    return result


def scores_of(predictions: Path, *options: str) -> dict:
    return json.loads(
        run("evaluate", "--corpus", TEST, "--predictions", predictions, "--json", *options).stdout
    )


def test_evaluate_prints_the_contract_keys(sample_predictions):
    scores = scores_of(sample_predictions["near"])
    counts = {"universe", "num_positive", "num_negative", "missing", "baselines"}
    assert {"emotion_accuracy"} | ROW | {f"strict_{key}" for key in ROW} | counts <= set(scores)
    assert set(scores["baselines"]) == {"all negative", "j = i", "j >= i-1", "majority emotion"}
    assert all(set(rule) >= UTTERANCE for rule in scores["baselines"].values())
    assert scores["universe"] == "fold1"
    assert scores["missing"] == 0
    # Unrounded: a mean over this many rows does not end after two digits.
    assert scores["positive_f1"] != round(scores["positive_f1"], 4)
    assert scores["utterance_positive_f1"] == scores["baselines"]["j >= i-1"]["utterance_positive_f1"]


def test_evaluate_in_the_other_universe_counts_what_is_missing(sample_predictions):
    fold1, everything = (scores_of(sample_predictions["near"], "--universe", u) for u in ("fold1", "all"))
    assert everything["num_positive"] == fold1["num_positive"]
    assert everything["num_negative"] > fold1["num_negative"]
    # Pairs of targets without causes were not predicted: all of them negative rows.
    assert everything["missing"] == everything["num_negative"] - fold1["num_negative"]


@pytest.mark.parametrize("protocol", ["reccon", "reccon-released", "squad"])
def test_evaluate_names_its_protocol(sample_predictions, protocol):
    assert scores_of(sample_predictions["near"], "--protocol", protocol)["protocol"] == protocol


def test_the_released_rows_give_the_order_of_dialogues(sample_predictions, tmp_path, caplog):
    """From RECCON's CSV or JSON; without them a score that depends on the order says so."""
    dialogues = [d.id for d in read_corpus(TEST).dialogues]
    spans = {
        (d.id, p.target, p.candidate): p.spans[0]
        for d in read_corpus(TEST).dialogues
        for p in pairs_of(d)
        if p.spans
    }
    by_dialogue = {name: [key for key in spans if key[0] == name] for name in dialogues}
    first, second, third = [name for name in dialogues if by_dialogue[name]][:3]
    lines = [
        Prediction(*by_dialogue[first][0], None, True, spans[by_dialogue[first][0]][:-1]),
        Prediction(*by_dialogue[third][0], None, True, "zzz"),
    ]
    # One dialogue ends in a similar row with a span, all others in rows that were predicted empty.
    lines += [
        Prediction(*key, None, True, spans[key]) for key in by_dialogue[first][1:] if key != lines[0].key
    ]
    file = tmp_path / "p.jsonl"
    write_predictions(file, lines)
    csv, rows = tmp_path / "rows.csv", tmp_path / "rows.json"
    row = "dailydialog_{}_utt_1_impossible_cause_utt_1".format
    csv.write_text(",text,labels,id\n" + "".join(f"0,a,0,{row(name)}\n" for name in dialogues))
    turned = [second, *(name for name in dialogues if name not in (first, second)), first]
    rows.write_text(json.dumps([{"qas": [{"id": row(name)}]} for name in turned]))
    protocol = ("--protocol", "reccon-released")
    with_csv, with_json = (scores_of(file, *protocol, "--released-rows", str(f)) for f in (csv, rows))
    assert not caplog.records
    assert with_csv["negative_f1"] < with_json["negative_f1"]
    assert scores_of(file, *protocol)["negative_f1"] == with_csv["negative_f1"]
    assert "--released-rows FILE gives the order" in caplog.text
    few = ("--samples", "100", "--json")
    compared = run("compare", file, file, "--corpus", TEST, *protocol, "--released-rows", rows, *few)
    assert json.loads(compared.stdout)["negative_f1"]["a"] == with_json["negative_f1"]
    arguments = ("evaluate", "--corpus", TEST, "--predictions", file, "--released-rows")
    for path, content in ((tmp_path / "none.csv", None), (tmp_path / "other.csv", "id\n7\n")):
        if content:
            path.write_text(content)
        run(*arguments, path, *protocol, refused=PredictionError)
    csv.write_text(row(first))
    run(*arguments, csv, *protocol, refused=PredictionError)
    assert CliRunner().invoke(app, [str(a) for a in (*arguments, rows)]).exit_code == 2


def test_evaluate_details(sample_predictions):
    scores = scores_of(sample_predictions["majority"], "--details", "--intervals", "--samples", "200")
    assert scores["emotion_accuracy"] == scores["emotions"]["accuracy"]
    assert sum(scores["emotions"]["count"].values()) == scores["num_utterances"]
    assert set(scores["breakdowns"]) == {"distance", "emotion", "utterance_length"}
    for groups in scores["breakdowns"].values():
        assert sum(group["num_positive"] for group in groups.values()) == scores["num_positive"]
        assert sum(group["num_negative"] for group in groups.values()) == scores["num_negative"]
    low, high = scores["intervals"]["emotion_accuracy"]
    assert low < scores["emotion_accuracy"] < high


def test_evaluate_prints_tables(sample_predictions):
    shown = run(
        "evaluate",
        "--corpus",
        TEST,
        "--predictions",
        sample_predictions["majority"],
        "--details",
        "--intervals",
    ).stdout
    for words in ("universe fold1", "90 positive and 231 negative rows", "Confusions", "Scores by distance"):
        assert words in shown


def test_evaluate_maps_both_sides_to_coarse_labels(tmp_path):
    first = json.loads(Path(TEST).read_text())
    dialogue_id, nested = next(iter(first.items()))
    lines = [
        {"dialogue_id": dialogue_id, "target": u["turn"], "candidate": u["turn"], "emotion": "happiness"}
        | {"is_cause": False, "span": ""}
        for u in nested[0]
    ]
    path = tmp_path / "happy.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert scores_of(path, "--coarse")["emotion_accuracy"] > scores_of(path)["emotion_accuracy"]


def test_a_perfect_system_stays_perfect_among_coarse_labels(tmp_path):
    """Others maps to neutral: its pairs must not count as those of a target predicted neutral."""
    corpus = read_corpus(TEST)
    predictions = [
        Prediction(d.id, p.target, p.candidate, p.emotion, p.is_cause, p.spans[0] if p.spans else "")
        for d in corpus.dialogues
        for p in pairs_of(d)
    ]
    assert any(p.emotion == "others" and p.is_cause for p in predictions)
    write_predictions(tmp_path / "perfect.jsonl", predictions)
    fine, coarse = (scores_of(tmp_path / "perfect.jsonl", *options) for options in ((), ("--coarse",)))
    assert coarse["emotion_accuracy"] == coarse["utterance_macro_f1"] == 100
    assert {key: coarse[key] for key in SCORE_KEYS} == {key: fine[key] for key in SCORE_KEYS}


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_a_negative_seed_is_a_usage_error(sample_predictions, command):
    near = sample_predictions["near"]
    files = (near, near) if command == "compare" else ("--predictions", near)
    arguments = [command, *map(str, files), "--corpus", str(TEST), "--seed", "-1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)


def test_several_prediction_files_are_summarised(sample_predictions):
    arguments = ["evaluate", "--corpus", TEST]
    for name in ("near", "self"):
        arguments += ["--predictions", sample_predictions[name]]
    found = json.loads(run(*arguments, "--json").stdout)
    values = [scores_of(sample_predictions[name])["macro_f1"] for name in ("near", "self")]
    assert [each["macro_f1"] for each in found["runs"]] == values
    assert found["over_seeds"]["macro_f1"]["mean"] == pytest.approx(sum(values) / 2)
    assert found["over_seeds"]["macro_f1"]["num_seeds"] == 2
    assert "Over 2 runs" in run(*arguments).stdout


def test_compare_reports_difference_interval_and_p(sample_predictions):
    arguments = ("compare", sample_predictions["near"], sample_predictions["self"], "--corpus", TEST)
    compared = json.loads(run(*arguments, "--samples", "300", "--json").stdout)
    found = compared["utterance_positive_f1"]
    assert found["difference"] == pytest.approx(found["a"] - found["b"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert 0 < found["p"] <= 1
    same = json.loads(
        run(*arguments[:2], *arguments[1:2], *arguments[3:], "--samples", "300", "--json").stdout
    )
    assert same["macro_f1"]["difference"] == 0
    assert same["macro_f1"]["p"] == 1
    near = scores_of(sample_predictions["near"])
    assert compared["baselines"] == near["baselines"]
    above = {
        name: found["utterance_macro_f1"]["difference"] for name, found in compared["above_rule"].items()
    }
    assert above["a"] == 0, "A predicts by the rule"
    assert above["b"] == pytest.approx(-compared["utterance_macro_f1"]["difference"])
    shown = run(*arguments, "--samples", "300").stdout
    assert "A minus B" in shown
    assert "best trivial rule" in shown
    assert "strict utt. negative f1" in shown
    assert "…" not in shown.replace(" … ", "")  # nothing is cut in 80 columns


def test_a_system_without_emotions_has_no_scores_of_them(sample_predictions, tmp_path):
    near = sample_predictions["near"]
    missing = ("emotion_accuracy", "emotion_macro_f1", *(f"strict_{key}" for key in ROW))
    scores = scores_of(near, "--intervals", "--samples", "100", "--details")
    assert {key: scores[key] for key in missing} == dict.fromkeys(missing)
    assert set(scores["intervals"]) == ROW and "emotions" not in scores and "breakdowns" in scores
    shown = run("evaluate", "--corpus", TEST, "--predictions", near, "--details").stdout
    for name in ("emotion accuracy", "emotion macro f1"):
        assert re.search(rf"{name}\W+–", shown), name
    assert len(re.findall(r"macro f1 .*\d\.\d\d +│? *–", shown)) == 2, "the strict column"
    both = ("--predictions", near, "--predictions", sample_predictions["self"])
    seeds = json.loads(run("evaluate", "--corpus", TEST, *both, "--json").stdout)["over_seeds"]
    compare = ("compare", near, sample_predictions["self"], "--corpus", TEST, "--samples", "100")
    compared = json.loads(run(*compare, "--json").stdout)
    for key in set(missing) - {"emotion_macro_f1"}:
        assert seeds[key] is compared[key] is None
    assert compared["macro_f1"]["a"] == scores["macro_f1"] and seeds["macro_f1"]["num_seeds"] == 2
    assert re.search(r"strict macro f1\W+–\W+–\W+–", run(*compare).stdout)


def test_refusals_are_one_line(sample_predictions, tmp_path):
    near = sample_predictions["near"]
    run("evaluate", "--corpus", tmp_path / "no.json", "--predictions", near, refused=CorpusError)
    run("evaluate", "--corpus", TEST, "--predictions", tmp_path / "no.jsonl", refused=PredictionError)
    run("evaluate", "--corpus", bundled_sample("train"), "--predictions", near, refused=PredictionError)
    run("compare", near, tmp_path / "no.jsonl", "--corpus", TEST, refused=PredictionError)
    assert CliRunner().invoke(app, ["evaluate", "--corpus", str(TEST)]).exit_code == 2


def test_a_corpus_without_spans_has_scores_of_utterances_alone(tmp_path):
    corpus, predictions = tmp_path / "blocks.txt", tmp_path / "predictions.jsonl"
    corpus.write_text("1 2\n(2,1)\n1 | A | neutral | We won !\n2 | B | joy | Good !\n")
    write_predictions(
        predictions,
        [Prediction("1", 2, 1, "happiness", True, "We"), Prediction("1", 2, 2, "happiness", False, "")],
    )
    arguments = ("--corpus", corpus, "--predictions", predictions, "--details", "--intervals")
    scores = json.loads(run("evaluate", *arguments, "--json").stdout)
    assert scores["utterance_macro_f1"] == scores["strict_utterance_macro_f1"] == 100
    assert {scores[key] for key in ROW - UTTERANCE} == {None}
    assert set(scores["intervals"]) == {
        "emotion_accuracy",
        *UTTERANCE,
        *(f"strict_{key}" for key in UTTERANCE),
    }
    assert scores["breakdowns"]["distance"]["1"]["positive_f1"] is None
    assert "macro f1 " in run("evaluate", *arguments).stdout
    compared = json.loads(run("compare", predictions, predictions, "--corpus", corpus, "--json").stdout)
    assert compared["macro_f1"] is None and compared["utterance_macro_f1"]["difference"] == 0
