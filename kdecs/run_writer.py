"""One run record made true in MLflow, step by step: what is there is compared with the record, the rest is sent.

Told of an MLflow client by kdecs.tracking, which knows what to do where a step fails.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdecs.run_record import RunRecord, environment_tags

PARENT_TAG = "mlflow.parentRunId"
_STATE_TAG = "kdecs.state"
_DESCRIBED_TAG = "kdecs.described"  # digest of the parameters and artifacts that were sent
_CHANGED_TAG = "kdecs.changed."  # of a parameter: MLflow keeps the first value for good
_SAMPLES_TAG = "kdecs.system_samples"
_MAX_METRICS_A_BATCH = 900  # MLflow takes 1000 metrics a call
_MAX_PARAMS_A_BATCH = 90
_MAX_PARAM, _MAX_TAG = 6000, 5000  # characters of a value

Identity = tuple[tuple[str, str], ...]


@dataclass
class _Known:
    """A run as MLflow has it."""

    run_id: str
    epoch: float
    status: str
    ended: int | None = None
    num_samples: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    figures: set[tuple[Path, int]] = field(default_factory=set)


class RunWriter:
    """Writes records to one experiment; `entities` is the module `mlflow.entities`."""

    def __init__(self, client: Any, experiment: str, entities: Any) -> None:
        self._client, self._experiment, self._entities = client, experiment, entities
        self._known: dict[Identity, _Known] = {}

    def run_id(self, identity: Mapping[str, str]) -> str | None:
        """The id of a run that this process has seen."""
        known = self._known.get(identity_key(identity))
        return known.run_id if known else None

    def open(self, record: RunRecord, *, again: bool = False) -> None:
        """Find the record's run or make it. `again`: look once more for doubles of a run that is known.

        A request to make a run is repeated where its answer was lost, so there may be two: the others are deleted.
        """
        key = identity_key(record.identity)
        known = self._known.get(key)
        if known is None:
            known = self._find(record)
        elif again:
            self._find(record, keep=known.run_id)
        if known is None:
            made = self._create(record)
            known = self._find(record, keep=made) or _Known(made, -math.inf, "RUNNING")
        self._known[key] = known

    def steps(self, record: RunRecord) -> list[Callable[[], None]]:
        """What is to be done for a record whose run is open, in order; a step does not need those before it."""
        known = self._known[identity_key(record.identity)]
        steps = (self._tags, self._describe, self._points, self._samples, self._figures, self._end)
        return [lambda step=step: step(known, record) for step in steps]  # type: ignore[misc]

    def log_final(self, run_id: str, record: RunRecord) -> None:
        """Log scores without an epoch, and files, under the time at which the run ended; a repeat adds nothing."""
        stamp = round(1000 * (record.finished or time.time()))
        there = self._client.get_run(run_id).data.metrics
        metrics = [
            self._entities.Metric(key, value, stamp, 0)
            for key, value in record.scores.items()
            if there.get(key) != value
        ]
        if metrics:
            self._client.log_batch(run_id, metrics=metrics)
        for path in record.results:
            self._client.log_artifact(run_id, str(path))

    def _find(self, record: RunRecord, *, keep: str | None = None) -> _Known | None:
        """The run of a record, of several the one to keep, else the one that holds most; the others are deleted."""
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in record.identity.items())
        runs = self._client.search_runs([self._experiment], condition)
        runs = sorted(runs, key=lambda run: (run.info.run_id != keep, -_epoch(run), run.info.run_id))
        for double in runs[1:]:
            self._client.delete_run(double.info.run_id)
        if not runs:
            return None
        data, info = runs[0].data, runs[0].info
        return _Known(
            info.run_id,
            _epoch(runs[0]),
            info.status,
            info.end_time,
            int(data.tags.get(_SAMPLES_TAG, "0")),
            dict(data.tags),
            dict(data.params),
        )

    def _create(self, record: RunRecord) -> str:
        run = self._client.create_run(
            self._experiment,
            start_time=round(1000 * (record.started or time.time())),
            tags={**environment_tags(), **_tags_of(record), **record.identity},
            run_name=record.name,
        )
        return str(run.info.run_id)

    def _tags(self, known: _Known, record: RunRecord) -> None:
        for key, value in _tags_of(record).items():
            self._set_tag(known, key, value)

    def _describe(self, known: _Known, record: RunRecord) -> None:
        """Parameters and artifacts; both again where they changed, as far as MLflow lets them."""
        params = {key: _cut(str(value), _MAX_PARAM) for key, value in record.params.items()}
        artifacts = [path for path in record.artifacts if path.is_file()]
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
        for path in artifacts:
            digest.update(path.read_bytes())
        if known.tags.get(_DESCRIBED_TAG) == digest.hexdigest()[:16]:
            return
        new = [(key, value) for key, value in params.items() if key not in known.params]
        for first in range(0, len(new), _MAX_PARAMS_A_BATCH):
            batch = new[first : first + _MAX_PARAMS_A_BATCH]
            self._client.log_batch(known.run_id, params=[self._entities.Param(*pair) for pair in batch])
            known.params.update(batch)
        for key, value in params.items():
            if known.params[key] != value or f"{_CHANGED_TAG}{key}" in known.tags:
                self._set_tag(known, f"{_CHANGED_TAG}{key}", value)
        for path in artifacts:
            self._client.log_artifact(known.run_id, str(path))
        self._set_tag(known, _DESCRIBED_TAG, digest.hexdigest()[:16])

    def _points(self, known: _Known, record: RunRecord) -> None:
        for point in record.points:
            epoch = float(point["epoch"])
            if epoch <= known.epoch:
                continue
            stamp = round(1000 * point["time"])
            values = {key: point[key] for key in point if key not in ("time", "epoch", "step")}
            metrics = [
                self._entities.Metric(key, float(value), stamp, round(epoch))
                for key, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ][:_MAX_METRICS_A_BATCH]
            # `epoch` goes with the rest in one transaction: it says that they are there
            metrics.append(self._entities.Metric("epoch", epoch, stamp, round(epoch)))
            self._client.log_batch(known.run_id, metrics=metrics)
            known.epoch = epoch

    def _samples(self, known: _Known, record: RunRecord) -> None:
        """Samples of the machine; one delivered twice, by a driver that died in between, is the same to MLflow."""
        samples = record.system
        while known.num_samples < len(samples):
            batch = 0
            metrics: list[Any] = []
            for number in range(known.num_samples, len(samples)):
                sample = samples[number]
                if len(metrics) + len(sample) > _MAX_METRICS_A_BATCH:
                    break
                stamp = round(1000 * sample["time"])
                metrics += [
                    self._entities.Metric(key, float(value), stamp, number)
                    for key, value in sample.items()
                    if key != "time"
                ]
                batch += 1
            self._client.log_batch(known.run_id, metrics=metrics)
            known.num_samples += batch
            self._set_tag(known, _SAMPLES_TAG, str(known.num_samples))

    def _figures(self, known: _Known, record: RunRecord) -> None:
        for path in record.figures:
            if (stamp := (path, path.stat().st_mtime_ns)) not in known.figures:
                self._client.log_artifact(known.run_id, str(path), "report")
                known.figures.add(stamp)

    def _end(self, known: _Known, record: RunRecord) -> None:
        """Status, and the time of the end: a pruned trial that went on ends a second time with the same status."""
        ended = round(1000 * record.finished) if record.finished else None
        if record.status == "RUNNING":
            if known.status != "RUNNING":
                self._client.update_run(known.run_id, status="RUNNING")
        elif record.status != known.status or (ended is not None and ended != known.ended):
            ended = ended or round(1000 * time.time())
            self._client.set_terminated(known.run_id, record.status, end_time=ended)
            known.ended = ended
        known.status = record.status

    def _set_tag(self, known: _Known, key: str, value: str) -> None:
        value = _cut(value, _MAX_TAG)
        if known.tags.get(key) != value:
            self._client.set_tag(known.run_id, key, value)
            known.tags[key] = value


def identity_key(identity: Mapping[str, str]) -> Identity:
    """A record's identity as the key of a dictionary."""
    return tuple(sorted(identity.items()))


def _tags_of(record: RunRecord) -> dict[str, str]:
    tags = dict(record.tags)
    if record.parent:
        tags[PARENT_TAG] = record.parent
    if record.state:
        tags[_STATE_TAG] = record.state
    return {key: _cut(value, _MAX_TAG) for key, value in tags.items()}


def _epoch(run: Any) -> float:
    return float(run.data.metrics.get("epoch", -math.inf))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
