"""A student of one epoch, and a server in a thread of this process."""

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import made_once, save_tiny_encoder, wait_until

from kdecs.corpus.reading import bundled_sample
from kdecs.serve.guard import App, listen, make_server


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Ask = Callable[..., Answer]
Serving = Callable[[App], contextlib.AbstractContextManager[int]]


@pytest.fixture(scope="session")
def ask() -> Ask:
    """Ask a server on loopback: `ask(port, method, path, body)`."""
    return _ask


@pytest.fixture(scope="session")
def serving() -> Serving:
    """Serve an application in a thread: `with serving(app) as port`."""
    return _serving


def _ask(
    port: int,
    method: str,
    path: str,
    body: object = None,
    *,
    content_type: str = "application/json",
    **headers: str,
) -> Answer:
    """What a server answers; a body that is no bytes is sent as JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    described = {"Content-Type": content_type} if data is not None else {}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, data, described | headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())


@contextlib.contextmanager
def _serving(app: App) -> Iterator[int]:
    """The port of a server in a thread."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(app, stop_after_s=5)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started, "the server has started")
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student, trained for one epoch on two short dialogues."""

    def make(directory: Path) -> None:
        import torch

        from kdecs.config import COMMITTED, load_config
        from kdecs.runtime import Runtime
        from kdecs.student.config import StudentConfig
        from kdecs.student.training import train_student

        raw = json.loads(bundled_sample("valid").read_text("utf-8"))
        few = directory / "few.json"
        directory.mkdir(parents=True)
        few.write_text(json.dumps({key: [raw[key][0][:4]] for key in list(raw)[:2]}), "utf-8")
        changes = [
            f"output={directory / 'student'}",
            f"cache={directory / 'cache'}",
            f"corpus={{train: {few}, valid: {few}}}",
            f"model.base={save_tiny_encoder(directory / 'base')}",
            "optimization.epochs=1",
        ]
        config = load_config(StudentConfig, COMMITTED / "student" / "tiny.yaml", changes)
        train_student(config, Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))

    return made_once(tmp_path_factory, "served-student", make) / "student"
