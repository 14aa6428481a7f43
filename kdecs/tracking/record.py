"""What a run looks like on disk, for tracking: its record, its metrics, its identity. No MLflow here.

    metrics.jsonl   one JSON object per epoch (of a teacher: per logged step): epoch, time (unix s) and scores
    .run-id         the random identity of an output directory

The end of the module keeps passwords out of what is shown.
"""

import contextlib
import functools
import json
import re
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, unquote_plus

from pydantic import Field, model_validator

from kdecs import __version__
from kdecs.artifact import write_text
from kdecs.config import Config
from kdecs.errors import ArtifactError

METRICS_NAME = "metrics.jsonl"
_IDENTITY_NAME = ".run-id"
_USER_INFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/@][^\n]*)@")  # sqlite:/// and file:/// have no host
_SECRET_OPTION = re.compile(
    r"([?&;](?!passfile=)(?:[\w.-]*(?:pass|pwd|secret|token|user|credential|signature|access_?key|api_?key)[\w.-]*"
    r"|uid|odbc_connect)=)([^&\s]*)",
    re.IGNORECASE,
)


class TrackingConfig(Config):
    """Where runs are tracked: an MLflow URI (by default one SQLite file for all stages) and an experiment."""

    uri: str | None = Field(
        default=None,
        description="null: MLFLOW_TRACKING_URI, else mlflow.db in the folder runs above the output",
    )
    experiment: str = "kdecs"
    registered_model: str = "kdecs-student"

    @model_validator(mode="after")
    def _no_password(self) -> "TrackingConfig":
        """The config is written beside the outputs and logged, so it must hold no secret."""
        if self.uri and self.uri != without_password(self.uri):
            raise ValueError(
                "uri holds a user or password; set the environment variable MLFLOW_TRACKING_URI instead, or leave "
                "them out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


@dataclass(frozen=True)
class DatasetRecord:
    """A corpus file as a run reads it. Equal digests mean equal pairs, on whatever machine.

    `split` says what the run used it for. `profile` holds the universe of pairs, and what the config selects of the
    file.
    """

    name: str
    digest: str
    split: str
    path: str
    profile: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRecord:
    """The checkpoint that a run has kept: its directory, the point whose metrics it has, and what validated it.

    `checksum` stands for the directory's content. `kind` is student, teacher, mrc or baseline.
    """

    name: str
    kind: str
    directory: Path
    checksum: str
    epoch: float
    dataset: DatasetRecord | None = None


@dataclass
class RunRecord:
    """One run as it is on disk. Its `identity` tags find it; `points` hold `epoch`, `time` (unix s) and metrics.

    `parent` is the identity of the run above it. `entry` is the module that was started. `system` holds samples of the
    machine: `time` and metrics named `system/…`. `artifacts` are files that describe the run from its start, and
    `datasets` what it reads. `state` says more than the status, such as `pruned`. `model` is the checkpoint that it has
    kept at its end. `scores` are metrics without an epoch, `figures` the files of its report, and `results` the files
    of its selection.
    """

    identity: dict[str, str]
    name: str
    parent: dict[str, str] | None = None
    started: float | None = None
    finished: float | None = None
    status: str = "RUNNING"
    entry: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    system: list[dict[str, float]] = field(default_factory=list)
    artifacts: list[Path] = field(default_factory=list)
    datasets: list[DatasetRecord] = field(default_factory=list)
    state: str | None = None
    model: ModelRecord | None = None
    figures: list[Path] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    results: list[Path] = field(default_factory=list)


def directory_identity(directory: Path) -> str:
    """A random id that stays with an output directory. What is trained again elsewhere is another run."""
    path = directory / _IDENTITY_NAME
    if not path.is_file():
        write_text(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()


def has_identity(directory: Path) -> bool:
    """Whether a directory has been given an id, by a stage that was tracked."""
    return (directory / _IDENTITY_NAME).is_file()


def read_points(path: Path) -> list[dict[str, Any]]:
    """The points of a `metrics.jsonl`. A last line that is still being written is left for the next read.

    Raises ArtifactError for a line that is not a point.
    """
    if not path.is_file():
        return []
    points = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            point = json.loads(line)
            float(point["epoch"]), float(point["time"])
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(
                f"{path}: line {number} is not a JSON object with epoch and time; remove it"
            ) from None
        points.append(point)
    return points


@functools.cache
def environment_tags() -> Mapping[str, str]:
    """Tags that say which code ran: the version of kdecs, and the git commit if the package lies in a checkout."""
    tags = {"kdecs.version": __version__}
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git: the version alone
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if answer.returncode == 0:
            tags["kdecs.git_commit"] = answer.stdout.strip()
    return MappingProxyType(tags)


def source_tags(entry: str) -> dict[str, str]:
    """The tags that MLflow shows as a run's source: the module that was started, and the commit that it is of."""
    tags = {"mlflow.source.name": entry, "mlflow.source.type": "LOCAL"}
    if commit := environment_tags().get("kdecs.git_commit"):
        tags["mlflow.source.git.commit"] = commit
    return tags


def without_password(uri: str) -> str:
    """A URI that may be shown, without user, password and secrets among its options.

    Passwords are often written raw, with `/`, `#`, `?` or `@` in them. So everything up to the last `@` counts as user
    and password, wherever a standard parser would let the host begin.
    """
    shown = _SECRET_OPTION.sub(r"\1…", uri)
    found = _USER_INFO.match(shown)
    return f"{found[1]}…@{shown[found.end() :]}" if found else shown


def redacted(text: str, uri: str) -> str:
    """A message about a URI that may be shown: without the secrets of this URI and of any other in the message."""
    text = text.replace(uri, without_password(uri))
    # The longest first: where one secret is a part of another, the rest of the longer one would stay in view.
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        text = text.replace(secret, "…")
    return " ".join(without_password(word) if "://" in word else word for word in text.split(" "))


def _secrets(uri: str) -> set[str]:
    """The passwords of a URI, as written and decoded. A user name is not a secret by itself."""
    found = {option[2] for option in _SECRET_OPTION.finditer(uri) if "user" not in option[1].lower()}
    if info := _USER_INFO.match(uri):
        found.add(info[2].partition(":")[2])
    decoded = {decode(secret) for secret in found for decode in (unquote, unquote_plus)}
    return {secret for secret in found | decoded if secret}
