"""Training the baseline: exact resume, a product that predicts and scores as noted, refusals in one line."""

import json
import shutil
import signal
import time
from dataclasses import replace

import pytest
from support import (
    StopAfter,
    assert_same_weights,
    change_json,
    rewrite_manifest,
    run_forked,
    start_forked,
)
from transformers import AutoTokenizer

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.baselines.commands import predict
from kdecs.baselines.mrc.prediction import MrcBaseline
from kdecs.baselines.mrc.questions import mrc_text, training_pairs
from kdecs.baselines.prediction import open_baseline
from kdecs.baselines.training import train_baseline
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import NEUTRAL
from kdecs.errors import (
    ArtifactError,
    CorpusError,
    DialogueError,
    ModelError,
    PredictionError,
    Stopped,
)
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import Prediction, read_emotions, read_predictions, write_predictions


def test_a_stopped_training_ends_with_the_same_weights(make_config, runtime, trained, capsys):
    config = make_config("resumed")
    with pytest.raises(Stopped, match="run the same command again"):
        train_baseline(config, runtime, stop=StopAfter(9))  # in the second epoch
    train_baseline(config, runtime)
    assert "resumed at step" in capsys.readouterr().out
    assert_same_weights(config.output, trained)
    names = {path.name for path in config.output.iterdir()}
    assert names == {"model", "mrc.json", "config.json", "metrics.jsonl", "manifest.json"}
    assert verify_artifact(config.output) == []


def test_predictions_of_validation_score_as_training_said(trained, corpus_files):
    corpus = read_corpus(corpus_files["valid"])
    scores = evaluate(corpus, open_baseline(trained).predict_pairs(corpus))
    noted = read_manifest(trained, "mrc").details["valid"]
    assert scores.missing == 0
    for key in ("macro_f1", "positive_f1", "exact_match", "utterance_positive_f1"):
        assert scores[key] == pytest.approx(noted[key], abs=1e-6)


def test_spans_and_their_characters_agree(trained):
    baseline = MrcBaseline.from_pretrained(trained)
    baseline.card = baseline.card.model_copy(update={"threshold": 0.0})
    baseline.encoder.only_candidate = True
    dialogue = read_corpus(bundled_sample("test")).dialogues[0]
    for pair, found in zip(pairs_of(dialogue), baseline.detail(pairs_of(dialogue)), strict=True):
        assert found.prediction.is_cause and found.span_range is not None
        text = dialogue.utterances[pair.candidate - 1].text
        assert text[slice(*found.span_range)] == found.prediction.span != ""


def test_neutral_targets_are_not_asked_about(trained):
    dialogues = read_corpus(bundled_sample("test")).dialogues[:2]
    baseline = MrcBaseline.from_pretrained(trained)
    baseline.card = baseline.card.model_copy(update={"threshold": 0.0})
    for item in baseline.predict(dialogues):
        dialogue = next(d for d in dialogues if d.id == item.dialogue_id)
        assert item.is_cause == (dialogue.utterances[item.target - 1].emotion != NEUTRAL)
        assert item.emotion is None


def test_the_command_writes_a_file_that_evaluate_reads(trained, tmp_path, capsys):
    output = tmp_path / "predictions.jsonl"
    predict(trained, bundled_sample("test"), output, device="cpu", max_distance=3)
    corpus = read_corpus(bundled_sample("test"))
    assert read_predictions(output, corpus)
    assert "pairs of" in capsys.readouterr().out
    with pytest.raises(CorpusError, match="no emotion, which the question names"):
        predict(trained, bundled_sample("unlabelled"), tmp_path / "none.jsonl", device="cpu")
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(ArtifactError, match="uses no commonsense knowledge; leave out --knowledge"):
        predict(trained, bundled_sample("test"), tmp_path / "none.jsonl", knowledge=output, device="cpu")


def test_emotions_of_another_system_make_a_pipeline(trained, tmp_path):
    test = bundled_sample("test")
    dialogues = read_corpus(test).dialogues
    # All are happy but the last turn of each dialogue, of which nothing is asked.
    lines = [
        Prediction(d.id, u.turn, u.turn, NEUTRAL if u is d.utterances[-1] else "happiness", False, "")
        for d in dialogues
        for u in d.utterances
    ]
    write_predictions(tmp_path / "emotions.jsonl", lines)
    output = tmp_path / "predictions.jsonl"
    options = {"device": "cpu", "max_distance": 1, "emotions": tmp_path / "emotions.jsonl"}
    predict(trained, test, output, **options)
    found = read_predictions(output, read_corpus(test))
    given = {(line.dialogue_id, line.target): line.emotion for line in lines}
    assert found and all(item.emotion == given[item.dialogue_id, item.target] for item in found.values())
    assert not any(item.is_cause for item in found.values() if item.emotion == NEUTRAL)
    write_predictions(tmp_path / "few.jsonl", lines[:3])
    baseline = MrcBaseline.from_pretrained(trained, emotions=read_emotions(tmp_path / "few.jsonl"))
    with pytest.raises(DialogueError, match="the file of emotions has none for it"):
        baseline.predict(dialogues[:2])
    baseline.emotions = dict.fromkeys(given, "sadness")
    sad = baseline.predict(dialogues[:1])
    as_sad = replace(
        dialogues[0], utterances=tuple(replace(u, emotion="sadness") for u in dialogues[0].utterances)
    )
    baseline.emotions = None
    assert [replace(item, emotion=None) for item in sad] == baseline.predict([as_sad])
    write_predictions(tmp_path / "none.jsonl", [replace(line, emotion=None) for line in lines])
    with pytest.raises(PredictionError, match="holds no emotion"):
        read_emotions(tmp_path / "none.jsonl")


def test_complete_work_is_skipped_and_other_work_refused(trained, make_config, runtime, capsys):
    config = make_config().model_copy(update={"output": trained})
    train_baseline(config, runtime)
    assert "complete, skipped" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match="holds a finished mrc directory of another config"):
        train_baseline(
            make_config(optimization={"epochs": 1}).model_copy(update={"output": trained}), runtime
        )


@pytest.mark.parametrize("max_tokens", [96, 256])
def test_questions_that_lose_more_than_old_context_are_counted(
    make_config, runtime, base, max_tokens, capsys
):
    config = make_config(
        model={"base": str(base), "max_tokens": max_tokens}, optimization={"learning_rate": 1e-3, "epochs": 1}
    )
    details = read_manifest(train_baseline(config, runtime), "mrc").details
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = 0
    for pair in training_pairs(config):
        text = mrc_text(pair)
        old = text.context[: text.context_target[0]].replace(
            text.context[slice(*text.context_candidate)], "", pair.candidate != pair.target
        )
        length = len(tokenizer(text.question, text.context)["input_ids"])
        expected += length - len(tokenizer(old, add_special_tokens=False)["input_ids"]) > max_tokens
    assert details["num_cut"] == expected
    assert (expected > 0) == (max_tokens == 96) == (f"{expected} cut to 96 tokens" in capsys.readouterr().out)


def test_a_share_of_impossible_questions_keeps_every_cause(make_config):
    whole, part = (training_pairs(make_config(negative_share=share)) for share in (1.0, 0.3))
    assert [p.id for p in part if p.is_cause] == [p.id for p in whole if p.is_cause]
    assert 0 < sum(not p.is_cause for p in part) < 0.6 * sum(not p.is_cause for p in whole)


def test_a_corpus_without_causes_is_refused(make_config, runtime, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(
        json.dumps({"d": [[{"turn": 1, "speaker": "A", "utterance": "Hi", "emotion": "neutral"}]]})
    )
    corpus = {"train": str(path), "valid": str(bundled_sample("valid"))}
    with pytest.raises(CorpusError, match="no cause to learn from"):
        train_baseline(make_config(corpus=corpus), runtime)


@pytest.mark.slow
def test_a_killed_script_goes_on(make_config, tmp_path):
    config = make_config(optimization={"learning_rate": 1e-3, "epochs": 5}, threads=1)
    path = tmp_path / "config.yaml"
    path.write_text(config.model_dump_json(exclude={"system"}))  # as configs were that only this script took
    command = ("launch/train_mrc.py", "--config", path)
    started = start_forked(*command)
    deadline = time.monotonic() + 300
    while not (config.output / "checkpoint.pt").exists():
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert "run the same command again" in started.communicate(timeout=240)[1]
    assert started.returncode == 143
    assert "resumed at step" in run_forked(*command).stdout
    assert read_manifest(config.output, "mrc").details["epochs"] == 5
    assert "complete" in run_forked(*command).stdout


def test_a_baseline_from_anybody_runs_no_code_and_is_refused_in_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    for name, changes, message in (
        ("code", {"auto_map": {"AutoModelForQuestionAnswering": "own.Model"}}, "Python code"),
        ("tuple", {"return_dict": False}, "does not run as a question-answering model"),
        ("text", {"num_attention_heads": "two"}, "cannot be loaded"),
    ):
        copy = shutil.copytree(trained, tmp_path / name)
        change_json(copy / "model" / "config.json", **changes)
        rewrite_manifest(copy)
        with pytest.raises(ModelError, match=message) as caught:
            MrcBaseline.from_pretrained(copy)
        assert "\n" not in str(caught.value)
    (copy / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="does not list this file"):
        MrcBaseline.from_pretrained(copy)
