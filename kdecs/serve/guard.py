"""What stands before each HTTP server of a student: `kdecs serve` and MLflow's scoring server (kdecs.tracking.serving).

- Only requests whose Host header names this server are answered. Without this, a web page that a colleague visits can
  make its own name point to this machine and read the answers (DNS rebinding).
- Where the server has a token, requests without it are refused, except to pages that hold no secret.
- Only so many POST requests at a time are read and worked on.
- A body is read up to a limit of bytes and of seconds.
- Once a client has left, or the application has given its request up, the work for it stops
  (kdecs.student.predict.requests).

A refusal is one line. Nothing here needs FastAPI; uvicorn is imported when a server starts.
"""

import asyncio
import hmac
import json
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

from kdecs.errors import DependencyError, KdecsError
from kdecs.process import StopSignal
from kdecs.student.predict.requests import request_ended

if TYPE_CHECKING:
    import uvicorn

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY_BYTES = 8 << 20  # a million characters in any script, escaped as JSON
MAX_REQUESTS = 64  # a body that is read takes up to 8 MiB, and its dialogues several times as much
BODY_TIMEOUT_S = 30.0
# Of a request that is refused: read and thrown away before the answer.
_MAX_DISCARDED_BYTES = 64 << 20
_RETRY_AFTER_S = 5

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def listen(host: str, port: int) -> socket.socket:
    """An open listener. Call this before a model is loaded, which takes seconds: no other server takes the port then.

    Raises KdecsError if the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise KdecsError(
            f"{host}:{port}: cannot listen there ({getattr(error, 'strerror', None) or error}); "
            "choose another --port or --host"
        ) from None


def address_of(listener: socket.socket) -> str:
    """The address of a listener as a browser takes it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(app: App, *, stop_after_s: float | None = None) -> "uvicorn.Server":
    """A uvicorn server, with what every answer says to browsers. Raises DependencyError without uvicorn."""
    try:
        import uvicorn
    except ImportError as error:
        raise DependencyError(
            f"uvicorn is not installed ({error}); install it with: pip install 'kdecs[serve]'"
        ) from None
    config = uvicorn.Config(
        app,
        log_level="error",  # its warnings are about what clients send, who could fill a log with them
        access_log=False,
        server_header=False,
        headers=[("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")],
        ws="none",
        timeout_graceful_shutdown=None if stop_after_s is None else round(stop_after_s),
    )
    return uvicorn.Server(config)


def run_server(app: App, listener: socket.socket, *, stop_after_s: float | None = None) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then take no more, finish those that run, and return.

    Requests that still run `stop_after_s` seconds later are broken off, and so they are at a second Ctrl-C.
    """
    server = make_server(app, stop_after_s=stop_after_s)
    # Uvicorn stops at these signals, and raises them once more when it has stopped, for handlers of the program.
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    StopSignal().install()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # a second Ctrl-C
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Refusal(Exception):
    """What the guard answers in the application's place."""

    def __init__(self, status: int, line: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(line)
        self.status = status
        self.line = line
        self.headers = headers


def own_names(host: str, more: Iterable[str]) -> list[str]:
    """The Host headers to which a server that listens on `host` answers: loopback's, its own, and those of `more`."""
    return [*LOOPBACK_HOSTS, f"[{host}]" if ":" in host else host, *more]


def guarded(
    app: App,
    allowed_hosts: Iterable[str],
    *,
    token: str | None = None,
    open_paths: Collection[str] = (),
    describe: Callable[[str], dict[str, str]] = lambda line: {"error": line},
) -> App:
    """An ASGI application that lets pass what the head of this module says.

    `open_paths` need no token. `describe` makes the JSON of a refusal of its line.
    """
    allowed = {host.lower() for host in allowed_hosts}
    num_running = 0

    def check(scope: Message) -> None:
        names = [value.decode("latin-1") for value in _headers(scope, b"host")]
        if len(names) != 1 or _without_port(names[0]) not in allowed:
            raise _Refusal(403, "this server does not answer to that Host header; see --allowed-host")
        if token is not None and scope["path"] not in open_paths and not _has_token(scope, token):
            raise _Refusal(
                401,
                "this server needs its token: send the header Authorization: Bearer TOKEN",
                (b"www-authenticate", b"Bearer"),
            )
        # Other methods have no work to do: whether the server lives can be asked while it is busy.
        if scope["method"] == "POST" and num_running >= MAX_REQUESTS:
            raise _Refusal(
                503,
                f"this server works on {MAX_REQUESTS} requests already; send this one again in {_RETRY_AFTER_S} s",
                (b"retry-after", str(_RETRY_AFTER_S).encode()),
            )

    async def guard(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal num_running
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        counted = 0
        try:
            try:
                check(scope)
            except _Refusal:
                # Many clients look at the answer only after they have sent everything, and lose it if the connection
                # is closed under them.
                if await _read(scope, receive, keeps=False) is not None:
                    raise
                return
            counted = scope["method"] == "POST"
            num_running += counted
            body = await _read(scope, receive)
            if body is not None:
                await _answer(app, scope, body, receive, send)
        except _Refusal as refusal:
            content = json.dumps(describe(refusal.line)).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *refusal.headers]
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": content})
        finally:
            num_running -= counted

    return guard


async def _read(scope: Message, receive: Receive, *, keeps: bool = True) -> bytes | None:
    """The body of a request, or nothing of it unless `keeps`. None if the client has left. Raises _Refusal."""
    too_large = _Refusal(413, f"the request has more than {MAX_BODY_BYTES:,} bytes; send fewer dialogues")
    if b"100-continue" in [value.lower() for value in _headers(scope, b"expect")]:
        # The client asks before it sends.
        declared = _headers(scope, b"content-length")
        if keeps and declared and int(declared[0]) > MAX_BODY_BYTES:
            raise too_large
        if not keeps:
            return b""
    body, num_bytes, more = bytearray(), 0, True
    deadline = time.monotonic() + BODY_TIMEOUT_S
    while more:
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise _Refusal(
                408, f"the request was not received within {BODY_TIMEOUT_S:g} s; send fewer dialogues"
            ) from None
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        more = bool(message.get("more_body")) and num_bytes <= _MAX_DISCARDED_BYTES
        if keeps and num_bytes <= MAX_BODY_BYTES:
            body += chunk
        else:
            body.clear()
    if keeps and num_bytes > MAX_BODY_BYTES:
        raise too_large
    return bytes(body)


async def _answer(app: App, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
    """Have the application answer a request that is read, and tell its work when nobody waits any more."""
    ended, has_left = threading.Event(), asyncio.Event()
    request_ended.set(ended)  # in the context of this request, which a working thread gets a copy of
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()
        has_left.set()

    async def replay() -> Message:
        if messages:
            return messages.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    watcher = asyncio.create_task(watch())
    try:
        await app(scope, replay, send)
    finally:
        ended.set()  # the application may have given the request up, while its thread goes on
        watcher.cancel()


def _headers(scope: Message, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _has_token(scope: Message, token: str) -> bool:
    given = _headers(scope, b"authorization")
    scheme, _, value = (given[0] if len(given) == 1 else b"").partition(b" ")
    # In the same time for any value: how long it takes must not tell how much of it is right.
    return scheme.lower() == b"bearer" and hmac.compare_digest(value.strip(), token.encode())


def _without_port(host: str) -> str:
    # An IPv6 address has its brackets here, so the part after its last colon is no number.
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()
