"""What every caller of an endpoint shares. tests/baselines/generative and tests/annotate ask real questions."""

import gzip
import threading
import time

import pytest
from chat_server import KEY, Behaviour, ChatServer, Handler, completion, running, sends, status

from kdecs.endpoint import client
from kdecs.endpoint.client import Ask, Endpoint, Failure, Reply, check_url, main_reason, work_through
from kdecs.errors import ConfigError
from kdecs.process import StopSignal


def call(
    server: ChatServer, stop: StopSignal | None = None, *, key: str | None = KEY, attempts: int = 1
) -> Reply | Failure | None:
    """What one call comes to."""
    endpoint = Endpoint(server.url, "m", key, attempts=attempts, timeout_s=30)
    replies: list[Reply | None] = []

    def work(text: str, ask: Ask) -> None:
        replies.append(ask(endpoint.body(text)))

    failures = work_through(endpoint, ["hello"], work, stop or StopSignal(), on_done=lambda num_failed: None)
    [outcome] = failures or replies
    return outcome


@pytest.mark.parametrize("url", ["http://me:pw@host/v1", "http://host/v1?key=pw", "http://host/v1#pw"])
def test_a_base_url_holds_no_secret(url: str) -> None:
    with pytest.raises(ConfigError, match="which would be recorded") as raised:
        check_url(url)
    assert "pw" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://host/v1",
        "http://",
        "http://[::1/v1",
        "http://host:port/v1",
        "http://host:65536/v1",
        "http://a host/v1",
        "http://host/\nv1",
    ],
)
def test_what_is_no_base_url_is_refused_before_any_call(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a URL such as"):
        check_url(url)
    assert check_url("http://[::1]:8000/v1/") == "http://[::1]:8000/v1"


def sends_raw(data: bytes) -> Behaviour:
    def send(handler: Handler, prompt: str) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return send


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(400, f"wrong\nkey {KEY}"), "HTTP status 400: wrong key [key]"),
        (lambda handler, prompt: handler.reply(b'{"message": "full"}', status=503), "HTTP status 503: full"),
        (lambda handler, prompt: handler.reply(b"<html>", status=500), "HTTP status 500"),
        (lambda handler, prompt: handler.connection.close(), "Remote end closed connection without response"),
        (sends(completion("half")[:20], length=500), "the connection ended after 20 of 500 bytes"),
        (
            sends_raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nabc"),
            "the connection ended in the middle of a reply",
        ),
        (sends_raw(f"\x00{KEY}\r\n\r\n".encode()), r"a reply that is not HTTP: '\x00[key]\r\n'"),
        (
            lambda handler, prompt: handler.reply(gzip.compress(completion("x")), Content_Encoding="gzip"),
            "a reply that is no chat completion",
        ),
    ],
)
def test_a_failure_says_why_in_one_line_without_the_key(fault: Behaviour, message: str) -> None:
    with running(ChatServer(lambda messages: "never")) as server:
        server.faults = [fault]
        assert str(call(server)) == message


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(code: int) -> None:
    with (
        running(ChatServer(lambda messages: "")) as elsewhere,
        running(ChatServer(lambda messages: "")) as server,
    ):
        server.faults = [status(code, Location=f"{elsewhere.url}/chat/completions")]
        failure = call(server, attempts=3)
        assert isinstance(failure, Failure) and failure.ends_all and failure.status == code
        assert (len(server.bodies), len(elsewhere.bodies)) == (1, 0)


@pytest.mark.parametrize(
    ("code", "message"), [(200, "a reply of more than 65,536 bytes"), (500, "HTTP status 500")]
)
def test_a_reply_over_the_limit_is_not_read_to_its_end(
    code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_MAX_REPLY_BYTES", 1 << 16)
    is_cut_off = threading.Event()

    def send(handler: Handler, prompt: str) -> None:
        try:
            handler.reply(b" " * (64 << 20), status=code)  # more than the buffers of a connection hold
        except ConnectionError:
            is_cut_off.set()

    with running(ChatServer(lambda messages: "")) as server:
        server.faults = [send]
        assert str(call(server)) == message
        assert is_cut_off.wait(30)


def test_no_variable_of_the_environment_changes_what_is_sent_or_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(ChatServer(lambda messages: "fine")) as server:
        call(server)
        for name in (
            "API_KEY",
            "ADMIN_KEY",
            "ORG_ID",
            "PROJECT_ID",
            "CUSTOM_HEADERS",
            "BASE_URL",
            "API_BASE",
        ):
            monkeypatch.setenv(f"OPENAI_{name}", "http://127.0.0.1:9")
        for key in (KEY, None):
            reply = call(server, key=key)
            assert isinstance(reply, Reply) and reply.text == "fine"
    before, with_key, without_key = server.headers
    assert with_key == before and before["User-Agent"] == "kdecs"
    assert without_key == {name: value for name, value in before.items() if name != "Authorization"}
    assert server.bodies[0] == server.bodies[1] == server.bodies[2]


def test_a_stop_ends_the_wait_that_a_server_asks_for() -> None:
    stop = StopSignal()
    times: list[float] = []

    def refuse(handler: Handler, prompt: str) -> None:
        status(429, Retry_After="60")(handler, prompt)
        times.append(time.monotonic())
        stop.requested = True

    with running(ChatServer(lambda messages: "")) as server:
        server.always = lambda prompt: refuse
        assert call(server, stop, attempts=3) is None
        # Looked for ten times a second; the rest is for a busy machine.
        assert len(times) == 1 and time.monotonic() - times[0] < 10


def test_calls_are_spread_over_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(client.time, "monotonic", lambda: now)
    pace = client._Pace(30)
    assert [pace.wait_s() for _ in range(3)] == [0, 2, 4]
    now = 200.0
    assert [pace.wait_s(), pace.wait_s()] == [0, 2]
    assert client._Pace(0).wait_s() == 0


def test_a_task_that_fails_leaves_the_others_alone_and_five_in_a_row_end_all() -> None:
    done: list[int] = []
    counts: list[int] = []

    def work(number: int, ask: Ask) -> None:
        if (reply := ask(endpoint.body(str(number)))) is not None:
            done.append(int(reply.text))

    with running(ChatServer(lambda messages: messages[0]["content"])) as server:
        endpoint = Endpoint(server.url, "m", attempts=1, concurrency=1)
        server.faults = [status(400, "first")]
        failures = work_through(endpoint, range(8), work, StopSignal(), on_done=counts.append)
        assert sorted(done) == list(range(1, 8)) and counts[-1] == 1 and len(counts) == 8
        assert str(main_reason(failures)) == "HTTP status 400: first" and failures[0].status == 400
        server.always = lambda prompt: sends(b"{}")
        failures = work_through(endpoint, range(100), work, StopSignal(), on_done=counts.append)
        assert 5 <= len(failures) <= 7
