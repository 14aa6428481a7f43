"""A sweep whose teachers' soft labels are missing is refused, or trains and exports them first (`--build`).

    SWEEP/build/TEACHER-train.log, TEACHER-export.log   what the two stages printed

The stages skip what is complete and resume what is not, so the same command resumes after any stop.
"""

import json
import sys

from kdecs.artifact import MANIFEST_NAME
from kdecs.errors import ArtifactError, ConfigError
from kdecs.process import StopSignal, last_error, module_command, run_child
from kdecs.sweep.config import StageCommand, SweepConfig, flat_keys


def refuse_missing(config: SweepConfig, names: list[str]) -> None:
    """Raise ArtifactError that names the teachers whose labels are missing, and how to get them."""
    first = config.teachers[names[0]]
    is_buildable = first.export is not None or first.control is not None
    how = "--build makes them" if is_buildable else "train and export them first"
    listed = ", ".join(f"{name} ({config.teachers[name].labels})" for name in names)
    raise ArtifactError(f"the soft labels of {len(names)} teachers are missing: {listed}; {how}")


def build_teachers(config: SweepConfig, names: list[str], stop: StopSignal) -> None:
    """Train and export the missing teachers, one after the other.

    Raises ConfigError if a teacher has no export, ArtifactError if a stage failed, and Stopped.
    """
    # One at a time: a stage may take the whole machine, since a launcher starts a rank on each GPU.
    for name in names:
        for stage, arguments in build_commands(config, name):
            log = config.output / "build" / f"{name}-{stage}.log"
            print(f"sweep {config.name}: {stage} of teacher {name}, log: {log}", flush=True)
            title = f"{stage} of teacher {name}"
            code = run_child(arguments, stop, log=log)
            # Before the exit code, which is not 0 after a stop either: a stop is no failure.
            stop.raise_if_requested(f"{title} stopped; run the same command again to resume")
            if code != 0:
                raise ArtifactError(f"{title} failed with exit code {code}: {last_error(log)} (log: {log})")
        if not (config.teachers[name].labels / MANIFEST_NAME).is_file():
            raise ArtifactError(
                f"{config.teachers[name].labels}: missing after the export of teacher {name}; "
                f"set the output of its export to the path of teachers.{name}"
            )


def build_commands(config: SweepConfig, name: str) -> list[tuple[str, list[str]]]:
    """(stage, command) of a teacher: its training if it has one, then its export; or the making of a control.

    All read the students' corpus files unless their `set` says otherwise, because labels of another corpus would not
    cover the students' pairs.
    """
    teacher = config.teachers[name]
    if teacher.control is not None:
        return [("control", _control_command(config, name))]
    if teacher.export is None:
        raise ConfigError(
            f"teachers.{name}: its labels are missing and it names no export that --build could run; add one, or "
            "export the labels first"
        )
    commands = []
    for stage, entry in (("train", "train_teacher"), ("export", "export_soft_labels")):
        command: StageCommand | None = getattr(teacher, stage)
        if command is None:
            continue
        splits = ("train", "valid") if stage == "train" else ("train", "valid", "test")
        corpus = dict(flat_keys(config.student.get("corpus") or {}))
        values = {f"corpus.{split}": str(corpus[split]) for split in splits if corpus.get(split)}
        if stage == "export":
            values["output"] = str(teacher.labels)
        # What the user sets wins, even if it leads elsewhere: `build_teachers` says so after the export.
        values |= command.set
        arguments = [
            *module_command(config.build_launcher, f"kdecs.launch.{entry}"),
            "--config",
            str(command.config),
        ]
        for key, value in values.items():
            # --set takes a text whole, and reads JSON, which is YAML, where its key holds anything else.
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            arguments += ["--set", f"{key}={text}"]
        commands.append((stage, arguments))
    return commands


def _control_command(config: SweepConfig, name: str) -> list[str]:
    teacher = config.teachers[name]
    assert teacher.control is not None
    values = {
        "smoothing": teacher.control.smoothing,
        "wrong": teacher.control.wrong_share,
        "seed": teacher.control.seed,
        "after": dict(flat_keys(config.student)).get("candidates.after", 0),
        "output": teacher.labels,
    }
    corpus = dict(flat_keys(config.student.get("corpus") or {}))
    # Labels of test would be gold labels in a directory that a student is never trained on.
    for split in ("train", "valid"):
        found = corpus.get(split)
        files = found if isinstance(found, list | tuple) else [found] if found else []
        values |= {f"corpus {split} {number}": f"{split}={file}" for number, file in enumerate(files)}
    options = [part for key, value in values.items() for part in (f"--{key.split()[0]}", str(value))]
    return [sys.executable, "-m", "kdecs.cli", "soft-labels", "control", teacher.control.kind, *options]
