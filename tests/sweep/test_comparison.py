"""Selection compares settings by the predictions that trainings kept, as it would by predicting anew."""

import json

import pytest
from support import flip_bit, rewrite_manifest

from kdecs.config import load_config
from kdecs.corpus.reading import read_corpus
from kdecs.errors import ArtifactError
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.predictions import write_predictions
from kdecs.student.config import StudentConfig
from kdecs.student.predict.predictor import Student
from kdecs.sweep.selection.choose import select_student
from kdecs.sweep.status import read_results, trial_directory

KEPT = "valid-predictions.jsonl"
RULES = ("j >= i-1", "j = i", "all negative", "majority emotion")


def rule_of(directory):
    """A rule by seed, teacher and alpha, so that settings differ."""
    config = load_config(StudentConfig, directory / "config.json")
    number = (
        config.optimization.seed
        + ("t5" in str(config.distillation.labels))
        + (config.distillation.alpha < 0.5)
    )
    return RULES[number]


class Ruled:
    """Predicts by the rule of its directory; notes the corpora that it was asked for."""

    def __init__(self, directory, asked):
        self.directory, self.asked = directory, asked

    def predict_pairs(self, corpus):
        self.asked.append(corpus.path.stem)
        return trivial_predictions(corpus, "fold1+neutral")[rule_of(self.directory)]


@pytest.fixture
def asked(monkeypatch):
    found = []
    monkeypatch.setattr(Student, "from_pretrained", lambda directory, device: Ruled(directory, found))
    return found


@pytest.fixture
def sweep(finished, asked):
    """A finished sweep whose students predict by rules."""
    return finished


def renew_manifest(directory, *more):
    """Make a trial's manifest agree with the files that it lists, and `more`, and the sweep's manifest with that."""
    rewrite_manifest(directory, *more)
    rewrite_manifest(directory.parents[1])


def keep_predictions(sweep):
    """What a training does: its predictions stand in its directory and in the manifest."""
    for result in read_results(sweep):
        directory = trial_directory(sweep, result)
        corpus = read_corpus(load_config(StudentConfig, directory / "config.json").corpus.valid)
        rule = trivial_predictions(corpus, "fold1+neutral")[rule_of(directory)]
        write_predictions(directory / KEPT, rule.values())
        renew_manifest(directory, KEPT)


def test_kept_predictions_give_what_predicting_anew_gives(sweep, asked):
    record = select_student(sweep)
    assert asked == ["valid"] * 4 + ["test"]
    assert record.runner_up.tests["macro_f1"].difference != 0
    (sweep / "selection.json").unlink()
    for path in (sweep / "valid-predictions").iterdir():
        path.unlink()
    asked.clear()
    keep_predictions(sweep)
    kept = select_student(sweep)
    assert asked == ["test"], "no student predicted validation again"
    assert not list((sweep / "valid-predictions").iterdir())
    assert kept == record.model_copy(update={"test_opened_at": kept.test_opened_at})


def test_predictions_for_other_inputs_are_made_anew(sweep, asked):
    keep_predictions(sweep)
    for result in read_results(sweep):
        path = trial_directory(sweep, result) / "config.json"
        values = json.loads(path.read_text())
        values["corpus"]["valid"] = values["corpus"]["test"]
        path.write_text(json.dumps(values))
        renew_manifest(path.parent)  # nothing but the config's hash tells
    select_student(sweep)
    assert asked == ["test"] * 5


@pytest.mark.parametrize("gone", ["labels", "kept"])
def test_without_an_input_or_the_file_they_are_made_anew(finish, asked, gone, runs):
    sweep = finish()
    if gone == "labels":
        keep_predictions(sweep)
        (runs / "labels").rename(runs / "moved")
    select_student(sweep)
    assert asked == ["valid"] * 4 + ["test"]


def test_a_damaged_student_is_refused(sweep):
    keep_predictions(sweep)
    for result in read_results(sweep):
        path = trial_directory(sweep, result) / KEPT
        path.write_text(path.read_text().replace("false", "true ", 1))
    with pytest.raises(ArtifactError, match=r"valid-predictions\.jsonl.*sha256"):
        select_student(sweep)


def test_predictions_that_selection_kept_are_those_that_it_wrote(sweep):
    select_student(sweep)
    (sweep / "selection.json").unlink()
    path = sorted((sweep / "valid-predictions").iterdir())[0]
    flip_bit(path, path.read_bytes().index(b"false"))
    with pytest.raises(ArtifactError, match=r"valid-predictions/.* changed since it was written.*remove it"):
        select_student(sweep)
    path.unlink()
    select_student(sweep)
