"""Training end to end on a tiny base: product, resume, ranks, refusals."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import Killed, StopAfter, assert_same_weights, kill

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.config import Optimization
from kdecs.corpus.reading import read_corpus
from kdecs.errors import ArtifactError, LabelError, Stopped, TrainingError
from kdecs.evaluation.predictions import read_predictions
from kdecs.student import training
from kdecs.student.losses import step_seed
from kdecs.student.predict.predictor import Student
from kdecs.student.training import train_student
from kdecs.training.loop import learning_rate_at

FILES = (
    "heads.safetensors",
    "student.json",
    "valid-predictions.jsonl",
    "config.json",
    "metrics.jsonl",
    "manifest.json",
)


def assert_same_student(left: Path, right: Path) -> None:
    assert_same_weights(left, right)
    for name in ("student.json", "valid-predictions.jsonl"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_kd_writes_a_complete_student_and_is_skipped_the_second_time(make_config, runtime, capsys):
    config = make_config()
    epochs: list[dict[str, float]] = []
    output = train_student(config, runtime, on_epoch=epochs.append)
    assert verify_artifact(output) == []
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines == epochs
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    manifest = read_manifest(output, "student")
    best = max(lines, key=lambda line: line["macro_f1"])
    assert manifest.details["valid"]["macro_f1"] == best["macro_f1"]
    assert manifest.details["threshold"] == best["threshold"]
    assert manifest.details["teacher"]["details"]["lineage"] == {"teacher": "tiny"}
    assert manifest.details["emotions"][0] == "neutral"
    assert not (output / "checkpoint.pt").exists()
    capsys.readouterr()
    assert train_student(config, runtime) == output
    assert "complete, skipped" in capsys.readouterr().out


def test_joint_needs_no_labels_and_two_runs_are_equal(make_config, runtime):
    joint = {"distillation": {"mode": "joint"}, "optimization": {"epochs": 1}}
    first = train_student(make_config("a", **joint), runtime)
    second = train_student(make_config("b", **joint), runtime)
    assert_same_student(first, second)
    assert read_manifest(first).details["teacher"] is None


@pytest.mark.parametrize(
    "steps", [3, 7, 9], ids=["within the first epoch", "at its end", "within the second"]
)
def test_a_stopped_training_ends_with_the_weights_of_an_uninterrupted_one(make_config, runtime, steps):
    whole = train_student(make_config("whole"), runtime)
    config = make_config("stopped")
    with pytest.raises(Stopped, match="run the same command again"):
        train_student(config, runtime, stop=StopAfter(steps - 1))
    assert not (config.output / "manifest.json").exists()
    train_student(config, runtime)
    assert_same_student(whole, config.output)


def test_a_kill_after_an_epoch_goes_on_from_its_checkpoint(make_config, runtime):
    whole = train_student(make_config("whole"), runtime)
    config = make_config("killed")
    with pytest.raises(Killed):
        train_student(config, runtime, on_epoch=kill)
    train_student(config, runtime)
    assert_same_student(whole, config.output)
    assert len((config.output / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_kill_before_a_checkpoint_leaves_the_best_student_that_the_checkpoint_names(
    make_config, runtime, monkeypatch
):
    """Epoch 2 was the best until a kill; trained again, as on a GPU not bit for bit, it is not."""

    saved: list[dict[str, torch.Tensor]] = []
    write, measure, checkpoint = training.save_student, training.epoch_metrics, training.save_checkpoint

    def note(directory: Path, model, *rest) -> None:
        saved.append({name: tensor.clone() for name, tensor in model.language_model.state_dict().items()})
        write(directory, model, *rest)

    def kill(directory, digest, progress, *rest) -> None:
        if progress.epoch == 2:
            raise Killed
        checkpoint(directory, digest, progress, *rest)

    config = make_config()
    monkeypatch.setattr(training, "save_student", note)
    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch_metrics", lambda *a, **k: measure(*a, **k) | {"macro_f1": k["epoch"]})
        patch.setattr(training, "save_checkpoint", kill)
        with pytest.raises(Killed):
            train_student(config, runtime)
    assert len(saved) == 2
    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch_metrics", lambda *a, **k: measure(*a, **k) | {"macro_f1": 0.5})
        train_student(config, runtime)
    assert read_manifest(config.output).details["valid"]["epoch"] == 1
    found = load_file(config.output / "model/model.safetensors")
    assert all(torch.equal(tensor, saved[0][name]) for name, tensor in found.items())
    names = {path.name for path in config.output.iterdir()}
    assert names == {"model", *FILES}
    corpus = read_corpus(config.corpus.valid)
    kept = read_predictions(config.output / "valid-predictions.jsonl", corpus)
    assert kept == Student.from_pretrained(config.output).predict_pairs(corpus), "of epoch 1 as well"


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_while_the_best_student_moves_to_its_place_is_taken_up(
    make_config, runtime, monkeypatch, moved
):
    whole = train_student(make_config("whole", optimization={"epochs": 1}), runtime)
    config = make_config("killed", optimization={"epochs": 1})
    counts, replace = iter(range(4)), os.replace

    def kill(source: Path, target: Path) -> None:
        if Path(source).parent.name == "best-1" and next(counts) == moved:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(Killed):
            train_student(config, runtime)
    assert not (config.output / "manifest.json").exists()
    train_student(config, runtime)
    assert_same_student(whole, config.output)
    assert verify_artifact(config.output) == []
    assert {path.name for path in config.output.iterdir()} == {"model", *FILES}


def test_a_best_epoch_of_an_earlier_version_goes_without_its_predictions(make_config, runtime):
    config = make_config(optimization={"epochs": 1})
    with pytest.raises(Killed):
        train_student(config, runtime, on_epoch=kill)
    (config.output / "best-1/valid-predictions.jsonl").unlink()
    train_student(config, runtime)
    assert verify_artifact(config.output) == []
    assert {path.name for path in config.output.iterdir()} == {"model", *FILES} - {"valid-predictions.jsonl"}


def test_a_best_student_that_was_removed_by_hand_is_one_clear_line(make_config, runtime, monkeypatch):
    config, measure = make_config(), training.epoch_metrics
    # The score falls, so that the best student stays the first epoch's.
    monkeypatch.setattr(
        training, "epoch_metrics", lambda *a, **k: measure(*a, **k) | {"macro_f1": 1 / k["epoch"]}
    )
    with pytest.raises(Stopped):
        train_student(config, runtime, stop=StopAfter(9))
    for folder in config.output.glob("best-*"):
        shutil.rmtree(folder)
    with pytest.raises(ArtifactError, match=r"best-1.*missing, the checkpoint names it"):
        train_student(config, runtime)


@pytest.mark.parametrize("place", ["save_checkpoint", "write_metrics"])
def test_a_line_that_was_seen_stays_as_it_is_when_a_kill_hits_the_end_of_an_epoch(
    make_config, runtime, monkeypatch, place
):
    """Speed and time of a repeated epoch differ: two readings of one epoch would be two points in MLflow."""

    def kill(*arguments: object) -> None:
        if place == "save_checkpoint" or arguments[1]:  # at a start there is no line to write yet
            raise Killed

    config = make_config("killed")
    with monkeypatch.context() as patch:
        patch.setattr(training, place, kill)
        with pytest.raises(Killed):
            train_student(config, runtime)
    metrics = config.output / "metrics.jsonl"
    seen = metrics.read_text() if metrics.exists() else ""
    assert (config.output / "checkpoint.pt").exists() == (place == "write_metrics")
    train_student(config, runtime)
    assert metrics.read_text().startswith(seen)
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2]


def test_the_output_of_another_config_is_refused_finished_or_not(make_config, runtime):
    config = make_config()
    with pytest.raises(Stopped):
        train_student(config, runtime, stop=StopAfter(1))
    other = make_config(optimization={"epochs": 1})
    with pytest.raises(ArtifactError, match="unfinished training of another config"):
        train_student(other, runtime)
    train_student(config, runtime)
    with pytest.raises(ArtifactError, match="finished student directory of another config"):
        train_student(other, runtime)


def test_a_truncated_checkpoint_is_one_clear_line(make_config, runtime):
    config = make_config()
    with pytest.raises(Stopped):
        train_student(config, runtime, stop=StopAfter(1))
    checkpoint = config.output / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(ArtifactError, match=r"checkpoint\.pt: not a readable checkpoint"):
        train_student(config, runtime)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(make_config, runtime, monkeypatch):
    def poisoned(parts: object, distillation: object) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(training, "step_loss", poisoned)
    config = make_config()
    with pytest.raises(TrainingError, match="not finite"):
        train_student(config, runtime)
    assert not (config.output / "checkpoint.pt").exists()
    assert not (config.output / "model").exists() and not list(config.output.glob("best-*"))


def test_a_step_that_is_not_finite_is_not_taken_nor_any_after_it(make_config, runtime, monkeypatch):
    """On several ranks and on GPUs losses are looked at every 20 steps only."""
    config, calls = make_config(), []
    config.output.mkdir()
    trainer = training.StudentTrainer(config, "0", runtime, None, StopAfter())
    trainer.check_steps = 20
    loss = training.step_loss

    def poisoned(parts, distillation) -> torch.Tensor:
        calls.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        return loss(parts, distillation) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(training, "step_loss", poisoned)
    with pytest.raises(TrainingError, match="not finite near step 7"):
        trainer.train()
    assert len(calls) == 7
    found = trainer.model.state_dict()
    assert any(not torch.equal(tensor, found[name]) for name, tensor in calls[1].items())
    assert all(torch.equal(tensor, found[name]) for name, tensor in calls[2].items())
    assert not (config.output / "checkpoint.pt").exists()


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


def test_learning_rate_rises_then_falls_to_zero():
    optimization = Optimization(learning_rate=1.0, warmup_share=0.2)
    rates = [learning_rate_at(step, 10, optimization) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx([(10 - step) / 8 for step in range(2, 11)])
    assert learning_rate_at(0, 10, Optimization(learning_rate=1.0, warmup_share=0.0)) == 1.0


def test_dropout_seeds_differ_by_step_and_rank():
    seeds = {step_seed(0, step, rank) for step in range(20) for rank in range(4)}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**63 for seed in seeds)
