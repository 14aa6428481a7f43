"""Serve a registered student over HTTP: MLflow's scoring server behind a guard.

    MLFLOW_TRACKING_URI=… python -m kdecs.tracking.serving models:/kdecs-student@champion --port 5001

Requests and answers are those of `mlflow models serve`. The guard (kdecs.serve.guard) adds what that server lacks: only
requests to this server's own names are answered, only so many at a time, their bodies are bounded, and the work for a
client that has left stops (kdecs.student.pyfunc). A refusal is the reason in one line, not a traceback.

Without MLFLOW_TRACKING_URI the registry is that of `runs/mlflow.db`, which all stages of a checkout share.

It serves students of kdecs alone: a model that brings code of its own, or another loader, is refused.
"""

import argparse
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kdecs.errors import KdecsError, ModelError
from kdecs.process import run_entry
from kdecs.serve.guard import App, address_of, guarded, listen, own_names, run_server
from kdecs.tracking.mlflow import default_database, import_mlflow
from kdecs.tracking.registry import mlflow_at

_LOADER = "kdecs.student.pyfunc"


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", metavar="MODEL", help="an MLflow URI, such as models:/kdecs-student@champion"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5001, help="default: %(default)s")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name by which clients call this server; repeatable",
    )
    arguments = parser.parse_args()
    with listen(arguments.host, arguments.port) as listener:
        app = guarded(
            scoring_app(arguments.model),
            own_names(arguments.host, arguments.allowed_host),
            describe=lambda line: {"error_code": "BAD_REQUEST", "message": line},
        )
        print(f"{arguments.model}: {address_of(listener)}/invocations", flush=True)
        run_server(app, listener)


def scoring_app(uri: str) -> App:
    """MLflow's scoring server of a student. Raises ModelError if the URI leads to none."""
    mlflow = import_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.pyfunc import scoring_server

    # Of any other exception MLflow's server answers with a traceback.
    class Refusal(MlflowException):  # type: ignore[misc]
        """MLflow's server answers with what this says of itself."""

        def __init__(self, line: str) -> None:
            super().__init__(line, error_code=INVALID_PARAMETER_VALUE)
            self.line = line

        def serialize_as_json(self) -> str:
            return json.dumps({"error_code": self.error_code, "message": self.line})

    registry = default_database(Path.cwd() / "runs" / "sweep")
    is_named = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    # MLflow would create an empty database here, or, without a URI, one in the current directory.
    if uri.startswith(("models:", "runs:")) and not is_named and not registry.is_file():
        raise ModelError(
            f"{uri}: {registry} does not exist; set MLFLOW_TRACKING_URI to the MLflow that has it"
        )
    try:
        with nullcontext() if is_named else mlflow_at(f"sqlite:///{registry}"):
            directory = mlflow.artifacts.download_artifacts(artifact_uri=uri)
        loader = mlflow.models.Model.load(directory).flavors.get("python_function", {})
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"{uri}: MLflow finds no such model ({error}); check it and MLFLOW_TRACKING_URI"
        ) from None
    # `code` names a folder beside the model that loading would put on Python's path.
    if loader.get("loader_module") != _LOADER or loader.get("code"):
        raise ModelError(f"{uri}: not a student that kdecs has registered; serve it by `mlflow models serve`")
    model = mlflow.pyfunc.load_model(directory)

    class Refusing:
        metadata = model.metadata

        def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
            try:
                return model.predict(data, params=params)
            except KdecsError as error:
                raise Refusal(str(error)) from None

    app: App = scoring_server.init(Refusing())
    return app


if __name__ == "__main__":
    # Uvicorn and MLflow would each print lines of their own about every request and warning.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    run_entry(main)
