"""The registry: one version per student, one champion per corpus and metric, and where each comes from."""

import shutil

import pytest
from mlflow import MlflowClient
from support import empty_mlflow

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

    def log(tracker, record, run_id, directory):
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
    for _ in range(2):
        assert register_student(tracker, record, tmp_path / "student", **values).endswith(
            "version 1, alias champion"
        )
    client = MlflowClient(config.uri, registry_uri=config.uri)
    version = client.get_model_version(NAME, "1")
    [logged] = client.search_logged_models([client.get_run(version.run_id).info.experiment_id])
    assert version.source == f"models:/{logged.model_id}" and logged.metrics[0].value == 60.0
    assert "mlflow.model.isExternal" not in logged.tags, "it has files now"
    run = client.get_run(version.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
