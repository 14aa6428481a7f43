"""What a worker notes of a shard that it finished, `.work/shard-00000.json`: a resume trusts no other shard.

A record holds the shard's size, sha256 and rows, the plan that it is of, the kind of device that scored it, how far
its labels agree with gold, and a checksum of itself: a flipped digit makes it no record, and the shard is labelled
again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdecs.artifact import sha256_of_file, write_json

WORK_DIRECTORY = ".work"


class Agreement(BaseModel):
    """Fold1 pairs by gold (cause or not) and by what the labels say: counts, so that shards add up."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    true_positive: int = Field(default=0, ge=0)
    false_positive: int = Field(default=0, ge=0)
    false_negative: int = Field(default=0, ge=0)
    true_negative: int = Field(default=0, ge=0)

    def __add__(self, other: "Agreement") -> "Agreement":
        names = type(self).model_fields
        return Agreement(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def num_pairs(self) -> int:
        """All pairs counted."""
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative


class ShardRecord(BaseModel):
    """The facts of one finished shard; `agreement` by split."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)
    plan: str = Field(description="sha256 of the plan's entries: a shard of another plan holds other pairs")
    device: str
    agreement: dict[str, Agreement] = Field(default_factory=dict)


def record_path(shard: Path) -> Path:
    """Where the record of a finished shard stands."""
    return shard.parent / WORK_DIRECTORY / f"{shard.stem}.json"


def write_record(shard: Path, record: ShardRecord) -> None:
    """Note a finished shard, atomically and durably."""
    write_checked(record_path(shard), record.model_dump(mode="json"))


def read_record(shard: Path) -> ShardRecord | None:
    """The record of a shard, or None where there is none that can be read and agrees with its own checksum."""
    values = read_checked(record_path(shard))
    try:
        return ShardRecord.model_validate(values)
    except ValidationError:
        return None


def write_checked(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON object by one with a checksum of itself, atomically and durably."""
    write_json(path, values | {"checksum": _checksum(values)})


def read_checked(path: Path) -> dict[str, Any] | None:
    """What `write_checked` wrote; None where the file is missing or is not that."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(values, dict):
        return None
    checksum = values.pop("checksum", None)
    return values if checksum == _checksum(values) else None


def is_as_recorded(shard: Path, record: ShardRecord) -> bool:
    """Whether the shard's bytes are those that its worker wrote (reads the file)."""
    return has_recorded_size(shard, record) and sha256_of_file(shard) == record.sha256


def has_recorded_size(shard: Path, record: ShardRecord) -> bool:
    """Whether the shard is there with as many bytes as its worker wrote (reads nothing)."""
    return shard.is_file() and shard.stat().st_size == record.bytes


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
