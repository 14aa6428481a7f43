"""JSON lines larger than memory: reading and verifying keep ids, not dialogues."""

import json
import tracemalloc

import pytest

from kdecs.corpus.reading import find_faults, iter_dialogues

NUM_DIALOGUES = 3_000


@pytest.fixture(scope="module")
def lines_file(tmp_path_factory, make_valid_document):
    path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
    utterances = make_valid_document()["tr_1"][0]
    for utterance in utterances:
        utterance["free"] = "x" * 400
    with path.open("w") as file:
        for n in range(NUM_DIALOGUES):
            file.write(json.dumps({"id": f"d_{n}", "utterances": utterances}) + "\n")
    return path


@pytest.mark.parametrize("consume", [lambda path: sum(1 for _ in iter_dialogues(path)), find_faults])
def test_streaming_keeps_no_dialogue(lines_file, consume):
    tracemalloc.start()
    consume(lines_file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lines_file.stat().st_size > 8e6
    assert peak < 2e6
