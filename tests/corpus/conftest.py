import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import made_once, save_tiny_encoder

from kdecs.corpus.reading import bundled_sample

RECCON = Path(os.environ.get("KDECS_RECCON", Path(__file__).parents[2].parent / "shared" / "reccon"))


def utterance(turn: int, text: str, emotion: str = "neutral", evidence: list | None = None) -> dict[str, Any]:
    """A raw utterance; `evidence` is a list of (turn or "b", span)."""
    raw: dict[str, Any] = {"turn": turn, "speaker": "AB"[turn % 2], "utterance": text, "emotion": emotion}
    if evidence is not None:
        raw["expanded emotion cause evidence"] = [turn for turn, _ in evidence]
        raw["expanded emotion cause span"] = [span for _, span in evidence]
        raw["type"] = ["no-context"]
    return raw


def make_valid_document() -> dict[str, Any]:
    """A small RECCON document with every odd thing that is valid."""
    return {
        "tr_1": [
            [
                utterance(1, "We won the game !", "happy", [(1, "won the game")]),
                utterance(
                    2, "Really ? We won the game !", "surprised", [(2, "We won"), (1, "We won"), (1, "game")]
                ),
                utterance(3, "Oh ."),
                utterance(
                    4, "I lost my bag in the crowd .", "sad", [("b", "b"), (4, "lost my bag"), (3, "Oh .")]
                ),
                utterance(5, "Oh .", "anger", [("b", "b")]),
            ]
        ],
        "tr_2": [
            [
                utterance(1, "Hello .", "excited", [(2, "news"), (1, "Hello .")]),
                utterance(2, "Good news !", "frustrated", []) | {"flag": "F", "explanation": {"free": [1.5]}},
                utterance(3, "No evidence key here .", "gratitude"),
            ]
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a document (JSON value, text or bytes) to a file."""

    def write_document(document: Any, name: str = "corpus.json") -> Path:
        path = tmp_path / name
        if isinstance(document, bytes):
            path.write_bytes(document)
        else:
            path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        return path

    return write_document


@pytest.fixture
def valid_document() -> dict[str, Any]:
    return make_valid_document()


@pytest.fixture(scope="session", name="make_valid_document")
def valid_document_maker() -> Callable[[], dict[str, Any]]:
    return make_valid_document


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer RoBERTa with its tokenizer."""
    return made_once(tmp_path_factory, "student-base", save_tiny_encoder)


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first turns of three dialogues of the bundled sample's training and validation split."""
    files = {}
    for split in ("train", "valid"):
        raw = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        files[split] = tmp_path_factory.mktemp("corpus") / f"{split}.json"
        files[split].write_text(json.dumps({key: [raw[key][0][:6]] for key in list(raw)[:3]}))
    return files
