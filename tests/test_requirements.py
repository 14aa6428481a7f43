"""The lock, the pins and pyproject.toml say the same: a change of one without `make lock` is caught here."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

LOCKED_EXTRAS = ("onnx", "onnx-export", "teacher", "sweep", "serve", "dev", "mlflow-server")


def pins(name: str) -> dict[str, str]:
    """Package -> version, of the lines that pin one."""
    lines = (ROOT / name).read_text().splitlines()
    found = [re.fullmatch(r"([\w.-]+)==(\S+)( ;[^\\]+)?( \\)?", line) for line in lines if line[:1].isalnum()]
    assert all(found), f"{name} holds a line that pins nothing"
    return {canonicalize_name(line[1]): line[2] for line in found if line}


def test_every_locked_version_is_the_pinned_one() -> None:
    pinned, locked = pins("constraints.txt"), pins("requirements.lock")
    assert locked.items() <= pinned.items()


@pytest.mark.parametrize("name", ["requirements.lock", "torch.lock"])
def test_every_locked_file_has_its_hash(name: str) -> None:
    blocks = re.split(r"\n(?=\w)", (ROOT / name).read_text())[1:]
    assert {canonicalize_name(block.split("==")[0]) for block in blocks} == set(pins(name))
    assert all("    --hash=sha256:" in block for block in blocks)


def test_torch_is_locked_in_its_usual_and_its_cpu_build() -> None:
    locked = re.findall(r"(?m)^torch==(\S+)", (ROOT / "torch.lock").read_text())
    pinned = pins("constraints.txt")["torch"]
    assert locked == [f"{pinned}+cpu", pinned], "run `make lock-torch`"
    assert not pins("torch.lock").keys() & pins("requirements.lock").keys()


def test_what_setup_installs_is_locked_and_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in LOCKED_EXTRAS for line in extras[name])]
    pinned, locked = pins("constraints.txt"), pins("requirements.lock")
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in locked or name == "torch", f"{name}: run `make lock`"
        assert requirement.specifier.contains(pinned[name]), (
            f"{requirement}: constraints.txt has {pinned[name]}"
        )


def test_what_builds_kdecs_is_pinned_and_no_build_fetches_anything() -> None:
    [builder] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert builder == f"setuptools=={pins('requirements.lock')['setuptools']}"
    installs = re.findall(r"(?m)^ *install (.*)$", (ROOT / "launch" / "set_up.sh").read_text())
    unchecked = [line for line in installs if "--require-hashes" not in line]
    assert len(installs) == 5
    assert [line.split()[-1] for line in unchecked] == ['torch)"', "."], (
        "the index of the user's choice, kdecs"
    )
    builds = [line for line in installs if "requirements.lock" in line or "--editable" in line]
    assert len(builds) == 2 and all("--no-build-isolation" in line for line in builds)
    assert "pip install" not in (ROOT / "Makefile").read_text()


def test_workflows_name_actions_by_commit() -> None:
    for path in (ROOT / ".github" / "workflows").iterdir():
        uses = re.findall(r"uses: *(\S+)", path.read_text())
        assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name) for name in uses), path
