"""A project of three dialogues of the sample, and a server that answers questions about the sample with gold labels."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer, causes_answer, emotions_answer, running

from kdecs.annotate.project import Project, create_project
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import FINE_EMOTIONS, Dialogue
from kdecs.endpoint import client

FEW = 3


@pytest.fixture(scope="session")
def all_gold() -> list[Dialogue]:
    return list(read_corpus(bundled_sample("test")).dialogues)


@pytest.fixture(scope="session")
def gold(all_gold: list[Dialogue]) -> list[Dialogue]:
    return all_gold[:FEW]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The dialogues in a labelled file."""
    raw = json.loads(bundled_sample("test").read_text(encoding="utf-8"))
    path = tmp_path / "few.json"
    path.write_text(json.dumps({name: raw[name] for name in list(raw)[:FEW]}), encoding="utf-8")
    return path


@pytest.fixture
def project(corpus: Path, tmp_path: Path) -> Project:
    return create_project(tmp_path / "project", [corpus], labels="fine", annotators=["ann", "ben", "cem"])


@pytest.fixture(scope="session")
def gold_answer(all_gold: list[Dialogue]) -> Callable[[list[dict[str, str]]], str]:
    """What the server answers to the messages of a request."""
    assert {u.emotion for d in all_gold for u in d.utterances} <= set(FINE_EMOTIONS)
    first_line = {d.utterances[0].text: d for d in all_gold}

    def answer(messages: list[dict[str, str]]) -> str:
        prompt = messages[0]["content"]
        dialogue = first_line[prompt.partition("as follows:\n1 ")[2].partition(": ")[2].partition("\n")[0]]
        return emotions_answer(dialogue) if prompt.startswith("Identify") else causes_answer(dialogue)

    return answer


@pytest.fixture
def server(gold_answer: Callable[[list[dict[str, str]]], str]) -> Iterator[ChatServer]:
    with running(ChatServer(gold_answer)) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat a failed call at once."""
    monkeypatch.setattr(client.random, "uniform", lambda low, high: 0.0)
