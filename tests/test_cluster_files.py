"""The files in cluster/: syntax, the commands they run (recorded by stand-ins on PATH), no secrets, no open ports."""

import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import manifest_schemas
import pytest
import yaml

from kdecs.config import Config, load_config
from kdecs.soft_labels.config import ExportConfig
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig
from kdecs.teacher.config import TeacherConfig

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
DOCKERFILE = CLUSTER / "ray" / "Dockerfile"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
SHELL = [path for path in FILES if path.suffix in {".sh", ".sbatch"}]
SBATCH = [path for path in FILES if path.suffix == ".sbatch"]
YAML = [path for path in FILES if path.suffix == ".yaml"]
CONFIGS: dict[str, type[Config]] = {
    "launch/train_teacher.py": TeacherConfig,
    "launch/export_soft_labels.py": ExportConfig,
    "launch/train_student.py": StudentConfig,
    "tune/sweep.py": SweepConfig,
}
KNOWN_DIRECTIVES = {
    *("array", "cpus-per-task", "exclusive", "gpus-per-node", "job-name", "mem", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "requeue", "signal", "time"),
}
RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >>"$RECORD"
[[ $(basename "$0") == sbatch ]] && echo 101
[[ $(basename "$0") == scontrol && $1 == show ]] && echo node-7 && echo node-8
[[ $(basename "$0") == ray ]] && exit "${RAY_STATUS:-0}"
[[ $(basename "$0") == squeue ]] && echo "${JOB_STATE:-RUNNING}"
if [[ $(basename "$0") == srun ]]; then
    for file in ${RANKS_SAY:-}; do echo "${SAYS:-stopped}" >"$KDECS_JOB_DIR/$file"; done
    exit "${SRUN_STATUS:-0}"
fi
exit 0
"""


def name_of(path: Path) -> str:
    return path.relative_to(CLUSTER).as_posix()


def directives(path: Path) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --(\S+)$", path.read_text(), flags=re.MULTILINE)
    assert len(lines) == path.read_text().count("#SBATCH")
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment of a Slurm job whose commands only note how they were called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "sbatch", "scontrol", "squeue", "ray", "sleep", "deepspeed"):
        (commands / name).write_text(RECORD)
        (commands / name).chmod(0o755)
    root = tmp_path / "repository"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "activate").write_text("")
    shutil.copytree(CLUSTER, root / "cluster")
    slurm = {"SLURM_SUBMIT_DIR": root, "SLURM_JOB_ID": 4711, "SLURM_JOB_NODELIST": "node-[7-8]"}
    slurm |= {"SLURM_NNODES": 2, "SLURM_CPUS_PER_TASK": 32, "SLURM_GPUS_ON_NODE": 4}
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    named = {key: str(value) for key, value in slurm.items()}
    return os.environ | named | {"PATH": path, "RECORD": str(tmp_path / "record")}


def recorded(environment: dict[str, str]) -> list[str]:
    return Path(environment["RECORD"]).read_text().splitlines()


def run(path: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    copy = Path(environment["SLURM_SUBMIT_DIR"]) / path.relative_to(ROOT)
    return subprocess.run(
        ["bash", str(copy), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_shell_scripts_parse(path: Path) -> None:
    found = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    if path.name != "job.sh":  # sourced, never run
        assert path.read_text().startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in path.read_text()
        assert path.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("path", SBATCH, ids=name_of)
def test_sbatch_directives(path: Path) -> None:
    found = directives(path)
    assert set(found) <= KNOWN_DIRECTIVES
    assert re.fullmatch(r"\d\d:\d\d:\d\d", found["time"])
    # Ray would not survive a signal to the whole step.
    assert re.fullmatch(r"B:TERM@\d+" if path.stem == "sweep" else r"TERM@\d+", found["signal"])
    assert all(found[key].isdigit() for key in ("nodes", "gpus-per-node", "cpus-per-task"))
    assert "requeue" in found
    # Slurm reads directives only above the first command.
    body = path.read_text().split("set -euo pipefail")[1]
    assert "#SBATCH" not in body


def test_every_file_that_is_named_exists() -> None:
    pattern = re.compile(
        r"(?<![\w./-])(?:launch|tune|cluster)/[\w./-]+\.(?:py|yaml|sh|sbatch|example|service)"
    )
    named = {(name_of(path), name) for path in FILES for name in pattern.findall(path.read_text())}
    assert len(named) > 10
    assert [f"{path}: {name}" for path, name in sorted(named) if not (ROOT / name).is_file()] == []


def _python_commands() -> Iterator[tuple[str, str, str]]:
    for path in FILES:
        for script, config in re.findall(
            r"((?:launch|tune)/\w+\.py)\s+(?:--config\s+)?((?:launch|tune)/[\w./-]+\.yaml)", path.read_text()
        ):
            yield name_of(path), script, config


@pytest.mark.parametrize(("path", "script", "config"), sorted(set(_python_commands())))
def test_configs_of_the_commands_parse(path: str, script: str, config: str) -> None:
    load_config(CONFIGS[script], ROOT / config)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("train_teacher", "launch/train_teacher.py --config launch/configs/teacher/llama-7b.yaml"),
        ("export_soft_labels", "launch/export_soft_labels.py --config launch/configs/export/llama-7b.yaml"),
        ("train_student", "launch/train_student.py --config launch/configs/student/kd.yaml"),
        ("sweep", "tune/sweep.py tune/spaces/main.yaml --set ray_address=auto"),
    ],
)
def test_what_the_jobs_run(script: str, expected: str, stand_ins: dict[str, str]) -> None:
    result = run(CLUSTER / "slurm" / f"{script}.sbatch", environment=stand_ins)
    assert (result.returncode, result.stderr) == (0, "")
    [command] = [line for line in recorded(stand_ins) if line.startswith("srun ")]
    assert command.endswith(f"python {expected}")
    name, config = shlex.split(expected)[0], shlex.split(expected)[-1]
    if script != "sweep":
        load_config(CONFIGS[name], ROOT / config)
    else:
        assert "srun --kill-on-bad-exit=1 cluster/slurm/ray_node.sh node-7:24711 python" in command
        assert list((Path(stand_ins["SLURM_SUBMIT_DIR"]) / "runs").iterdir()) == []  # the token is gone


@pytest.mark.parametrize(
    ("status", "ranks_say", "state", "is_queued", "code", "line"),
    [
        (
            143,
            "resumable-0 resumable-1",
            "RUNNING",
            True,
            143,
            "job 4711 can be resumed, and is queued again",
        ),
        (1, "resumable-0", "RUNNING", True, 1, "queued again"),  # rank 1 was lost with its node
        (
            143,
            "resumable-0 resumable-1",
            "COMPLETING",
            False,
            143,
            "",
        ),  # cancelled, or queued again by others
        (
            143,
            "resumable-0 failed-1",
            "RUNNING",
            False,
            1,
            "is not queued again: it failed; its error is above",
        ),
        (143, "", "RUNNING", False, 1, "Jobs that depend on it are cancelled"),
        (2, "failed-0", "RUNNING", False, 2, "is not queued again"),
    ],
)
def test_a_job_is_queued_again_if_the_same_command_resumes_it(
    status: int, ranks_say: str, state: str, is_queued: bool, code: int, line: str, stand_ins: dict[str, str]
) -> None:
    environment = {"SRUN_STATUS": str(status), "RANKS_SAY": ranks_say, "JOB_STATE": state}
    result = run(CLUSTER / "slurm" / "train_teacher.sbatch", environment=stand_ins | environment)
    assert result.returncode == code
    assert (recorded(stand_ins)[-1] == "scontrol requeue 4711") == is_queued
    assert line in (result.stdout if is_queued else result.stderr)


def test_a_job_that_gets_no_further_between_its_stops_is_given_up(stand_ins: dict[str, str]) -> None:
    script = CLUSTER / "slurm" / "train_teacher.sbatch"
    stopped = stand_ins | {"SRUN_STATUS": "143", "RANKS_SAY": "resumable-0"}
    for step in [1, *[2] * 9]:
        result = run(script, environment=stopped | {"SAYS": f"stopped at step {step}"})
        assert "is queued again" in result.stdout
    result = run(script, environment=stopped | {"SAYS": "stopped at step 2"})
    assert (result.returncode, result.stdout) == (1, "")
    assert "it was stopped 10 times without getting any further" in result.stderr
    assert list((Path(stand_ins["SLURM_SUBMIT_DIR"]) / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("task", "ray_starts", "code", "notes"),
    [(0, True, 0, []), (0, False, 1, ["failed-0"]), (1, True, 0, [])],
)
def test_ray_starts_on_a_node_and_the_driver_on_the_first(
    task: int, ray_starts: bool, code: int, notes: list[str], tmp_path: Path, stand_ins: dict[str, str]
) -> None:
    job = tmp_path / "job"
    job.mkdir()
    if task:
        (job / "over").touch()
    environment = stand_ins | {"KDECS_JOB_DIR": str(job), "SLURM_PROCID": str(task)}
    environment |= {} if ray_starts else {"RAY_STATUS": "1"}
    result = run(
        CLUSTER / "slurm" / "ray_node.sh", "localhost:24711", *("ray", "driver"), environment=environment
    )
    assert result.returncode == code
    started, *others = [line for line in recorded(stand_ins) if not line.startswith("sleep")]
    shared = "--num-cpus 32 --num-gpus 4 --disable-usage-stats"
    if task:
        assert (started, others) == (f"ray start --address localhost:24711 {shared}", ["ray stop"])
    else:
        # Loopback is no address for the other nodes.
        assert re.fullmatch(
            rf"ray start --head --node-ip-address (?!127)\S+ --port 24711 --include-dashboard=false {shared}",
            started,
        )
        assert others == (
            ["ray driver", "ray stop"]
            if ray_starts
            else ["ray stop", started, "ray stop", started, "ray stop"]
        )
    assert sorted(path.name for path in job.glob("failed-*")) == notes
    assert ("Ray does not start on" in result.stderr) != ray_starts


def test_arguments_are_passed_on(stand_ins: dict[str, str]) -> None:
    run(CLUSTER / "slurm" / "train_teacher.sbatch", "a.yaml", "--set", "zero.stage=3", environment=stand_ins)
    assert recorded(stand_ins)[-1].endswith("--config a.yaml --set zero.stage=3")


def test_the_pipeline_is_queued_in_order(stand_ins: dict[str, str]) -> None:
    result = run(
        CLUSTER / "slurm" / "submit_pipeline.sh",
        *("teacher.yaml", "export.yaml"),
        environment=stand_ins | {"EXPORT_SBATCH": "--array=0-1 --mem=4G"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "teacher 101, export 101, sweep 101\n"
    after = "--dependency=afterok:101 --kill-on-invalid-dep=yes"
    assert recorded(stand_ins) == [
        "sbatch --parsable cluster/slurm/train_teacher.sbatch teacher.yaml",
        f"sbatch --parsable --array=0-1 --mem=4G {after} cluster/slurm/export_soft_labels.sbatch export.yaml",
        f"sbatch --parsable {after} cluster/slurm/sweep.sbatch tune/spaces/main.yaml",
    ]


RANK = """
import os, signal, sys, time
from kdecs.errors import KdecsError, Stopped
from kdecs.process import StopSignal, note_resumable, run_entry
def main():
    print(os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], flush=True)
    how = sys.argv[1]
    if how == "early": os.kill(os.getppid(), signal.SIGTERM); signal.pause()
    if how == "refused": raise KdecsError("no such file")
    stop = StopSignal()
    stop.install()
    if how == "stopped":
        os.kill(os.getppid(), signal.SIGTERM)
        while not stop.requested: time.sleep(0.01)
        stop.raise_if_requested("stopped at step 3")
    if how == "lost": note_resumable("rank 0 is lost"); os._exit(1)
    if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
run_entry(main)
"""


@pytest.mark.parametrize(
    ("how", "code", "notes"),
    [
        ("done", 0, {}),
        ("early", 143, {"resumable-5": "stopped before it began\n"}),
        ("stopped", 143, {"resumable-5": "stopped at step 3\n"}),
        ("lost", 1, {"resumable-5": "rank 0 is lost\n"}),
        ("refused", 1, {"failed-5": "1\n"}),
        ("killed", 137, {"failed-5": "137\n"}),
    ],
)
def test_a_rank_of_slurm_notes_how_it_ended(
    how: str, code: int, notes: dict[str, str], tmp_path: Path, stand_ins: dict[str, str]
) -> None:
    script, job = tmp_path / "rank.py", tmp_path / "job"
    script.write_text(RANK)
    job.mkdir()
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "KDECS_JOB_DIR": str(job)}
    environment = stand_ins | slurm | {"PYTHONPATH": str(ROOT)}
    result = run(CLUSTER / "slurm" / "rank.sh", sys.executable, str(script), how, environment=environment)
    assert (result.stdout, result.returncode) == ("5 1 8\n", code), result.stderr
    assert {path.name: path.read_text() for path in job.iterdir() if path.name != "pid-5"} == notes


def test_the_deepspeed_command(stand_ins: dict[str, str]) -> None:
    result = run(CLUSTER / "deepspeed_two_nodes.sh", environment=stand_ins)
    assert (result.returncode, result.stderr) == (0, "")
    assert recorded(stand_ins)[-1] == (
        "deepspeed --hostfile cluster/hostfile --num_nodes 2 --master_addr node-1 --master_port 29500 "
        "launch/train_teacher.py --config launch/configs/teacher/llama-7b.yaml"
    )


@pytest.mark.slow  # DeepSpeed takes seconds to import
def test_deepspeeds_own_parsers_accept_command_and_hostfile(stand_ins: dict[str, str]) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    run(CLUSTER / "deepspeed_two_nodes.sh", environment=stand_ins)
    arguments = runner.parse_args(shlex.split(recorded(stand_ins)[-1])[1:])
    assert not arguments.no_ssh
    assert (arguments.num_nodes, arguments.master_addr) == (2, "node-1")
    assert arguments.user_script == "launch/train_teacher.py"
    assert runner.fetch_hostfile(str(ROOT / arguments.hostfile)) == {"node-1": 8, "node-2": 8}
    run(CLUSTER / "deepspeed_two_nodes.sh", environment=stand_ins | {"NODE_RANK": "1"})
    arguments = runner.parse_args(shlex.split(recorded(stand_ins)[-1])[1:])
    assert (arguments.no_ssh, arguments.node_rank) == (True, 1)
    assert arguments.user_args == ["--config", "launch/configs/teacher/llama-7b.yaml"]


def test_rays_own_check_accepts_the_on_premises_file() -> None:
    autoscaler = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((CLUSTER / "ray" / "on_premises.yaml").read_text())
    autoscaler.validate_config(autoscaler.prepare_config(config))
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in command and "RAY_USAGE_STATS_ENABLED=0" in command


KUBERAY = ["kuberay_cluster.yaml", "kuberay_job.yaml"]


def manifests(name: str) -> dict[str, Any]:
    """The documents of a KubeRay file by kind; its Ray cluster also as "cluster"."""
    found = {d["kind"]: d for d in yaml.safe_load_all((CLUSTER / "ray" / name).read_text())}
    of_job = found["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in found else None
    return {**found, "cluster": of_job or found["RayCluster"]["spec"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files(name: str) -> None:
    ray = pytest.importorskip("ray")
    cluster = manifests(name)["cluster"]
    image = re.findall(r"^ARG BASE=docker.io/rayproject/ray:([\d.]+)-", DOCKERFILE.read_text(), re.M)
    assert [cluster["rayVersion"]] == image == [ray.__version__]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_are_as_the_published_schemas_say(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    documents = list(yaml.safe_load_all((CLUSTER / "ray" / name).read_text()))
    assert len(documents) == 2
    for document in documents:
        jsonschema.Draft202012Validator(manifest_schemas.KINDS[document["kind"]]).validate(document)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-gpus"), 0),  # text, not a number
        (("spec", "rayClusterSpec", "authOption"), {"mode": "token"}),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "2"),
        (
            ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volume"),
            [],
        ),
        (("spec", "backoffLimits"), 2),
        (("metadata", "name"), "kdecs_sweep"),
    ],
)
def test_the_schemas_refuse_what_an_operator_would(where: tuple[Any, ...], value: object) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    job = manifests("kuberay_job.yaml")["RayJob"]
    place = job
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert not jsonschema.Draft202012Validator(manifest_schemas.KINDS["RayJob"]).is_valid(job)


@pytest.mark.parametrize("name", KUBERAY)
def test_only_the_namespace_and_the_operator_reach_ray(name: str) -> None:
    policy = manifests(name)["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {
        "matchLabels": {"ray.io/is-ray-node": "yes"}
    }  # KubeRay's label of its pods
    assert policy["policyTypes"] == ["Ingress"]
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-operator"}}}
    assert policy["ingress"] == [{"from": [{"podSelector": {}}, operator]}]


@pytest.mark.parametrize("path", sorted((CLUSTER / "sky").glob("*.yaml")), ids=name_of)
def test_skypilot_files(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load(path.read_text())
    jsonschema.Draft202012Validator(manifest_schemas.SKY_TASK).validate(task)
    parsed = subprocess.run(["bash", "-n", "-c", task["run"]], capture_output=True, text=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    assert task["run"].startswith("set -euo pipefail\n")
    script, config = re.findall(r"python (\S+\.py) (?:--config )?(\S+\.yaml)", task["run"])[0]
    load_config(CONFIGS[script], ROOT / config)
    images = {
        manifests(name)["cluster"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
        for name in KUBERAY
    }
    assert {task["resources"]["image_id"]} == {f"docker:{image}" for image in images}
    if "ray_address" in task["run"]:
        # A token that SkyPilot asks for, not one in the file, and no dashboard for others.
        assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
        assert "RAY_AUTH_MODE=token RAY_DASHBOARD_HOST=127.0.0.1" in task["run"]
        assert not re.search(r"^\s*[^#\n]*ray stop", task["run"], re.M)


def test_an_image_gets_what_it_needs_of_the_checkout_and_nothing_else(tmp_path: Path) -> None:
    """By Docker's own reading of .dockerignore: a checkout with its environment and outputs is several gigabytes."""
    build = pytest.importorskip("docker.utils.build")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if not tracked:
        pytest.skip("not a git checkout")
    strays = [
        ".venv/lib/torch.so",
        "runs/demo/mlflow.db",
        "data/train.json",
        "models/weights.safetensors",
        ".git/config",
    ]
    strays += [
        "kdecs/__pycache__/cli.cpython-311.pyc",
        "kdecs/corpus/__pycache__/x.pyc",
        "secret.env",
        "torch-index.lock",
    ]
    for name in [*tracked.splitlines(), *strays]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line for line in patterns if line and not line.startswith("#")]
    taken = {name for name in build.exclude_paths(str(tmp_path), ignored) if (tmp_path / name).is_file()}
    taken.discard(".dockerignore")  # the client itself reads it
    # torch-index.lock is optional: `make lock-torch` writes it.
    assert taken & set(strays) == {"torch-index.lock"}
    package = {name for name in tracked.splitlines() if name.startswith(("kdecs/", "launch/", "tune/"))}
    needed = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "requirements.lock", "torch.lock"}
    assert taken == package | needed | {"torch-index.lock"}


def test_the_dockerfile_names_its_registry_and_installs_what_is_locked() -> None:
    text = DOCKERFILE.read_text()
    variants = re.findall(r"^ARG (\w+)=(.*)$", text, re.M)
    assert (
        dict(variants)
        == {
            "VARIANT": "gpu",
            "BASE": "docker.io/rayproject/ray:2.60.0-py311-${VARIANT}",  # a short name is looked up in other registries
            "TORCH_INDEX": "",
        }
    )
    steps = re.sub(r"\\\n", " ", text)
    assert "launch/set_up.sh" in steps  # which checks every hash
    assert "pip install" not in steps
    assert not re.search(r"https?://", text)  # an index comes from the builder's settings
    # The settings of pip, which may hold a password, are there for one step and in no layer.
    assert "--mount=type=secret,id=pip.conf,target=/etc/pip.conf" in steps


@pytest.mark.parametrize("path", YAML, ids=name_of)
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(path.read_text()))


def test_the_mlflow_server_keeps_to_loopback_and_refuses_passwords(tmp_path: Path) -> None:
    script = CLUSTER / "mlflow" / "serve.sh"
    assert "--host 127.0.0.1" in script.read_text()
    environment = os.environ | {"MLFLOW_ARTIFACTS": str(tmp_path / "artifacts")}
    uri = "postgresql://kdecs:secret@127.0.0.1/mlflow"
    result = subprocess.run(
        ["bash", str(script)],
        env=environment | {"MLFLOW_BACKEND_STORE_URI": uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "holds a password: put it into ~/.pgpass" in result.stderr
    assert "secret" not in result.stderr
    for line in (CLUSTER / "mlflow" / "mlflow.env.example").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Z_]+=\S+", line)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("command", ["make ui", "serve.sh"])
def test_an_address_that_is_taken_is_named_and_ends_no_service_as_if_all_were_well(
    tmp_path: Path, command: str
) -> None:
    binaries, run = tmp_path / "venv" / "bin", tmp_path / "run"
    binaries.mkdir(parents=True)
    run.mkdir()
    (run / "mlflow.db").touch()
    (binaries / "python").symlink_to(sys.executable)
    (binaries / "mlflow").write_text("#!/bin/sh\necho started\n")  # MLflow itself would end with 0 as well
    (binaries / "mlflow").chmod(0o755)
    (tmp_path / "venv" / ".complete").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = {
            "make ui": [
                "make",
                "-C",
                str(ROOT),
                "ui",
                f"VENV={tmp_path / 'venv'}",
                f"RUN={run}",
                f"PORT={port}",
            ],
            "serve.sh": ["bash", str(CLUSTER / "mlflow" / "serve.sh")],
        }[command]
        uri = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{run / 'mlflow.db'}",
            "MLFLOW_ARTIFACTS": str(run / "a"),
            "MLFLOW_HOME": str(run / "home"),
        }
        # The server's further packages belong to an extra, and nothing here runs them.
        for package in ("flask_wtf", "psycopg2"):
            (binaries / f"{package}.py").touch()
        environment = os.environ | uri | {"MLFLOW_PORT": str(port), "PYTHONPATH": str(binaries)}
        environment["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"

        def start() -> subprocess.CompletedProcess[str]:
            return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)

        result = start()
        assert result.returncode != 0 and "started" not in result.stdout
        assert f"127.0.0.1:{port} is in use" in result.stderr
    assert "started" in start().stdout


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_service_file_is_accepted_by_systemd(tmp_path: Path) -> None:
    unit = tmp_path / "kdecs-mlflow.service"
    text = (CLUSTER / "mlflow" / "kdecs-mlflow.service").read_text()
    unit.write_text(text.replace("%h/kdecs", str(ROOT)))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--user", str(unit)],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_no_secrets() -> None:
    for path in FILES:
        assert not re.search(r"://[^/@\s$]*:[^/@\s]+@", path.read_text()), path
        # What a variable or a command gives is no secret in the file.
        found = re.search(r"(?im)^\s*\w*(password|secret)\w*\s*[:=][^\S\n]*(?!\s|\"?\$)\S", path.read_text())
        assert not found, path
