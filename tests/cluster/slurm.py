"""Slurm on the hosts of hosts.py: one munged, slurmctld on node-1, a slurmd on each, and a checkout to submit from.

Each daemon is a child of the test's process or of a host, and ends with it.
"""

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from hosts import Hosts, Running
from hosts import _die_with_parent as die_with_parent
from support import ROOT, wait_until

COMMANDS = ("slurmctld", "slurmd", "munged", "sshd", "unshare", "nsenter", "ip")
_SECONDS_TO_NOTICE = 20  # that a node is down; Slurm's own 300 are long for a test

_CONFIG = """
ClusterName=kdecs
SlurmctldHost=node-1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=15
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SlurmdTimeout={timeout_s}
KillWait=30
MinJobAge=3600
{gres}
NodeName=node-[1-{num_nodes}] Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=100000 {node}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_CGROUPS = Path("/sys/fs/cgroup/freezer")


def _remove_cgroups() -> bool:
    """Kill what is left of the jobs and remove their cgroups. Returns whether that is done."""
    for group in sorted(_CGROUPS.glob("slurm_node-*/**"), reverse=True):
        with contextlib.suppress(OSError):  # a process that still ends, or has just ended
            for pid in (group / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            group.rmdir()
    return not any(_CGROUPS.glob("slurm_node-*"))


class Slurm:
    """Slurm over some hosts, with as many CPUs and GPUs per node as it shall claim. Use it as a context."""

    def __init__(self, hosts: Hosts, place: Path, *, cpus: int = 2, gpus: int = 0) -> None:
        self.hosts, self.place = hosts, place
        self.checkout = place / "checkout"
        self._environment = {"SLURM_CONF": str(place / "slurm.conf")}
        self._munged: subprocess.Popen[bytes] | None = None
        self._daemons: dict[str, Running] = {}
        place.mkdir(parents=True)
        (place / "state").mkdir()
        # Ray's servers leave their process group, so only cgroups end them with their job. Another Slurm of this
        # machine that has such nodes keeps its own.
        self._has_cgroups = os.access(_CGROUPS, os.W_OK) and not any(_CGROUPS.glob("slurm_node-*"))
        (place / "slurm.conf").write_text(
            _CONFIG.format(
                place=place,
                proctrack="cgroup" if self._has_cgroups else "linuxproc",
                timeout_s=_SECONDS_TO_NOTICE,
                num_nodes=len(hosts.numbers),
                cpus=cpus,
                node=f"Gres=gpu:{gpus}" if gpus else "",
                gres="GresTypes=gpu" if gpus else "",
            )
        )
        if self._has_cgroups:
            (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        if gpus:
            for number in range(gpus):  # Slurm asks for character devices
                os.mknod(place / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            (place / "gres.conf").write_text(f"Name=gpu File={place}/gpu[0-{gpus - 1}]\n")
        # What a user has: the repository with its environment. Jobs write below it.
        self.checkout.mkdir()
        for name in ("cluster", "launch", "tune", "kdecs"):
            (self.checkout / name).symlink_to(ROOT / name)
        (self.checkout / ".venv").symlink_to(sys.prefix)

    def __enter__(self) -> "Slurm":
        key = self.place / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {name: str(self.place / f"munge.{name}") for name in ("socket", "pid", "log", "seed")}
        command = [
            "/usr/sbin/munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={files['socket']}",
        ]
        command += [f"--{name}-file={files[name]}" for name in ("pid", "log", "seed")]
        self._munged = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
        wait_until(lambda: Path(files["socket"]).exists(), "munged listens")
        self._start(1, "slurmctld")
        for number in self.hosts.numbers:
            self.boot(number)
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons.values():
            if not daemon.has_ended:
                with contextlib.suppress(subprocess.CalledProcessError):
                    daemon.send(9)
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()
        if self._has_cgroups:
            wait_until(_remove_cgroups, "no process of a job is left", 60, poll_s=0.2)

    def boot(self, number: int) -> None:
        """Start the slurmd of a host that is up, and wait until Slurm uses the node."""
        self._start(number, "slurmd", "-N", f"node-{number}")
        wait_until(lambda: self.state_of(number) in ("idle", "mixed", "allocated"), f"node-{number} is idle")

    def state_of(self, number: int) -> str:
        """A node's state, such as idle or down*."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.run("sinfo", "--noheader", "--nodes", f"node-{number}", "--format", "%T").strip()
        return "unknown"

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """What a command prints that a user runs on node-1, in the checkout. Raises CalledProcessError if it fails."""
        in_checkout = ("bash", "-c", 'cd "$0" && exec "$@"', str(self.checkout), *command)
        command = self.hosts.command(1, *in_checkout, environment=self._environment | dict(environment or {}))
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """Submit a job by `sbatch` and return its number."""
        return self.run("sbatch", "--parsable", *arguments, environment=environment).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return dict(
                    re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job))
                )
            except subprocess.CalledProcessError:  # a busy slurmctld does not answer in time
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def wait(
        self, job: str, states: Iterable[str] = ("COMPLETED",), timeout_s: float = 720
    ) -> dict[str, str]:
        """Wait until a job is in one of some states; fails at once if it ends in another one."""
        known = set(states)
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        deadline = time.monotonic() + timeout_s
        while (found := self.job(job))["JobState"] not in known:
            assert found["JobState"] not in ends, (
                f"job {job} is {found['JobState']}:\n{self.log(job)[-3000:]}"
            )
            assert time.monotonic() < deadline, (
                f"job {job} is still {found['JobState']}:\n{self.log(job)[-3000:]}"
            )
            time.sleep(0.2)
        return found

    def log(self, job: str) -> str:
        """What a job has printed so far, over all of its starts."""
        [*paths] = self.checkout.glob(f"*-{job.replace('_', '-')}.out")
        return "".join(path.read_text(errors="replace") for path in paths)

    def _start(self, number: int, name: str, *arguments: str) -> None:
        self._daemons[f"{name}-{number}"] = self.hosts.start(
            number, f"/usr/sbin/{name}", "-D", *arguments, environment=self._environment
        )
