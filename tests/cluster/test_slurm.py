"""The jobs of cluster/slurm under a real Slurm of two nodes: stops, losses and refusals, and where the work goes on."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import Hosts
from slurm import COMMANDS, Slurm
from support import assert_same_weights, save_tiny_encoder, wait_until

from kdecs.artifact import read_manifest
from kdecs.corpus.reading import bundled_sample

pytestmark = [pytest.mark.timeout(3600)]
# What a user of nodes without GPUs adds, as docs/cluster.md has it.
CPU_NODES = {
    "SBATCH_GPUS_PER_NODE": "0",
    "TEACHER_SBATCH": "--ntasks-per-node=1 --cpus-per-task=1",
    "EXPORT_SBATCH": "--array=0-1 --cpus-per-task=1 --mem=0",
    "SWEEP_SBATCH": "--cpus-per-task=2",
}
TEACHER, EXPORT, SWEEP = (
    f"cluster/slurm/{name}.sbatch" for name in ("train_teacher", "export_soft_labels", "sweep")
)
CORPUS = {split: str(bundled_sample(split)) for split in ("train", "valid")}


class Work:
    """A place for the outputs of one scenario, its configs and its jobs."""

    def __init__(self, slurm: Slurm, base: Path, name: str) -> None:
        self.slurm, self.base, self.place = slurm, base, slurm.place / name
        self.place.mkdir()
        self.teacher, self.labels, self.sweep = (self.place / part for part in ("teacher", "labels", "sweep"))

    def config(self, name: str, values: dict[str, Any]) -> str:
        path = self.place / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def teacher_config(self, **changes: Any) -> str:
        values = {
            "name": "test",
            "output": str(self.teacher),
            "corpus": CORPUS,
            "model": {"family": "masked", "base": str(self.base)},
            "lora": {"rank": 4},
            "zero": {"stage": 2, "dtype": "float32"},
            "batches": {"global_batch_pairs": 11, "micro_batch_tokens": 256, "max_prompt_tokens": 200},
            "optimization": {"learning_rate": 0.001, "epochs": 1},
            "checkpoint_every_steps": 10,
            "log_every_steps": 1,
            "threads_per_rank": 1,
        }
        return self.config("teacher", values | changes)

    def export_config(self, teacher: Path) -> str:
        values = {"teacher": str(teacher), "output": str(self.labels), "corpus": CORPUS, "num_shards": 16}
        return self.config("export", values)

    def sweep_config(self, labels: Path) -> str:
        student = {
            "cache": str(self.place / "cache"),
            "corpus": CORPUS,
            "model": {"base": str(self.base), "max_prompt_tokens": 96},
            "optimization": {"learning_rate": 2e-3, "epochs": 4},
        }
        values = {
            "name": "test",
            "output": str(self.sweep),
            "teachers": {"tiny": str(labels)},
            "student": student,
            "space": {
                "teacher": {"grid": ["tiny"]},
                "distillation.alpha": {"grid": [0.6]},
                "optimization.seed": {"grid": [0, 1]},
            },
            "cpus_per_trial": 1,
            "reuse_students": False,
            "report": False,
        }
        return self.config("sweep", values)

    def submit(self, script: str, config: str, *options: str) -> str:
        kind = {TEACHER: "TEACHER", EXPORT: "EXPORT", SWEEP: "SWEEP"}[script]
        mine = CPU_NODES[f"{kind}_SBATCH"].split()
        return self.slurm.submit(*mine, *options, script, config, environment=CPU_NODES)

    @property
    def step(self) -> int:
        """The last step of the teacher that is in its metrics."""
        path = self.teacher / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    @property
    def epochs(self) -> int:
        """The epochs that all trials of the sweep have trained."""
        return sum(path.read_text().count("\n") for path in self.sweep.glob("trials/*/metrics.jsonl"))


@pytest.fixture(scope="module")
def slurm(require_commands: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of two CPUs."""
    require_commands(*COMMANDS)
    place = tmp_path_factory.mktemp("slurm")
    with Hosts(place / "hosts") as hosts, Slurm(hosts, place / "slurm") as found:
        yield found


@pytest.fixture(scope="module")
def base(slurm: Slurm) -> Path:
    """A tiny base of teachers and students that all nodes see."""
    return save_tiny_encoder(slurm.place / "base")


@pytest.fixture
def work(slurm: Slurm, base: Path, request: pytest.FixtureRequest) -> Work:
    return Work(slurm, base, re.sub(r"\W+", "-", request.node.name))


@pytest.fixture(scope="module")
def pipeline(slurm: Slurm, base: Path) -> Work:
    """Teacher, labels and sweep, queued by submit_pipeline.sh, that nothing has disturbed."""
    work = Work(slurm, base, "pipeline")
    configs = work.teacher_config(), work.export_config(work.teacher), work.sweep_config(work.labels)
    line = slurm.run("cluster/slurm/submit_pipeline.sh", *configs, environment=CPU_NODES)
    jobs = re.findall(r"\d+", line)
    for job in jobs:
        slurm.wait(job, timeout_s=1200)
    return work


def assert_same_labels(left: Path, right: Path) -> None:
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.glob("*.parquet")}
        for place in (left, right)
    )
    assert len(first) == 16
    assert first == second


def assert_same_trials(left: Path, right: Path) -> None:
    trials = sorted(path.name for path in (left / "trials").iterdir())
    assert len(trials) == 2
    assert trials == sorted(path.name for path in (right / "trials").iterdir())
    for trial in trials:
        assert_same_weights(left / "trials" / trial, right / "trials" / trial)


def assert_goes_on(pipeline: Work, work: Work, job: str, step: int, began: float) -> None:
    """A teacher that lost a rank at `step` resumes from the last checkpoint before and ends with the same adapter."""
    work.slurm.wait(job)
    log = work.slurm.log(job)
    resumed, took = int(re.search(r"resumed at step (\d+)", log)[1]), time.monotonic() - began
    print(f"resumed at step {resumed}, complete {took:.1f} s after the loss\n{log}")
    assert resumed >= step - 11
    assert_same_weights(pipeline.teacher, work.teacher)


@pytest.mark.slow
def test_a_stopped_teacher_is_queued_again_and_ends_with_the_same_adapter(slurm: Slurm, base: Path) -> None:
    straight, stopped = (Work(slurm, base, name) for name in ("straight", "stopped"))
    jobs = [work.submit(TEACHER, work.teacher_config()) for work in (straight, stopped)]
    wait_until(lambda: stopped.step >= 12, "the training is under way", 720)
    began = time.monotonic()
    slurm.run("scancel", "--signal=TERM", jobs[1])
    wait_until(lambda: "queued again" in slurm.log(jobs[1]), "the job is queued again", 240)
    print(f"\nteacher: SIGTERM at step {stopped.step}, queued again after {time.monotonic() - began:.1f} s")
    for job in jobs:
        slurm.wait(job)
    print(f"teacher: complete {time.monotonic() - began:.1f} s after SIGTERM")
    saved, resumed = (
        re.search(pattern, slurm.log(jobs[1]))[1]
        for pattern in (r"stopped at step (\d+)", r"resumed at step (\d+)")
    )
    assert saved == resumed
    assert_same_weights(straight.teacher, stopped.teacher)


@pytest.mark.cluster
def test_the_pipeline_runs_from_teacher_to_sweep(pipeline: Work) -> None:
    for place, kind in (
        (pipeline.teacher, "teacher"),
        (pipeline.labels, "soft-labels"),
        (pipeline.sweep, "sweep"),
    ):
        assert read_manifest(place, kind)


@pytest.mark.cluster
def test_a_stopped_sweep_saves_its_trials_and_ends_with_the_same_students(pipeline: Work, work: Work) -> None:
    slurm = pipeline.slurm
    job = work.submit(SWEEP, work.sweep_config(pipeline.labels))
    wait_until(lambda: work.epochs >= 3, "both trials train", 720)
    began, epochs = time.monotonic(), work.epochs
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    wait_until(lambda: "queued again" in slurm.log(job), "the sweep is queued again", 480)
    print(f"\nsweep: SIGTERM after {epochs} epochs, queued again after {time.monotonic() - began:.1f} s")
    print(slurm.log(job))
    notes = [json.loads(path.read_text()) for path in work.sweep.glob("trials/*/trial.json")]
    assert [note["status"] for note in notes] == ["stopped", "stopped"]
    slurm.wait(job, timeout_s=1200)
    print(f"sweep: complete {time.monotonic() - began:.1f} s after SIGTERM")
    print(slurm.log(job))
    assert_same_trials(pipeline.sweep, work.sweep)


@pytest.mark.cluster
def test_a_missing_file_fails_at_once_and_cancels_what_waits_for_it(work: Work) -> None:
    slurm = work.slurm
    base = work.base.with_name("absent")
    teacher = work.teacher_config(model={"family": "masked", "base": str(base)})
    configs = teacher, work.export_config(work.teacher), work.sweep_config(work.labels)
    began = time.monotonic()
    line = slurm.run("cluster/slurm/submit_pipeline.sh", *configs, environment=CPU_NODES)
    first, *later = re.findall(r"\d+", line)
    assert slurm.wait(first, ["FAILED"])["Restarts"] == "0"
    for job in later:
        assert slurm.wait(job, ["CANCELLED"], 60)["Reason"] == "DependencyNeverSatisfied"
    print(
        f"\nmissing file: said and dependents cancelled {time.monotonic() - began:.1f} s after the submission"
    )
    assert f"kdecs: error: {base}" in slurm.log(first)
    assert f"job {first} is not queued again: it failed; its error is above" in slurm.log(first)


@pytest.mark.cluster
def test_one_rank_that_fails_ends_the_job_for_good(pipeline: Work, work: Work) -> None:
    """The other rank is ended by srun, whose exit code is then that of a stop."""
    slurm = work.slurm
    job = work.submit(TEACHER, work.teacher_config())
    wait_until(lambda: work.step >= 3, "the training is under way", 720)
    slurm.run("pkill", "-KILL", "-f", "^python launch/train_teacher.py")  # of node-1 alone
    assert slurm.wait(job, ["FAILED"])["Restarts"] == "0"
    assert "is not queued again: it failed" in slurm.log(job)
    again = work.submit(TEACHER, work.teacher_config())
    slurm.wait(again)
    assert_same_weights(pipeline.teacher, work.teacher)


@pytest.mark.cluster
def test_a_cancelled_job_stays_cancelled_and_the_same_command_resumes_it(pipeline: Work, work: Work) -> None:
    slurm = work.slurm
    job = work.submit(TEACHER, work.teacher_config())
    wait_until(lambda: work.step >= 12, "the training is under way", 720)
    slurm.run("scancel", job)
    slurm.wait(job, ["CANCELLED"])
    time.sleep(5)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    again = work.submit(TEACHER, work.teacher_config())
    slurm.wait(again)
    saved = int(re.search(r"resumed at step (\d+)", slurm.log(again))[1])
    print(f"\nscancel: the next job resumed at step {saved}")
    assert saved >= 10
    assert_same_weights(pipeline.teacher, work.teacher)


@pytest.mark.cluster
def test_a_time_limit_that_is_near_saves_the_state(pipeline: Work, work: Work) -> None:
    slurm = work.slurm
    values = {"optimization": {"learning_rate": 0.001, "epochs": 10}}
    # Slurm looks at time limits twice a minute, and sends the signal up to a minute early.
    job = work.submit(TEACHER, work.teacher_config(**values), "--time=2", "--signal=TERM@30")
    wait_until(lambda: "queued again" in slurm.log(job), "the job is queued again", 720)
    assert "checkpoint written" in slurm.log(job)
    stopped = work.step
    wait_until(lambda: "resumed at step" in slurm.log(job), "it goes on", 720)
    assert f"resumed at step {stopped} of" in slurm.log(job)
    slurm.run("scancel", job)


@pytest.mark.cluster
@pytest.mark.parametrize("lost_rank_s", [10, 120], ids=["kdecs-first", "Slurm-first"])
def test_a_node_without_power_costs_the_steps_since_the_last_checkpoint(
    pipeline: Work, work: Work, lost_rank_s: int
) -> None:
    """Whoever misses it first: srun does not end before Slurm takes the node for down and queues the job again."""
    slurm, hosts = work.slurm, work.slurm.hosts
    job = work.submit(TEACHER, work.teacher_config(lost_rank_s=lost_rank_s))
    wait_until(lambda: work.step >= 15, "the training is under way", 720)
    hosts.off(2)
    began, step = time.monotonic(), work.step
    wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", "the job is queued again", 720, poll_s=0.2)
    print(f"\nnode lost at step {step}, queued again after {time.monotonic() - began:.1f} s")
    assert ("rank 1 on node-2 has given no sign of life" in slurm.log(job)) == (lost_rank_s == 10)
    hosts.boot(2)
    slurm.boot(2)
    assert_goes_on(pipeline, work, job, step, began)


@pytest.mark.cluster
def test_a_rank_that_falls_silent_on_a_node_that_answers_is_missed_by_the_others(
    pipeline: Work, work: Work
) -> None:
    """As with a device that hangs: Slurm sees nothing, the other rank ends, and the job queues itself again."""
    slurm = work.slurm
    job = work.submit(TEACHER, work.teacher_config(lost_rank_s=10))
    wait_until(lambda: work.step >= 15, "the training is under way", 720)
    slurm.hosts.run(2, "pkill", "-STOP", "-f", "^python launch/train_teacher.py")
    began, step = time.monotonic(), work.step
    wait_until(lambda: "is queued again" in slurm.log(job), "the job is queued again", 240, poll_s=0.2)
    print(f"\nrank silent at step {step}, queued again after {time.monotonic() - began:.1f} s")
    assert "rank 1 on node-2 has given no sign of life for 10 s" in slurm.log(job)
    assert_goes_on(pipeline, work, job, step, began)


@pytest.mark.cluster
def test_stopped_and_killed_export_tasks_end_with_the_same_shards(pipeline: Work, work: Work) -> None:
    slurm = work.slurm
    job = work.submit(EXPORT, work.export_config(pipeline.teacher))
    wait_until(lambda: len(list(work.labels.glob("*.parquet"))) >= 1, "a shard is there", 720)
    began = time.monotonic()
    slurm.run("scancel", "--signal=TERM", f"{job}_0")
    slurm.run("scontrol", "requeue", f"{job}_1")  # as by an administrator
    for task in (0, 1):
        slurm.wait(f"{job}_{task}")
    print(f"\nexport: complete {time.monotonic() - began:.1f} s after the stop of both tasks")
    assert_same_labels(pipeline.labels, work.labels)


@pytest.mark.cluster
def test_a_sweep_goes_on_after_the_loss_of_a_node(pipeline: Work, work: Work) -> None:
    slurm, hosts = work.slurm, work.slurm.hosts
    job = work.submit(SWEEP, work.sweep_config(pipeline.labels))
    wait_until(lambda: work.epochs >= 3, "both trials train", 720)
    hosts.off(2)
    began, epochs = time.monotonic(), work.epochs
    wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", "the job is queued again", 720, poll_s=0.2)
    print(f"\nsweep: node lost after {epochs} epochs, queued again after {time.monotonic() - began:.1f} s")
    hosts.boot(2)
    slurm.boot(2)
    slurm.wait(job, timeout_s=1200)
    print(f"sweep: complete {time.monotonic() - began:.1f} s after the loss\n{slurm.log(job)}")
    assert_same_trials(pipeline.sweep, work.sweep)


@pytest.mark.cluster
def test_nodes_with_gpus_take_the_jobs_as_they_are(
    require_commands: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    require_commands(*COMMANDS)
    place = tmp_path_factory.mktemp("gpus")
    with Hosts(place / "hosts") as hosts, Slurm(hosts, place / "slurm", cpus=32, gpus=4) as slurm:
        for script in (TEACHER, EXPORT, SWEEP, "cluster/slurm/train_student.sbatch"):
            slurm.run("sbatch", "--test-only", script)
