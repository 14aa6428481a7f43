"""A sweep over the bundled sample with made-up soft labels, a fake trainer, and MLflow's schema made once."""

import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from support import empty_mlflow

from kdecs.artifact import write_manifest
from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.selection.choose import select_student
from kdecs.sweep.space import trials_directory
from kdecs.sweep.trial import run_trial
from kdecs.tracking.mlflow import Tracker

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from fake_trainer import train  # noqa: E402


@pytest.fixture(autouse=True)
def _trainer_is_importable(monkeypatch):
    path = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def _mlflow_where_it_matters(request, monkeypatch):
    """Tests that do not look at MLflow, by its URI, do not wait for it."""
    if "uri" not in request.fixturenames:
        monkeypatch.setattr(Tracker, "sync", lambda *arguments, **values: True)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory):
    """A SQLite database with MLflow's schema; making it takes seconds, copying it nothing."""
    return empty_mlflow(tmp_path_factory)


@pytest.fixture
def runs(tmp_path):
    """A folder for sweeps."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def write_labels(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "shard-00000.parquet").write_bytes(directory.name.encode())
    write_manifest(
        directory, "soft-labels", config_hash="0" * 64, inputs={}, files=["shard-00000.parquet"], details={}
    )
    return directory


@pytest.fixture
def make_labels():
    """A function that writes a made-up soft-label directory."""
    return write_labels


def sweep_config(runs: Path, labels: dict[str, str], **changes) -> SweepConfig:
    """The config of a sweep in the folder `runs`: 2 teachers × 2 alphas × 2 seeds unless the changes say otherwise."""
    values = {
        "name": "small",
        "output": str(runs / "sweep"),
        "teachers": labels,
        "student": {
            "corpus": {split: str(bundled_sample(split)) for split in ("train", "valid", "test")},
            "model": {"base": "roberta-tiny"},
            "optimization": {"epochs": 3},
        },
        "space": {
            "teacher": {"grid": ["llama-tiny", "t5-tiny"]},
            "distillation.alpha": {"grid": [0.3, 0.6]},
            "optimization.seed": {"grid": [0, 1]},
        },
        "max_failures": 1,
        "max_concurrent_trials": 2,
        "report": False,
        **changes,
    }
    return parse_config(SweepConfig, values, source="test")


def two_labels(runs: Path) -> dict[str, str]:
    return {name: str(write_labels(runs / "labels" / name)) for name in ("llama-tiny", "t5-tiny")}


@pytest.fixture
def make_config(runs):
    """A function that makes a sweep's config (sweep_config)."""
    labels = two_labels(runs)
    return lambda **changes: sweep_config(runs, labels, **changes)


@pytest.fixture
def uri(runs, mlflow_template):
    """The URI of a database beside the sweeps, which is where they are tracked by default."""
    shutil.copy(mlflow_template, runs / "mlflow.db")
    return f"sqlite:///{runs / 'mlflow.db'}"


def run_in_process(stage, stop, follow):
    """A runner without Ray: one trial after the other, with its retries; a fault of one leaves the others."""
    for identity in stage.trials:
        for _ in range(stage.run.max_failures + 1):
            follow()
            if stop.requested:
                stage.run.stop_file.touch()
            try:
                run_trial(trials_directory(stage.sweep) / identity, stage.run, lambda metrics: None)
                break
            except Exception as error:
                print(f"{identity}: {error}")
        follow()


@pytest.fixture
def in_process():
    return run_in_process


@pytest.fixture
def runs_of():
    """A function of an MLflow URI: (client, parent runs, child runs by trial); no trial or setting has two."""

    def find(uri):
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("kdecs").experiment_id
        found = client.search_runs([experiment], max_results=1000)
        parents = [run for run in found if run.data.tags["kdecs.kind"] == "sweep"]
        children = {
            run.data.tags["kdecs.trial"]: run for run in found if run.data.tags["kdecs.kind"] == "trial"
        }
        settings = [
            run.data.tags["kdecs.setting"] for run in found if run.data.tags["kdecs.kind"] == "setting"
        ]
        assert len(settings) == len(set(settings)), "two runs for one setting"
        assert len(parents) + len(settings) + len(children) == len(found), "two runs for one trial"
        return client, parents, children

    return find


class RuleStudent:
    """Predicts by the distance rule; notes which corpora it was asked for."""

    asked: ClassVar[list[str]] = []

    def predict_pairs(self, corpus):
        RuleStudent.asked.append(corpus.path.stem)
        return trivial_predictions(corpus, "fold1")["j >= i-1"]


@pytest.fixture
def asked():
    """The corpora that students of `finished` sweeps were asked to predict."""
    return RuleStudent.asked


def predict_by_rule(patch):
    """Put the distance rule in the place of every student and baseline, and a word in that of the registry."""
    from kdecs.baselines.generative.prediction import GenerativeBaseline
    from kdecs.baselines.mrc.prediction import MrcBaseline
    from kdecs.baselines.prediction import Baseline
    from kdecs.student.predict.predictor import Student

    RuleStudent.asked.clear()
    patch.setattr(Baseline, "from_pretrained", lambda directory, device, knowledge: RuleStudent())
    patch.setattr(GenerativeBaseline, "load", lambda directory, runtime, dtype: RuleStudent())
    patch.setattr(MrcBaseline, "from_pretrained", lambda directory, device, emotions: RuleStudent())
    patch.setattr(Student, "from_pretrained", lambda directory, device: RuleStudent())
    patch.setattr("kdecs.sweep.selection.choose.register_student", lambda *a, **k: "kdecs-student version 1")


@pytest.fixture
def _rule_students(monkeypatch):
    predict_by_rule(monkeypatch)


@pytest.fixture
def finish(make_config, _rule_students):
    """A function that runs a sweep with the fake trainer; its students predict by the distance rule."""
    return lambda **changes: run_sweep(make_config(**changes), trainer=train, runner=run_in_process)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    """The folder of a finished sweep over 2 teachers × 2 alphas × 2 seeds, not to be changed."""
    runs = tmp_path_factory.mktemp("finished") / "runs"
    with pytest.MonkeyPatch.context() as untracked:
        untracked.setattr(Tracker, "sync", lambda *arguments, **values: True)
        run_sweep(sweep_config(runs, two_labels(runs)), trainer=train, runner=run_in_process)
    return runs


@pytest.fixture
def finished(finished_once, tmp_path, _rule_students):
    """The directory of such a sweep, for one test alone; its labels are those of all."""
    return shutil.copytree(finished_once / "sweep", tmp_path / "finished" / "sweep")


@pytest.fixture(scope="session")
def selected_once(finished_once, tmp_path_factory):
    """The directory of such a sweep with a selected student, not to be changed."""
    sweep = shutil.copytree(finished_once / "sweep", tmp_path_factory.mktemp("selected") / "sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "sync", lambda *arguments, **values: True)
        predict_by_rule(patch)
        select_student(sweep)
    return sweep


@pytest.fixture
def selected(selected_once, tmp_path, _rule_students):
    """The directory of a sweep with a selected student, for one test alone."""
    return shutil.copytree(selected_once, tmp_path / "selected" / "sweep")


@pytest.fixture
def _coarse_figures(monkeypatch):
    """Figures of a sixteenth of the dots, which are drawn sooner and hold the same."""
    monkeypatch.setattr("kdecs.sweep.report.figures._DPI", 40)
