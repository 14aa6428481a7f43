"""Selection compares settings by the predictions that trainings kept, as it would by predicting anew."""

import json
import shutil

import numpy as np
import pytest
from support import flip_bit, rewrite_manifest
from typer.testing import CliRunner

from kdecs.cli import app
from kdecs.config import load_config
from kdecs.corpus.reading import read_corpus
from kdecs.errors import ArtifactError, ConfigError
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import write_predictions
from kdecs.evaluation.significance import compare_systems, holm
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


def compared(*arguments):
    done = CliRunner().invoke(app, ["sweep", "compare", *map(str, arguments)])
    return done.exit_code, done.stdout


def test_settings_are_compared_with_one_of_them(sweep, tmp_path):
    results = read_results(sweep)
    groups = {}
    for result in results:
        groups.setdefault(result.label.rpartition(" s")[0], []).append(result)
    first, *rest = groups
    code, text = compared(sweep, "--minus", first, "--json")
    found = json.loads(text)
    assert code == 0 and found["minus"] == first
    assert {row["setting"] for row in found["scores"]} == {*groups}
    assert {row["setting"] for row in found["differences"]} == {*rest}
    corpus = read_corpus(
        load_config(StudentConfig, trial_directory(sweep, results[0]) / "config.json").corpus.valid
    )

    def sums(label):
        tables = [
            trivial_predictions(corpus, "fold1+neutral")[rule_of(trial_directory(sweep, r))]
            for r in groups[label]
        ]
        return np.sum([evaluate(corpus, table).sums_by_dialogue for table in tables], axis=0)

    for row in found["differences"]:
        expected = compare_systems(sums(row["setting"]), sums(first))[row["score"]]
        for name in ("difference", "low", "high", "p"):
            assert row[name] == pytest.approx(getattr(expected, name))
    # All that are shown are corrected together.
    p_values = [row["p"] for row in found["differences"]]
    assert [row["holm_p"] for row in found["differences"]] == holm(p_values) != p_values
    [only] = {
        row["setting"]
        for row in json.loads(compared(sweep, "--minus", first, "--setting", rest[0], "--json")[1])[
            "differences"
        ]
    }
    assert only == rest[0]
    # The tables say the same.
    row = found["differences"][0]
    cells = [
        f"{row['difference']:+.2f}",
        f"{row['low']:+.2f} to {row['high']:+.2f}",
        f"{row['p']:.3f}",
        f"{row['holm_p']:.3f}",
    ]
    assert (
        f"| {row['setting']} | macro F1 | {' | '.join(cells)} |"
        in compared(sweep, "--minus", first, "--markdown")[1]
    )
    assert cells[1] in compared(sweep, "--minus", first)[1]
    # A second sweep with settings of the same names.
    other = shutil.copytree(sweep, sweep.with_name("other"))
    found = json.loads(compared(sweep, other, "--minus", f"{first} (sweep)", "--json")[1])
    same = [row for row in found["differences"] if row["setting"] == f"{first} (other)"]
    assert [row["difference"] for row in same] == [0] * 4 and {row["p"] for row in same} == {1.0}


def test_what_cannot_be_compared_is_one_line(sweep, finish):
    label = read_results(sweep)[0].label.rpartition(" s")[0]
    other = shutil.copytree(sweep, sweep.with_name("other"))
    for arguments, message in (
        ((sweep, "--minus", "nobody"), f"nobody: no setting has this name; there are .*{label}"),
        (
            (sweep, other, "--minus", label),
            f"{label}: 2 settings have this name; name one of .*{label} .sweep.; .*",
        ),
        ((sweep, "--minus", label, "--setting", label), "there is no other setting to compare it with"),
    ):
        with pytest.raises((ArtifactError, ConfigError), match=message):
            CliRunner().invoke(app, ["sweep", "compare", *map(str, arguments)], catch_exceptions=False)
