"""Serve a registered student over HTTP: MLflow's scoring server behind a guard.

    MLFLOW_TRACKING_URI=… python -m kdecs.tracking.serving models:/kdecs-student@champion --port 5001

Requests and answers are those of `mlflow models serve`. The guard adds what that server lacks:

- Only requests whose Host header names this server are answered. Without this, a web page that a colleague visits can
  make its own name point to this machine and read the answers (DNS rebinding).
- A body is read up to a limit.
- Once a client has left, or MLflow has given its request up, the work for it stops (kdecs.student.pyfunc).
- A refusal is the reason in one line, not a traceback.

It serves students of kdecs alone: a model that brings code of its own, or another loader, is refused.
"""

import argparse
import asyncio
import json
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from kdecs.errors import KdecsError, ModelError
from kdecs.process import run_entry
from kdecs.student.pyfunc import request_ended
from kdecs.tracking.mlflow import import_mlflow

_LOADER = "kdecs.student.pyfunc"
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_MAX_BODY_BYTES = 8 << 20  # a million characters in any script, escaped as JSON

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


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
    # Before the model is loaded, which takes seconds. Held from here on, so that no other server takes it meanwhile.
    try:
        listener = socket.create_server((arguments.host, arguments.port))
    except (OSError, OverflowError) as error:
        raise KdecsError(
            f"{arguments.host}:{arguments.port}: cannot listen there ({getattr(error, 'strerror', None) or error}); "
            "choose another --port or --host"
        ) from None
    with listener:
        names = [*_LOOPBACK_HOSTS, arguments.host, *arguments.allowed_host]
        app = guarded(scoring_app(arguments.model), names)
        import uvicorn

        print(f"{arguments.model}: http://{arguments.host}:{arguments.port}/invocations", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def scoring_app(uri: str) -> _App:
    """MLflow's scoring server of a student. Raises ModelError if the URI leads to none."""
    mlflow = import_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.pyfunc import scoring_server

    class Refusal(MlflowException):  # type: ignore[misc]
        """MLflow's server answers with what this says of itself."""

        def __init__(self, line: str) -> None:
            super().__init__(line, error_code=INVALID_PARAMETER_VALUE)
            self.line = line

        def serialize_as_json(self) -> str:
            return json.dumps({"error_code": self.error_code, "message": self.line})

    try:
        directory = mlflow.artifacts.download_artifacts(artifact_uri=uri)
        loader = mlflow.models.Model.load(directory).flavors.get("python_function", {})
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"{uri}: MLflow finds no such model ({error}); check it and MLFLOW_TRACKING_URI"
        ) from None
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

    app: _App = scoring_server.init(Refusing())
    return app


def guarded(app: _App, allowed_hosts: list[str]) -> _App:
    """An ASGI application that lets pass what the head of this module says."""
    allowed = {host.lower() for host in allowed_hosts}

    async def guard(scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        names = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
        if len(names) != 1 or _without_port(names[0]) not in allowed:
            await _refuse(send, 403, "this server does not answer to that Host header; see --allowed-host")
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > _MAX_BODY_BYTES:
                await _refuse(
                    send, 413, f"the request has more than {_MAX_BODY_BYTES:,} bytes; send fewer dialogues"
                )
                return
            if not message.get("more_body"):
                break
        await _answer(app, scope, bytes(body), receive, send)

    return guard


async def _answer(app: _App, scope: _Message, body: bytes, receive: _Receive, send: _Send) -> None:
    """Have the application answer a request that is read, and tell its work when nobody waits any more."""
    ended, has_left = threading.Event(), asyncio.Event()
    request_ended.set(ended)  # in the context of this request, which MLflow's working thread gets a copy of
    messages: list[_Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()
        has_left.set()

    async def replay() -> _Message:
        if messages:
            return messages.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    watcher = asyncio.create_task(watch())
    try:
        await app(scope, replay, send)
    finally:
        ended.set()  # MLflow gives a request up after its timeout, but its thread goes on
        watcher.cancel()


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


async def _refuse(send: _Send, status: int, line: str) -> None:
    content = json.dumps({"error_code": "BAD_REQUEST", "message": line}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


if __name__ == "__main__":
    # Uvicorn and MLflow would each print lines of their own about every request and warning.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    run_entry(main)
