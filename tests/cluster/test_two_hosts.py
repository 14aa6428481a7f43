"""DeepSpeed's launcher and independent export workers on two hosts, one of which is cut off, killed or switched off.

Each scenario prints a line with what it took, for docs/cluster.md: run them with -s.
"""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hosts import Hosts, Running
from support import TESTS, wait_until

from kdecs.artifact import read_manifest
from kdecs.corpus.reading import bundled_sample

sys.path.append(str(TESTS / "soft_labels"))

from label_directories import read_shard

pytestmark = pytest.mark.timeout(1800)
LAUNCHER = "cluster/deepspeed_two_nodes.sh"
LOST_RANK_S = 10
NUM_STEPS = 88
CHECKPOINT_EVERY = 10
# ssh notices a lost host by this, or by what the script gives it after these: ssh takes the first value of an option.
QUICK_SSH = "-o ServerAliveInterval=3 -o ServerAliveCountMax=5"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-hosts")


@pytest.fixture(scope="module")
def hosts(place: Path, require_commands) -> Iterator[Hosts]:
    require_commands("sshd", "ssh", "pdsh", "ip", "unshare", "nsenter")
    with Hosts(place / "hosts") as running:
        (place / "hostfile").write_text("node-1 slots=1\nnode-2 slots=1\n")
        yield running


@pytest.fixture(scope="module")
def base(place: Path, hosts: Hosts) -> Path:
    values = {
        "name": "base",
        "output": str(place / "base"),
        "corpus": {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("test"))},
        "architecture": "llama",
        "vocabulary_size": 800,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "max_positions": 512,
        "max_steps": 3,
        "batch_size": 4,
        "sequence_tokens": 64,
    }
    (place / "base.yaml").write_text(yaml.safe_dump(values))
    hosts.run(
        1, "python", "-m", "kdecs.launch.pretrain_base", "--config", place / "base.yaml", timeout_s=1200
    )
    return place / "base"


def write_teacher(place: Path, base: Path, name: str) -> Path:
    """A config of 88 steps under ZeRO-3."""
    values = {
        "name": name,
        "output": str(place / name),
        "corpus": {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("valid"))},
        "model": {"family": "causal", "base": str(base)},
        "lora": {"rank": 4},
        "zero": {"stage": 3, "dtype": "float32"},
        "batches": {"global_batch_pairs": 11, "micro_batch_tokens": 256, "max_prompt_tokens": 400},
        "optimization": {"learning_rate": 0.001, "epochs": 4},
        "log_every_steps": 1,
        "checkpoint_every_steps": CHECKPOINT_EVERY,
        "threads_per_rank": 1,
        "lost_rank_s": LOST_RANK_S,
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def launch(hosts: Hosts, config: Path, *options: str, **environment: str) -> Running:
    """The two-node launcher on node-1."""
    hostfile = {"HOSTFILE": str(config.parent / "hostfile"), "PDSH_SSH_ARGS_APPEND": QUICK_SSH}
    return hosts.start(1, LAUNCHER, config, *options, environment=hostfile | environment)


def steps_of(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def losses_of(output: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def await_step(job: Running, output: Path, step: int) -> int:
    """Wait until a training has written the line of a step, and return its last one."""
    wait_until(
        lambda: job.has_ended or (steps_of(output) or [0])[-1] >= step,
        f"step {step} of {output}",
        timeout_s=1200,
    )
    assert not job.has_ended, job.text()[-3000:]
    return steps_of(output)[-1]


def lines_of(job: Running) -> list[str]:
    """The errors that kdecs printed, without pdsh's prefix. Python printed none."""
    text = job.text()
    assert "Traceback" not in text, text[-5000:]
    return [line.partition("kdecs: error: ")[2] for line in text.splitlines() if "kdecs: error: " in line]


def ranks_on(hosts: Hosts, number: int) -> list[str]:
    return hosts.run(number, "bash", "-c", "pgrep -f '^[^ ]+ -u launch/' || true").split()


def resumed_at(job: Running) -> int:
    line = next(line for line in job.text().splitlines() if "resumed at step" in line)
    return int(line.partition("resumed at step ")[2].split()[0])


@pytest.mark.slow
def test_a_host_that_is_cut_off_ends_the_job_and_the_other_host_resumes_alone(hosts, place, base):
    config = write_teacher(place, base, "cut")
    job = launch(hosts, config)
    at = await_step(job, place / "cut", 25)
    hosts.cut(2)
    began = time.monotonic()
    try:
        # In a shorter time than this they could not have told a lost host from a slow one.
        wait_until(lambda: not ranks_on(hosts, 1) and not ranks_on(hosts, 2), "ranks end", 4 * LOST_RANK_S)
        noticed = time.monotonic() - began
        assert job.wait(240) != 0
        ended = time.monotonic() - began
    finally:
        hosts.plug(2)
    (line,) = lines_of(job)
    assert line.startswith(f"rank 1 on node-2 has given no sign of life for {LOST_RANK_S} s (lost_rank_s)")

    alone = hosts.start(1, "python", "-m", "kdecs.launch.train_teacher", "--config", config)
    assert alone.wait(900) == 0, alone.text()[-3000:]
    assert steps_of(place / "cut") == list(range(1, NUM_STEPS + 1))
    print(
        f"\ncut off: noticed after {noticed:.1f} s, launcher ended after {ended:.1f} s, "
        f"{at - resumed_at(alone)} steps lost"
    )
    assert at - resumed_at(alone) <= 2 * CHECKPOINT_EVERY
    read_manifest(place / "cut", "teacher")


@pytest.fixture(scope="module")
def trained(hosts: Hosts, place: Path, base: Path) -> Path:
    """A teacher that both hosts trained, without a disturbance."""
    job = launch(hosts, write_teacher(place, base, "both"))
    assert job.wait(900) == 0, job.text()[-3000:]
    return place / "both"


@pytest.mark.cluster
def test_two_hosts_train_with_the_losses_of_one(hosts, place, base, trained):
    config = write_teacher(place, base, "one")
    alone = hosts.start(1, "python", "-m", "kdecs.launch.train_teacher", "--config", config)
    assert alone.wait(900) == 0, alone.text()[-3000:]
    assert read_manifest(trained, "teacher").details["world_size"] == 2
    both, one = losses_of(trained), losses_of(place / "one")
    assert len(both) == len(one) == NUM_STEPS
    print(f"\nlosses: at most {max(abs(a - b) for a, b in zip(both, one, strict=True)):.1e} apart")
    assert both == pytest.approx(one, abs=1e-5)


@pytest.mark.cluster
def test_kills_ctrl_c_and_power_losses_lose_at_most_the_steps_since_a_checkpoint(hosts, place, base, trained):
    config, output = write_teacher(place, base, "lost"), place / "lost"
    killed = launch(hosts, config)
    at = await_step(killed, output, 15)
    (rank,) = ranks_on(hosts, 2)
    hosts.run(2, "kill", "-KILL", rank)
    began = time.monotonic()
    assert killed.wait(240) != 0
    took = time.monotonic() - began
    (line,) = lines_of(killed)
    assert line.startswith("rank 1 on node-2 ended without a word (it was killed")

    stopped = launch(hosts, config)
    await_step(stopped, output, 35)
    assert at - resumed_at(stopped) <= 2 * CHECKPOINT_EVERY
    print(f"\nrank killed: launcher ended after {took:.1f} s, {at - resumed_at(stopped)} steps lost")
    stopped.send(signal.SIGINT, to_group=True)
    began = time.monotonic()
    assert stopped.wait(240) == 143, stopped.text()[-3000:]
    took = time.monotonic() - began
    assert "checkpoint written" in stopped.text()
    assert not ranks_on(hosts, 1) and not ranks_on(hosts, 2)
    at = steps_of(output)[-1]

    # DeepSpeed's own launcher ends before the ranks, whose output then has no reader.
    plain = hosts.start(
        1,
        *("deepspeed", "--hostfile", place / "hostfile", "--master_addr", "node-1"),
        *("launch/train_teacher.py", "--config", config),
    )
    await_step(plain, output, at + 6)
    assert resumed_at(plain) == at
    print(f"Ctrl-C: launcher ended after {took:.1f} s, no step lost")
    plain.send(signal.SIGINT, to_group=True)
    assert plain.wait(240) == 1
    wait_until(lambda: not ranks_on(hosts, 1) and not ranks_on(hosts, 2), "ranks end")
    at = steps_of(output)[-1]

    off = launch(hosts, config)
    last = await_step(off, output, at + 12)
    assert resumed_at(off) == at
    hosts.off(2)
    began = time.monotonic()
    try:
        wait_until(lambda: not ranks_on(hosts, 1), "ranks end", 4 * LOST_RANK_S)
        noticed = time.monotonic() - began
        assert off.wait(240) != 0
        took = time.monotonic() - began
        (line,) = lines_of(off)
        assert line.startswith("rank 1 on node-2 has given no sign of life")
    finally:
        hosts.boot(2)

    whole = launch(hosts, config)
    assert whole.wait(900) == 0, whole.text()[-3000:]
    lost = last - resumed_at(whole)
    print(f"power off: noticed after {noticed:.1f} s, launcher ended after {took:.1f} s, {lost} steps lost")
    assert lost <= 2 * CHECKPOINT_EVERY
    assert losses_of(output) == pytest.approx(losses_of(trained), abs=1e-5)


def write_export(place: Path, teacher: Path, name: str, **changes: object) -> Path:
    values = {
        "teacher": str(teacher),
        "output": str(place / name),
        "corpus": {"train": str(bundled_sample("valid")), "valid": str(bundled_sample("test"))},
        "num_shards": 6,
        "micro_batch_tokens": 512,
        "lease_s": 3,
        "lost_rank_s": LOST_RANK_S,
        "allow_other_corpus": True,
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def shards_of(output: Path) -> dict[str, str]:
    return {
        entry.path: entry.sha256
        for entry in read_manifest(output, "soft-labels").files
        if entry.path.startswith("shard-")
    }


@pytest.fixture(scope="module")
def exported(hosts: Hosts, place: Path, trained: Path) -> Path:
    """The labels that one host exports."""
    job = hosts.start(
        1,
        *("python", "-m", "kdecs.launch.export_soft_labels"),
        "--config",
        write_export(place, trained, "labels"),
    )
    assert job.wait(900) == 0, job.text()[-3000:]
    return place / "labels"


@pytest.mark.cluster
def test_two_hosts_export_a_partitioned_teacher(hosts, place, trained, exported):
    config = write_export(place, trained, "partitioned", engine="zero3")
    job = launch(hosts, config, SCRIPT="launch/export_soft_labels.py")
    assert job.wait(900) == 0, job.text()[-3000:]
    # Not the same bytes: a partitioned head multiplies all of its rows (docs/reference/soft-labels.md).
    words = tuple(read_manifest(exported, "soft-labels").details["answer_words"])
    furthest = 0.0
    for name in sorted(shards_of(exported)):
        part, whole = (read_shard(output / name, words) for output in (place / "partitioned", exported))
        assert list(part.pair_hashes) == list(whole.pair_hashes)
        for values in ("logits", "log_rest_mass"):
            furthest = max(furthest, float(np.abs(getattr(part, values) - getattr(whole, values)).max()))
    print(f"\npartitioned teacher: labels at most {furthest:.1e} from those of a whole one")
    assert furthest < 1e-5


@pytest.mark.cluster
def test_a_worker_takes_over_the_shards_of_a_host_without_power(hosts, place, trained, exported):
    config = write_export(place, trained, "shared")
    command = ["python", "-m", "kdecs.launch.export_soft_labels", "--config", config]
    first = hosts.start(2, *command)
    output = place / "shared"
    wait_until(lambda: first.has_ended or list(output.glob("shard-*.parquet")), "a first shard", 900)
    hosts.off(2)
    began, done = time.monotonic(), len(list(output.glob("shard-*.parquet")))
    try:
        second = hosts.start(1, *command)
        assert second.wait(900) == 0, second.text()[-3000:]
        took = time.monotonic() - began
    finally:
        hosts.boot(2)
    assert shards_of(output) == shards_of(exported)
    print(
        f"\nexport: host off with {done} of 6 shards published; the other host completed after {took:.1f} s"
    )
