import json
import math

import pytest

from kdecs.artifact import verify_artifact
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ArtifactError
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.metrics import evaluate
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.report import write_report
from kdecs.sweep.results import read_results
from kdecs.sweep.selection import mean_interval, rank_settings, select_student

TRAINER = "fake_trainer:train"


class RuleStudent:
    """Predicts by the distance rule; counts how often it was asked."""

    asked = 0

    def predict_pairs(self, corpus):
        RuleStudent.asked += 1
        return trivial_predictions(corpus, "fold1")["j >= i-1"]


@pytest.fixture
def finished(make_config, in_process, monkeypatch):
    from kdecs.student.prediction import Student

    RuleStudent.asked = 0
    monkeypatch.setattr(Student, "from_pretrained", lambda directory, device: RuleStudent())
    monkeypatch.setattr("kdecs.tracking.Tracker.register_student", lambda *a, **k: "kdecs-student version 1")
    return run_sweep(make_config(), trainer=TRAINER, runner=in_process)


def test_interval_is_student_t():
    mean, sd, (low, high) = mean_interval([1.0, 2.0, 3.0])
    assert (mean, sd) == (2.0, 1.0)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert mean_interval([5.0]) == (5.0, None, None)


def test_settings_are_ranked_by_mean_over_seeds(finished):
    ranked = rank_settings(read_results(finished))
    assert [setting.label for setting in ranked] == [
        "llama-tiny α0.6 τ2",
        "llama-tiny α0.3 τ2",
        "t5-tiny α0.6 τ2",
        "t5-tiny α0.3 τ2",
    ]
    assert ranked[0].num_seeds == 2
    assert ranked[0].mean == pytest.approx(68.15)


def test_winner_is_scored_on_test_once(finished):
    record = select_student(finished)
    assert record["winner"]["label"] == "llama-tiny α0.6 τ2 s1"
    corpus = read_corpus(bundled_sample("test"))
    rule = trivial_predictions(corpus, "fold1")["j >= i-1"]
    assert record["test"] == json.loads(json.dumps(evaluate(corpus, rule).as_dict()))
    assert record["test_baselines"]["j >= i-1"]["macro_f1"] == record["test"]["macro_f1"]
    assert "macro_f1" not in record["test_baselines"]["majority emotion"]
    assert (finished / "test-predictions.jsonl").is_file()
    assert record["registered"] == "kdecs-student version 1"
    assert select_student(finished) == record
    assert RuleStudent.asked == 1


def test_test_opened_for_another_state_is_refused(finished):
    select_student(finished)
    path = finished / "selection.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "sweep": "0" * 64}))
    with pytest.raises(ArtifactError, match="the test split was opened on"):
        select_student(finished)


def test_unfinished_sweep_is_refused(finished):
    (finished / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        select_student(finished)


def test_report_has_its_figures_and_scores(finished):
    page = write_report(finished).read_text()
    assert "Not opened yet" in page
    record = select_student(finished)
    page = write_report(finished).read_text()
    assert verify_artifact(finished / "report") == []
    for name in ("leaderboard.png", "alpha-temperature.png", "curves.png"):
        assert (finished / "report" / name).read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}"' in page
    assert f"{record['test']['macro_f1']:.2f}" in page
    assert "j &gt;= i-1" in page and "majority emotion" in page
    assert "0.00 points above the best trivial rule, j &gt;= i-1" in page
    assert "http://" not in page and "https://" not in page
    for result in read_results(finished):
        assert result.label in page
