"""Training end to end on a tiny base: product, resume, ranks, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.config import Optimization
from kdecs.errors import ArtifactError, LabelError, Stopped, TrainingError
from kdecs.runtime import StopSignal
from kdecs.schedule import learning_rate_at
from kdecs.student import training
from kdecs.student.objective import step_seed
from kdecs.student.training import train_student


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {**load_file(directory / "model/model.safetensors"), **load_file(directory / "heads.safetensors")}


def assert_same_student(left: Path, right: Path) -> None:
    first, second = weights(left), weights(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert (left / "student.json").read_bytes() == (right / "student.json").read_bytes()


class StopAfter(StopSignal):
    """A stop that is requested at the n-th look."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        del value


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
    class Killed(Exception):
        pass

    def kill(metrics: dict[str, float]) -> None:
        raise Killed

    whole = train_student(make_config("whole"), runtime)
    config = make_config("killed")
    with pytest.raises(Killed):
        train_student(config, runtime, on_epoch=kill)
    train_student(config, runtime)
    assert_same_student(whole, config.output)
    assert len((config.output / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_output_of_another_config_is_refused_finished_or_not(make_config, runtime):
    config = make_config()
    with pytest.raises(Stopped):
        train_student(config, runtime, stop=StopAfter(1))
    other = make_config(optimization={"epochs": 1})
    with pytest.raises(ArtifactError, match="unfinished training of another config"):
        train_student(other, runtime)
    train_student(config, runtime)
    with pytest.raises(ArtifactError, match="student of another config"):
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
    assert not (config.output / "model").exists()


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
    config = make_config(
        precision="bfloat16", patience_epochs=1, optimization={"learning_rate": 1e-9, "epochs": 5}
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
