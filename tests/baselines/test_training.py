"""Training a baseline: exact resume, a product that predicts and scores as noted, refusals in one line."""

import json
import shutil

import pytest
from support import StopAfter, assert_same_weights, change_json, rewrite_manifest

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.baselines.commands import predict
from kdecs.baselines.config import BaselineConfig
from kdecs.baselines.prediction import Baseline
from kdecs.baselines.training import train_baseline
from kdecs.config import config_hash, load_config, parse_config
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ArtifactError, ConfigError, CorpusError, ModelError, Stopped
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import read_predictions
from kdecs.student.config import VALIDATION_NAME


def test_a_stopped_training_ends_with_the_same_weights(make_config, runtime, trained, capsys):
    config = make_config("resumed")
    with pytest.raises(Stopped, match="run the same command again"):
        train_baseline(config, runtime, stop=StopAfter(5))  # in the second epoch
    train_baseline(config, runtime)
    assert "resumed at step" in capsys.readouterr().out
    assert_same_weights(config.output, trained)
    names = {path.name for path in config.output.iterdir()}
    assert names == {
        *("model", "heads.safetensors", "baseline.json", "valid-predictions.jsonl"),
        *("config.json", "metrics.jsonl", "manifest.json"),
    }
    assert verify_artifact(config.output) == []


def test_predictions_of_validation_score_as_training_said(trained, corpus_files):
    corpus = read_corpus(corpus_files["valid"])
    found = Baseline.from_pretrained(trained).predict_pairs(corpus)
    assert found == read_predictions(trained / "valid-predictions.jsonl", corpus)
    scores, noted = evaluate(corpus, found), read_manifest(trained, "baseline").details["valid"]
    for key in ("macro_f1", "positive_f1", "exact_match", "utterance_positive_f1", "emotion_accuracy"):
        assert scores[key] == pytest.approx(noted[key], abs=1e-6)
    assert {"train_emotion_loss", "train_cause_loss", "train_pair_loss", "train_span_loss"} < noted.keys()


def test_spans_and_their_characters_agree(trained):
    baseline = Baseline.from_pretrained(trained)
    emotions = tuple("fear" if emotion == "neutral" else emotion for emotion in baseline.card.emotions)
    baseline.card = baseline.card.model_copy(update={"threshold": 0.0, "emotions": emotions})
    dialogue = read_corpus(bundled_sample("test")).dialogues[0]
    predicted = baseline.predict([dialogue], max_distance=2)
    assert predicted and all(item.is_cause and item.target - item.candidate <= 2 for item in predicted)
    for item in predicted:
        assert item.span and item.span in dialogue.utterances[item.candidate - 1].text


def test_the_command_writes_a_file_that_evaluate_reads(trained, tmp_path, capsys):
    output = tmp_path / "predictions.jsonl"
    predict(trained, bundled_sample("test"), output, device="cpu", max_distance=3)
    assert read_predictions(output, read_corpus(bundled_sample("test")))
    assert "pairs of" in capsys.readouterr().out
    predict(trained, bundled_sample("unlabelled"), tmp_path / "unlabelled.jsonl", device="cpu")
    with pytest.raises(ArtifactError, match="only MRC takes others; leave out --emotions"):
        predict(trained, bundled_sample("test"), tmp_path / "no.jsonl", emotions=output, device="cpu")
    knowledge = tmp_path / "phrases.jsonl"
    line = {"dialogue_id": "a", "turn": 1, "relation": "xReact", "text": "sad", "polarity": "negative"}
    knowledge.write_text(json.dumps(line))
    with pytest.raises(ArtifactError, match="trained without commonsense knowledge; leave out --knowledge"):
        predict(trained, bundled_sample("test"), tmp_path / "no.jsonl", knowledge=knowledge, device="cpu")


def test_complete_work_is_skipped_and_other_work_refused(trained, make_config, runtime, capsys):
    train_baseline(make_config().model_copy(update={"output": trained}), runtime)
    assert "complete, skipped" in capsys.readouterr().out
    other = make_config(optimization={"epochs": 1}).model_copy(update={"output": trained})
    with pytest.raises(ArtifactError, match="holds a finished baseline directory of another config"):
        train_baseline(other, runtime)


def test_a_system_is_given_by_its_name_or_with_its_settings(values, tmp_path):
    given = {**values, "output": str(tmp_path / "a")}

    def config(**changes: object) -> BaselineConfig:
        return parse_config(BaselineConfig, {**given, **changes}, source="test")

    assert config_hash(config(system="kec")) == config_hash(config(system={"name": "kec", "layers": 5}))
    assert config_hash(config(system="kec")) != config_hash(config(system="mgsag"))
    path = tmp_path / "config.json"
    path.write_text(config(system="kec").model_dump_json())
    assert load_config(BaselineConfig, path, ["system.window=4"]).system.window == 4
    for changes, message in (
        ({"system": "kecs"}, "system: .*'ecpe-2d', 'kec', 'mgsag', 'ueca-prompt'"),
        ({"system": "ueca-prompt"}, "set task: ecpe"),
        ({"system": {"name": "mgsag", "window": 2}}, "window"),
        ({"system": {"name": "mgsag", "hidden_size": 10, "heads": 4}}, "no multiple of heads"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            config(**changes)
        assert "\n" not in str(caught.value)


def test_later_candidates_are_learnt_scored_and_predicted(make_config, runtime, tmp_path):
    said = [
        {
            "utterance_ID": n,
            "text": f"We won {n} .",
            "speaker": "A",
            "emotion": ("joy", "fear", "neutral")[n % 3],
        }
        for n in range(1, 6)
    ]
    pairs = [["3_joy", "4_won 4"], ["1_fear", "2_We"], ["3_joy", "1_We won"], ["4_fear", "4_We won 4"]]
    path = tmp_path / "ecf.json"
    path.write_text(json.dumps([{"conversation_ID": 1, "conversation": said, "emotion-cause_pairs": pairs}]))
    groups = {
        "corpus": {"train": str(path), "valid": str(path)},
        "optimization": {"learning_rate": 1e-3, "epochs": 1},
    }
    plain, config = make_config("plain", **groups), make_config("later", candidates={"after": 1}, **groups)
    assert config_hash(make_config("same", candidates={"after": 0}, **groups)) == config_hash(plain)
    output = train_baseline(config, runtime)
    assert json.loads((output / "baseline.json").read_text())["candidates_after"] == 1
    corpus = read_corpus(path, log=False)
    scores = evaluate(corpus, read_predictions(output / VALIDATION_NAME, corpus), candidates_after=1)
    assert (scores.num_positive, scores.missing) == (4, 0)
    metrics = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["macro_f1"] == pytest.approx(metrics["macro_f1"])
    found = {(p.target, p.candidate) for p in Baseline.from_pretrained(output).predict(corpus.dialogues)}
    assert found == {(i, j) for i in range(1, 6) for j in range(1, min(5, i + 1) + 1)}
    with pytest.raises(ConfigError, match=r"candidates.after needs system ecpe-2d: kec reads no utterance"):
        make_config("kec", system="kec", candidates={"after": 1})


def test_a_corpus_without_causes_is_refused(make_config, runtime, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(
        json.dumps({"d": [[{"turn": 1, "speaker": "A", "utterance": "Hi", "emotion": "neutral"}]]})
    )
    corpus = {"train": str(path), "valid": str(bundled_sample("valid"))}
    with pytest.raises(CorpusError, match="no cause to learn from"):
        train_baseline(make_config(corpus=corpus), runtime)


def test_a_baseline_from_anybody_runs_no_code_and_is_refused_in_one_line(trained, tmp_path):
    for name, file, changes, error in (
        ("code", "model/config.json", {"auto_map": {"AutoModelForMaskedLM": "own.Model"}}, ModelError),
        ("text", "model/config.json", {"num_attention_heads": "two"}, ModelError),
        ("card", "baseline.json", {"version": 99}, ArtifactError),
        ("size", "baseline.json", {"system": {"name": "ecpe-2d", "hidden_size": 8}}, ArtifactError),
        ("system", "baseline.json", {"system": {"name": "mgsag"}}, ArtifactError),
    ):
        copy = shutil.copytree(trained, tmp_path / name)
        change_json(copy / file, **changes)
        rewrite_manifest(copy)
        with pytest.raises(error) as caught:
            Baseline.from_pretrained(copy)
        assert "\n" not in str(caught.value)
