"""A sweep against `mlflow server` on a real PostgreSQL with a password, twelve trials at once.

Needs PostgreSQL's programs (tests/install_postgres.sh) and psycopg2; skipped without.
"""

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

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
PASSWORD = "f81d4fae7dec"
ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def server(postgres, tmp_path):
    """The URI of `cluster/mlflow/serve.sh` on that database."""
    uri, environment = postgres
    port = free_port()
    environment = {
        **environment,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_ARTIFACTS": str(tmp_path / "artifacts"),
        "MLFLOW_PORT": str(port),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    log = tmp_path / "server.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            ["bash", str(ROOT / "cluster" / "mlflow" / "serve.sh")],
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
        wait_until(answers, "MLflow's server answers", 180, poll_s=0.2)
        yield f"http://127.0.0.1:{port}", log
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
