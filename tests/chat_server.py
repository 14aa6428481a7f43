"""A local OpenAI-compatible server that fails in every way that servers fail. Its answers are up to the test."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kdecs.corpus.pairs import causes_of
from kdecs.corpus.schema import NEUTRAL, Dialogue

KEY = "sk-very-secret"
Behaviour = Callable[["Handler", str], None]
"""What the server does with a request, instead of answering it: it gets the handler and the last message."""


class ChatServer(ThreadingHTTPServer):
    """Answers every request with `answer(messages)`, after the faults of `faults`, one per request."""

    daemon_threads = True

    def __init__(self, answer: Callable[[list[dict[str, str]]], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.faults: list[Behaviour] = []
        self.always: Callable[[str], Behaviour | None] = lambda prompt: None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_answered: Counter[str] = Counter()
        """How often each call, as the text of its messages, was answered."""
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address  # a client that was killed or has given up

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always(prompt)
        if fault is not None:
            fault(self, prompt)
            return
        assert self.path == "/v1/chat/completions"
        self.answer(body)

    def answer(self, body: dict[str, Any], text: str | None = None) -> None:
        """Send an answer, by default that of the server, and count it once the client has it."""
        self.reply(completion(self.server.answer(body["messages"]) if text is None else text))
        with self.server.lock:
            self.server.num_answered["\n".join(message["content"] for message in body["messages"])] += 1

    def reply(self, data: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        del arguments


@contextmanager
def running(server: ChatServer) -> Iterator[ChatServer]:
    """A server that answers until the block ends."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def completion(text: Any) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()


def status(code: int, message: str = "no", **headers: str) -> Behaviour:
    data = json.dumps({"error": {"message": message}}).encode()
    return lambda handler, prompt: handler.reply(data, status=code, **headers)


def sends(data: bytes, length: int | None = None) -> Behaviour:
    return lambda handler, prompt: handler.reply(data, length=length)


def emotions_answer(dialogue: Dialogue) -> str:
    """What a model should answer to the first question of kdecs annotate."""
    return json.dumps({"emotions": [{"turn": u.turn, "emotion": u.emotion} for u in dialogue.utterances]})


def gold_causes(dialogue: Dialogue, target: int) -> dict[int, str]:
    """The longest span of each turn that causes a target."""
    longest: dict[int, str] = {}
    for _, turn, span in causes_of(dialogue.utterances[target - 1]):
        if len(span) > len(longest.get(turn, "")):
            longest[turn] = span
    return longest


def causes_answer(dialogue: Dialogue) -> str:
    """What a model should answer to the second question."""
    targets = [
        {
            "target": u.turn,
            "causes": [{"turn": turn, "span": span} for turn, span in gold_causes(dialogue, u.turn).items()],
        }
        for u in dialogue.utterances
        if u.emotion != NEUTRAL
    ]
    return json.dumps({"targets": targets})
