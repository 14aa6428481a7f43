"""The registry: one version per student, one champion per corpus and metric, and where each comes from."""

import runpy
import shutil
import sys

import pytest
from mlflow import MlflowClient
from support import ROOT, empty_mlflow

from kdecs.tracking import registry
from kdecs.tracking.mlflow import Tracker
from kdecs.tracking.record import ModelRecord, RunRecord, TrackingConfig
from kdecs.tracking.registry import register_student

NAME = "kdecs-student"


@pytest.fixture
def register(tmp_path, tmp_path_factory, monkeypatch):
    """A function that registers a student without logging its files, and the registry's client."""
    shutil.copy(empty_mlflow(tmp_path_factory), tmp_path / "mlflow.db")
    config = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = MlflowClient(config.uri, registry_uri=config.uri)

    def log(tracker, record, run_id, directory, reads_emotions):
        if not client.search_registered_models(f"name = '{NAME}'"):
            client.create_registered_model(NAME)
        return client.create_model_version(NAME, str(directory), run_id).version

    monkeypatch.setattr(registry, "_log_student", log)

    def register(name, score, **changes):
        record = RunRecord(
            identity={"kdecs.run": name}, name=name, status="FINISHED", scores={"test_macro_f1": score}
        )
        values = {"corpus_checksum": "c", "metric": "macro_f1", "card": f"card of {name}", **changes}
        return register_student(Tracker(config, tmp_path / "sweep"), record, tmp_path, score=score, **values)

    return register, client


def test_the_better_one_is_champion_and_the_other_challenges_it(register):
    register, client = register
    assert register("a", 60.0) == f"{NAME} version 1, alias champion"
    assert register("b", 59.0, lineage={"kdecs.teacher": "t5-tiny"}) == f"{NAME} version 2, alias challenger"
    assert register("c", 61.0) == f"{NAME} version 3, alias champion"
    assert register("d", 70.0, corpus_checksum="other").endswith("version 4, alias challenger"), (
        "not comparable"
    )
    assert register("c", 61.0) == f"{NAME} version 3, alias champion", "a student is registered once"
    assert client.get_registered_model(NAME).aliases == {"champion": 3, "challenger": 4}
    version = client.get_model_version(NAME, "2")
    assert version.description == "card of b" and version.tags["kdecs.teacher"] == "t5-tiny"
    assert version.tags["kdecs.score"] == "59.0"
    run = client.get_run(version.run_id)
    assert run.info.run_name == "b" and run.data.metrics == {"test_macro_f1": 59.0}, (
        "it leads back to its run"
    )


def test_a_challenger_whose_champion_is_gone_becomes_champion_alone(register):
    register, client = register
    register("a", 60.0)
    register("b", 59.0)
    client.delete_registered_model_alias(NAME, "champion")
    assert register("b", 59.0) == f"{NAME} version 2, alias champion"
    assert client.get_registered_model(NAME).aliases == {"champion": 2}


def test_the_version_is_the_checkpoint_that_the_run_logged(tmp_path, tmp_path_factory):
    shutil.copy(empty_mlflow(tmp_path_factory), tmp_path / "mlflow.db")
    config = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "weights").write_text("1 2 3")
    model = ModelRecord(
        name="a", kind="student", directory=tmp_path / "student", checksum="0123", epoch=1.0, dataset=None
    )
    points = [{"time": 1.0, "epoch": 1.0, "step": 9, "macro_f1": 60.0}]
    record = RunRecord(
        identity={"kdecs.run": "a"}, name="a", status="FINISHED", points=points, model=model, finished=2.0
    )
    tracker = Tracker(config, tmp_path / "sweep")
    values = {"score": 60.0, "corpus_checksum": "c", "metric": "macro_f1", "card": "card"}
    values["reads_emotions"] = True
    for _ in range(2):
        assert register_student(tracker, record, tmp_path / "student", **values).endswith(
            "version 1, alias champion"
        )
    client = MlflowClient(config.uri, registry_uri=config.uri)
    version = client.get_model_version(NAME, "1")
    [logged] = client.search_logged_models([client.get_run(version.run_id).info.experiment_id])
    assert version.source == f"models:/{logged.model_id}" and logged.metrics[0].value == 60.0
    assert "mlflow.model.isExternal" not in logged.tags, "it has files now"
    [example] = tmp_path.rglob("input_example.json")
    assert "happiness" in example.read_text(), "without an emotion this student could not predict its example"
    run = client.get_run(version.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]


def test_a_laptops_database_moves_to_the_server_under_its_ids(
    tmp_path, tmp_path_factory, monkeypatch, capsys
):
    laptop, server, artifacts = tmp_path / "runs", tmp_path / "server.db", tmp_path / "served"
    laptop.mkdir()
    shutil.copy(empty_mlflow(tmp_path_factory), laptop / "mlflow.db")
    shutil.copy(laptop / "mlflow.db", server)
    uri = f"sqlite:///{laptop / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.create_experiment("kdecs", f"file://{laptop / 'mlartifacts'}")
    run = client.create_run(experiment, tags={"mlflow.note.content": "the one"}).info.run_id
    for step in range(5):
        client.log_metric(run, "loss", 1 / (step + 1), timestamp=step, step=step)
    (tmp_path / "note.txt").write_text("an artifact")
    client.log_artifact(run, str(tmp_path / "note.txt"))
    model = client.create_logged_model(experiment, name="a", source_run_id=run)
    client.create_registered_model(NAME)
    with registry.mlflow_at(uri):
        client.create_model_version(NAME, f"models:/{model.model_id}", run)
    client.set_registered_model_alias(NAME, "champion", "1")

    def move(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["move", str(laptop / "mlflow.db")])
        runpy.run_path(str(ROOT / "cluster" / "mlflow" / "move_from_sqlite.py"), run_name="__main__")

    move(MLFLOW_BACKEND_STORE_URI=f"sqlite:///{server}", MLFLOW_ARTIFACTS=artifacts)
    assert "2 experiments, 1 runs, 5 metrics, 1 models, 1 registered versions" in capsys.readouterr().out
    moved = MlflowClient(f"sqlite:///{server}", registry_uri=f"sqlite:///{server}")
    assert moved.get_run(run).data.to_dictionary() == client.get_run(run).data.to_dictionary()
    history = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run, "loss")]
    assert [(m.step, m.timestamp, m.value) for m in moved.get_metric_history(run, "loss")] == history
    place = moved.get_run(run).info.artifact_uri
    assert place == f"mlflow-artifacts:/{experiment}/{run}/artifacts"
    assert (artifacts / experiment / run / "artifacts" / "note.txt").read_text() == "an artifact"
    logged = moved.get_logged_model(model.model_id)
    assert logged.artifact_location.startswith(f"mlflow-artifacts:/{experiment}/models/")
    assert moved.get_model_version_by_alias(NAME, "champion").run_id == run
    with pytest.raises(SystemExit, match="has runs already"):
        move()
    monkeypatch.delenv("MLFLOW_ARTIFACTS")
    with pytest.raises(SystemExit, match="MLFLOW_ARTIFACTS is not set"):
        move()
