"""What stands before a student's HTTP server: names, token, number of requests, bodies, clients that leave."""

import asyncio
import json
import time

import pytest

from kdecs.serve import guard
from kdecs.serve.guard import guarded, own_names
from kdecs.student.predict.requests import request_ended

TOKEN = "correct-horse-battery"


def ask(app, host=b"127.0.0.1:5001", chunks=(b"{}",), leaves_after=None, path="/", method="POST", **headers):
    """The status and JSON that a guarded application answers; its client may leave once `leaves_after` is set."""
    return asyncio.run(asked(app, host, chunks, leaves_after, path, method, **headers))


async def asked(
    app, host=b"127.0.0.1:5001", chunks=(b"{}",), leaves_after=None, path="/", method="POST", **headers
):
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if messages:
        messages[-1]["more_body"] = False
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await (leaves_after or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    pairs += [(b"host", host)] if host is not None else []
    await app({"type": "http", "method": method, "path": path, "headers": pairs}, receive, send)
    return (sent[0]["status"], json.loads(sent[1]["body"])) if sent else None


async def echo(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(len(body)).encode()})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:5001", 200),
        (b"LOCALHOST", 200),
        (b"[::1]:5001", 200),
        (b"model.example:80", 200),
        (b"[2001:db8::7]:5001", 200),
        (b"evil.example:5001", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"localhost:5001:80", 403),
        (b"", 403),
        (None, 403),
    ],
)
def test_a_served_student_answers_to_its_own_names_alone(host, status):
    app = guarded(echo, own_names("2001:db8::7", ["model.example"]))
    found, answer = ask(app, host)
    assert found == status
    assert answer == 2 if status == 200 else "--allowed-host" in answer["error"]


def test_a_refusal_is_described_as_the_server_does():
    app = guarded(echo, ["localhost"], describe=lambda line: {"message": line})
    assert ask(app)[1].keys() == {"message"}


@pytest.mark.parametrize(
    ("given", "path", "status"),
    [
        ({}, "/v1/predict", 401),
        ({}, "/health", 200),
        ({}, "/health/", 401),
        ({"authorization": b"Bearer " + TOKEN.encode()}, "/v1/predict", 200),
        ({"authorization": b"bearer  " + TOKEN.encode()}, "/v1/predict", 200),
        ({"authorization": b"Bearer " + TOKEN.encode()[:-1]}, "/v1/predict", 401),
        ({"authorization": b"Bearer \xff\xfe"}, "/v1/predict", 401),
        ({"authorization": b"Basic " + TOKEN.encode()}, "/v1/predict", 401),
        ({"authorization": TOKEN.encode()}, "/v1/predict", 401),
    ],
)
def test_a_token_opens_all_but_the_open_pages(given, path, status):
    app = guarded(echo, ["127.0.0.1"], token=TOKEN, open_paths=["/health"])
    found, answer = ask(app, path=path, **given)
    assert found == status and (status == 200 or "Authorization: Bearer TOKEN" in answer["error"])


def test_a_body_is_passed_on_whole_up_to_its_limit(monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 100)
    app = guarded(echo, ["127.0.0.1"])
    assert ask(app, chunks=(b"x" * 60, b"x" * 40)) == (200, 100)
    status, answer = ask(app, chunks=(b"x" * 60, b"x" * 60, b"x" * 60))
    assert status == 413 and "100 bytes" in answer["error"]


def test_a_client_that_asks_before_it_sends_a_large_body_need_not_send_it(monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 100)
    app = guarded(echo, ["127.0.0.1"], token=TOKEN, open_paths=["/open"])
    for path, status in (("/open", 413), ("/", 401)):
        found, _ = ask(app, chunks=(), path=path, content_length=b"101", expect=b"100-Continue")
        assert found == status


def test_a_body_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.05)
    began = time.monotonic()
    status, answer = ask(guarded(echo, ["127.0.0.1"]), chunks=())
    assert status == 408 and "0.05 s" in answer["error"] and time.monotonic() - began < 5


def test_a_client_that_leaves_while_it_sends_gets_no_answer():
    async def main():
        left = asyncio.Event()
        left.set()
        return await asked(guarded(echo, ["127.0.0.1"]), chunks=(), leaves_after=left)

    assert asyncio.run(main()) is None


def test_only_so_many_requests_are_worked_on_at_a_time(monkeypatch):
    monkeypatch.setattr(guard, "MAX_REQUESTS", 2)

    async def main():
        opened = asyncio.Event()

        async def waits(scope, receive, send):
            await opened.wait()
            await echo(scope, receive, send)

        app = guarded(waits, ["127.0.0.1"])
        running = [asyncio.create_task(asked(app)) for _ in range(2)]
        await asyncio.sleep(0)
        status, answer = await asked(app)
        assert status == 503 and "2 requests" in answer["error"]
        asks = asyncio.create_task(asked(app, method="GET"))  # has no work to do, so it is never refused
        opened.set()
        assert [await one for one in (*running, asks)] == [(200, 2)] * 3
        assert await asked(app) == (200, 2)

    asyncio.run(main())


def test_the_work_of_a_request_learns_that_its_client_has_left():
    seen = []

    async def works(scope, receive, send):
        await receive()
        leaves_after.set()
        # A thread has a copy of this context, as MLflow's has.
        seen.append(await asyncio.to_thread(lambda: request_ended.get().wait(20)))
        assert (await receive())["type"] == "http.disconnect"

    leaves_after = asyncio.Event()
    assert ask(guarded(works, ["127.0.0.1"]), leaves_after=leaves_after) is None
    assert seen == [True]
