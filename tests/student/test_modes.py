"""Every mode trains, resumes exactly, and predicts with the decision that its validation chose."""

import contextlib
import functools
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support import StopAfter, assert_same_weights, weights
from transformers import AutoTokenizer

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.config import parse_config
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import Dialogue, Utterance, map_corpus
from kdecs.errors import ConfigError, CorpusError, LabelError, Stopped
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import read_predictions
from kdecs.models import load_tokenizer
from kdecs.runtime import Runtime
from kdecs.student.config import StudentConfig
from kdecs.student.data import load_training_data
from kdecs.student.model import TorchScorer, load_student, student_answer_ids
from kdecs.student.predict.predictor import Student
from kdecs.student.training import StudentTask, train_student

RUNTIME = Runtime(0, 0, 1, torch.device("cpu"))
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
        "cause_calibration": "distance",
        "head_rate_factor": 5.0,
    },
    "priors, classifier": {"model": {"priors": "training"}, "distillation": {"mode": "cls"}},
    "share": {"distillation": {**KD, "hard_share": 0.5, "teacher_weighting": "confidence"}},
    "as the paper": {
        "distillation": KD,
        "cause_decision": "argmax",
        "optimization": {
            **{"learning_rate": 1e-3, "warmup_share": 0, "schedule": "constant"},
            **{"steps": 16, "validate_every_steps": 7},
        },
    },
    "tree": {"model": {"layout": "tree", "span_head": "position", "priors": "training"}, "distillation": KD},
    "tree, classifier": {
        "model": {"layout": "tree", "branch": "short", "given_emotions": "coarse"},
        "distillation": {"mode": "cls"},
    },
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
    "as the paper": {"emotion", "span", "distillation"},
    "tree": {"emotion", "span", "distillation"},
    "tree, classifier": {"span", "classifier"},
}


@dataclass(frozen=True)
class Trained:
    """A training of two epochs: its config, what it printed, and a copy of its directory after the first epoch."""

    config: StudentConfig
    printed: list[str]
    after_first: Path


@pytest.fixture(scope="module")
def config_of(values) -> Callable[..., StudentConfig]:
    """The config of a mode for an output: the mode's groups laid over those of the tiny student."""

    def make(mode: str, output: Path, **more: object) -> StudentConfig:
        # Half of the pairs: every mode trains twice, and each step is the same.
        groups = {**values, "output": str(output), "corpus": {**values["corpus"], "train_share": 0.5}}
        for name, value in {**MODES[mode], **more}.items():
            is_laid_over = name in ("model", "corpus") or (name == "distillation" and value["mode"] == "kd")
            groups[name] = {**groups[name], **value} if is_laid_over else value
        return parse_config(StudentConfig, groups, source="test")

    return make


@pytest.fixture(scope="module")
def trained_in(config_of, tmp_path_factory) -> Callable[[str], Trained]:
    """The training of a mode, made once for all tests of this file, which only read it."""

    @functools.cache
    def train(mode: str) -> Trained:
        folder = tmp_path_factory.mktemp("mode")
        config = config_of(mode, folder / "whole")

        def copy_once(metrics: dict[str, float]) -> None:
            if metrics["epoch"] == 1:
                shutil.copytree(config.output, folder / "after_first")

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            train_student(config, RUNTIME, on_epoch=copy_once)
        return Trained(config, printed.getvalue().splitlines(), folder / "after_first")

    return train


@pytest.fixture
def make(config_of, tmp_path) -> Callable[..., StudentConfig]:
    """A config of a mode by the name of its output."""
    return lambda mode, output, **more: config_of(mode, tmp_path / output, **more)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_learns_by_its_losses_and_predicts_as_it_was_validated(mode, trained_in):
    config = trained_in(mode).config
    assert verify_artifact(config.output) == []
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    found = {key[6:-5] for key in lines[0] if key.startswith("train_") and key.endswith("_loss")}
    assert found - {""} == PARTS[mode]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    details = read_manifest(config.output, "student").details
    assert (details["teacher"] is None) == (config.distillation.mode != "kd")

    corpus = read_corpus(config.corpus.valid)
    if config.corpus.emotions == "coarse":
        corpus = map_corpus(corpus)
    predictions = Student.from_pretrained(config.output).predict_pairs(corpus)
    assert read_predictions(config.output / "valid-predictions.jsonl", corpus) == predictions
    scores = evaluate(corpus, predictions, universe="fold1")
    keys = {"macro_f1", "exact_match", "utterance_macro_f1"}
    if config.model.given_emotions == "none":
        keys |= {"emotion_accuracy", "strict_macro_f1"}
    for key in keys:
        assert scores[key] == pytest.approx(details["valid"][key]), key
    # A student that is given the emotions has no score of theirs.
    about_emotions = {key for key in lines[0] if key == "emotion_accuracy" or key.startswith("strict_")}
    assert bool(about_emotions) == bool(about_emotions & details["valid"].keys())
    assert bool(about_emotions) == ("emotion_accuracy" in keys)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_resumes_exactly(mode, trained_in):
    """From the end of an epoch, as after a kill; some modes from within the next one, too."""
    trained = trained_in(mode)
    config = trained.config.model_copy(update={"output": trained.after_first})
    if mode in ("priors", "share", "tree", "as the paper"):
        first = json.loads((config.output / "metrics.jsonl").read_text().splitlines()[0])
        message = f"stopped at step {first['step'] + 3}, state saved; run the same command again"
        with pytest.raises(Stopped, match=message):
            train_student(config, RUNTIME, stop=StopAfter(2))
        assert not (config.output / "manifest.json").exists()
    train_student(config, RUNTIME)
    assert_same_weights(config.output, trained.config.output)
    for name in ("student.json", "valid-predictions.jsonl"):
        assert (config.output / name).read_bytes() == (trained.config.output / name).read_bytes(), name


@pytest.mark.parametrize("mode", ["kd", "priors"])
def test_a_threshold_of_a_bfloat16_training_is_the_one_that_float32_prediction_uses(mode, make):
    config = make(mode, "bf16", precision="bfloat16", optimization={"learning_rate": 3e-3, "epochs": 1})
    directory = train_student(config, RUNTIME)
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
def test_the_terminal_shows_the_scores_that_the_mode_has_and_is_chosen_by(mode, shown, hidden, trained_in):
    trained = trained_in(mode)
    metrics = read_manifest(trained.config.output).details["valid"]
    lines = [line for line in trained.printed if "valid " in line]
    assert len(lines) == 3, "two epochs, and the best one at the end"
    for line in lines:
        assert all(word in line for word in shown) and not any(word in line for word in hidden)
    level = "utterance_" if mode == "ecpe" else ""
    figures = f"Pos {metrics[level + 'positive_f1']:.2f}, Neg {metrics[level + 'negative_f1']:.2f}"
    assert f"macro F1 {metrics[level + 'macro_f1']:.2f} ({figures})" in lines[-1]


@pytest.mark.parametrize(
    ("mode", "cause_by", "emotions", "spans"),
    [
        ("cls", "cls", True, True),
        ("span_only", "none", True, True),
        ("given fine", "connective", False, True),
        ("ecpe", "connective", True, False),
    ],
)
def test_what_a_mode_predicts_by(mode, cause_by, emotions, spans, trained_in):
    config = trained_in(mode).config
    model, tokenizer, card = load_student(config.output)
    assert (model.outputs.cause_by, model.outputs.emotions, model.outputs.spans) == (
        cause_by,
        emotions,
        spans,
    )
    assert card.prompt.has_connective == (cause_by == "connective")
    assert card.prompt == config.prompt
    dialogue = read_corpus(config.corpus.valid).dialogues[0]
    student = Student(TorchScorer(model, pad_id=1, device=torch.device("cpu")), tokenizer, card)
    for found in student.predict([dialogue]):
        gold = dialogue.utterances[found.target - 1].emotion
        assert emotions or found.emotion == gold
        assert spans or found.span == ""


def test_a_student_of_given_emotions_refuses_a_dialogue_without(trained_in):
    student = Student.from_pretrained(trained_in("given fine").config.output)
    bare = Dialogue("d1", (Utterance(1, "A", "I won !", None, None),))
    with pytest.raises(CorpusError, match=r"dialogue d1, turn 1: found no emotion.*give each utterance"):
        student.predict([bare])


def test_a_student_with_its_teachers_tokenizer_distils_over_the_vocabulary(
    make, write_labels, corpus_files, tmp_path, base
):
    """L_KD of a batch against the whole model's logits; labels of other tokens are refused."""
    ids = student_answer_ids(load_tokenizer(str(base)), ()).connectives
    labels = write_labels(tmp_path / "top", corpus_files, answer_ids=ids, top_k=9)
    distilled = {"mode": "kd", "space": "vocabulary", "labels": str(labels)}
    config = make("kd", "whole", distillation=distilled)
    task = StudentTask(config, RUNTIME)
    task.model.train()
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = task.data.rows[:5]
    _, sums = task.loss(rows, np.ones(5, dtype=np.float32), 5)
    batch, targets = task.data.batch(rows, np.ones(5, dtype=np.float32))
    with torch.no_grad():
        whole = task.model.language_model(batch.token_ids_RT, attention_mask=batch.attention_RT).logits
    student_BV = whole[torch.arange(5), batch.masks_B4[:, 1]]
    log_s = torch.log_softmax(student_BV, dim=-1)
    kept = targets.top_ids_BK
    others = [[n for n in range(log_s.size(1)) if n not in row] for row in kept.tolist()]
    log_s_BC = torch.cat(
        (
            log_s.gather(1, kept),
            torch.stack([log_s[n, row].logsumexp(0) for n, row in enumerate(others)])[:, None],
        ),
        dim=1,
    )
    q_t, q_s = torch.softmax(targets.top_log_p_BC / 2, 1), torch.softmax(log_s_BC / 2, 1)
    assert sums[3].item() / 5 == pytest.approx(float((q_t * (q_t / q_s).log()).sum(1).mean()), rel=1e-4)
    trained = train_student(config.model_copy(update={"output": tmp_path / "trained"}), RUNTIME)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train_distillation_loss"] < lines[0]["train_distillation_loss"]
    # The answer words alone are what predicts.
    assert Student.from_pretrained(trained).predict([read_corpus(corpus_files["valid"]).dialogues[0]])
    for name, values, message in (
        ("none", {}, "holds no top logits, which distillation.space vocabulary needs"),
        ("other", {"answer_ids": (7, 8, 9, 10, 11), "top_k": 9}, "the teacher has another tokenizer"),
        ("beyond", {"answer_ids": ids, "top_k": 9, "top_id": 10_000}, "token id 10003, expected one below"),
    ):
        other = write_labels(tmp_path / name, corpus_files, **values)
        with pytest.raises(LabelError, match=message):
            StudentTask(make("kd", "out", distillation={**distilled, "labels": str(other)}), RUNTIME)
    for values, message in (
        (
            {"distillation": {**distilled, "dynamic": "weight"}},
            "needs one teacher, in labels, and dynamic none",
        ),
        ({"distillation": {"mode": "joint", "space": "vocabulary"}}, "space needs mode kd"),
        ({"distillation": distilled, "model": {"priors": "training"}}, "needs model.priors none"),
    ):
        with pytest.raises(ConfigError, match=message):
            make("kd", "out", **values)


def test_two_equal_teachers_train_the_student_of_one(make, trained_in, labels):
    one = trained_in("kd").config.output
    twice = {"mode": "kd", "labels": None, "teachers": [{"labels": str(labels)}] * 2}
    two = train_student(make("kd", "two", distillation=twice), RUNTIME)
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
        # Repeated, the same rows have gold labels, more often in an epoch and with smaller weights.
        repeated = data(hard_share=share, gold_repeats=3)
        counts = np.bincount(repeated.epoch_rows, minlength=len(repeated.is_gold_P))
        assert (counts[repeated.rows] == np.where(repeated.is_gold_P[repeated.rows], 3, 1)).all()
        assert counts.sum() == len(repeated.epoch_rows)
        assert repeated.gold_weights_P[repeated.epoch_rows].mean() == pytest.approx(1.0, rel=1e-5)
    assert gold[0] < gold[1] < gold[2]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"distillation": {"mode": "kd"}}, "mode kd needs labels"),
        ({"distillation": {"mode": "joint", "hard_weight": 0.5}}, "hard_weight needs mode kd"),
        ({"distillation": {"mode": "cls", "dynamic": "weight"}}, "dynamic needs mode kd"),
        ({"distillation": {"mode": "joint", "gold_repeats": 2}}, "gold_repeats needs mode kd"),
        ({"distillation": {"mode": "span_only"}, "task": "ecpe"}, "task ecpe has no span loss"),
        (
            {"distillation": {"mode": "joint"}, "model": {"base": "b", "given_emotions": "fine"}}
            | {"neutral_decision": "balanced"},
            "neutral_decision needs predicted emotions",
        ),
        (
            {"distillation": {"mode": "joint"}, "cause_calibration": "distance", "cause_decision": "argmax"},
            "cause_calibration needs cause_decision threshold",
        ),
        (
            {"distillation": {"mode": "joint"}, "least_emotion_accuracy": 50},
            "least_emotion_accuracy needs neutral_decision macro_f1 or balanced",
        ),
        (
            {"distillation": {"mode": "joint"}, "model": {"base": "b", "layout": "tree"}, "compile": True},
            "compile needs model.layout pair",
        ),
        (
            {"distillation": {"mode": "joint"}, "model": {"base": "b", "branch": "short"}},
            "branch short needs layout tree",
        ),
        (
            {"distillation": {"mode": "kd", "labels": "a", "teachers": [{"labels": "b"}]}},
            "labels and teachers exclude each other",
        ),
        (
            {"distillation": {"mode": "joint"}, "model": {"base": "b", "stand_ins": {"disaproval": "no"}}},
            "model.stand_ins: disaproval is not an emotion; known: .*disapproval",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_one_clear_line(groups, message):
    values = {"output": "o", "cache": "c", "corpus": {"train": "t", "valid": "v"}, "model": {"base": "b"}}
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config(StudentConfig, {**values, **groups}, source="test")
    assert "\n" not in str(raised.value)
