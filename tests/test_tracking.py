"""Tracking against a real SQLite database: one run a record, one point an epoch, one champion a corpus."""

import json
import shutil
import socket
import sys
import threading
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from support import empty_mlflow

from kdecs.artifact import content_checksum, file_lock, write_manifest
from kdecs.config import config_hash, parse_config, write_config
from kdecs.corpus.reading import bundled_sample
from kdecs.corpus.splits import CorpusConfig
from kdecs.errors import ConfigError, KdecsError, ModelError, Stopped
from kdecs.launch import train_teacher
from kdecs.student.config import StudentConfig
from kdecs.tracking import serving
from kdecs.tracking.datasets import corpus_datasets, label_dataset
from kdecs.tracking.machine import load, read_samples, sampled_load
from kdecs.tracking.mlflow import Tracker, default_database, tracking_uri
from kdecs.tracking.record import RunRecord, TrackingConfig, read_points, without_password
from kdecs.tracking.registry import mlflow_at
from kdecs.tracking.stage import stage_record, stage_upload


@pytest.fixture
def config(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_mlflow(tmp_path_factory), tmp_path / "mlflow.db")
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
    assert tracker.sync([parent, record(1, parent=parent.identity)])
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


def named(name, num_epochs, **changes):
    made = record(num_epochs, **changes)
    made.identity, made.name = {"kdecs.run": name}, name
    return made


def steps_of(client, run_id, key="macro_f1"):
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def test_a_repeated_request_makes_no_second_run(config, tmp_path, monkeypatch):
    create = MlflowClient.create_run

    def create_twice(*arguments, **values):  # the first answer was lost
        create(*arguments, **values)
        return create(*arguments, **values)

    monkeypatch.setattr(MlflowClient, "create_run", create_twice)
    tracker = Tracker(config, tmp_path / "sweep")
    assert tracker.sync([record(2)])
    client, found = runs(config)
    assert [run.info.run_id for run in found] == [tracker.run_id({"kdecs.run": "a"})]
    assert steps_of(client, found[0].info.run_id) == [1, 2]


def test_a_double_that_comes_late_is_deleted_at_the_end(config, tmp_path):
    tracker = Tracker(config, tmp_path / "sweep")
    tracker.sync([record(2)])
    client, [kept] = runs(config)
    client.create_run(kept.info.experiment_id, start_time=1, tags={"kdecs.run": "a"})
    assert tracker.sync([record(3)], now=True, final=True)
    client, found = runs(config)
    assert [run.info.run_id for run in found] == [kept.info.run_id]
    assert steps_of(client, kept.info.run_id) == [1, 2, 3]


def test_a_run_that_was_deleted_holds_up_no_other(config, tmp_path, capsys):
    tracker = Tracker(config, tmp_path / "sweep")
    tracker.sync([named("first", 1), named("second", 1)])
    client, _ = runs(config)
    client.delete_run(tracker.run_id({"kdecs.run": "first"}))
    capsys.readouterr()
    for _ in range(2):
        assert not tracker.sync([named("first", 2), named("second", 2)], now=True)
    assert steps_of(client, tracker.run_id({"kdecs.run": "second"})) == [1, 2]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "refuses part of run 'first'" in printed
    client.restore_run(tracker.run_id({"kdecs.run": "first"}))
    assert tracker.sync([named("first", 2), named("second", 2)], now=True)
    assert steps_of(client, tracker.run_id({"kdecs.run": "first"})) == [1, 2]


def test_children_are_delivered_below_a_parent_that_is_refused(config, tmp_path):
    tracker = Tracker(config, tmp_path / "sweep")
    parent = named("parent", 0)
    tracker.sync([parent, record(1, parent=parent.identity)])
    client, _ = runs(config)
    client.delete_run(tracker.run_id(parent.identity))
    parent.params = {"late": 1}
    assert not tracker.sync([parent, record(2, parent=parent.identity)], now=True)
    assert steps_of(client, tracker.run_id({"kdecs.run": "a"})) == [1, 2]


def test_what_changed_is_renewed_as_far_as_mlflow_lets_it(config, tmp_path):
    file = tmp_path / "config.json"
    for alpha, text in ((0.6, "one"), (0.7, "two"), (0.7, "two")):
        file.write_text(text)
        changes = {"params": {"alpha": alpha, "long": "x" * 7000}, "artifacts": [file]}
        assert Tracker(config, tmp_path / "sweep").sync([record(1, tags={"kdecs.teacher": text}, **changes)])
    client, [run] = runs(config)
    assert run.data.params["alpha"] == "0.6" and run.data.tags["kdecs.changed.alpha"] == "0.7"
    assert len(run.data.params["long"]) == 6000 and "kdecs.changed.long" not in run.data.tags
    assert run.data.tags["kdecs.teacher"] == "two"
    assert client.download_artifacts(run.info.run_id, "config.json", str(tmp_path / "mlartifacts"))
    assert (tmp_path / "mlartifacts" / "config.json").read_text() == "two"


def test_state_and_end_follow_where_the_status_stays(config, tmp_path):
    tracker = Tracker(config, tmp_path / "sweep")
    for state, finished in (("pruned", 1010.0), ("complete", 1030.0)):
        assert tracker.sync([record(1, status="FINISHED", state=state, finished=finished)])
        [run] = runs(config)[1]
        assert (run.data.tags["kdecs.state"], run.info.end_time) == (state, 1000 * finished)


def test_a_store_that_cannot_be_written_costs_no_metric(config, tmp_path, monkeypatch, capsys):
    def fault(*arguments):
        raise ModuleNotFoundError("No module named 'boto3'")

    monkeypatch.setattr(MlflowClient, "log_artifact", fault)
    file = tmp_path / "config.json"
    file.write_text("{}")
    tracker = Tracker(config, tmp_path / "sweep")
    described = record(2, artifacts=[file], status="FINISHED", finished=1010.0)
    assert not tracker.sync([described, named("b", 1)])
    client, _ = runs(config)
    run = client.get_run(tracker.run_id({"kdecs.run": "a"}))
    assert steps_of(client, run.info.run_id) == [1, 2] and run.info.status == "FINISHED"
    assert steps_of(client, tracker.run_id({"kdecs.run": "b"})) == [1]
    assert "boto3" in capsys.readouterr().err


def test_a_missing_driver_is_a_warning(tmp_path, monkeypatch, capsys):
    def fault(uri):
        raise ModuleNotFoundError("No module named 'psycopg2'")

    monkeypatch.setattr("kdecs.tracking.mlflow._probe_database", fault)
    tracker = Tracker(TrackingConfig(uri="postgresql://host/db"), tmp_path / "sweep")
    assert not tracker.sync([named("parent", 0), record(1)], now=True)
    assert "psycopg2" in capsys.readouterr().err


def test_final_scores_are_logged_once(config, tmp_path):
    tracker = Tracker(config, tmp_path / "sweep")
    final = record(1, scores={"test_macro_f1": 55.0})  # without an end
    tracker.sync([final])
    run_id = tracker.run_id(final.identity)
    for _ in range(2):
        tracker.log_final(final)
    assert len(runs(config)[0].get_metric_history(run_id, "test_macro_f1")) == 1


SECRET_URIS = [
    ("postgresql://me:top5ecret@host/db", "postgresql://…@host/db"),
    ("postgresql://me:top/5ecret@host/db", "postgresql://…@host/db"),
    ("postgresql://me:top#5ecret@host/db", "postgresql://…@host/db"),
    ("postgresql://me:top?5ecret@host/db", "postgresql://…@host/db"),
    ("postgresql://me:top@5ecret@host/db", "postgresql://…@host/db"),
    ("postgresql://me:top%2F5ecret@host/db", "postgresql://…@host/db"),
    ("postgresql://host/db?user=me&password=top5ecret", "postgresql://host/db?user=…&password=…"),
    (
        "postgresql://host/db?password=top@5ecret&sslmode=require",
        "postgresql://host/db?password=…&sslmode=require",
    ),
    ("mssql+pyodbc:///?odbc_connect=PWD%3Dtop5ecret", "mssql+pyodbc:///?odbc_connect=…"),
    ("http://:top5ecret@host:5000", "http://…@host:5000"),
]


@pytest.mark.parametrize(("uri", "shown"), SECRET_URIS)
def test_no_form_of_a_credential_is_shown(uri, shown, tmp_path, monkeypatch, capsys):
    assert without_password(uri) == shown
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI") as caught:
        parse_config(TrackingConfig, {"uri": uri}, source="x.yaml")
    assert "5ecret" not in str(caught.value)
    decoded = unquote(uri.rpartition("@")[0].rpartition("me:")[2])

    def fault(_):
        raise RuntimeError(f"{'long ' * 37}{uri} or {decoded} or top5ecret://{uri}")

    monkeypatch.setattr("kdecs.tracking.mlflow._probe_database", fault)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    Tracker(TrackingConfig(), tmp_path / "sweep").sync([record(1)])
    printed = capsys.readouterr().err
    assert "does not answer" in printed and "5ecret" not in printed and "top" not in printed


@pytest.mark.parametrize(
    "uri",
    [
        "http://mlflow:5000",
        "sqlite:////home/me@corp/mlflow.db",
        "file:///home/me@corp/mlruns",
        "postgresql://host/db?sslmode=require&passfile=/home/me/pgpass",
    ],
)
def test_a_uri_without_a_secret_is_shown_whole(uri):
    assert without_password(uri) == uri
    assert parse_config(TrackingConfig, {"uri": uri}, source="x.yaml").uri == uri


def test_a_taken_port_is_refused_before_a_model_is_loaded(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["serving", "models:/kdecs-student@champion", "--port", str(port)])
        with pytest.raises(
            KdecsError, match=f"127.0.0.1:{port}: cannot listen there .*choose another --port"
        ):
            serving.main()


def test_a_model_of_another_kind_is_not_served(tmp_path, config):
    import mlflow

    with pytest.raises(ModelError, match="MLflow finds no such model"):
        serving.scoring_app(str(tmp_path / "nothing"))
    (tmp_path / "code").mkdir()
    foreign = mlflow.models.Model()
    mlflow.pyfunc.add_to_model(foreign, loader_module="os", data="data")
    (tmp_path / "MLmodel").write_text(foreign.to_yaml())
    with pytest.raises(ModelError, match="not a student that kdecs has registered"):
        serving.scoring_app(str(tmp_path))


def test_a_registered_student_is_looked_up_where_stages_register_it(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    champion = "models:/kdecs-student@champion"
    with pytest.raises(ModelError, match=r"runs/mlflow\.db does not exist; set MLFLOW_TRACKING_URI"):
        serving.scoring_app(champion)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_mlflow(tmp_path_factory), tmp_path / "runs")
    with pytest.raises(ModelError, match="MLflow finds no such model"):
        serving.scoring_app(champion)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "MLflow's own default database"


def test_points_are_read_up_to_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "time": 2.0}\n{"epoch": 2, "ti')
    assert read_points(path) == [{"epoch": 1, "time": 2.0}]
    assert read_points(tmp_path / "none.jsonl") == []


def test_all_stages_of_a_checkout_share_a_database_unless_there_is_an_older_one(tmp_path):
    runs = tmp_path / "work" / "runs"
    shared = [
        runs / "teachers" / "llama-7b",
        runs / "sweeps" / "main",
        runs / "mrc",
        runs / "demo" / "labels" / "a",
    ]
    assert {default_database(output) for output in shared} == {runs / "mlflow.db"}
    (runs / "sweeps").mkdir(parents=True)
    (runs / "sweeps" / "mlflow.db").touch()
    (tmp_path / "work" / "mlflow.db").touch()  # MLflow's own default, which is not ours
    found = [default_database(output).relative_to(runs).as_posix() for output in shared]
    assert found == ["mlflow.db", "sweeps/mlflow.db", "mlflow.db", "mlflow.db"]
    assert default_database(tmp_path / "elsewhere" / "sweep") == tmp_path / "elsewhere" / "mlflow.db"


def test_one_process_at_a_time_makes_a_database(config, tmp_path):
    tracker = Tracker(config, tmp_path / "sweep")
    with file_lock(tmp_path / ".mlflow.db.lock"):
        other = threading.Thread(target=tracker.sync, args=([record(1)],))
        other.start()
        other.join(0.3)
        assert other.is_alive() and runs(config)[1] == []
    other.join()
    assert len(runs(config)[1]) == 1


def test_uri_defaults_beside_the_output(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), tmp_path / "sweep") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(TrackingConfig(), tmp_path / "sweep") == "http://server:5000"
    assert without_password("postgresql://a:b@host/db") == "postgresql://…@host/db"


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "/data/mlruns", "file:mlruns", "file:///data/mlruns"])
@pytest.mark.parametrize("is_in_config", [True, False])
def test_the_retired_file_store_is_refused_unless_it_is_asked_for(uri, is_in_config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    config = TrackingConfig(uri=uri if is_in_config else None)
    with pytest.raises(ConfigError, match="file store, which MLflow has retired") as caught:
        Tracker(config, tmp_path / "sweep")
    named = "tracking.uri" if is_in_config else "MLFLOW_TRACKING_URI"
    assert str(caught.value).startswith(f"{named} {uri}: ") and "\n" not in str(caught.value)
    assert f"sqlite:///{tmp_path / 'mlflow.db'}" in str(caught.value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert tracking_uri(config, tmp_path / "sweep") == uri


def test_a_teacher_is_refused_the_retired_file_store_before_torch_is_imported(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    config = {"tracking.uri": "mlruns", "output": tmp_path / "teacher", "model.base": tmp_path / "base"}
    config |= {f"corpus.{split}": bundled_sample(split) for split in ("train", "valid")}
    overrides = [part for key, value in config.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr("sys.argv", ["train_teacher", "--local_rank=0", "--config", "minilm-l6", *overrides])
    monkeypatch.setitem(sys.modules, "kdecs.runtime", None)  # an import of it would raise
    with pytest.raises(ConfigError, match="retired"):
        train_teacher.main()


def test_an_experiment_deleted_in_the_ui_is_named_and_used_again_once_restored(config, tmp_path, capsys):
    assert Tracker(config, tmp_path / "sweep").sync([record(1)])
    client, [run] = runs(config)
    client.delete_experiment(run.info.experiment_id)
    tracker = Tracker(config, tmp_path / "sweep")
    assert not tracker.sync([record(2)])
    [line] = capsys.readouterr().err.splitlines()
    assert f"cannot be used (experiment {config.experiment!r} was deleted there; restore it" in line
    assert f"--experiment-id {run.info.experiment_id}`" in line and "tracking.experiment" in line
    client.restore_experiment(run.info.experiment_id)
    assert tracker.sync([record(2)], now=True)
    assert steps_of(client, run.info.run_id) == [1, 2]


@pytest.mark.parametrize("uri", ["elsewhere://host/db", "oracle://host/db"])
def test_a_database_that_cannot_be_used_is_not_said_to_be_away(uri, tmp_path, capsys):
    assert not Tracker(TrackingConfig(uri=uri), tmp_path / "sweep").sync([record(1)])
    [line] = capsys.readouterr().err.splitlines()
    assert f"MLflow at {uri} cannot be used (" in line and "does not answer" not in line


@pytest.mark.parametrize("users", [None, "sqlite:////somewhere/mlflow.db"])
def test_registering_leaves_mlflow_where_it_was(users, config, tmp_path, monkeypatch):
    import mlflow

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
        if users:
            monkeypatch.setenv(name, users)
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    unnamed = TrackingConfig()
    where = tracking_uri(unnamed, tmp_path / "sweep")
    with mlflow_at(config.uri):
        assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == config.uri
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before
    assert tracking_uri(unnamed, tmp_path / "sweep") == where


def test_load_is_sampled_to_the_end_and_cut_lines_are_left_out(tmp_path):
    import psutil

    with sampled_load(tmp_path, interval_s=0.05):
        threading.Event().wait(0.2)
    samples = read_samples(tmp_path / "system.jsonl")
    assert len(samples) >= 2 and all(sample["system/trial_memory_usage_megabytes"] > 1 for sample in samples)
    assert load(psutil.Process()).keys() == samples[0].keys() - {"time"}
    with (tmp_path / "system.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1.0})[:-3])
    assert read_samples(tmp_path / "system.jsonl") == samples


@pytest.fixture
def stage(config, tmp_path):
    """The config of a student that is trained alone, and a function that writes its files up to an epoch."""
    values = {
        "name": "alone",
        "output": str(tmp_path / "student"),
        "cache": str(tmp_path / "cache"),
        "corpus": {split: str(bundled_sample(split)) for split in ("train", "valid")},
        "model": {"base": "roberta-tiny"},
        "distillation": {"mode": "joint"},
        "tracking": {"uri": config.uri},
    }
    made = parse_config(StudentConfig, values, source="test")

    def write(num_epochs, *, is_complete=False):
        write_config(made, made.output)
        points = record(num_epochs).points
        (made.output / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
        if is_complete:
            details = {"valid": {"epoch": num_epochs}}
            write_manifest(
                made.output,
                "student",
                config_hash="0" * 64,
                inputs={},
                files=["metrics.jsonl"],
                details=details,
            )

    return made, write


def upload_of(made):
    datasets = corpus_datasets(made.corpus, universe="fold1+neutral")

    def read():
        return stage_record(
            made,
            "student",
            output=made.output,
            name=made.name,
            config_hash=config_hash(made),
            datasets=datasets,
        )

    return stage_upload(made.tracking, made.output, read, is_main=True)


def test_a_stage_is_a_run_from_its_first_epoch_and_has_a_model_at_its_end(stage, config):
    made, write = stage
    with pytest.raises(ConfigError), upload_of(made):
        raise ConfigError("refused before it began")
    assert runs(config)[1] == [] and not made.output.exists()

    def end_with(error):
        with upload_of(made) as upload:
            write(1)
            upload.sync()
            raise error

    for error, status in ((Stopped("by a signal"), "KILLED"), (KeyError("fault"), "FAILED")):
        with pytest.raises(type(error)):
            end_with(error)
        assert [run.info.status for run in runs(config)[1]] == [status]
    with upload_of(made) as upload:
        write(3, is_complete=True)
        upload.sync()
    client, [run] = runs(config)
    assert run.info.status == "FINISHED" and steps_of(client, run.info.run_id) == [1, 2, 3]
    assert run.data.tags["kdecs.kind"] == "student" and run.data.params["optimization.seed"] == "0"
    assert run.data.tags["mlflow.source.name"] == "kdecs.launch.train_student"
    valid = corpus_datasets(made.corpus, universe="fold1")[1]
    on_valid = [{"dataset_name": valid.name, "dataset_digest": valid.digest}]
    [model] = client.search_logged_models(
        [run.info.experiment_id], "metrics.macro_f1 >= 30", datasets=on_valid
    )
    assert model.source_run_id == run.info.run_id and model.tags["kdecs.directory"] == str(made.output)
    assert model.model_type == "student" and model.params["distillation.mode"] == "joint"


def test_a_model_that_was_made_before_a_kill_is_found_and_one_that_is_gone_is_replaced(
    stage, config, monkeypatch
):
    made, write = stage
    write(2, is_complete=True)
    with monkeypatch.context() as killed:

        def fault(*arguments):
            raise KeyboardInterrupt

        killed.setattr(MlflowClient, "log_outputs", fault)
        with pytest.raises(KeyboardInterrupt), upload_of(made):
            pass
    for num_epochs in (2, 2, 3):  # at last the training went on: another product
        write(num_epochs, is_complete=True)
        with upload_of(made):
            pass
        client, [run] = runs(config)
        [model] = client.search_logged_models([run.info.experiment_id])
        assert model.tags["kdecs.checksum"] == content_checksum(made.output)[:16]
        assert {metric.value for metric in model.metrics if metric.key == "macro_f1"} == {10.0 * num_epochs}
        assert model.model_id in [output.model_id for output in run.outputs.model_outputs]


def test_a_dataset_is_known_by_its_pairs_wherever_it_lies(tmp_path):
    def datasets(folder, universe="fold1", **changes):
        paths = {split: shutil.copy(bundled_sample(split), folder) for split in ("train", "valid", "test")}
        corpus = parse_config(CorpusConfig, {**paths, **changes}, source="test")
        return corpus_datasets(corpus, universe=universe, has_test=True)

    for name in ("one", "two"):
        (tmp_path / name / "sample").mkdir(parents=True)
    here, there = tmp_path / "one" / "sample", tmp_path / "two" / "sample"
    first = datasets(here)
    names = ["sample-train", "sample-valid", "sample-test"]
    assert [(made.name, made.split) for made in first] == list(
        zip(names, ("train", "valid", "test"), strict=True)
    )
    assert [made.digest for made in datasets(there)] == [made.digest for made in first]
    # What a change leaves as it is: the validation split is scored on the same pairs, whatever one trains on.
    changes = [
        ({"universe": "fold1+neutral"}, [1]),
        ({"train_share": 0.5}, [1, 2]),
        ({"drop_cross_split": True}, [1, 2]),
    ]
    for change, same in [*changes, ({"emotions": "coarse"}, [])]:
        changed = datasets(here, **change)
        assert [n for n in range(3) if changed[n].digest == first[n].digest] == same, change
    several = datasets(here, train=[str(here / "train.json"), str(here / "valid.json")])
    assert [(made.name, made.split) for made in several[:2]] == [
        ("sample-train", "train"),
        ("sample-valid", "train"),
    ]
    labels = tmp_path / "llama-7b"
    labels.mkdir()
    write_manifest(labels, "soft-labels", config_hash="0" * 64, inputs={}, files=[], details={})
    assert label_dataset(labels).name == "llama-7b" and label_dataset(labels).split == "soft labels"
