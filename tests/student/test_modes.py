"""Every mode trains, resumes exactly, and predicts with the decision that its validation chose."""

import json

import numpy as np
import pytest
import torch
from support import StopAfter, weights
from transformers import AutoTokenizer

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.config import parse_config
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import Dialogue, Utterance, map_corpus
from kdecs.errors import ConfigError, CorpusError, Stopped
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import read_predictions
from kdecs.student.config import StudentConfig
from kdecs.student.data import load_training_data
from kdecs.student.predict.predictor import Student
from kdecs.student.product import load_student
from kdecs.student.training import train_student

KD = {"mode": "kd"}  # its labels are the fixture's
MODES: dict[str, dict[str, object]] = {
    "kd": {"distillation": KD},
    "joint": {"distillation": {"mode": "joint"}},
    "cls": {"distillation": {"mode": "cls"}},
    "span_only": {"distillation": {"mode": "span_only"}},
    "given fine": {"model": {"given_emotions": "fine"}, "distillation": KD},
    "given coarse, classifier": {"model": {"given_emotions": "coarse"}, "distillation": {"mode": "cls"}},
    "ecpe": {"task": "ecpe", "corpus": {"emotions": "coarse"}, "distillation": KD},
    "priors": {
        "model": {"priors": "training", "span_head": "position", "history_utterances": 1},
        "distillation": {**KD, "dynamic": "temperature", "hard_weight": 0.5},
        "emotion_weight": "own",
        "neutral_decision": "balanced",
        "head_rate_factor": 5.0,
    },
    "priors, classifier": {"model": {"priors": "training"}, "distillation": {"mode": "cls"}},
    "share": {"distillation": {**KD, "hard_share": 0.5, "teacher_weighting": "confidence"}},
}
PARTS = {
    "kd": {"emotion", "span", "distillation"},
    "joint": {"emotion", "span", "connective"},
    "cls": {"emotion", "span", "classifier"},
    "span_only": {"emotion", "span"},
    "given fine": {"span", "distillation"},
    "given coarse, classifier": {"span", "classifier"},
    "ecpe": {"emotion", "distillation"},
    "priors": {"emotion", "span", "distillation", "connective"},
    "priors, classifier": {"emotion", "span", "classifier"},
    "share": {"emotion", "span", "distillation"},
}


@pytest.fixture
def make(make_config, labels, base, corpus_files):
    """A config of a mode: its groups laid over the fixture's."""

    def made(mode: str, output: str, **more: object) -> StudentConfig:
        groups = {**MODES[mode], **more}
        own = dict(groups.pop("distillation"))
        if own["mode"] == "kd":
            own.setdefault("labels", str(labels))
        model = {"base": str(base), "span_head": "pointer", "max_prompt_tokens": 256}
        corpus = {name: str(path) for name, path in corpus_files.items()}
        return make_config(
            output,
            distillation=own,
            model={**model, **groups.pop("model", {})},
            corpus={**corpus, **groups.pop("corpus", {})},
            **groups,
        )

    return made


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains_resumes_exactly_and_predicts_as_it_was_validated(mode, make, runtime):
    whole = train_student(make(mode, "whole"), runtime)
    assert verify_artifact(whole) == []
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    found = {key[6:-5] for key in lines[0] if key.startswith("train_") and key.endswith("_loss")}
    assert found - {""} == PARTS[mode]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    config = make(mode, "stopped")
    with pytest.raises(Stopped):
        train_student(config, runtime, stop=StopAfter(9))
    train_student(config, runtime)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(config.output)[name]), name
    for name in ("student.json", "valid-predictions.jsonl"):
        assert (whole / name).read_bytes() == (config.output / name).read_bytes(), name

    corpus = read_corpus(config.corpus.valid)
    if config.corpus.emotions == "coarse":
        corpus = map_corpus(corpus)
    predictions = Student.from_pretrained(whole).predict_pairs(corpus)
    assert read_predictions(whole / "valid-predictions.jsonl", corpus) == predictions
    scores = evaluate(corpus, predictions, universe="fold1")
    validated = read_manifest(whole, "student").details["valid"]
    keys = {"macro_f1", "exact_match", "utterance_macro_f1"}
    if config.model.given_emotions == "none":
        keys |= {"emotion_accuracy", "strict_macro_f1"}
    for key in keys:
        assert scores[key] == pytest.approx(validated[key]), key
    # A student that is given the emotions has no score of theirs.
    about_emotions = {key for key in lines[0] if key == "emotion_accuracy" or key.startswith("strict_")}
    assert bool(about_emotions) == bool(about_emotions & validated.keys()) == ("emotion_accuracy" in keys)


@pytest.mark.parametrize("mode", ["kd", "priors"])
def test_a_threshold_of_a_bfloat16_training_is_the_one_that_float32_prediction_uses(mode, make, runtime):
    config = make(mode, "bf16", precision="bfloat16", optimization={"learning_rate": 3e-3, "epochs": 1})
    directory = train_student(config, runtime)
    corpus = read_corpus(config.corpus.valid)
    scores = evaluate(corpus, Student.from_pretrained(directory).predict_pairs(corpus), universe="fold1")
    validated = read_manifest(directory, "student").details["valid"]
    assert scores["macro_f1"] == pytest.approx(validated["macro_f1"])
    assert scores["emotion_accuracy"] == pytest.approx(validated["emotion_accuracy"])


@pytest.mark.parametrize(
    ("mode", "shown", "hidden"),
    [
        ("kd", ["valid macro F1", "EM", "emotion accuracy"], ["utterance"]),
        ("ecpe", ["valid utterance macro F1", "emotion accuracy"], ["EM"]),
        ("given fine", ["valid macro F1", "EM"], ["emotion accuracy"]),
    ],
)
def test_the_terminal_shows_the_scores_that_the_mode_has_and_is_chosen_by(
    mode, shown, hidden, make, runtime, capsys
):
    output = train_student(make(mode, "shown", optimization={"epochs": 1}), runtime)
    metrics = read_manifest(output).details["valid"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "valid " in line]
    assert len(lines) == 2
    for line in lines:
        assert all(word in line for word in shown) and not any(word in line for word in hidden)
        level = "utterance_" if mode == "ecpe" else ""
        figures = f"Pos {metrics[level + 'positive_f1']:.2f}, Neg {metrics[level + 'negative_f1']:.2f}"
        assert f"macro F1 {metrics[level + 'macro_f1']:.2f} ({figures})" in line


def test_what_a_mode_predicts_by(make, runtime):
    expected = {
        "cls": ("cls", True, True),
        "span_only": ("none", True, True),
        "given fine": ("connective", False, True),
        "ecpe": ("connective", True, False),
    }
    for mode, (cause_by, emotions, spans) in expected.items():
        config = make(mode, mode.replace(" ", "-"), optimization={"epochs": 1})
        model, tokenizer, card = load_student(train_student(config, runtime))
        assert (model.outputs.cause_by, model.outputs.emotions, model.outputs.spans) == (
            cause_by,
            emotions,
            spans,
        )
        assert card.prompt.has_connective == (cause_by == "connective")
        dialogue = read_corpus(config.corpus.valid).dialogues[0]
        student = Student(model, tokenizer, card, device=torch.device("cpu"), precision="float32")
        for found in student.predict([dialogue]):
            gold = dialogue.utterances[found.target - 1].emotion
            assert emotions or found.emotion == gold
            assert spans or found.span == ""


def test_a_student_of_given_emotions_refuses_a_dialogue_without(make, runtime):
    config = make("given fine", "given", optimization={"epochs": 1})
    student = Student.from_pretrained(train_student(config, runtime))
    bare = Dialogue("d1", (Utterance(1, "A", "I won !", None, None),))
    with pytest.raises(CorpusError, match=r"dialogue d1, turn 1: no emotion.*give each utterance"):
        student.predict([bare])


def test_two_equal_teachers_train_the_student_of_one(make, runtime, labels):
    one = train_student(make("kd", "one", optimization={"learning_rate": 1e-3, "epochs": 1}), runtime)
    twice = {"mode": "kd", "labels": None, "teachers": [{"labels": str(labels)}] * 2}
    config = make("kd", "two", distillation=twice, optimization={"learning_rate": 1e-3, "epochs": 1})
    two = train_student(config, runtime)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, atol=2e-4, rtol=1e-3)
    assert len(read_manifest(two).details["teacher"]["teachers"]) == 2
    assert set(read_manifest(two).inputs) >= {"soft_labels", "soft_labels_1"}


def test_share_of_gold_labels_is_nested_and_the_rest_distils_or_is_dropped(make, base):
    tokenizer = AutoTokenizer.from_pretrained(base)

    def data(**distillation: object):
        own = {"mode": "kd", **distillation}
        return load_training_data(make("kd", "share", distillation=own), tokenizer, 256)

    whole = data()
    assert whole.is_gold_P[whole.rows].all()
    gold: list[set[int]] = []
    for share in (0.2, 0.5, 0.8):
        distilled, dropped = data(hard_share=share), data(hard_share=share, outside_share="drop")
        joint = data(hard_share=share, mode="joint")
        gold.append(set(distilled.rows[distilled.is_gold_P[distilled.rows]].tolist()))
        assert distilled.rows.tolist() == whole.rows.tolist()
        assert set(dropped.rows.tolist()) == set(joint.rows.tolist()) == gold[-1]
        assert (dropped.gold_weights_P[dropped.rows] == 1).all()
        # A batch's mean over its pairs is, in expectation, the mean over those with gold labels.
        assert distilled.gold_weights_P[distilled.rows].mean() == pytest.approx(1.0, rel=1e-5)
        outside = np.flatnonzero(~distilled.is_gold_P)
        _, targets = distilled.batch(outside[:8], np.ones(8, dtype=np.float32))
        assert (targets.gold_weights_B == 0).all()
        assert (targets.teacher_weights_B == 1).all()
    assert gold[0] < gold[1] < gold[2]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"distillation": {"mode": "joint", "hard_weight": 0.5}}, "hard_weight needs mode kd"),
        ({"distillation": {"mode": "cls", "dynamic": "weight"}}, "dynamic needs mode kd"),
        ({"distillation": {"mode": "span_only"}, "task": "ecpe"}, "task ecpe has no span loss"),
        (
            {"distillation": {"mode": "joint"}, "model": {"base": "b", "given_emotions": "fine"}}
            | {"neutral_decision": "balanced"},
            "neutral_decision needs predicted emotions",
        ),
        (
            {"distillation": {"mode": "kd", "labels": "a", "teachers": [{"labels": "b"}]}},
            "labels and teachers exclude each other",
        ),
        (
            {"distillation": {"mode": "joint"}, "model": {"base": "b", "stand_ins": {"disaproval": "no"}}},
            "model.stand_ins: disaproval is no emotion; known: .*disapproval",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_one_clear_line(groups, message):
    values = {"output": "o", "cache": "c", "corpus": {"train": "t", "valid": "v"}, "model": {"base": "b"}}
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config(StudentConfig, {**values, **groups}, source="test")
    assert "\n" not in str(raised.value)
