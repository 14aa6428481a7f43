"""A run labels what the model says and nothing else, through faults of the server, faulty answers and kills."""

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import (
    KEY,
    Behaviour,
    ChatServer,
    Handler,
    emotions_answer,
    gold_causes,
    sends,
    status,
)
from support import StopAfter, start_python
from typer.testing import CliRunner

from kdecs.annotate.labels import Annotation
from kdecs.annotate.project import Project, RunSettings, create_project
from kdecs.annotate.running import Run, Summary, annotation_of_run, run_model
from kdecs.cli import app
from kdecs.corpus.reading import bundled_sample
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.endpoint.record import call_hash
from kdecs.errors import ConfigError, EndpointError, PredictionError, Stopped
from kdecs.process import StopSignal


@pytest.fixture
def begun(project: Project, server: ChatServer) -> Run:
    return Run.start(project, "some", RunSettings(model="some-model", base_url=server.url))


def label(run: Run, stop: StopSignal | None = None, **connection: Any) -> Annotation:
    endpoint = run.endpoint(**{"key": KEY, "timeout_s": 30, "attempts": 4} | connection)
    run_model(run, endpoint, stop or StopSignal(), prices=(1.0, 1.0))
    return annotation_of_run(Run.open(run.project, run.name))


def assert_gold_or_open(annotation: Annotation, gold: list[Dialogue]) -> Counter[str]:
    """No label differs from the only one that the server ever gave; counts what is open."""
    num_open: Counter[str] = Counter()
    for dialogue in gold:
        for utterance in dialogue.utterances:
            found = annotation.labels[dialogue.id, utterance.turn]
            num_open["emotions"] += found.emotion is None
            num_open["causes"] += found.causes is None
            assert found.emotion in (None, utterance.emotion)
            if found.causes is not None:
                expected = {} if utterance.emotion == NEUTRAL else gold_causes(dialogue, utterance.turn)
                assert {cause.turn: cause.span for cause in found.causes} == expected
    return num_open


def test_two_calls_per_dialogue_give_all_labels_and_a_second_start_makes_none(
    begun: Run, server: ChatServer, gold: list[Dialogue]
) -> None:
    annotation = label(begun)
    assert not +assert_gold_or_open(annotation, gold)
    assert len(server.bodies) == 2 * len(gold) and set(server.num_answered.values()) == {1}
    assert server.bodies[0]["response_format"]["json_schema"]["strict"] is True
    assert label(begun) == annotation and len(server.bodies) == 2 * len(gold)
    some = annotation.labels[gold[0].id, 1]
    calls = {call_hash(body) for body in server.bodies}
    assert some.emotion_call in calls and some.at is not None and annotation.model == "some-model"
    summary = str(Summary.of(begun, begun.labels()))
    assert "3 of 3 dialogues" in summary and "0 open" in summary and "faults in the answers: none" in summary
    everything = "".join(path.read_text() for path in begun.project.root.rglob("*") if path.is_file())
    assert KEY not in everything + summary + repr(begun)


def test_a_server_that_refuses_the_schema_is_asked_without_it(
    begun: Run, server: ChatServer, gold: list[Dialogue]
) -> None:
    def refuse(handler: Handler, prompt: str) -> None:
        body = server.bodies[-1]
        if "response_format" in body:
            handler.reply(b'{"error": {"message": "response_format: unknown"}}', status=422)
        else:
            handler.answer(body)

    server.always = lambda prompt: refuse
    assert not +assert_gold_or_open(label(begun, concurrency=1), gold)
    assert sum("response_format" in body for body in server.bodies) == 1
    num_asked = len(server.bodies)
    label(begun)
    assert len(server.bodies) == num_asked
    # Another fault of the same status is reported, and is not taken for a refusal of the schema.
    other = Run.start(begun.project, "other", RunSettings(model="other", base_url=server.url))
    server.always = lambda prompt: status(400, "too long")
    with pytest.raises(EndpointError, match="400: too long"):
        label(other, concurrency=1)


def test_faulty_answers_are_asked_again_with_their_faults_and_then_left_open(
    begun: Run, server: ChatServer, gold: list[Dialogue]
) -> None:
    invented = emotions_answer(gold[0]).replace(f'"{gold[0].utterances[0].emotion}"', '"joy"', 1)
    server.faults = [lambda handler, prompt: handler.answer(server.bodies[-1], invented)]
    assert not +assert_gold_or_open(label(begun, concurrency=1), gold)
    asked_again = server.bodies[1]["messages"]
    assert [message["role"] for message in asked_again] == ["user", "assistant", "user"]
    assert (
        asked_again[1]["content"] == invented and "turn 1: 'joy' is not one of" in asked_again[2]["content"]
    )
    assert Summary.of(begun, begun.labels()).faults == {"unknown label": 1}

    stubborn = Run.start(begun.project, "stubborn", RunSettings(model="stubborn", base_url=server.url))
    server.answer = lambda messages: "I would rather talk about the weather."
    annotation = label(stubborn)
    num_turns = sum(len(dialogue.utterances) for dialogue in gold)
    assert assert_gold_or_open(annotation, gold) == {"emotions": num_turns, "causes": num_turns}
    # Asked again twice at most, and not at all where the same question would bring the same answer.
    assert Counter(body["model"] for body in server.bodies)["stubborn"] == 2 * len(gold)
    assert label(stubborn) == annotation
    with pytest.raises(ConfigError, match=r"was begun with model 'stubborn'.*--run NAME"):
        Run.start(begun.project, "stubborn", RunSettings(model="other"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(401, f"wrong key {KEY}"), r"HTTP status 401: wrong key \[key\]"),
        (sends(b"{}"), "no chat completion"),
    ],
)
def test_a_failed_run_says_why_in_one_line_without_the_key(
    fault: Behaviour, message: str, begun: Run, server: ChatServer, gold: list[Dialogue]
) -> None:
    server.always = lambda prompt: fault
    with pytest.raises(EndpointError, match=message) as raised:
        label(begun, concurrency=1)
    assert KEY not in str(raised.value) and "\n" not in str(raised.value)
    assert annotation_of_run(begun).labels == {}
    server.always = lambda prompt: None
    assert not +assert_gold_or_open(label(begun), gold)


def test_a_stop_keeps_what_was_answered_and_one_run_works_at_a_time(
    begun: Run, server: ChatServer, gold: list[Dialogue]
) -> None:
    with pytest.raises(Stopped, match=r"of 3 dialogues are labelled in .*run the same command again"):
        label(begun, StopAfter(6), concurrency=1)
    assert 0 < len(server.bodies) < 2 * len(gold)
    with begun.record.recording(), pytest.raises(PredictionError, match="another run records"):
        label(begun)
    assert not +assert_gold_or_open(label(begun), gold)
    assert set(server.num_answered.values()) == {1}


def test_runs_of_one_model_stand_side_by_side(
    project: Project, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    common = ["annotate", "run", str(project.root), "--model", "org/m:1", "--base-url", server.url + "/"]
    common += ["--key-variable", "MY_KEY", "--input-price", "1000", "--output-price", "1000"]
    for seed in (1, 2):
        named = ["--run", "second", "--option", "seed=2"] if seed == 2 else []
        result = CliRunner().invoke(app, common + named)
        assert result.exit_code == 0 and KEY not in result.output, result.output
        assert "0 open" in result.output and "$0.0780" in result.output
    assert project.run_names == ["org-m-1", "second"]
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert Counter(body.get("seed") for body in server.bodies) == {None: 6, 2: 6}
    wrong = CliRunner().invoke(app, ["annotate", "run", str(project.root), "--model", "ann"])
    assert wrong.exit_code != 0


DRIVER = """
import json, os, random, signal, sys, time
from kdecs import cli
import kdecs.annotate.running, kdecs.annotate.planning, kdecs.endpoint.client as client
client.random.uniform = lambda low, high: 0.0
assert "torch" not in sys.modules
seed, most, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
dice, num_killed, codes = random.Random(seed), 0, []
while True:
    child = os.fork()
    if child == 0:
        sys.argv = ["kdecs", *arguments]
        cli.main()
    if num_killed < most:
        time.sleep(dice.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    num_killed += code == -signal.SIGKILL
    if code == 0:
        break
    assert code in (-signal.SIGKILL, 1), code
    codes.append(code)
print(json.dumps({"killed": num_killed, "failed": codes.count(1)}))
"""


class Troubles:
    """Turns a server bad: a share of requests meets a fault, drawn at random. Counts each kind."""

    def __init__(self, server: ChatServer, record: Path, seed: int, share: float) -> None:
        self.server, self.record, self.dice, self.share = server, record, random.Random(seed), share
        self.met: Counter[str] = Counter()
        self.num_repeated = 0
        self.lock = threading.Lock()

    def __call__(self, prompt: str) -> Behaviour | None:
        body = self.server.bodies[-1]
        # The server's lock is held. A call that the record holds must never be made again.
        if self.record.exists() and call_hash(body) in self.record.read_text():
            self.num_repeated += 1
        if self.dice.random() > self.share:
            return None
        name = self.dice.choice(list(self.kinds(body)))
        self.met[name] += 1
        return self.kinds(body)[name]

    def kinds(self, body: dict[str, Any]) -> dict[str, Behaviour]:
        whole = self.server.answer(body["messages"])
        value = json.loads(whole)
        [name] = value
        entries = value[name]

        def says(text: str) -> Behaviour:
            return lambda handler, prompt: handler.answer(body, text)

        def dump(changed: list[Any]) -> str:
            return json.dumps({name: changed})

        first = dict(entries[0])
        spoilt = {**first, "emotion": "joy"} if name == "emotions" else {
            **first, "causes": [{"turn": 1, "span": "words that nobody said"}]
        }  # fmt: skip
        return {
            "status 429": status(429, Retry_After="0"),
            "status 500": status(500, f"internal {KEY}"),
            "status 503": status(503),
            "no answer in time": lambda handler, prompt: time.sleep(1.5),
            "connection closed": lambda handler, prompt: handler.connection.close(),
            "half a reply": sends(b'{"choices": [{"mess', length=500),
            "HTML instead of JSON": sends(b"<html>bad gateway</html>"),
            "JSON of another kind": sends(b'{"choices": []}'),
            "prose": says("Certainly! The first speaker is happy."),
            "no content": says(""),
            "half an answer": says(whole[: len(whole) // 2]),
            "a label or span that does not exist": says(dump([spoilt, *entries[1:]])),
            "a turn left out": says(dump(entries[1:])),
            "a turn twice": says(dump([*entries, spoilt])),
            "a turn that is not there": says(dump([*entries, {**first, next(iter(first)): 99}])),
        }


def campaign(
    project: Project, server: ChatServer, gold: list[Dialogue], *, seed: int, kills: int, share: float
) -> tuple[Troubles, dict[str, int], Counter[str]]:
    """Kill a run at random points of a bad server until it ends; what it met, how often it died, what is open."""
    troubles = Troubles(server, project.run_folder("m") / "answers.jsonl", seed, share)
    server.always = troubles
    arguments = ["annotate", "run", project.root, "--model", "m", "--base-url", server.url]
    limits = ["--timeout", 1, "--attempts", 20, "--concurrency", 2, "--per-minute", 1500, "--repeats", 3]
    process = start_python("-c", DRIVER, seed, kills, *arguments, *limits, OPENAI_API_KEY=KEY)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    written = "".join(path.read_text() for path in project.root.rglob("*") if path.is_file())
    assert KEY not in printed + errors + written
    annotation = annotation_of_run(Run.open(project, "m"))
    return troubles, json.loads(printed.splitlines()[-1]), assert_gold_or_open(annotation, gold)


@pytest.mark.slow
def test_kills_and_faults_repeat_no_recorded_call_and_guess_no_label(
    server: ChatServer, all_gold: list[Dialogue], tmp_path: Path
) -> None:
    project = create_project(tmp_path / "project", [bundled_sample("test")], labels="fine")
    troubles, ends, num_open = campaign(project, server, all_gold, seed=1, kills=8, share=0.55)
    num_requests = len(server.bodies)
    print(f"{num_requests} requests, {ends}, open {dict(num_open)}, {dict(sorted(troubles.met.items()))}")
    assert ends["killed"] >= 4 and sum(troubles.met.values()) >= 15 and len(troubles.met) >= 6
    assert troubles.num_repeated == 0
