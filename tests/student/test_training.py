"""Training end to end on a tiny base: product, resume, ranks, refusals."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support import Killed, StopAfter, kill, weights

from kdecs.artifact import content_checksum, read_manifest, verify_artifact
from kdecs.config import config_hash
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.errors import ArtifactError, CorpusError, LabelError, Stopped, TrainingError
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import Prediction, read_predictions
from kdecs.student import training
from kdecs.student.losses import LossParts
from kdecs.student.predict.predictor import Student
from kdecs.student.training import train_student

FILES = (
    "heads.safetensors",
    "student.json",
    "valid-predictions.jsonl",
    "config.json",
    "metrics.jsonl",
    "manifest.json",
)


def test_kd_writes_a_complete_student_and_is_skipped_the_second_time(trained, runtime, capsys):
    output = trained.config.output
    assert verify_artifact(output) == []
    assert {path.name for path in output.iterdir()} == {"model", *FILES}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines == trained.epochs
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    manifest = read_manifest(output, "student")
    best = max(lines, key=lambda line: line["macro_f1"])
    assert manifest.details["valid"]["macro_f1"] == best["macro_f1"]
    assert manifest.details["threshold"] == best["threshold"]
    assert manifest.details["teacher"]["details"]["lineage"] == {"teacher": "tiny"}
    assert manifest.details["emotions"][0] == "neutral"
    capsys.readouterr()
    assert train_student(trained.config, runtime) == output
    assert "complete, skipped" in capsys.readouterr().out


def test_the_best_epoch_becomes_the_product_also_after_a_kill_while_it_moves(
    make_config, runtime, monkeypatch, tmp_path
):
    """And one that an earlier version of kdecs saved goes without its predictions."""
    config, replace = make_config("killed", optimization={"epochs": 1}), os.replace
    with pytest.raises(Killed):
        train_student(config, runtime, on_epoch=kill)
    saved = weights(config.output / "best-1")
    earlier = config.model_copy(update={"output": tmp_path / "earlier"})
    shutil.copytree(config.output, earlier.output)
    (earlier.output / "best-1/valid-predictions.jsonl").unlink()
    train_student(earlier, runtime)
    assert verify_artifact(earlier.output) == []
    assert {path.name for path in earlier.output.iterdir()} == {"model", *FILES} - {"valid-predictions.jsonl"}

    def kill_at_the_card(source, target):
        if Path(source).name == "student.json" and Path(source).parent.name == "best-1":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill_at_the_card)
        with pytest.raises(Killed):
            train_student(config, runtime)
    assert not (config.output / "manifest.json").exists()
    train_student(config, runtime)
    assert verify_artifact(config.output) == []
    assert {path.name for path in config.output.iterdir()} == {"model", *FILES}
    found = weights(config.output)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


def test_the_output_of_another_config_is_refused_finished_or_not(make_config, runtime, directory):
    config = make_config()
    with pytest.raises(Stopped):
        train_student(config, runtime, stop=StopAfter(1))
    with pytest.raises(ArtifactError, match="unfinished training of another config"):
        train_student(make_config(optimization={"epochs": 1}), runtime)
    with pytest.raises(ArtifactError, match="finished student directory of another config"):
        train_student(config.model_copy(update={"output": directory}), runtime)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(make_config, runtime, monkeypatch):
    def poisoned(*arguments: object, **keywords: object) -> tuple[torch.Tensor, LossParts]:
        return torch.tensor(float("nan"), requires_grad=True), LossParts()

    monkeypatch.setattr(training, "step_loss", poisoned)
    config = make_config()
    with pytest.raises(TrainingError, match=r"not finite near step 1; lower optimization\.learning_rate"):
        train_student(config, runtime)
    assert not (config.output / "checkpoint.pt").exists()
    assert not (config.output / "model").exists() and not list(config.output.glob("best-*"))


def test_labels_that_do_not_cover_the_pairs_or_have_other_words_are_refused(
    make_config, runtime, tmp_path, corpus_files, write_labels
):
    raw = json.loads(corpus_files["train"].read_text())
    first = next(iter(raw))
    raw[first][0][0]["utterance"] += " indeed"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(raw))
    corpus = {"train": str(changed), "valid": str(corpus_files["valid"])}
    with pytest.raises(
        LabelError, match=rf"no soft label for the pair {first}/1/1 .* of 99 pairs are missing"
    ):
        train_student(make_config(corpus=corpus), runtime)
    foreign = write_labels(tmp_path / "foreign", corpus_files, ("because", "as", "so", "thus", "other"))
    with pytest.raises(LabelError, match=r"because, as, so, thus, other, expected"):
        train_student(make_config(distillation={"mode": "kd", "labels": str(foreign)}), runtime)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_split_without_causes_is_refused_before_training(
    make_config, runtime, tmp_path, corpus_files, split
):
    raw = json.loads(corpus_files[split].read_text())
    for nested in raw.values():
        for utterance in nested[0]:
            if "expanded emotion cause evidence" in utterance:
                utterance |= {"expanded emotion cause evidence": [], "expanded emotion cause span": []}
    without = tmp_path / f"without-{split}.json"
    without.write_text(json.dumps(raw))
    corpus = {name: str(path) for name, path in corpus_files.items()} | {split: str(without)}
    with pytest.raises(CorpusError, match=f"without-{split}.json: no cause to learn from or to validate on"):
        train_student(make_config(corpus=corpus, distillation={"mode": "joint"}), runtime)


def test_share_and_neutral_share_choose_nested_subsets(make_config, base):
    from transformers import AutoTokenizer

    from kdecs.student.data import load_training_data

    def rows(share: float, neutral: float) -> set[int]:
        config = make_config(neutral_share=neutral)
        corpus = config.corpus.model_copy(update={"train_share": share})
        tokenizer = AutoTokenizer.from_pretrained(base)
        return set(
            load_training_data(config.model_copy(update={"corpus": corpus}), tokenizer, 256).rows.tolist()
        )

    whole = rows(1.0, 1.0)
    assert rows(0.5, 1.0) < whole
    assert rows(0.2, 1.0) < rows(0.5, 1.0)
    assert rows(1.0, 0.4) < whole
    assert rows(0.5, 0.4) == rows(0.5, 1.0) & rows(1.0, 0.4)


def test_bfloat16_and_patience(make_config, runtime):
    # So small a rate changes no activation, and the second epoch's score is the first's.
    config = make_config(
        precision="bfloat16", patience_epochs=1, optimization={"learning_rate": 1e-30, "epochs": 5}
    )
    output = train_student(config, runtime)
    assert read_manifest(output).details["epochs"] == 2


@pytest.mark.parametrize("layout", ["pair", "tree"])
def test_a_student_of_later_candidates_learns_them_and_predicts_them(
    make_config, runtime, values, write_labels, tmp_path, layout
):
    """By their labels, with priors of their own; without them nothing of a config's hash or a card changes."""
    corpus = {}
    for split, count in (("train", 4), ("valid", 2)):
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
        conversations = [
            {"conversation_ID": n, "conversation": said, "emotion-cause_pairs": pairs} for n in range(count)
        ]
        corpus[split] = str(tmp_path / split)
        Path(corpus[split]).write_text(json.dumps(conversations))
    labels = write_labels(tmp_path / "labels", {s: Path(p) for s, p in corpus.items()}, candidates_after=1)
    groups = {
        "corpus": corpus,
        "model": {**values["model"], "layout": layout, "priors": "training"},
        "distillation": {"mode": "kd", "labels": str(labels)},
        "optimization": {"learning_rate": 1e-3, "epochs": 1},
    }
    plain, config = make_config("plain", **groups), make_config("later", candidates={"after": 1}, **groups)
    assert config_hash(make_config("same", candidates={"after": 0}, **groups)) == config_hash(plain)
    assert config_hash(plain) != config_hash(config)
    train_student(config, runtime)
    student = Student.from_pretrained(config.output)
    dialogues = read_corpus(corpus["valid"], log=False).dialogues
    found = {p.key for p in student.predict(dialogues)}
    assert found == {p.key for d in dialogues for p in all_pairs(d)}
    metrics = json.loads((config.output / "metrics.jsonl").read_text().splitlines()[-1])
    written = read_predictions(
        config.output / "valid-predictions.jsonl", read_corpus(corpus["valid"], log=False)
    )
    scores = evaluate(read_corpus(corpus["valid"], log=False), written, candidates_after=1)
    # 4 causes of each dialogue, two of them later.
    assert (scores.num_positive, scores.missing) == (2 * 4, 0)
    assert scores["macro_f1"] == pytest.approx(metrics["macro_f1"])
    assert json.loads((config.output / "student.json").read_text())["candidates_after"] == 1
    with pytest.raises(LabelError):
        train_student(make_config("far", candidates={"after": 2}, **groups), runtime)


def test_a_student_of_two_files_and_their_labels(make_config, runtime, values, write_labels, tmp_path):
    """What it trains on are the pairs of both, and the labels of both."""
    conversation = {
        "conversation_ID": 7,
        "conversation": [{"utterance_ID": 1, "text": "We won !", "speaker": "A", "emotion": "joy"}],
        "emotion-cause_pairs": [["1_joy", "1_won"]],
    }
    other = tmp_path / "ecf.json"
    other.write_text(json.dumps([conversation]))
    first = Path(values["corpus"]["train"])
    made = write_labels(tmp_path / "labels", {"train": [first, other]})
    groups = {
        "corpus": {**values["corpus"], "train": [str(first), str(other)]},
        "optimization": {"learning_rate": 1e-3, "epochs": 1},
    }
    config = make_config("both", distillation={"mode": "kd", "labels": str(made)}, **groups)
    manifest = read_manifest(train_student(config, runtime))
    num_pairs = sum(
        len(pairs_of(d, "fold1+neutral")) for path in (first, other) for d in read_corpus(path).dialogues
    )
    assert manifest.details["num_pairs"] == num_pairs
    assert "happiness" in manifest.details["emotions"] and "joy" not in manifest.details["emotions"]
    assert [manifest.inputs["train"], manifest.inputs["train_1"]] == [
        content_checksum(path) for path in (first, other)
    ]
    with pytest.raises(LabelError, match="7/1/1"):
        train_student(make_config("labels-of-one", **groups), runtime)


def all_pairs(dialogue):
    """What `predict` should give for each dialogue, one turn ahead."""
    return [
        Prediction(dialogue.id, i, j, None, False, "")
        for i in range(1, len(dialogue.utterances) + 1)
        for j in range(1, min(len(dialogue.utterances), i + 1) + 1)
    ]
