"""One run in MLflow: what it holds, and the requests that make it agree with its record (kdecs.tracking.mlflow).

Besides parameters, metrics and files, a run in MLflow's lists has

    datasets   the corpora that it read, each with the digest of its content
    models     the checkpoint that was kept, as a LoggedModel. Its metrics are those of its epoch, linked to the
               validation corpus; it holds no weights, and its tag `kdecs.directory` says where they are

Each request costs milliseconds on SQLite and more over a network, so what the run holds is remembered here.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdecs.tracking.record import DatasetRecord, ModelRecord, RunRecord

PARENT_TAG = "mlflow.parentRunId"
SAMPLES_TAG = "kdecs.system_samples"
CHECKSUM_TAG = "kdecs.checksum"  # of a LoggedModel: stands for the content of its directory
MODEL_TAG = "kdecs.model."  # of a run, with that checksum: the LoggedModel's id
_STATE_TAG = "kdecs.state"
_DESCRIBED_TAG = "kdecs.described"  # digest of the parameters, datasets and artifacts that were sent
_CHANGED_TAG = "kdecs.changed."  # of a parameter: MLflow keeps its first value forever
_MAX_METRICS_PER_CALL = 900  # MLflow takes 1000
_MAX_PARAMS_PER_CALL = 90  # MLflow takes 100
_MAX_TAGS_PER_CALL = 90  # MLflow takes 100
_MAX_PARAM, _MAX_TAG = 6000, 5000  # characters of a value
_MODEL_NAME = str.maketrans(
    {".": "·", **dict.fromkeys("/:%'\"", "-")}
)  # what MLflow does not take in a model's name


@dataclass
class MlflowRun:
    """A run in MLflow. `tags`, `params` and `metrics` are what it holds as far as this process knows."""

    client: Any
    entities: Any
    id: str
    experiment: str
    parent: str | None = None
    epoch: float = -math.inf
    status: str = "RUNNING"
    ended: int | None = None
    num_samples: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    figures: set[tuple[Path, int]] = field(default_factory=set)  # path and time of each file that was sent

    @classmethod
    def of(cls, client: Any, entities: Any, run: Any) -> "MlflowRun":
        """The run that a search of MLflow's has found."""
        return cls(
            client,
            entities,
            run.info.run_id,
            run.info.experiment_id,
            epoch=epoch_of(run),
            status=run.info.status,
            ended=run.info.end_time,
            num_samples=int(run.data.tags.get(SAMPLES_TAG, "0")),
            tags=dict(run.data.tags),
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
        )

    def set_tags(self, record: RunRecord) -> None:
        """Set the tags that differ."""
        self._set_tags(tags_of(record, self.parent))

    def describe(self, record: RunRecord) -> None:
        """Send parameters, datasets and artifacts, and again if they changed, as far as MLflow allows that."""
        params = {key: _cut(str(value), _MAX_PARAM) for key, value in record.params.items()}
        artifacts = [path for path in record.artifacts if path.is_file()]
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
        digest.update(json.dumps([asdict(dataset) for dataset in record.datasets]).encode())
        for path in artifacts:
            # By content: a resume writes the same files again, and MLflow need not get them again.
            digest.update(path.read_bytes())
        if self.tags.get(_DESCRIBED_TAG) == digest.hexdigest()[:16]:
            return
        # A call that changes a parameter is refused as a whole, so only new ones are sent; tags tell what changed.
        new = [(key, value) for key, value in params.items() if key not in self.params]
        for first in range(0, len(new), _MAX_PARAMS_PER_CALL):
            batch = new[first : first + _MAX_PARAMS_PER_CALL]
            self.client.log_batch(self.id, params=[self.entities.Param(*pair) for pair in batch])
            self.params.update(batch)
        changed = {
            f"{_CHANGED_TAG}{key}": value
            for key, value in params.items()
            if self.params[key] != value or f"{_CHANGED_TAG}{key}" in self.tags
        }
        if record.datasets:
            # MLflow ignores those that the run has already.
            self.client.log_inputs(self.id, [self._dataset_input(dataset) for dataset in record.datasets])
        for path in artifacts:
            self.client.log_artifact(self.id, str(path))
        # Last, so that a kill before it has everything sent again, which changes nothing.
        self._set_tags(changed | {_DESCRIBED_TAG: digest.hexdigest()[:16]})

    def add_points(self, record: RunRecord) -> None:
        """Send the epochs after the last one that MLflow has."""
        for point in record.points:
            epoch = float(point["epoch"])
            if epoch <= self.epoch:  # MLflow would keep a second value of the same step
                continue
            metrics = self._metrics_of(point)
            # `epoch` goes in the same transaction: if it is there, the others are.
            metrics.append(self.entities.Metric("epoch", epoch, metrics_stamp(point), round(epoch)))
            self.client.log_batch(self.id, metrics=metrics)
            self.epoch = epoch

    def add_samples(self, record: RunRecord) -> None:
        """Send the samples of the machine. MLflow keeps one of a sample that a killed driver had sent already."""
        samples = record.system
        while self.num_samples < len(samples):
            metrics: list[Any] = []
            num_sent = self.num_samples
            while num_sent < len(samples):
                sample = samples[num_sent]
                if len(metrics) + len(sample) > _MAX_METRICS_PER_CALL:
                    break
                stamp = metrics_stamp(sample)
                metrics += [
                    self.entities.Metric(key, float(value), stamp, num_sent)
                    for key, value in sample.items()
                    if key != "time"
                ]
                num_sent += 1
            # MLflow writes the tag after the metrics: a kill in between has samples sent twice, never left out.
            tag = self.entities.RunTag(SAMPLES_TAG, str(num_sent))
            self.client.log_batch(self.id, metrics=metrics, tags=[tag])
            self.tags[SAMPLES_TAG] = str(num_sent)
            self.num_samples = num_sent

    def add_scores(self, record: RunRecord) -> None:
        """Log the scores that have no epoch and differ, under the time at which the run ended."""
        stamp = round(1000 * (record.finished or time.time()))
        new = {key: value for key, value in record.scores.items() if self.metrics.get(key) != value}
        if new:
            metrics = [self.entities.Metric(key, value, stamp, 0) for key, value in new.items()]
            self.client.log_batch(self.id, metrics=metrics[:_MAX_METRICS_PER_CALL])
            self.metrics.update(new)

    def add_model(self, record: RunRecord) -> None:
        """Make the kept checkpoint a LoggedModel with the metrics of its epoch, in place of an earlier one."""
        model = record.model
        if model is None or (tag := f"{MODEL_TAG}{model.checksum}") in self.tags:
            return
        replaced = {key: value for key, value in self.tags.items() if key.startswith(MODEL_TAG)}
        for key, model_id in replaced.items():
            # Its files are gone: the training went on, or was repeated.
            self.client.delete_logged_model(model_id)
            self.client.delete_tag(self.id, key)
            del self.tags[key]
        # A kill after the creation has left one that the run does not know.
        of_run = self.client.search_logged_models(
            [self.experiment], filter_string=f"source_run_id = '{self.id}'"
        )
        found = next((made for made in of_run if made.tags.get(CHECKSUM_TAG) == model.checksum), None)
        made = found or self.client.create_logged_model(
            self.experiment,
            name=model.name.translate(_MODEL_NAME),
            source_run_id=self.id,
            tags=self._model_tags(record, model),
            params={key: _cut(str(value), _MAX_PARAM) for key, value in record.params.items()},
            model_type=model.kind,
        )
        point = next((point for point in record.points if point["epoch"] == model.epoch), None)
        if point is not None:
            # MLflow knows these metrics of the run already; what it adds are model and dataset.
            self.client.log_batch(self.id, metrics=self._metrics_of(point, model, made.model_id))
        self.client.finalize_logged_model(made.model_id, "READY")
        outputs = self.client.get_run(self.id).outputs if found else None
        if made.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self.client.log_outputs(
                self.id, [self.entities.LoggedModelOutput(made.model_id, step=round(model.epoch))]
            )
        self._set_tags({tag: made.model_id})

    def add_figures(self, record: RunRecord) -> None:
        """Send the figures of the report that are new or were written again."""
        for path in record.figures:
            if (stamp := (path, path.stat().st_mtime_ns)) not in self.figures:
                self.client.log_artifact(self.id, str(path), "report")
                self.figures.add(stamp)

    def end(self, record: RunRecord) -> None:
        """Set status and end. A pruned trial that went on ends a second time, with the same status."""
        ended = round(1000 * record.finished) if record.finished else None
        if record.status == "RUNNING":
            if self.status != "RUNNING":
                self.client.update_run(self.id, status="RUNNING")
        elif record.status != self.status or (ended is not None and ended != self.ended):
            ended = ended or round(1000 * time.time())
            self.client.set_terminated(self.id, record.status, end_time=ended)
            self.ended = ended
        self.status = record.status

    def log_results(self, record: RunRecord) -> None:
        """Log the scores and files of a record whose run has been selected. A repeat adds no score."""
        self.add_scores(record)
        for path in record.results:
            self.client.log_artifact(self.id, str(path))

    def _metrics_of(
        self, point: dict[str, Any], model: ModelRecord | None = None, model_id: str | None = None
    ) -> list[Any]:
        """The metrics of an epoch, linked to a model and the corpus that it was validated on if they are given."""
        dataset = model.dataset if model else None
        values = {key: point[key] for key in point if key not in ("time", "epoch", "step")}
        return [
            self.entities.Metric(
                key,
                float(value),
                metrics_stamp(point),
                round(float(point["epoch"])),
                model_id=model_id,
                dataset_name=dataset.name if dataset else None,
                dataset_digest=dataset.digest if dataset else None,
            )
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ][:_MAX_METRICS_PER_CALL]

    def _model_tags(self, record: RunRecord, model: ModelRecord) -> dict[str, str]:
        kept = {key: value for key, value in record.tags.items() if not key.startswith("mlflow.")}
        tags = {
            **kept,
            CHECKSUM_TAG: model.checksum,
            "kdecs.directory": str(model.directory),
            # Tells the UI that there are no weights to show.
            "mlflow.model.isExternal": "true",
        }
        return {key: _cut(value, _MAX_TAG) for key, value in tags.items()}

    def _dataset_input(self, dataset: DatasetRecord) -> Any:
        entity = self.entities.Dataset(
            name=dataset.name,
            digest=dataset.digest,
            source_type="local",
            source=json.dumps({"uri": dataset.path}),
            profile=json.dumps(dataset.profile),
        )
        tags = {"mlflow.data.context": dataset.split, **dataset.profile}
        return self.entities.DatasetInput(
            entity, tags=[self.entities.InputTag(key, str(value)) for key, value in tags.items()]
        )

    def _set_tags(self, tags: dict[str, str]) -> None:
        """Set those of the tags that differ, in one request."""
        cut = {key: _cut(value, _MAX_TAG) for key, value in tags.items()}
        new = [(key, value) for key, value in cut.items() if self.tags.get(key) != value]
        for first in range(0, len(new), _MAX_TAGS_PER_CALL):
            batch = new[first : first + _MAX_TAGS_PER_CALL]
            self.client.log_batch(self.id, tags=[self.entities.RunTag(*pair) for pair in batch])
            self.tags.update(batch)


def tags_of(record: RunRecord, parent: str | None) -> dict[str, str]:
    """The tags of a record's run, below the run `parent`."""
    tags = dict(record.tags)
    if parent:
        tags[PARENT_TAG] = parent
    if record.state:
        tags[_STATE_TAG] = record.state
    return {key: _cut(value, _MAX_TAG) for key, value in tags.items()}


def epoch_of(run: Any) -> float:
    """How far MLflow is with a run."""
    return float(run.data.metrics.get("epoch", -math.inf))


def metrics_stamp(point: dict[str, Any]) -> int:
    """The time of a point as MLflow counts it, in milliseconds."""
    return round(1000 * point["time"])


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
