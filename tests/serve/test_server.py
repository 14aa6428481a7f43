"""`kdecs serve`: answers as in Python, shared batches, and one clear answer to every abuse."""

import itertools
import json
import os
import re
import select
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from random import Random

import pytest
from support import start_python, wait_until
from typer.testing import CliRunner

from kdecs import cli
from kdecs.corpus.reading import bundled_sample, iter_dialogues, parse_dialogue
from kdecs.errors import DialogueError, KdecsError
from kdecs.evaluation.predictions import Prediction
from kdecs.serve import guard
from kdecs.serve.guard import guarded, own_names
from kdecs.serve.server import OPEN_PATHS, Batcher, Batchers, DialogueOut, make_app
from kdecs.student.predict import streaming
from kdecs.student.predict.streaming import PairPrediction

SHORT = {"utterances": [{"speaker": "A", "utterance": "We won ."}]}


def dialogue_of(num_utterances, text="We won .", **keys):
    return {**keys, "utterances": [{"speaker": "A", "utterance": text}] * num_utterances}


class Panic(BaseException):
    """As PyO3 raises it where Rust code panics."""


class Fake:
    """A student that sees a cause in its target alone, waits at its gate, and cannot read or survive some texts."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.long_gate = threading.Event()
        self.groups = []
        self.texts = []

    def stream(self, dialogues, *, max_distance, batch_tokens, on_batch, on_warning):
        del batch_tokens, on_warning
        self.groups.append(len(dialogues))
        return streaming.stream(self, dialogues, max_distance=max_distance, on_batch=on_batch)

    def detail(self, pairs, *, batch_tokens, on_batch):
        self.gate.wait(30)
        texts = {pair.dialogue.utterances[0].text for pair in pairs}
        self.texts += texts
        if "long" in texts:
            self.long_gate.wait(30)
        if "unreadable" in texts:
            raise DialogueError("dialogue x: no token is left of it")
        if "deadly" in texts:
            raise RuntimeError("a bug")
        if "panic" in texts:
            raise Panic("a bug")
        on_batch(len(pairs))
        return [
            PairPrediction(
                Prediction(p.dialogue.id, p.target, p.candidate, "joy", p.target == p.candidate, ""),
                0.25,
                None,
            )
            for p in pairs
        ]


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def start(serving):
    """Start a server of a student: `start(student)` is its port."""
    with ExitStack() as stack:

        def start(student, *, token=None, **options):
            batchers = stack.enter_context(Batchers(student))
            app = guarded(
                make_app(batchers, **options), own_names("127.0.0.1", []), token=token, open_paths=OPEN_PATHS
            )
            return stack.enter_context(serving(app))

        yield start


@pytest.mark.parametrize("decision", ["threshold", "argmax"])
def test_answers_are_those_of_python(start, ask, directory, decision):
    from kdecs.student.predict.files import _lines
    from kdecs.student.predict.predictor import Student

    trained = Student.from_pretrained(directory)
    student = Student(
        trained.scorer, trained.tokenizer, trained.card.model_copy(update={"cause_decision": decision})
    )
    dialogues = list(itertools.islice(iter_dialogues(bundled_sample("unlabelled"), labelled=False), 2))
    rows = [
        {
            "id": d.id,
            "utterances": [{"turn": u.turn, "speaker": u.speaker, "utterance": u.text} for u in d.utterances],
        }
        for d in dialogues
    ]
    port = start(student)
    for query, options in (("", {}), ("?max_distance=1", {"max_distance": 1})):
        wanted = [
            {"id": d.id, "predictions": [json.loads(line) for line in _lines(found, has_offsets=True)]}
            for d, found in student.stream(dialogues, **options)
        ]
        answer = ask(port, "POST", f"/v1/predict{query}", rows)
        assert (answer.status, answer.json) == (200, wanted)
        # One dialogue is answered with one object.
        assert ask(port, "POST", f"/v1/predict{query}", rows[0]).json == wanted[0]
    for one in answer.json:
        DialogueOut.model_validate(one)
    assert ask(port, "POST", "/v1/predict", []).json == []


JSON, TEXT = "application/json", "text/plain"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "no JSON at line 1"),
        (b'{"utterances": [{"speaker": "A", "utterance": "x"}], "id": NaN}', 400, "found NaN"),
        (b"\xff\xfe{", 400, "UTF-16"),
        (b'"\xff"', 400, "the byte 0xff"),
        (b"[" * 200_000, 400, "nested too deeply"),
        (b'{"utterances": [], "utterances": []}', 400, "'utterances' more than once"),
        (b"", 422, "found no body"),
        (b"   ", 400, "found nothing"),
        (5, 422, "request: found 5, expected a dialogue"),
        (json.dumps(SHORT), 422, "expected a dialogue"),
        ([SHORT, "x"], 422, "item 2: found 'x', expected a dialogue"),
        ({"dialogue": SHORT}, 422, "expected an object with a list `utterances`"),
        ({"utterances": {}}, 422, "expected an object with a list `utterances`"),
        ({"utterances": []}, 422, "expected 1 to 2000 utterances"),
        (dialogue_of(10_000), 422, "found 10000, expected 1 to 2000 utterances"),
        (dialogue_of(1_900), 422, "found 1,805,950 pairs up to item 1, expected at most 25,000"),
        ([SHORT] * 1_001, 422, "found 1,001 dialogues, expected at most 1,000"),
        (dialogue_of(1, "x" * 100_001), 422, "100001 characters"),
        (dialogue_of(2, 5), 422, "turn 1, field utterance: found 5, expected a string"),
        (dialogue_of(1, "\ud800"), 422, "half of a surrogate pair"),
        (dialogue_of(1, id=7), 422, "field id: found 7"),
        (dialogue_of(1, id="evil\n\x1b[2J" * 99), 422, "dialogue 'evil\\n"),
        ({"utterances": [None]}, 422, "turn 1: found null, expected an utterance"),
        (b'{"utterances": [{"turn": ' + b"9" * 5000 + b"}]}", 422, "an integer of 5000 digits"),
    ],
)
def test_a_body_that_is_no_dialogue_is_refused_in_one_line(module_port, ask, body, status, message):
    answer = ask(module_port, "POST", "/v1/predict", body)
    assert answer.status == status, answer.body
    assert message in answer.json["error"] and answer.json.keys() == {"error"}
    assert answer.json["error"].isprintable()
    assert ask(module_port, "POST", "/v1/predict", SHORT).status == 200


def changed(value, random):
    """A JSON value with one part replaced, removed or repeated."""
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        copy = value.copy()
        key = random.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if random.random() < 0.2:
            del copy[key]
        else:
            copy[key] = changed(copy[key], random)
        return copy
    return random.choice(
        [None, True, -1, 10**30, 3.5, float("nan"), "", "x", "\ud800", "\0", [], [value, value], {}]
    )


def test_no_damage_to_a_request_gets_past_the_checks_or_hurts_the_server(module_port, ask):
    random = Random(0)
    whole = [SHORT, [SHORT, dialogue_of(3, id="é😀")], dialogue_of(2, emotion="happy", turn=1)]
    statuses = Counter()
    for _ in range(250):
        body = bytearray(json.dumps(changed(changed(random.choice(whole), random), random)).encode())
        if random.random() < 0.3:
            body[random.randrange(len(body))] = random.randrange(256)
        answer = ask(module_port, "POST", "/v1/predict", bytes(body))
        statuses[answer.status] += 1
        assert answer.status == 200 or (
            answer.json.keys() == {"error"} and answer.json["error"].isprintable()
        )
    assert statuses.keys() == {200, 400, 422}


@pytest.fixture(scope="module")
def module_port(serving):
    with (
        Batchers(Fake()) as batchers,
        serving(guarded(make_app(batchers), own_names("127.0.0.1", []))) as port,
    ):
        yield port


@pytest.mark.parametrize(
    ("method", "path", "content_type", "status", "message"),
    [
        ("POST", "/v1/predict", TEXT, 415, "Content-Type: application/json"),
        ("POST", "/v1/predict", "application/x-www-form-urlencoded", 415, "Content-Type: application/json"),
        ("POST", "/v1/predict?max_distance=-1", JSON, 422, "max_distance: found '-1', expected an integer"),
        ("POST", "/v1/predict?max_distance=far", JSON, 422, "max_distance: found 'far'"),
        ("POST", "/v1/predict?distance=3", JSON, 422, "distance: found '3', expected max_distance alone"),
        ("GET", "/v1/predict", JSON, 405, "does not take GET"),
        ("POST", "/health", JSON, 405, "does not take POST"),
        ("POST", "/v2/predict", JSON, 404, "there is no '/v2/predict'"),
        ("GET", "/redoc", JSON, 404, "there is no '/redoc'; see GET /docs"),
        ("GET", "/../../etc/passwd", JSON, 404, "there is no"),
    ],
)
def test_a_request_of_another_form_is_refused_in_one_line(
    module_port, ask, method, path, content_type, status, message
):
    answer = ask(module_port, method, path, SHORT if method == "POST" else None, content_type=content_type)
    assert answer.status == status and message in answer.json["error"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and "Server" not in answer.headers


def test_the_schema_describes_all_of_it(module_port, ask):
    answer = ask(module_port, "GET", "/openapi.json")
    schema = answer.json
    assert set(schema["paths"]) == {"/health", "/v1/predict"}
    predict = schema["paths"]["/v1/predict"]["post"]
    one, many = predict["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert one["$ref"].endswith("/DialogueIn") and many["items"] == one and many["maxItems"] == 1_000
    assert {"200", "400", "401", "403", "413", "415", "422", "503", "504"} <= set(predict["responses"])
    assert schema["components"]["schemas"]["DialogueIn"]["properties"]["utterances"]["maxItems"] == 2_000
    assert b"http" not in answer.body  # nothing that a browser would load from elsewhere


def test_the_schema_is_a_page_too_that_loads_nothing(module_port, ask):
    answer = ask(module_port, "GET", "/docs")
    page = answer.body.decode()
    for expected in (
        "POST /v1/predict",
        "max_distance",
        "UtteranceIn",
        "list of",
        "at most 2,000 items",
        "503",
    ):
        assert expected in page
    assert set(re.findall(r'href="#(\w+)"', page)) <= set(re.findall(r'<h2 id="(\w+)"', page))
    assert set(re.findall(r"https?://[^/ ]+", page)) == {f"http://127.0.0.1:{module_port}"}
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    # What the page adds to the schema stays out of the schema.
    assert "description" not in ask(module_port, "GET", "/openapi.json").json["paths"]["/health"]["get"]


def test_a_body_of_20_mb_is_refused_and_the_server_goes_on(module_port, ask):
    answer = ask(module_port, "POST", "/v1/predict", b" " * 20_000_000)
    assert answer.status == 413 and "8,388,608 bytes" in answer.json["error"]
    assert ask(module_port, "GET", "/health").json == {"status": "ok"}


def test_fifty_requests_at_once_share_batches(start, ask, fake):
    port = start(fake)
    fake.gate.clear()
    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(ask, port, "POST", "/v1/predict", dialogue_of(3, id=str(n))) for n in range(50)]
        # The first group waits at the gate; all others come together behind it.
        wait_until(lambda: len(fake.groups) == 1, "the first request is worked on")
        time.sleep(0.3)
        fake.gate.set()
        answers = [one.result() for one in asked]
    assert [answer.status for answer in answers] == [200] * 50
    assert [answer.json["id"] for answer in answers] == [str(n) for n in range(50)]
    assert sum(fake.groups) == 50 and len(fake.groups) <= 10


def test_requests_of_different_distances_do_not_share_a_batch(start, ask, fake):
    port = start(fake)
    fake.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(ask, port, "POST", f"/v1/predict?max_distance={n % 2}", dialogue_of(3))
            for n in range(8)
        ]
        fake.gate.set()
        assert [len(one.result().json["predictions"]) for one in asked] == [3, 5] * 4


def test_beyond_so_many_requests_the_next_is_sent_away_and_told_when_to_come_back(
    start, ask, fake, monkeypatch
):
    monkeypatch.setattr(guard, "MAX_REQUESTS", 8)
    port = start(fake)
    fake.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, port, "POST", "/v1/predict", SHORT) for _ in range(8)]
        refused = []

        def is_refused():
            # On a slow machine some of the eight may not have arrived yet; this one then waits in their place.
            if time.monotonic() > begun + 1:
                refused.append(ask(port, "POST", "/v1/predict", SHORT))
            return refused

        begun = time.monotonic()
        wait_until(is_refused, "the server is full")
        assert ask(port, "GET", "/health").status == 200
        fake.gate.set()
        assert {one.result().status for one in asked} == {200}
    assert refused[0].status == 503 and refused[0].headers["Retry-After"] == "5"
    assert "8 requests" in refused[0].json["error"]
    assert ask(port, "POST", "/v1/predict", SHORT).status == 200


def test_the_dialogues_of_a_client_that_hangs_up_are_dropped(start, ask, fake):
    port = start(fake)
    fake.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, port, "POST", "/v1/predict", dialogue_of(1, "first"))
        wait_until(lambda: fake.groups, "the first request is worked on")
        body = json.dumps([dialogue_of(1, f"left {n}") for n in range(3)]).encode()
        head = f"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {JSON}\r\n"
        for part in (body, body[:10]):  # one leaves while it waits, one while it sends
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + part)
                time.sleep(0.2)
        time.sleep(0.2)
        fake.gate.set()
        assert first.result().status == 200
    assert ask(port, "POST", "/v1/predict", dialogue_of(1, "last")).status == 200
    assert fake.texts == ["first", "last"]


def test_a_request_is_given_up_after_its_time_and_its_work_stops(start, ask, fake):
    port = start(fake, timeout_s=0.3)
    fake.gate.clear()
    answer = ask(port, "POST", "/v1/predict", [dialogue_of(45, "slow"), dialogue_of(45, "never")])
    assert answer.status == 504 and "not answered within 0.3 s" in answer.json["error"]
    fake.gate.set()
    assert ask(port, "POST", "/v1/predict", dialogue_of(1, "last")).status == 200
    assert fake.texts == ["slow", "last"]


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("unreadable", 422, "no token is left"),
        ("deadly", 500, "the server has failed at this request"),
        ("panic", 500, "the server has failed at this request"),
    ],
)
def test_a_failing_request_costs_no_other_in_its_batch(start, ask, fake, capfd, text, status, message):
    port = start(fake)
    fake.gate.clear()
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(ask, port, "POST", "/v1/predict", SHORT)
        wait_until(lambda: fake.groups, "the first request is worked on")
        texts = ["a", "b", text, "c"]
        asked = [pool.submit(ask, port, "POST", "/v1/predict", dialogue_of(1, one)) for one in texts]
        time.sleep(0.3)
        fake.gate.set()
        answers = {one: job.result() for one, job in zip(texts, asked, strict=True)}
        assert first.result().status == 200
    bad = answers.pop(text)
    assert bad.status == status and message in bad.json["error"]
    assert {answer.status for answer in answers.values()} == {200}
    assert max(fake.groups) > 1
    assert ("a bug" in capfd.readouterr().err) == (status == 500)  # the log has what the client is not told


def test_a_long_list_does_not_hold_up_a_single_dialogue():
    fake, order = Fake(), []
    batcher = Batcher(fake)
    parsed = [parse_dialogue(dialogue_of(40), str(n)) for n in range(12)]
    jobs = {
        "list": batcher.submit(parsed, None, threading.Event()),
        "long": batcher.submit([parse_dialogue(dialogue_of(60), "long")], None, threading.Event()),
        "single": batcher.submit([parse_dialogue(SHORT, "single")], None, threading.Event()),
    }
    for name, job in jobs.items():
        job.add_done_callback(lambda _, name=name: order.append(name))
    batcher.start()
    assert [len(job.result(30)) for job in jobs.values()] == [12, 1, 1]
    batcher.stop()
    assert order == ["single", "long", "list"]


def test_a_long_dialogue_does_not_hold_up_a_short_one(start, ask, fake):
    port = start(fake)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, port, "POST", "/v1/predict", dialogue_of(46, "long"))
        wait_until(lambda: fake.texts, "the long dialogue is worked on")
        assert ask(port, "POST", "/v1/predict", SHORT).status == 200
        assert not long.done()
        fake.long_gate.set()
        assert len(long.result().json["predictions"]) == 46 * 47 // 2


def test_a_stop_ends_what_waits():
    fake = Fake()
    fake.gate.clear()
    batcher = Batcher(fake)
    jobs = [
        batcher.submit([parse_dialogue(dialogue_of(45), "x")] * 2, None, threading.Event()) for _ in range(3)
    ]
    batcher.start()
    wait_until(lambda: fake.groups, "the first request is worked on")
    stopping = threading.Thread(target=batcher.stop)
    stopping.start()
    wait_until(lambda: batcher._is_stopping, "the stop has arrived")
    fake.gate.set()
    stopping.join(30)
    assert not stopping.is_alive() and all(job.exception(1) is not None for job in jobs)


def test_a_token_is_asked_for_wherever_there_is_something_to_get(start, ask, fake):
    port = start(fake, token="correct-horse-battery")
    assert ask(port, "POST", "/v1/predict", SHORT).status == 401
    assert ask(port, "GET", "/openapi.json").status == 401
    assert ask(port, "GET", "/health").status == 200
    bearer = {"Authorization": "Bearer correct-horse-battery"}
    assert ask(port, "POST", "/v1/predict", SHORT, **bearer).status == 200


@pytest.mark.parametrize(
    ("options", "variable", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "",
            "--host 0.0.0.0: other machines can reach this address, so the server needs",
        ),
        (["--host", "localhost.example.org"], "", "needs a token"),
        (
            ["--host", "0.0.0.0"],
            "short",
            "KDECS_SERVE_TOKEN: found a token that is too short",
        ),
        (["--token-file", "empty"], "", "empty: found no text, expected a token on one line"),
        (["--token-file", "two"], "", "two: found a token that .* expected one line of at least 16"),
        (["--token-file", "missing"], "", "missing"),
        (["--port", "{taken}"], "", "cannot listen there .*choose another --port"),
    ],
)
def test_what_would_be_unsafe_or_cannot_be_is_refused_before_a_student_is_loaded(
    tmp_path, monkeypatch, options, variable, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDECS_SERVE_TOKEN", variable)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("a token of one line\nand another of it\nin 3")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = ["serve", "--student", "none", *(option.format(taken=port) for option in options)]
        result = CliRunner().invoke(cli.app, command)
    assert isinstance(result.exception, KdecsError | OSError)
    assert re.search(message, str(result.exception))


@pytest.mark.slow
def test_the_process_answers_and_finishes_its_requests_when_it_is_asked_to_end(ask, directory):
    process = start_python("-m", "kdecs.cli", "serve", "--student", directory, "--port", "0")
    try:
        ready, _, _ = select.select([process.stdout], [], [], 300)
        assert ready
        port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", process.stdout.readline())[1])
        assert ask(port, "POST", "/v1/predict", SHORT).status == 200
        assert ask(port, "GET", "/health", Host="evil.example").status == 403
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, port, "POST", "/v1/predict", dialogue_of(30))
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGTERM)
            answer = asked.result()
        assert answer.status == 200 and len(answer.json["predictions"]) == 30 * 31 // 2
        assert (process.wait(60), process.stderr.read()) == (0, "")
    finally:
        process.kill()
        process.wait()
