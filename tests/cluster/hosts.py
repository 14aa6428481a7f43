"""Several "hosts" on one machine, by namespaces: own network, processes, name, /tmp, /dev/shm and home, and an sshd.

The hosts hang on a switch, so that one of them can be cut off (silence, as behind a pulled cable) or lose its power
(silence, and all of its processes gone) while the others keep their network. They share the file system, as over NFS.

Everything ends with the test's process, however that ends: the kernel kills the first process of each namespace, and
with it all others. Nothing is left in the machine's own namespaces.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support import ROOT, wait_until

NETWORK = "10.77.0"
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

# The first process of a host. Arguments: its number, its directory, its home, then what of /tmp all hosts share.
_BOOT = """
set -e
number=$1 place=$2 home=$3; shift 3
hostname node-$number
mount --make-rprivate /
mkdir -p "$place/tmp" "$home"
mount -t tmpfs -o mode=1777 tmpfs "$place/tmp"
for shared in "$@"; do
    mkdir -p "$place/tmp/${shared#/tmp/}"
    mount --rbind "$shared" "$place/tmp/${shared#/tmp/}"
done
echo node-$number >"$place/hostname"
mount --bind "$place/hostname" /etc/hostname
mount --bind "$place/../hosts" /etc/hosts
sed "s,^root:.*,root:x:0:0:root:$home:/bin/bash," /etc/passwd >"$place/passwd"
mount --bind "$place/passwd" /etc/passwd
mount -t tmpfs tmpfs /dev/shm
mount -t proc proc /proc
mount --rbind "$place/tmp" /tmp
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
/usr/sbin/sshd -f "$place/../sshd_config" -E "$place/sshd.log"
touch "$place/is-up"
trap : TERM INT HUP
while :; do sleep 3600 & wait || true; done # as the first process it reaps what others leave
"""

_SSHD = """
HostKey {place}/host_key
AuthorizedKeysFile {place}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile /run/sshd.pid
SetEnv KDECS_DEVICE=cpu DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH={root}
"""
_SSH = """
Host *
IdentityFile {place}/key
UserKnownHostsFile {place}/known_hosts
LogLevel ERROR
"""


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Running:
    """A command on a host, the leader of a session there."""

    def __init__(self, hosts: "Hosts", number: int, process: "subprocess.Popen[bytes]", pid: Path, log: Path):
        self.hosts, self.number, self.process, self._pid, self.log = hosts, number, process, pid, log

    @property
    def pid(self) -> int:
        """Its process id on the host."""
        wait_until(
            lambda: self._pid.exists() and self._pid.read_text().endswith("\n"), f"{self.log} has begun"
        )
        return int(self._pid.read_text())

    def send(self, number: int, *, to_group: bool = False) -> None:
        """Send a signal to it, or to its process group as a terminal does on Ctrl-C."""
        target = f"-{self.pid}" if to_group else str(self.pid)
        self.hosts.run(self.number, "kill", f"-{number}", "--", target)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout_s: float) -> int:
        """Its exit code; fails with the end of its output once the time is over."""
        wait_until(lambda: self.has_ended, f"{self.log} ends:\n{self.text()[-3000:]}", timeout_s)
        return self.process.returncode

    def text(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Hosts:
    """The hosts node-1, node-2, …, with the addresses 10.77.0.1, 10.77.0.2, …; use it as a context."""

    def __init__(self, place: Path, num_hosts: int = 2) -> None:
        """`place` is a directory that all hosts see, for their homes, keys and logs."""
        self.place, self.numbers = place, range(1, num_hosts + 1)
        self._switch: subprocess.Popen[bytes] | None = None
        self._outer: dict[int, subprocess.Popen[bytes]] = {}
        self._inner: dict[int, int] = {}
        self._num_commands = 0

    def __enter__(self) -> "Hosts":
        self.place.mkdir(parents=True, exist_ok=True)
        names = [f"{NETWORK}.{n} node-{n}" for n in self.numbers]
        (self.place / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        for name in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.place / name)]
            subprocess.run(command, check=True)
        host_key = " ".join((self.place / "host_key.pub").read_text().split()[:2])
        (self.place / "known_hosts").write_text("".join(f"{n.replace(' ', ',')} {host_key}\n" for n in names))
        (self.place / "sshd_config").write_text(_SSHD.format(place=self.place, root=ROOT))
        self._skip_where_there_are_no_namespaces()
        try:
            self._switch = self._unshare(self.place / "switch.log", "--net", "sleep", "infinity")
            wait_until(
                lambda: self._namespace("net", self._switch.pid) != self._namespace("net", None), "a switch"
            )
            self._on_switch("link", "add", "br0", "type", "bridge")
            self._on_switch("link", "set", "br0", "up")
            for number in self.numbers:
                self.boot(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._outer):
            self.off(number)
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    def boot(self, number: int) -> None:
        """Start a host, for the first time or after `off`."""
        place = self.place / f"node-{number}"
        home = place / "home"
        (home / ".ssh").mkdir(parents=True, exist_ok=True)
        (home / ".ssh" / "config").write_text(_SSH.format(place=self.place))
        (place / "is-up").unlink(missing_ok=True)
        # What lies in /tmp here, such as the directories of the tests, would be hidden by the host's own /tmp.
        shared = [
            p for p in {ROOT, self.place, self.place.parent, Path(sys.prefix)} if p.is_relative_to("/tmp")
        ]
        arguments = [str(number), str(place), str(home), *sorted(map(str, shared))]
        log = place / "boot.log"
        outer = self._unshare(
            log,
            *("--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child"),
            *("bash", "-c", _BOOT, "boot", *arguments),
        )
        self._outer[number] = outer
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        wait_until(lambda: (place / "is-up").exists() or outer.poll() is not None, f"node-{number} is up")
        assert outer.poll() is None, log.read_text()
        self._inner[number] = int(children.read_text())
        with contextlib.suppress(
            subprocess.CalledProcessError
        ):  # the switch's end of the host before a loss of power
            self._on_switch("link", "del", f"port{number}")
        # With an address of its number, which the others still know after a loss of power.
        card = ["name", "eth0", "address", f"02:00:00:00:00:{number:02x}", "netns", str(self._inner[number])]
        self._on_switch("link", "add", f"port{number}", "type", "veth", "peer", *card)
        self._on_switch("link", "set", f"port{number}", "master", "br0", "up")
        self.run(number, "ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        self.run(number, "ip", "link", "set", "eth0", "up")

    def cut(self, number: int) -> None:
        """Pull the host's network cable: the others see silence, and so does it."""
        self._on_switch("link", "set", f"port{number}", "nomaster")

    def plug(self, number: int) -> None:
        """Put the cable back."""
        self._on_switch("link", "set", f"port{number}", "master", "br0")

    def off(self, number: int) -> None:
        """Take the host's power away."""
        with contextlib.suppress(subprocess.CalledProcessError):  # not wired yet
            self.cut(number)
        self._outer[number].kill()
        self._outer.pop(number).wait()
        self._inner.pop(number, None)

    def command(
        self, number: int, *command: object, environment: Mapping[str, str] | None = None
    ) -> list[str]:
        """The command line that runs a command on a host, in the repository's root."""
        assert number in self._inner, f"node-{number} is off"
        variables = {
            "HOME": str(self.place / f"node-{number}" / "home"),
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin",
            "PYTHONPATH": f"{ROOT}",
            "KDECS_DEVICE": "cpu",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        enter = [
            "nsenter",
            "-t",
            str(self._inner[number]),
            "-n",
            "-u",
            "-i",
            "-m",
            "-p",
            f"--wd={ROOT}",
            "--",
        ]
        pairs = [f"{name}={value}" for name, value in variables.items()]
        return [*enter, "env", "-i", *pairs, *map(str, command)]

    def run(self, number: int, *command: object, timeout_s: float = 60) -> str:
        """What a command prints on a host. Raises CalledProcessError if it fails."""
        done = subprocess.run(
            self.command(number, *command), check=True, capture_output=True, text=True, timeout=timeout_s
        )
        return done.stdout

    def start(self, number: int, *command: object, environment: Mapping[str, str] | None = None) -> Running:
        """Start a command on a host; what it prints goes to a log."""
        self._num_commands += 1
        name = self.place / f"command-{self._num_commands}"
        pid, log = name.with_suffix(".pid"), name.with_suffix(".log")
        script = 'echo $$ >"$0"; exec "$@"'
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(number, "setsid", "bash", "-c", script, pid, *command, environment=environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return Running(self, number, process, pid, log)

    @staticmethod
    def _skip_where_there_are_no_namespaces() -> None:
        try_out = "mount -t tmpfs tmpfs /mnt && ip link add type bridge && ip link add type veth"
        command = ["unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "bash", "-c", try_out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs namespaces with a network, which this machine refuses: {done.stderr.strip()}")

    @staticmethod
    def _unshare(log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
        with log.open("wb") as output:
            return subprocess.Popen(
                ["unshare", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _on_switch(self, *arguments: str) -> None:
        assert self._switch is not None
        command = ["nsenter", "-t", str(self._switch.pid), "-n", "ip", *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)

    @staticmethod
    def _namespace(kind: str, pid: int | None) -> str:
        return os.readlink(f"/proc/{pid or 'self'}/ns/{kind}")
