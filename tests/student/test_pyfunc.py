"""A served student answers what it answers in Python, over HTTP and to threads, within its bounds."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from support import kill

from kdecs.corpus.encoding import HistoryWindow
from kdecs.corpus.reading import parse_dialogue
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import CorpusError, KdecsError
from kdecs.student.predict import predictor, streaming
from kdecs.student.predict.streaming import offsets_of
from kdecs.student.pyfunc import ServedStudent, request_ended
from kdecs.tracking.mlflow import Tracker
from kdecs.tracking.record import RunRecord, TrackingConfig
from kdecs.tracking.registry import register_student

DIALOGUES = [
    {
        "id": "x",
        "utterances": [
            {"speaker": "A", "utterance": "We won the big game ! 😀"},
            {"speaker": "B", "utterance": "très bien , I am so happy ."},
            {"speaker": "A", "utterance": "Let us celebrate ."},
        ],
    },
    {"utterances": [{"speaker": "B", "utterance": "I lost my job ."}]},
]
START_S = 500


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory) -> Iterator[str]:
    """The address of a server of the registry's champion."""
    folder = tmp_path_factory.mktemp("registry")
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}"), folder / "sweep")
    record = RunRecord(identity={"kdecs.run": "a"}, name="student", status="FINISHED")
    told = register_student(
        tracker, record, directory, score=50.0, corpus_checksum="c", metric="macro_f1", card="A student."
    )
    assert told == "kdecs-student version 1, alias champion"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracker.uri,
        "MLFLOW_REGISTRY_URI": tracker.uri,
        "PYTHONPATH": str(root),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "kdecs.tracking.serving", "models:/kdecs-student@champion"]
    command += ["--port", str(port)]
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=file, stderr=file, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, f"{address}/ping", log)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=120)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer after {START_S} s: {log.read_text()[-2000:]}")


def post(address: str, body: object) -> tuple[int, dict[str, object]]:
    """Status and JSON of the answer to a request."""
    request = urllib.request.Request(
        f"{address}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=240) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(student, **options):
    """What the Python API says of DIALOGUES, as the server writes it."""
    dialogues = [parse_dialogue(row, f"row {number}") for number, row in enumerate(DIALOGUES)]
    return [
        [{**asdict(item.prediction), **offsets_of(item)} for item in found]
        for _, found in student.stream(dialogues, **options)
    ]


class Interrupted(list[int]):
    """Token counts at whose first look another thread takes its turn."""

    turn: Callable[[], object] | None = None

    def __len__(self) -> int:
        turn, self.turn = self.turn, None
        if turn is not None:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(turn).result()
        return super().__len__()


def test_a_thread_between_two_looks_does_not_change_the_history_of_a_dialogue():
    window = HistoryWindow(None, 8)
    turns = tuple(Utterance(turn, "A", "word", None, None) for turn in range(1, 61))
    dialogue, other = Dialogue("long", turns), Dialogue("short", turns[:2])
    counts = {"long": Interrupted(range(0, 240, 4)), "short": Interrupted()}
    window._counted = lambda asked: counts[asked.id]
    expected = window.first_turn(dialogue, 60)
    assert expected == 56  # 4 tokens a turn: the history from here on has 16 of them or more
    counts["long"].turn = lambda: window.first_turn(other, 2)
    window.first_turn(other, 2)
    assert window.first_turn(dialogue, 60) == expected


def test_requests_that_overlap_are_answered_as_one_by_one(student):
    served = ServedStudent(student)
    requests = [
        [{"id": str(n), "utterances": [{"speaker": "A", "utterance": f"We won {n} games ! " * 30}] * (4 + n)}]
        for n in range(8)
    ]
    alone = [served.predict(request, {"max_distance": 1}) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: served.predict(request, {"max_distance": 1}), requests * 3))
    assert found == alone * 3


SHORT = {"utterances": [{"speaker": "A", "utterance": "We won ."}]}


def dialogue_of(num_utterances, text="We won ."):
    return {"utterances": [{"speaker": "A", "utterance": text}] * num_utterances}


@pytest.mark.parametrize(
    ("rows", "params", "message"),
    [
        ([SHORT] * 1001, {}, "found 1,001 dialogues, expected at most 1,000"),
        ([dialogue_of(150)] * 3, {}, "found 33,975 pairs up to row 2, expected at most 25,000"),
        ([dialogue_of(1700)], {"max_distance": 20}, "found 35,490 pairs"),
        ([SHORT, dialogue_of(11, "x" * 99_999)], {}, "found 1,100,009 characters up to row 1"),
    ],
)
def test_a_request_beyond_its_bounds_is_refused_before_any_work(student, monkeypatch, rows, params, message):
    monkeypatch.setattr(type(student), "detail", kill)
    with pytest.raises(CorpusError, match=re.escape(message)) as caught:
        ServedStudent(student).predict(rows, params)
    assert str(caught.value).startswith("request: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("why", ["timeout", "client"])
def test_the_work_for_a_request_stops_once_nobody_waits(student, monkeypatch, why):
    batches = []
    score = predictor.score_pairs

    def counted(*arguments, **options):
        batches.append(None)
        return score(*arguments, **options)

    monkeypatch.setattr(predictor, "score_pairs", counted)
    monkeypatch.setattr(streaming, "PAIRS_PER_GROUP", 10)
    served, rows = ServedStudent(student), [dialogue_of(4)] * 4
    assert len(served.predict(rows)) == 4
    in_all = len(batches)
    assert in_all == 4
    if why == "timeout":
        monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "0.000001")
        with pytest.raises(KdecsError, match=r"not answered within 1e-06 s"):
            served.predict(rows)
    else:
        ended = threading.Event()
        ended.set()
        token = request_ended.set(ended)
        with pytest.raises(KdecsError, match="client has left"):
            served.predict(rows)
        request_ended.reset(token)
    assert len(batches) == in_all + 1


@pytest.mark.slow
def test_a_foreign_host_header_gets_no_answer(server):
    host = server.removeprefix("http://")
    for name, status in (("evil.example", 403), (host, 200), (f"localhost:{host.partition(':')[2]}", 200)):
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/ping", headers={"Host": name})
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.slow
def test_a_served_student_answers_as_in_python(server, student):
    texts = [json.dumps(dialogue) for dialogue in DIALOGUES]
    status, answer = post(
        server, {"dataframe_split": {"columns": ["dialogue"], "data": [[t] for t in texts]}}
    )
    assert status == 200
    assert [json.loads(text) for text in answer["predictions"]] == expected(student)
    status, answer = post(
        server, {"dataframe_records": [{"dialogue": t} for t in texts], "params": {"max_distance": 0}}
    )
    assert status == 200
    found = [json.loads(text) for text in answer["predictions"]]
    assert found == expected(student, max_distance=0)
    assert [len(rows) for rows in found] == [3, 1]


@pytest.mark.slow
def test_a_faulty_request_is_refused_by_name_and_the_server_lives(server):
    for text, message in (
        ('{"utterances": []}', "expected 1 to 2000 utterances"),
        ("{", "row 0: not JSON"),
    ):
        status, answer = post(server, {"dataframe_records": [{"dialogue": text}]})
        assert status == 400 and message in answer["message"] and "stack_trace" not in answer
    status, answer = post(server, {"dataframe_records": [{"text": "x"}]})
    assert status == 400 and "dialogue" in json.dumps(answer)
    assert post(server, {"dataframe_records": [{"dialogue": json.dumps(DIALOGUES[0])}]})[0] == 200
