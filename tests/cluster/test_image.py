"""`cluster/ray/Dockerfile` built for real, by buildah, on a Debian that stands in for Ray's image.

Like Ray's image the stand-in has Python 3.11 and `ray[default]` in /home/ray/anaconda3, a user `ray` with sudo, and no
compiler. pip's settings on this machine go into the builds as a secret, and the local directories that they name as
volumes.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3600)]

RAY = re.findall(r"rayproject/ray:([\d.]+)-py311", (ROOT / "cluster" / "ray" / "Dockerfile").read_text())[0]
STAND_IN = f"""\
FROM scratch
ADD rootfs.tar /
RUN useradd -m -d /home/ray -s /bin/bash -u 1000 -g 100 ray && echo 'ray ALL=NOPASSWD: ALL' >> /etc/sudoers
ENV PATH=/home/ray/anaconda3/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/home/ray LC_ALL=C.UTF-8
USER 1000
RUN python3 -m venv /home/ray/anaconda3
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 pip install --no-cache-dir 'ray[default]=={RAY}'
WORKDIR /home/ray
"""
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


class Builder:
    """buildah with a storage that goes with its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._command = ["buildah", "--storage-driver", "overlay", *storage]
        settings = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        ).stdout
        found = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", settings, re.M))
        self.pip_conf = folder / "pip.conf"
        lines = [f"{name} = {value}" for name, value in found.items() if name in self._HANDED_ON]
        self.pip_conf.write_text("\n".join(["[global]", *lines, ""]))
        text = "\n".join(found.values())
        folders = [Path(place) for place in re.findall(r"(?m)^(/\S+)", text)]
        # The pages of an index may lead to files beside them.
        indexes = [Path(place).parent for place in re.findall(r"file://(/\S+)", text)]
        shared = [place for place in folders + indexes if place.is_dir()] + [Path("/etc/resolv.conf")]
        self._volumes = [option for place in shared for option in ("--volume", f"{place}:{place}:ro")]

    _HANDED_ON = ("index-url", "extra-index-url", "find-links", "cert", "timeout", "trusted-host")

    def __call__(self, *arguments: object, fails: bool = False) -> str:
        done = subprocess.run(
            [*self._command, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, output[-5000:]
        return output

    def build(self, dockerfile: Path, context: Path, tag: str, *arguments: str, fails: bool = False) -> str:
        secret = ("--secret", f"id=pip.conf,src={self.pip_conf}")
        options = ("--isolation", "chroot", "--network", "host", *self._volumes, *secret)
        return self("bud", *options, *arguments, "--file", dockerfile, "--tag", tag, context, fails=fails)

    def run(self, image: str, *command: str) -> str:
        container = self("from", image).split()[-1]
        return self("run", "--isolation", "chroot", container, "--", *command)


@pytest.fixture(scope="module")
def builder(require_commands: Callable[..., None]) -> Iterator[Builder]:
    require_commands("buildah", "debootstrap")
    # Not pytest's folder, which outlives the test: an image takes gigabytes.
    with tempfile.TemporaryDirectory(prefix="image-") as scratch:
        made = Builder(Path(scratch))
        root, context = made.folder / "rootfs", made.folder / "context"
        packages = "python3,python3-venv,ca-certificates,sudo,wget"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)],
            check=True,
            capture_output=True,
        )
        shutil.copy(f"/{CERTIFICATES}", root / CERTIFICATES)
        context.mkdir()
        subprocess.run(["tar", "-C", str(root), "-cf", str(context / "rootfs.tar"), "."], check=True)
        (context / "Dockerfile").write_text(STAND_IN)
        made.build(context / "Dockerfile", context, "localhost/ray")
        yield made
        made("rm", "--all")
        made("rmi", "--all", "--force")


def test_the_image_holds_kdecs_and_exactly_what_is_locked(builder: Builder) -> None:
    dockerfile = ROOT / "cluster" / "ray" / "Dockerfile"
    arguments = ("--build-arg", "BASE=localhost/ray", "--build-arg", "VARIANT=cpu")
    builder.build(dockerfile, ROOT, "localhost/kdecs", *arguments)

    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    frozen = builder.run("localhost/kdecs", "python", "-m", "pip", "list", "--format=freeze")
    installed = {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", frozen, re.M)}
    for name in ("numpy", "pyarrow", "transformers", "deepspeed", "mlflow", "pydantic", "ray"):
        assert installed[name] == pinned[name], name
    assert installed["torch"].partition("+")[0] == pinned["torch"]
    # Ray's own extras (dashboard, jobs) still have what they need.
    assert "No broken requirements found" in builder.run("localhost/kdecs", "python", "-m", "pip", "check")

    assert f"version {RAY}" in builder.run("localhost/kdecs", "ray", "--version")
    assert "llama-7b" in builder.run("localhost/kdecs", "kdecs", "configs")
    files = builder.run("localhost/kdecs", "bash", "-c", "ls -A . && ! test -s /etc/pip.conf && id -un")
    assert files.split()[-1] == "ray"
    assert not {".venv", ".git", "tests", "runs", "data"} & set(files.split())

    # The last step refuses a PyTorch without CUDA in an image for GPUs, if it is one.
    if "+cpu" in installed["torch"]:
        arguments = ("--build-arg", "BASE=localhost/ray", "--build-arg", "VARIANT=gpu")
        refused = builder.build(dockerfile, ROOT, "localhost/gpu", *arguments, fails=True)
        assert "this PyTorch has no CUDA: build with VARIANT=cpu" in refused
