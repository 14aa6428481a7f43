"""`ray up` on two hosts, and a sweep over both of them of which one loses its power and comes back.

It prints a line with what it took, for docs/cluster.md: run it with -s.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hosts import Hosts, Running
from support import ROOT, TESTS, save_tiny_encoder, wait_until

from kdecs.artifact import verify_artifact
from kdecs.corpus.reading import bundled_sample

sys.path.append(str(TESTS / "soft_labels"))

from label_directories import sample_labels

pytestmark = pytest.mark.timeout(3600)

NUM_TRIALS, NUM_EPOCHS = 6, 8
CACHE = "/tmp/kdecs-cache"  # each host has its /tmp


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all hosts see, with a "checkout" in it that has a .venv, as /shared/kdecs has."""
    place = tmp_path_factory.mktemp("ray")
    (place / "kdecs").mkdir()
    for name in ("cluster", "kdecs", "launch", "tune"):
        (place / "kdecs" / name).symlink_to(ROOT / name)
    (place / "kdecs" / ".venv").symlink_to(sys.prefix)
    return place


@pytest.fixture(scope="module")
def hosts(place: Path, require_commands) -> Iterator[Hosts]:
    require_commands("sshd", "ssh", "rsync", "ip", "unshare", "nsenter")
    with Hosts(place / "hosts") as running:
        for number in running.numbers:
            token = place / "hosts" / f"node-{number}" / "home" / ".ray" / "auth_token"
            token.parent.mkdir(parents=True)
            token.touch(mode=0o600)
            token.write_text("0123456789abcdef" * 4)
        yield running


def on_head(hosts: Hosts, place: Path, command: str) -> Running:
    """A command as the user runs it on the head, in the checkout and with the token."""
    return hosts.start(
        1, "bash", "-c", f"cd {place}/kdecs && source .venv/bin/activate && RAY_AUTH_MODE=token {command}"
    )


def num_nodes(hosts: Hosts, place: Path) -> int:
    count = "print('alive', sum(node['Alive'] for node in ray.nodes()))"
    job = on_head(
        hosts, place, f"python -c \"import ray; ray.init(address='auto', log_to_driver=False); {count}\""
    )
    job.wait(480)
    return int(job.text().rpartition("alive ")[2].split()[0]) if "alive " in job.text() else 0


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, place: Path) -> Path:
    """The committed file, with the user, the key and the place of this trial."""
    text = (
        (ROOT / "cluster" / "ray" / "on_premises.yaml").read_text().replace("/shared/kdecs", f"{place}/kdecs")
    )
    config = yaml.safe_load(text)
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(place / "hosts" / "key")}
    path = place / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    began = time.monotonic()
    up = on_head(hosts, place, f"ray up --yes --no-config-cache {path}")
    assert up.wait(900) == 0, up.text()[-5000:]
    wait_until(lambda: num_nodes(hosts, place) == 2, "the worker has joined", 420, poll_s=3)
    print(f"\nray up: both nodes after {time.monotonic() - began:.0f} s")
    return path


def write_space(place: Path) -> Path:
    corpus = {split: str(bundled_sample(split)) for split in ("train", "valid", "test")}
    values = {
        "name": "two-hosts",
        "output": str(place / "sweep"),
        "teachers": {"random": str(sample_labels(place / "labels", seed=0))},
        "student": {
            "cache": CACHE,
            "corpus": corpus | {"train_share": 0.15},
            "model": {
                "base": str(save_tiny_encoder(place / "base")),
                "span_head": "pointer",
                "max_prompt_tokens": 96,
            },
            "optimization": {"epochs": NUM_EPOCHS},
            "threads": 1,  # not those of the CPUs, which both hosts have in common here
        },
        "space": {
            "teacher": {"grid": ["random"]},
            "optimization.seed": {"grid": list(range(NUM_TRIALS))},
        },
        "max_concurrent_trials": 2,
        "cpus_per_trial": 2,
        "ray_address": "auto",
        "report": False,
    }
    path = place / "space.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def epochs_by_host(sweep: Path) -> dict[str, int]:
    """The epochs of all trials by the host on which each trial runs or has run last."""
    found: dict[str, int] = {}
    for trial in (sweep / "trials").glob("*"):
        machine, metrics = trial / "environment.json", trial / "metrics.jsonl"
        if machine.exists() and metrics.exists():
            host = json.loads(machine.read_text())["host"]
            found[host] = found.get(host, 0) + len(metrics.read_text().splitlines())
    return found


@pytest.mark.slow
def test_ray_refuses_a_user_without_the_token(hosts, place, cluster):
    other = "RAY_AUTH_TOKEN_PATH= RAY_AUTH_TOKEN=" + "f" * 64
    job = on_head(
        hosts, place, f"{other} python -c \"import ray; ray.init(address='auto'); print('joined')\""
    )
    assert job.wait(480) != 0
    assert "joined" not in job.text()


@pytest.mark.slow
def test_the_head_starts_ray_again_on_a_worker_whose_processes_were_killed(hosts, place, cluster):
    """Version 1 of the autoscaler restarts Ray over ssh on a worker from which it hears nothing."""
    hosts.run(2, "pkill", "-KILL", "-f", "raylet/raylet")
    began = time.monotonic()
    wait_until(lambda: num_nodes(hosts, place) == 1, "Ray has noticed", 300, poll_s=1)
    noticed = time.monotonic() - began
    wait_until(lambda: num_nodes(hosts, place) == 2, "the worker is back", 600, poll_s=2)
    print(f"\nraylet killed: noticed after {noticed:.0f} s, back after {time.monotonic() - began:.0f} s")


@pytest.mark.cluster
def test_a_sweep_goes_on_without_a_host_and_with_it_again(hosts, place, cluster):
    space, sweep = write_space(place), place / "sweep"
    job = on_head(hosts, place, f"python tune/sweep.py {space}")
    wait_until(
        lambda: job.has_ended or epochs_by_host(sweep).keys() >= {"node-1", "node-2"}, "both hosts train", 300
    )
    assert not job.has_ended, job.text()[-5000:]
    caches = [
        hosts.run(n, "bash", "-c", f"cd {CACHE} && sha256sum soft-labels-*.arrow") for n in hosts.numbers
    ]
    assert caches[0] == caches[1] and caches[0].count("\n") == 1
    hosts.off(2)
    began = time.monotonic()
    wait_until(lambda: num_nodes(hosts, place) == 1, "Ray has noticed", 900, poll_s=2)
    noticed = time.monotonic() - began
    hosts.boot(2)
    began = time.monotonic()
    wait_until(lambda: num_nodes(hosts, place) == 2, "the head has started Ray there", 900, poll_s=2)
    back = time.monotonic() - began
    assert job.wait(900) == 0, job.text()[-5000:]
    trials = list((sweep / "trials").glob("*"))
    assert len(trials) == NUM_TRIALS
    for trial in trials:
        assert verify_artifact(trial) == []
        epochs = [json.loads(line)["epoch"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
        assert epochs == list(range(1, NUM_EPOCHS + 1))
    print(
        f"\nsweep: Ray noticed the lost host after {noticed:.0f} s and had it back after {back:.0f} s; "
        f"epochs by host: {epochs_by_host(sweep)}"
    )
