"""Register selected students in MLflow: one version per student, the aliases champion and challenger, a model card."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from kdecs import __version__
from kdecs.tracking.mlflow import Tracker, import_mlflow
from kdecs.tracking.record import RunRecord
from kdecs.tracking.run import MODEL_TAG

_URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_EXAMPLE_UTTERANCES = (
    {"speaker": "A", "utterance": "I got the job!"},
    {"speaker": "B", "utterance": "That is wonderful news."},
)


def register_student(
    tracker: Tracker,
    record: RunRecord,
    directory: Path,
    *,
    score: float,
    corpus_checksum: str,
    metric: str,
    card: str,
    lineage: Mapping[str, str] | None = None,
    reads_emotions: bool = False,
) -> str | None:
    """Log a student to its run as a pyfunc model, register it and give it its alias. Returns version and alias.

    The alias is `champion` if there is no champion yet or the student beats it on the same validation corpus, otherwise
    `challenger`. Returns None if MLflow does not answer. A student is registered once. `card` (Markdown) becomes the
    version's description, and `lineage`, which says where the student comes from, its tags; the record's `scores` and
    `results` go to its run. A student that `reads_emotions` gets an example whose utterances have them.
    """

    def register() -> str:
        name, client = tracker.config.registered_model, tracker.client
        run_id = tracker.ensure(record)
        # By its run: a registration that was interrupted finds its version and adds what it lacks.
        versions = client.search_model_versions(f"name = '{name}'")
        version = next((found.version for found in versions if found.run_id == run_id), None)
        version = version or _log_student(tracker, record, run_id, directory, reads_emotions)
        tracker.log_final(record)
        # Before the alias: whoever becomes champion is compared with the next student by these tags.
        # `repr` keeps every digit of the score, which is read back for the comparison.
        comparable = {"kdecs.valid": corpus_checksum, "kdecs.metric": metric}
        for key, value in {**(lineage or {}), **comparable, "kdecs.score": repr(score)}.items():
            client.set_model_version_tag(name, version, key, value)
        client.update_model_version(name, version, description=card)
        alias = "champion" if _beats_champion(tracker, version, comparable, score) else "challenger"
        client.set_registered_model_alias(name, alias, version)
        aliases = client.get_registered_model(name).aliases
        if alias == "champion" and str(aliases.get("challenger")) == str(version):
            # It challenged a champion that is gone.
            client.delete_registered_model_alias(name, "challenger")
        return f"{name} version {version}, alias {alias}"

    return tracker.attempt(register)


def run_tags(tracker: Tracker, run_id: str) -> dict[str, str] | None:
    """The tags of a run, None if there is no such run. Raises TrackingError if MLflow cannot be asked."""
    from mlflow.exceptions import MlflowException

    def read() -> dict[str, str] | None:
        try:
            return dict(tracker.client.get_run(run_id).data.tags)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    return tracker.ask(read)


def find_runs(tracker: Tracker, tags: Mapping[str, str]) -> list[dict[str, str]]:
    """The tags of all runs that have these tags, newest first. Raises TrackingError if MLflow cannot be asked."""

    def search() -> list[dict[str, str]]:
        experiments = [found.experiment_id for found in tracker.client.search_experiments()]
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found: list[dict[str, str]] = []
        page: str | None = ""
        while page is not None:
            runs = tracker.client.search_runs(experiments, condition, page_token=page or None)
            found += [dict(run.data.tags) for run in runs]
            page = runs.token or None
        return found

    return tracker.ask(search)


def _log_student(
    tracker: Tracker, record: RunRecord, run_id: str, directory: Path, reads_emotions: bool
) -> str:
    mlflow = import_mlflow()
    import pandas

    # MLflow predicts the example when it logs the model.
    emotion = {"emotion": "happiness"} if reads_emotions else {}
    dialogue = {"id": "example", "utterances": [{**item, **emotion} for item in _EXAMPLE_UTTERANCES]}
    example = pandas.DataFrame({"dialogue": [json.dumps(dialogue)]})
    # The run has the kept checkpoint as a LoggedModel, with its metrics. It gets the files, rather than a second one.
    tags = tracker.client.get_run(run_id).data.tags
    model_id = next((tags[key] for key in tags if key.startswith(MODEL_TAG)), None)
    # The LoggedModel is an output of its run already. With the run active, MLflow would add it again, and fail.
    with mlflow_at(tracker.uri), nullcontext() if model_id else mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="student",
            loader_module="kdecs.student.pyfunc",
            data_path=str(directory),
            signature=mlflow.models.infer_signature(example, ["[]"], params={"max_distance": -1}),
            input_example=example,
            pip_requirements=[f"kdecs=={__version__}"],  # otherwise MLflow loads the model to guess them
            registered_model_name=tracker.config.registered_model,
            model_id=model_id,
        )
    if not model_id:
        # `start_run` has opened the run again, so it must be ended again.
        ended = record.finished or time.time()
        tracker.client.set_terminated(run_id, record.status, end_time=round(1000 * ended))
    return str(logged.registered_model_version)


@contextmanager
def mlflow_at(uri: str) -> Iterator[None]:
    """Point MLflow's fluent functions at a URI, and back to where they were afterwards.

    Setting MLflow's URIs sets environment variables too. If they stayed, the next sweep in this process, and every
    child process, would take them for the user's.
    """
    mlflow = import_mlflow()
    before = {name: os.environ.get(name) for name in _URI_VARIABLES}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        for (name, value), reset in zip(
            before.items(), (mlflow.set_tracking_uri, mlflow.set_registry_uri), strict=True
        ):
            reset(value)
            if value is None:
                os.environ.pop(name, None)


def _beats_champion(tracker: Tracker, version: str, comparable: Mapping[str, str], score: float) -> bool:
    """Whether a version becomes the champion. A champion of another corpus or metric is not comparable, so it stays."""
    name = tracker.config.registered_model
    current = tracker.client.get_registered_model(name).aliases.get("champion")
    if current is None or str(current) == str(version):
        return True
    champion = tracker.client.get_model_version(name, current).tags
    is_comparable = all(champion.get(key) == value for key, value in comparable.items())
    return is_comparable and score > float(champion["kdecs.score"])
