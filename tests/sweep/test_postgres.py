"""`cluster/mlflow/serve.sh` on a real PostgreSQL with a password: users, hosts, backups, twelve trials at once.

Needs PostgreSQL's programs (tests/install_postgres.sh) and the extra `mlflow-server`; skipped without.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import free_port, wait_until

from kdecs.sweep.status import read_results

pytestmark = pytest.mark.timeout(900)
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
PASSWORD = "f81d4fae7dec"
SCRIPTS = Path(__file__).parents[2] / "cluster" / "mlflow"
PATH = os.pathsep.join(
    [str(Path(sys.executable).parent), *(str(p.parent) for p in PROGRAMS[-1:]), os.environ["PATH"]]
)


@pytest.fixture
def postgres(tmp_path_factory):
    """The URI, without its password, and environment of a fresh server; it refuses to run as root."""
    if not PROGRAMS:
        pytest.skip("no PostgreSQL: tests/install_postgres.sh installs it")
    pytest.importorskip("psycopg2")
    folder, port = Path("/tmp") / f"kdecs-pg-{os.getpid()}", free_port()
    folder.mkdir(mode=0o755)
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    programs = PROGRAMS[-1].parent
    control = [*as_user, str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w", "-t", "120"]
    initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "kdecs", "-A", "scram-sha-256"]
    subprocess.run([*as_user, *initdb, f"--pwfile={folder / 'password'}"], check=True, capture_output=True)
    options = f"-h 127.0.0.1 -p {port} -k {folder}"
    subprocess.run(
        [*control, "-o", options, "-l", str(folder / "log"), "start"], check=True, capture_output=True
    )
    passfile = tmp_path_factory.mktemp("pgpass") / "pgpass"
    passfile.write_text(f"127.0.0.1:{port}:*:kdecs:{PASSWORD}\n")
    passfile.chmod(0o600)
    environment = {**os.environ, "PGPASSFILE": str(passfile), "OMP_NUM_THREADS": "1"}
    create = [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "kdecs", "mlflow"]
    try:
        subprocess.run(create, env=environment, check=True, capture_output=True)
        yield f"postgresql+psycopg2://kdecs@127.0.0.1:{port}/mlflow", environment
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def serving(uri, environment, folder):
    """`cluster/mlflow/serve.sh` on a database: its address, its log and the admin's password."""
    pytest.importorskip("flask_wtf")
    port = free_port()
    environment = {
        **environment,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_ARTIFACTS": str(folder / "artifacts"),
        "MLFLOW_HOME": str(folder / "home"),
        "MLFLOW_PORT": str(port),
        "PATH": PATH,
    }
    log = folder / "server.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            ["bash", str(SCRIPTS / "serve.sh")],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def answers():
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
        except (OSError, urllib.error.URLError):
            return False

    try:
        wait_until(answers, "MLflow's server answers", 400, poll_s=0.2)
        yield f"http://127.0.0.1:{port}", log, (folder / "home" / "admin-password").read_text().strip()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def server(postgres, tmp_path, monkeypatch):
    """The URI of a server whose admin this process is, and its log."""
    with serving(*postgres, tmp_path) as (uri, log, password):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        yield uri, log


def status_of(address, *, user=None, host=None):
    """The status that the list of experiments is answered with."""
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/experiments/search?max_results=5")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(user).encode()).decode())
    if host:
        request.add_header("Host", host)
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.cluster
def test_only_users_are_answered_and_a_restored_backup_has_all(postgres, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.server import get_app_client

    uri, environment = postgres
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    with serving(uri, environment, first) as (address, _, password):
        admin = ("admin", password)
        assert [status_of(address), status_of(address, user=("admin", "admin"))] == [401, 401]
        assert status_of(address, user=admin) == 200
        assert status_of(address, user=admin, host="evil.example") == 403
        assert status_of(address, user=admin, host="localhost:7000") == 200, "the end of a tunnel"
        assert {path.name: path.stat().st_mode & 0o777 for path in (first / "home").iterdir()} == {
            "admin-password": 0o600,
            "form-key": 0o600,
            "auth.ini": 0o600,
        }
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        get_app_client("basic-auth", tracking_uri=address).create_user("anna", "a-long-password")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        client = MlflowClient(address)
        run = client.create_run(client.create_experiment("kdecs")).info.run_id
        client.log_metric(run, "macro_f1", 61.5, timestamp=5, step=2)
        (tmp_path / "note.txt").write_text("an artifact")
        client.log_artifact(run, str(tmp_path / "note.txt"))
        values = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_ARTIFACTS": str(first / "artifacts"), "PATH": PATH}
        script(SCRIPTS / "backup.sh", tmp_path / "backup", environment=environment | values)
    empty = uri.rsplit("/", 1)[0] + "/restored"
    create = ["createdb", f"--maintenance-db={uri.replace('+psycopg2', '')}", "restored"]
    subprocess.run(create, env=environment, check=True, capture_output=True)
    values = {"MLFLOW_BACKEND_STORE_URI": empty, "MLFLOW_ARTIFACTS": str(second / "artifacts"), "PATH": PATH}
    restore = [SCRIPTS / "restore.sh", tmp_path / "backup"]
    script(*restore, environment=environment | values)
    assert "is not empty" in script(*restore, environment=environment | values, code=1)
    (tmp_path / "backup" / "artifacts.tar").write_bytes(b"cut")
    assert "incomplete or damaged" in script(*restore, environment=environment | values, code=1)
    with serving(empty, environment, second) as (address, _, password):
        assert status_of(address, user=("admin", password)) == 401, "the users are those of the backup"
        assert status_of(address, user=admin) == 200
        client = MlflowClient(address)
        [metric] = client.get_metric_history(run, "macro_f1")
        assert (metric.value, metric.timestamp, metric.step) == (61.5, 5, 2)
        note = client.download_artifacts(run, "note.txt", str(tmp_path / "second"))
        assert Path(note).read_text() == "an artifact"


@pytest.mark.slow
def test_a_laptops_experiments_move_to_the_server(postgres, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    uri, environment = postgres
    monkeypatch.setenv("PGPASSFILE", environment["PGPASSFILE"])
    laptop = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = laptop.create_experiment("kdecs", f"file://{tmp_path / 'mlartifacts'}")
    runs = [laptop.create_run(experiment).info.run_id for _ in range(3)]
    for step, value in enumerate((61.5, float("nan"), float("inf"))):
        laptop.log_metric(runs[0], "macro_f1", value, timestamp=5, step=step)
    laptop.create_logged_model(experiment, name="a", source_run_id=runs[0], tags={"kept": "yes"})
    server = MlflowClient(uri)
    server.search_experiments()  # makes the tables, as the first start of a server does
    move = [sys.executable, str(SCRIPTS / "move_from_sqlite.py"), str(tmp_path / "mlflow.db")]
    settings = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_ARTIFACTS": str(tmp_path / "served")}
    done = subprocess.run(move, env=environment | settings, capture_output=True, text=True, check=True)
    assert "2 experiments, 3 runs, 3 metrics, 1 models" in done.stdout
    assert {run.info.run_id for run in server.search_runs([experiment])} == set(runs)
    assert [repr(m.value) for m in server.get_metric_history(runs[0], "macro_f1")] == [
        repr(m.value) for m in laptop.get_metric_history(runs[0], "macro_f1")
    ]
    [model] = server.search_logged_models([experiment])
    assert model.tags["kept"] == "yes" and model.artifact_location.startswith("mlflow-artifacts:/")
    assert int(server.create_experiment("new")) > int(experiment), "numbers go on after those that came"


def script(path, argument, *, environment, code=0):
    """What a script of `cluster/mlflow` prints."""
    done = subprocess.run(
        ["bash", str(path), str(argument)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.cluster
def test_twelve_trials_at_once(server, make_config, runs_of, runs, tmp_path):
    uri, log = server
    config = make_config(
        space={"optimization.seed": {"grid": list(range(12))}, "teacher": {"grid": ["t5-tiny"]}},
        max_concurrent_trials=12,
        tracking={"uri": uri},
    )
    path = tmp_path / "sweep.json"
    path.write_text(config.model_dump_json())
    driver = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("drive.py")), str(path)],
        env={**os.environ, "FAKE_TRAINER": json.dumps({"epoch_s": 15.0})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    results = read_results(config.output)
    assert len(results) == 12
    starts, ends = max(r.started for r in results), min(r.finished for r in results)
    assert starts < ends, "all twelve ran at the same time"
    client, parents, children = runs_of(uri)
    assert len(parents) == 1 and len(children) == 12
    for run in children.values():
        setting = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert setting.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert [m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")] == [1, 2, 3]
    written = [p for folder in (runs, tmp_path / "artifacts") for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 50
    texts = [driver.stdout, driver.stderr, log.read_text(), str([run.data for run in children.values()])]
    assert not any(PASSWORD in text for text in texts)
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]
