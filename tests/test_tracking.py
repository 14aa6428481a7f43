"""Tracking against a real SQLite database: one run a record, one point an epoch, one champion a corpus."""

import json
import shutil

import pytest
from mlflow import MlflowClient

from kdecs.config import parse_config
from kdecs.errors import ConfigError
from kdecs.run_record import RunRecord, TrackingConfig, directory_identity, read_points, without_password
from kdecs.tracking import Tracker, track_run, tracking_uri


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow") / "template.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def config(tmp_path, template, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(template, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


def record(num_epochs, **changes):
    points = [
        {"epoch": e, "step": e, "time": 1000.5 + e, "macro_f1": 10.0 * e} for e in range(1, num_epochs + 1)
    ]
    return RunRecord(identity={"kdecs.run": "a"}, name="a α0.6", points=points, started=1000.0, **changes)


def runs(config):
    client = MlflowClient(config.uri)
    experiment = client.get_experiment_by_name(config.experiment)
    return client, client.search_runs([experiment.experiment_id]) if experiment else []


def test_replays_make_no_second_run_or_point(config, tmp_path):
    for num_epochs in (0, 1, 1, 3, 3):
        assert Tracker(config, tmp_path / "sweep").sync([record(num_epochs, params={"alpha": 0.6})])
    client, found = runs(config)
    assert len(found) == 1
    history = client.get_metric_history(found[0].info.run_id, "macro_f1")
    assert [(m.step, m.timestamp, m.value) for m in history] == [
        (1, 1001500, 10.0),
        (2, 1002500, 20.0),
        (3, 1003500, 30.0),
    ]
    assert found[0].data.params == {"alpha": "0.6"}
    assert found[0].info.start_time == 1000000
    assert "step" not in found[0].data.metrics


def test_an_epoch_measured_again_keeps_its_first_point(config, tmp_path):
    tracker = Tracker(config, tmp_path / "sweep")
    tracker.sync([record(2)])
    again = record(3)
    for point in again.points:
        point["time"] += 100
    tracker.sync([again])
    client, found = runs(config)
    history = client.get_metric_history(found[0].info.run_id, "macro_f1")
    assert [(m.step, m.timestamp) for m in history] == [(1, 1001500), (2, 1002500), (3, 1103500)]


def test_status_follows_the_record(config, tmp_path):
    for status, finished in (("RUNNING", None), ("KILLED", 1010.0), ("RUNNING", None), ("FINISHED", 1020.0)):
        Tracker(config, tmp_path / "sweep").sync([record(1, status=status, finished=finished)])
        assert runs(config)[1][0].info.status == status
    assert runs(config)[1][0].info.end_time == 1020000


def test_family_is_nested(config, tmp_path):
    parent = RunRecord(identity={"kdecs.run": "parent"}, name="sweep")
    tracker = Tracker(config, tmp_path / "sweep")
    assert tracker.sync_family(parent, [record(1)])
    child = next(run for run in runs(config)[1] if run.info.run_name == "a α0.6")
    assert child.data.tags["mlflow.parentRunId"] == tracker.run_id(parent.identity)


def test_password_in_a_config_is_refused():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as caught:
        parse_config(TrackingConfig, {"uri": "postgresql://me:secret@host/db"}, source="x.yaml")
    assert "secret" not in str(caught.value)


def test_server_away_warns_once_without_password(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    tracker = Tracker(TrackingConfig(), tmp_path / "sweep")
    assert not tracker.sync([record(1)])
    assert not tracker.sync([record(1)], now=True)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "does not answer" in printed and "secret" not in printed


def test_track_run_of_a_teacher(config, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    identity = {"kdecs.run": directory_identity(teacher)}
    line = json.dumps({"epoch": 1, "step": 7, "time": 1001.0, "macro_f1": 70.0}) + "\n"
    interrupted = pytest.raises(KeyboardInterrupt)
    with interrupted, track_run(config, RunRecord(identity=identity, name="teacher"), teacher):
        (teacher / "metrics.jsonl").write_text(line)
        raise KeyboardInterrupt
    assert runs(config)[1][0].info.status == "FAILED"
    with track_run(config, RunRecord(identity=identity, name="teacher"), teacher):
        (teacher / "metrics.jsonl").write_text(line + line.replace('"epoch": 1', '"epoch": 2'))
    client, found = runs(config)
    assert [run.info.status for run in found] == ["FINISHED"]
    assert len(client.get_metric_history(found[0].info.run_id, "macro_f1")) == 2


def test_points_are_read_up_to_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "time": 2.0}\n{"epoch": 2, "ti')
    assert read_points(path) == [{"epoch": 1, "time": 2.0}]
    assert read_points(tmp_path / "none.jsonl") == []


def test_uri_defaults_beside_the_output(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), tmp_path / "sweep") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(TrackingConfig(), tmp_path / "sweep") == "http://server:5000"
    assert without_password("postgresql://a:b@host/db") == "postgresql://…@host/db"
