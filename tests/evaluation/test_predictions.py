import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import PredictionError
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import Prediction, by_pair, read_predictions, write_predictions

CORPUS = read_corpus(bundled_sample("test"))
FIRST = CORPUS.dialogues[0]
GOOD = {
    "dialogue_id": FIRST.id,
    "target": 2,
    "candidate": 1,
    "emotion": "happy",
    "is_cause": True,
    "span": "anything, even what the utterance does not hold",
}


def read(path, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return read_predictions(path, CORPUS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "predictions.jsonl"


def test_a_written_file_is_read_back(path):
    predictions = [
        Prediction(FIRST.id, 2, 1, "happiness", True, "Ünï ☃ \u2028 span"),
        Prediction(FIRST.id, 2, 2, "happiness", False, ""),
        Prediction(FIRST.id, 1, 1, None, True, ""),
    ]
    assert write_predictions(path, predictions) == 3
    assert read_predictions(path, CORPUS) == by_pair(predictions)


def test_what_is_accepted(path):
    found = read(
        path,
        GOOD | {"score": 0.5, "more": [1]},
        "",
        GOOD | {"candidate": 2, "is_cause": False, "span": " "},
        GOOD | {"target": 1, "candidate": 1, "emotion": "gratitude", "span": ""},
        # A candidate after its target is outside every universe, but both turns are known.
        GOOD | {"target": 1, "candidate": 2, "emotion": None},
    )
    assert [p.emotion for p in found.values()] == ["happiness", "happiness", "gratitude", None]
    assert read(path) == {}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(read_predictions(path, CORPUS)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dialogue_id": "nowhere"}, "the dialogue 'nowhere' is not in"),
        ({"target": 0}, "target is 0, expected a turn from 1 to"),
        ({"target": 99}, "target is 99, expected a turn from 1 to"),
        ({"candidate": 99}, "candidate is 99, expected a turn from 1 to"),
        ({"candidate": -1}, "candidate is -1"),
        ({"target": 2.0}, "target is 2.0, expected a turn"),
        ({"target": True}, "target is true, expected a turn"),
        ({"target": "2"}, "target is '2', expected a turn"),
        ({"candidate": 10**30}, "candidate is an integer of 31 digits"),
        ({"is_cause": 1}, "is_cause is 1, expected true or false"),
        ({"is_cause": "yes"}, "is_cause is 'yes'"),
        ({"is_cause": None}, "is_cause is null"),
        ({"is_cause": False}, "has is_cause false and the span 'anything"),
        ({"span": None}, "span is null, expected a string"),
        ({"span": "\ud800"}, "span is '\\ud800'"),
        ({"dialogue_id": 7}, "dialogue_id is 7"),
        ({"emotion": "bliss"}, "the emotion 'bliss' is unknown, expected one of"),
        ({"emotion": 3}, "emotion is 3, expected a string"),
        ({"emotion": ["anger"]}, "emotion is a list of 1"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(path, change, message):
    with pytest.raises(PredictionError) as refusal:
        read(path, GOOD, GOOD | {"candidate": 2} | change)
    assert str(refusal.value).startswith(f"{path}, line 2: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_refused(path, key):
    with pytest.raises(PredictionError, match=f"line 1: the key '{key}' is missing"):
        read(path, {name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, GOOD], "line 2: the pair .*/2/1 occurs a second time"),
        ([GOOD, GOOD | {"span": "", "is_cause": False}], "line 2: the pair .*/2/1 occurs a second time"),
        (
            [GOOD, GOOD | {"candidate": 2, "emotion": "anger"}],
            "line 2: the target .*/2 has the emotion 'anger' here",
        ),
        ([json.dumps(GOOD)[:-1]], "line 1: found no JSON"),
        ([json.dumps(GOOD)[:-1] + ', "span": ""}'], "line 1: found the key 'span' more than once"),
        (["[]"], "line 1: found a list of 0, expected an object"),
        (["NaN"], "line 1: found NaN"),
        (["[" * 100_000], "line 1: found JSON nested too deeply"),
        ([json.dumps([GOOD], indent=1)], "line 1: found no JSON"),
    ],
)
def test_a_faulty_file_is_refused(path, lines, message):
    with pytest.raises(PredictionError, match=message):
        read(path, *lines)


def test_unreadable_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.jsonl", tmp_path / "nul\0"):
        with pytest.raises(PredictionError):
            read_predictions(path, CORPUS)
    utf_16 = tmp_path / "utf_16.jsonl"
    utf_16.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(PredictionError, match="UTF-16"):
        read_predictions(utf_16, CORPUS)


def test_nothing_is_left_of_a_failed_write(path):
    def interrupted():
        yield Prediction(FIRST.id, 1, 1, None, False, "")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_predictions(path, interrupted())
    assert list(path.parent.iterdir()) == []


def test_pairs_given_twice_are_refused_in_memory():
    prediction = Prediction(FIRST.id, 1, 1, None, False, "")
    with pytest.raises(PredictionError, match="second time"):
        by_pair([prediction, prediction])


VALUES = st.sampled_from(
    [None, True, 0, 1, 2, 3.0, 10**25, "", " ", "x", "anger", "\ud800", [], {}, FIRST.id]
)


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.dictionaries(st.sampled_from(list(GOOD)), VALUES, max_size=2), max_size=4),
    cut=st.integers(0, 400),
)
def test_mutated_lines_are_scored_or_refused(tmp_path_factory, lines, cut):
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    text = "\n".join(json.dumps(GOOD | {"candidate": 1 + n} | line) for n, line in enumerate(lines))
    path.write_text(text[:cut] if cut < 200 else text)
    refusal = None
    try:
        scores = evaluate(CORPUS, read_predictions(path, CORPUS))
    except PredictionError as error:
        refusal = str(error)
    if refusal is not None:
        assert len(refusal.splitlines()) == 1
    else:
        assert all(0 <= value <= 100 for value in scores.values.values())


def test_seeded_byte_mutations_are_scored_or_refused(path):
    data = "\n".join(json.dumps(GOOD | {"candidate": n}) for n in (1, 2)).encode()
    outcomes: Counter[str] = Counter()
    for seed in range(600):
        rng = random.Random(seed)
        position = rng.randrange(len(data))
        replaced = rng.choice([b"", b"\x00", b"\xff", b'"', b"}", b"\n", bytes([data[position] ^ 1])])
        path.write_bytes(data[:position] + replaced + data[position + 1 :])
        try:
            read_predictions(path, CORPUS)
            outcomes["read"] += 1
        except PredictionError:
            outcomes["refused"] += 1
    assert outcomes.total() == 600
    assert min(outcomes.values()) > 50
