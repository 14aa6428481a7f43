"""Teachers that a space names and that are not there yet: said so, or trained and exported by the launch scripts.

    SWEEP/build/TEACHER-train.log, TEACHER-export.log   what the scripts printed

The scripts skip what is complete and resume what is not, so the same command goes on after any stop.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from kdecs.artifact import MANIFEST_NAME
from kdecs.errors import ArtifactError, ConfigError, Stopped
from kdecs.process import StopSignal
from kdecs.sweep.config import StageCommand, SweepConfig, Teacher
from kdecs.sweep.space import missing_teachers

_SCRIPTS = Path(__file__).resolve().parents[1] / "launch"
_POLL_S = 0.5
_GRACE_S = 10.0  # after which an interrupted script is killed


def refuse_missing(config: SweepConfig) -> None:
    """Raise ArtifactError naming every teacher whose labels are missing and how to get them."""
    names = missing_teachers(config)
    first = config.teachers[names[0]]
    how = "--build trains and exports them" if _is_buildable(first) else "train and export them first"
    listed = ", ".join(f"{name} ({config.teachers[name].labels})" for name in names)
    raise ArtifactError(f"soft labels of {len(names)} teachers are not there yet: {listed}; {how}")


def build_teachers(config: SweepConfig, stop: StopSignal) -> None:
    """Train and export every missing teacher, one after the other.

    Raises ConfigError where a teacher says nothing of how, ArtifactError where a script failed, and Stopped.
    """
    for name in missing_teachers(config):
        for stage, arguments in build_commands(config, name):
            log = config.output / "build" / f"{name}-{stage}.log"
            print(f"sweep {config.name}: {stage} of teacher {name}, log: {log}", flush=True)
            _run(arguments, log, f"{stage} of teacher {name}", stop)
        if not (config.teachers[name].labels / MANIFEST_NAME).is_file():
            raise ArtifactError(
                f"{config.teachers[name].labels}: not there after the export of teacher {name}; "
                "its export must write where teachers says"
            )


def build_commands(config: SweepConfig, name: str) -> list[tuple[str, list[str]]]:
    """(stage, command) of a teacher: its training where it has one, then its export."""
    teacher = config.teachers[name]
    if not _is_buildable(teacher):
        raise ConfigError(f"teachers.{name}: its labels are missing and it has no export, which --build runs")
    if not _SCRIPTS.is_dir():
        raise ConfigError(
            f"--build runs the launch scripts of a checkout, and {_SCRIPTS} is not there: install kdecs from a "
            "checkout (pip install --editable), or train and export the teachers first"
        )
    commands = []
    launcher = [sys.executable if part == "python" else part for part in config.build_launcher]
    for stage, script in (("train", "train_teacher.py"), ("export", "export_soft_labels.py")):
        command: StageCommand | None = getattr(teacher, stage)
        if command is None:
            continue
        values = dict(command.set)
        if stage == "export":
            values = {"output": str(teacher.labels), **values}
        commands.append(
            (stage, [*launcher, str(_SCRIPTS / script), "--config", str(command.config), *_set(values)])
        )
    return commands


def _is_buildable(teacher: Teacher) -> bool:
    return teacher.export is not None


def _set(values: dict[str, Any]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={_as_yaml(value)}")]


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _run(arguments: list[str], log: Path, title: str, stop: StopSignal) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = _wait(process, stop)
    except BaseException:  # a second Ctrl-C: nothing goes on that nobody waits for
        _end(process)
        raise
    if stop.requested:
        raise Stopped(f"{title} stopped; run the same command again to go on")
    if code != 0:
        raise ArtifactError(f"{title} failed with exit code {code}: {_last_line(log)} (log: {log})")


def _wait(process: "subprocess.Popen[bytes]", stop: StopSignal) -> int:
    is_told = False
    while True:
        if stop.requested and not is_told:
            is_told = True
            os.killpg(process.pid, signal.SIGTERM)  # the deepspeed launcher does not pass it on to its ranks
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("kdecs: error: ") if lines else "it printed nothing"
