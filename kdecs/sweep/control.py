"""What people ask of a sweep while it runs: trials that stop or are dropped, settings that are added.

SWEEP/control.json   {"trials": {trial id: "stop" or "drop"}, "added": [{dotted key: value}]}

`kdecs sweep stop|resume|drop|add` (kdecs.sweep.commands) change the file in one step, under a lock. Everybody else only
reads it: the driver every second, each trial's process twice a second, the Ray process before it begins a trial. So it
does not matter whether a driver runs, or when one is killed: the file holds until the next command changes it.

A trial that is stopped saves its state, ends, and does not begin again until it is resumed. A trial that is dropped
ends the same way and is left out of the comparison, even if it is complete. An added setting is a point of the space
without its seed; it is trained with every seed.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kdecs.artifact import MANIFEST_NAME, file_lock, read_record, write_text
from kdecs.config import CONFIG_NAME
from kdecs.errors import ArtifactError

CONTROL_NAME = "control.json"
_LOCK_NAME = ".control-lock"

Wanted = Literal["stop", "drop"]


class Control(BaseModel):
    """What `control.json` holds, see the top of this module. Without the file, nothing is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: dict[str, Wanted] = {}
    added: tuple[dict[str, Any], ...] = ()

    def wanted(self, trial: str) -> Wanted | None:
        """What is asked of a trial, by its id."""
        return self.trials.get(trial)

    def write(self, sweep: Path) -> None:
        """Replace the file. Hold `control_lock`."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
        write_text(sweep / CONTROL_NAME, text + "\n")


def read_control(sweep: Path) -> Control:
    """What is asked of a sweep now. Raises ArtifactError for a damaged file."""
    path = sweep / CONTROL_NAME
    try:
        status = path.stat()
    except FileNotFoundError:
        return Control()
    return _control_at(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _control_at(path: Path, inode: int, size: int, mtime_ns: int) -> Control:
    """The file's content, parsed once per state of it: trials ask twice a second."""
    del inode, size, mtime_ns
    return read_record(Control, path, "correct it, or remove it to ask nothing of this sweep")


def wanted_of(trial: Path) -> Wanted | None:
    """What is asked of the trial in this directory."""
    try:
        return read_control(trial.parent.parent).wanted(trial.name)
    except (ArtifactError, OSError):
        # The driver says what is wrong with the file; a trial that trains should not fail because of it.
        return None


@contextlib.contextmanager
def control_lock(sweep: Path) -> Iterator[None]:
    """Hold the right to change what is asked of a sweep, or to complete it as it is."""
    with file_lock(sweep / _LOCK_NAME):
        yield


@contextlib.contextmanager
def changing_control(sweep: Path) -> Iterator[Control]:
    """What is asked of an unfinished sweep, while nobody else can change or complete it.

    Raises ArtifactError if no sweep has begun there, or if it is complete.
    """
    if not (sweep / CONFIG_NAME).is_file():
        raise ArtifactError(
            f"{sweep}: no sweep has begun here (no {CONFIG_NAME}); expected the output directory of a sweep"
        )
    if not os.access(sweep, os.W_OK):
        raise ArtifactError(f"{sweep}: you may not write to this sweep; ask its owner")
    with control_lock(sweep):
        if (sweep / MANIFEST_NAME).is_file():
            raise ArtifactError(
                f"{sweep}: this sweep is complete; to change it, remove its {MANIFEST_NAME}, and start the sweep "
                "again afterwards"
            )
        yield read_control(sweep)
