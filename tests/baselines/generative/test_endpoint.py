"""A chat model behind an endpoint is asked about every target, on a local server that fails as servers fail."""

import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, Behaviour, ChatServer, completion, running, sends, status
from support import StopAfter, start_python, wait_until
from typer.testing import CliRunner

from kdecs.baselines.generative import endpoint as endpoints
from kdecs.baselines.generative.answers import gold_answer, render
from kdecs.baselines.generative.endpoint import FewShot, ask_all, find_example, plan_few_shot
from kdecs.baselines.generative.record import AnswerRecord, read_answers
from kdecs.cli import app
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue
from kdecs.endpoint import client
from kdecs.endpoint.client import Endpoint
from kdecs.errors import CorpusError, EndpointError, PredictionError, Stopped
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import by_pair, read_predictions
from kdecs.process import StopSignal

FEW = 3


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    """Dialogues that begin differently, with about twenty targets."""
    return list(read_corpus(bundled_sample("test")).dialogues[:FEW])


@pytest.fixture(scope="module")
def training() -> list[Dialogue]:
    return list(read_corpus(bundled_sample("train")).dialogues)


@pytest.fixture
def server(dialogues: list[Dialogue]) -> Iterator[ChatServer]:
    """Answers every question with the gold answer."""
    gold = {dialogue.utterances[0].text: dialogue for dialogue in dialogues}

    def answer(messages: list[dict[str, str]]) -> str:
        asked = messages[0]["content"].rpartition("Dialogue:")[2]
        first = re.search(r"\n1 [^:]*: (.*)\n", asked)
        target = re.search(r"Target: turn (\d+)", asked)
        assert first and target
        return render(gold_answer(gold[first[1]], int(target[1])))

    with running(ChatServer(answer)) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat a failed call at once."""
    monkeypatch.setattr(client.random, "uniform", lambda low, high: 0.0)


@pytest.fixture
def endpoint(server: ChatServer) -> Endpoint:
    return Endpoint(server.url, "some-model", KEY, timeout_s=30, attempts=4)


@pytest.fixture
def plan(endpoint: Endpoint, dialogues: list[Dialogue], training: list[Dialogue]) -> FewShot:
    return plan_few_shot(endpoint, dialogues, training)


@pytest.fixture
def record(tmp_path: Path) -> AnswerRecord:
    return AnswerRecord(tmp_path / "answers.jsonl")


def test_every_target_is_asked_once_and_the_gold_answers_score_full_marks(
    server: ChatServer, endpoint: Endpoint, plan: FewShot, record: AnswerRecord, tmp_path: Path
) -> None:
    ask_all(endpoint, plan, record, StopSignal())
    ask_all(endpoint, plan, record, StopSignal())
    assert len(server.bodies) == len(plan.questions) == len(record.path.read_bytes().splitlines())
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert server.bodies[0].keys() == {"model", "messages", "temperature", "max_tokens"}
    assert KEY not in record.path.read_text() + repr(endpoint)
    outcome = read_answers(plan.targets, plan.questions, plan.labels, record, None)
    assert (outcome.num_missing, outcome.faults) == (0, Counter())
    assert (outcome.prompt_tokens, outcome.answer_tokens) == (
        10 * len(plan.questions),
        3 * len(plan.questions),
    )
    text = json.dumps(
        {d.id: [json.loads(bundled_sample("test").read_text())[d.id][0]] for d, _ in plan.targets}
    )
    (tmp_path / "few.json").write_text(text)
    scores = evaluate(read_corpus(tmp_path / "few.json"), by_pair(outcome.predictions), universe="all")
    assert scores.values["utterance_macro_f1"] == scores.values["emotion_accuracy"] == 100


def test_faults_are_repeated_and_never_recorded(
    server: ChatServer, endpoint: Endpoint, plan: FewShot, record: AnswerRecord
) -> None:
    server.faults = [
        status(429, Retry_After="0"),
        status(500),
        status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        lambda handler, prompt: time.sleep(0.4),  # a timeout
        lambda handler, prompt: handler.connection.close(),
        sends(completion("half")[:20], length=500),
        sends(b"<html>bad gateway</html>"),
        sends(b'{"choices": []}'),
        sends(b"[1]"),
        sends(completion(["text"])),
        sends(b'{"error": {"message": "overloaded"}}'),
    ]
    num_faults = len(server.faults)
    ask_all(replace(endpoint, timeout_s=0.2, concurrency=1, attempts=20), plan, record, StopSignal())
    assert len(server.bodies) == num_faults + len(plan.questions)
    assert set(server.num_answered.values()) == {1}
    outcome = read_answers(plan.targets, plan.questions, plan.labels, record, server.url)
    assert (outcome.num_answers, outcome.faults) == (len(plan.questions), Counter())


@pytest.mark.parametrize(
    ("fault", "message", "most_requests"),
    [
        (status(401, f"wrong key {KEY}"), r"HTTP status 401: wrong key \[key\]", 2),
        (status(404), "HTTP status 404: no", 2),
        (status(302, Location="http://127.0.0.1:9/elsewhere"), "HTTP status 302", 2),
        (status(400, "too long"), "HTTP status 400: too long", 7),
        (sends(b"{}"), "a reply that is no chat completion", 4 * 7),
    ],
)
def test_a_server_that_answers_nothing_is_not_asked_for_long(
    fault: Behaviour,
    message: str,
    most_requests: int,
    server: ChatServer,
    endpoint: Endpoint,
    plan: FewShot,
    record: AnswerRecord,
) -> None:
    server.always = lambda prompt: fault
    with pytest.raises(EndpointError, match=message) as raised:
        ask_all(replace(endpoint, concurrency=1), plan, record, StopSignal())
    assert len(server.bodies) <= most_requests
    assert KEY not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not record.path.exists()


def test_a_call_that_fails_leaves_the_others_alone(
    server: ChatServer, endpoint: Endpoint, plan: FewShot, record: AnswerRecord
) -> None:
    server.always = lambda prompt: status(400, "too long") if prompt == plan.texts[3] else None
    with pytest.raises(EndpointError, match=r"1 calls failed \(HTTP status 400: too long\).*--replay"):
        ask_all(endpoint, plan, record, StopSignal())
    outcome = read_answers(plan.targets, plan.questions, plan.labels, record, None)
    assert outcome.num_missing == 1
    assert "1 targets have no answer" in str(outcome)
    dialogue, target = plan.targets[3]
    assert (dialogue.id, target) not in {(p.dialogue_id, p.target) for p in outcome.predictions}
    server.always = lambda prompt: None
    ask_all(endpoint, plan, record, StopSignal())
    assert set(server.num_answered.values()) == {1}


def test_answers_of_any_sort_are_recorded_and_counted(
    server: ChatServer, endpoint: Endpoint, plan: FewShot, record: AnswerRecord
) -> None:
    server.faults = [
        sends(completion("I cannot help with that.")),
        sends(completion(None)),
        sends(completion('{"emotion": "joy\ud800", "causes": []}')),
    ]
    ask_all(replace(endpoint, concurrency=1), plan, record, StopSignal())
    assert len(server.bodies) == len(plan.questions)
    outcome = read_answers(plan.targets, plan.questions, plan.labels, AnswerRecord(record.path), None)
    assert outcome.faults == {"not in the form": 2, "unknown emotion": 1}
    assert "2 × not in the form, 1 × unknown emotion" in str(outcome)


def test_a_stop_keeps_what_was_answered(
    server: ChatServer, endpoint: Endpoint, plan: FewShot, record: AnswerRecord
) -> None:
    with pytest.raises(Stopped, match=r"of \d+ answers are in .*; run the same command again"):
        ask_all(replace(endpoint, concurrency=1), plan, record, StopAfter(5))
    assert 0 < sum(server.num_answered.values()) < len(plan.questions)
    ask_all(endpoint, plan, record, StopSignal())
    assert set(server.num_answered.values()) == {1}


def test_a_record_is_read_as_it_was_written_or_refused(plan: FewShot, record: AnswerRecord) -> None:
    def line(n: int, source: str) -> str:
        question = plan.questions[n]
        values = {"call": question.call, "source": source, "dialogue_id": question.dialogue_id}
        return json.dumps({**values, "target": question.target, "text": "x"}) + "\n"

    whole = line(0, "a") + line(1, "a")
    record.path.write_text(whole + line(2, "a")[:40])
    torn = AnswerRecord(record.path)
    assert torn.pending(plan.questions, "a") == list(range(2, len(plan.questions)))
    torn.add([found for question in plan.questions[:1] if (found := torn.find(question, "a"))])
    assert AnswerRecord(record.path).path.read_text().startswith(whole + '{"call"')
    record.path.write_text(whole + line(1, "b"))
    both = AnswerRecord(record.path)
    assert both.find(plan.questions[0], None) and both.find(plan.questions[1], "b")
    with pytest.raises(PredictionError, match="answers of a and of b"):
        both.find(plan.questions[1], None)
    record.path.write_text(line(0, "a") + "nonsense\n")
    with pytest.raises(PredictionError, match=r"line 2: the line: .*remove the line"):
        AnswerRecord(record.path)


def test_the_example_shows_all_that_an_answer_may_hold(training: list[Dialogue]) -> None:
    dialogue, turn = find_example(training)
    causes = [cause.turn for cause in gold_answer(dialogue, turn).causes]
    assert causes[0] < turn == causes[-1]
    other, _ = find_example(training, without={endpoints.text_digest(dialogue)})
    assert other.id != dialogue.id
    assert find_example(training, f"{dialogue.id}/1") == (dialogue, 1)
    for wanted in (f"{dialogue.id}/99", "nobody/1", dialogue.id, f"{dialogue.id}/x"):
        with pytest.raises(CorpusError, match="DIALOGUE/TURN"):
            find_example(training, wanted)
    bare = [replace(d, utterances=tuple(replace(u, evidence=None) for u in d.utterances)) for d in training]
    with pytest.raises(CorpusError, match="holds no example"):
        find_example(bare)


def test_the_command_counts_asks_goes_on_after_a_kill_and_replays(
    server: ChatServer, plan: FewShot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads(bundled_sample("test").read_text())
    corpus, output = tmp_path / "few.json", tmp_path / "out.jsonl"
    corpus.write_text(json.dumps({id: raw[id] for id in list(raw)[:FEW]}))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    common = ["baseline", "prompt", "--corpus", str(corpus), "--train", str(bundled_sample("train"))]
    common += ["--model", "some-model", "--output", str(output)]
    url = ["--base-url", server.url + "/"]

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*common, *arguments])
        assert KEY not in result.output
        return result

    priced = run(*url, "--dry-run", "--input-price", "1000000", "--output-price", "0")
    tokens = sum(-(-len(text) // 4) for text in plan.texts)
    assert f"{len(plan.texts)} calls to make (0 are recorded): about {tokens:,}" in priced.output
    assert f"${tokens:.2f}" in priced.output
    assert not server.bodies and list(tmp_path.iterdir()) == [corpus]

    # Killed while the server holds back the rest: what it had answered before is in the record.
    hold = threading.Event()
    server.always = lambda prompt: None if len(server.num_answered) < 5 else lambda *_: hold.wait(60) and None
    process = start_python("-m", "kdecs.cli", *common, *url, "--concurrency", "1")
    answers = tmp_path / "out.answers.jsonl"
    wait_until(lambda: answers.exists() and len(answers.read_bytes().splitlines()) == 5, "five are recorded")
    process.send_signal(signal.SIGKILL)
    printed = "".join(process.communicate())
    hold.set()
    server.always = lambda prompt: None
    assert KEY not in printed and not output.exists()
    result = run(*url)
    assert result.exit_code == 0, result.output
    assert set(server.num_answered.values()) == {1}
    assert len(server.num_answered) == len(plan.questions)
    assert f"{len(plan.questions)} answers; faults: none" in result.output
    assert len(read_predictions(output, read_corpus(corpus))) == sum(target for _, target in plan.targets)

    first, num_asked = output.read_bytes(), len(server.bodies)
    output.unlink()
    assert run("--replay").exit_code == 0
    assert output.read_bytes() == first and len(server.bodies) == num_asked
    for name in ("out.jsonl", "out.answers.jsonl"):
        assert KEY not in (tmp_path / name).read_text()
    # Other options are other calls, which nobody has answered.
    assert f"{len(plan.questions)} calls to make" in run(*url, "--dry-run", "--option", "seed=1").output
    assert len(server.bodies) == num_asked


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--base-url", "http://h", "--input-price", "1"],
        ["--replay", "--option", "model=1"],
        ["--replay", "--option", "a=b"],
        ["--replay", "--option", "a=NaN"],
        ["--replay", "--answers", "OUTPUT"],
    ],
)
def test_wrong_usage_is_refused_before_any_work(arguments: list[str], tmp_path: Path) -> None:
    paths = [part for name in ("corpus", "train", "output") for part in (f"--{name}", str(tmp_path / name))]
    given = [part.replace("OUTPUT", str(tmp_path / "output")) for part in arguments]
    assert CliRunner().invoke(app, ["baseline", "prompt", *paths, "--model", "m", *given]).exit_code == 2
