"""Mutated valid files: every input gives a corpus or a clear refusal, never another exception."""

import copy
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdecs.corpus.pairs import count_rows, pairs_of
from kdecs.corpus.reading import bundled_sample, find_faults, iter_dialogues, read_corpus
from kdecs.corpus.splits import find_duplicates
from kdecs.corpus.statistics import statistics_of
from kdecs.errors import CorpusError

SCALARS: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        10**6,
        10**20,
        10**4000,
        1.0,
        1.5,
        1e308,
        "",
        " ",
        "b",
        "c",
        "1",
        "Oh .",
    ),
    *(
        "happy",
        "neutral",
        "bliss",
        "\ud800",
        "\x00",
        "\u2028",
        "a" * 200_000,
        "😀",
        "We won",
        [],
        {},
        [[]],
        {"b": 1},
    ),
)
BYTES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"NaN",
    b"9" * 5000,
)


def nodes_of(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside."""
    found = [] if found is None else found
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            nodes_of(value[key], found)
    return found


def mutate_value(document: Any, rng: random.Random) -> None:
    """Replace, delete, repeat, move or rename one value somewhere in the document."""
    nodes = nodes_of(document)
    if not nodes:
        return
    container, key = rng.choice(nodes)
    match rng.randrange(6):
        case 0:
            container[key] = copy.deepcopy(rng.choice(SCALARS))
        case 1:
            del container[key]
        case 2 if isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
        case 3:
            other, other_key = rng.choice(nodes)
            container[key] = copy.deepcopy(other[other_key]) if other is not document else 7
        case 4 if isinstance(container, dict):
            container[rng.choice(("turn", "id", "b", "", "\ud800", "extra"))] = container.pop(key)
        case _ if isinstance(container, list):
            rng.shuffle(container)
        case _:
            container[key] = [container[key]]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert or double bytes, or write the text in another encoding."""
    if not data:
        return data
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    end = min(end, start + rng.choice((1, 5, 100)))
    match rng.randrange(6):
        case 0:
            return data[:start]
        case 1:
            return data[:start] + data[end:]
        case 2:
            return data[:start] + rng.choice(BYTES) + data[start:]
        case 3:
            return data[:start] + data[start:end] * 2 + data[end:]
        case 4:
            position = rng.randrange(len(data))
            return data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))]) + data[position + 1 :]
        case _:
            text = data.decode("utf-8", errors="replace")
            return text.encode(
                rng.choice(("utf-16", "utf-16-le", "latin-1", "utf-32", "utf-8-sig")), errors="replace"
            )


def mutated(document: dict[str, Any], rng: random.Random) -> tuple[bytes, str]:
    """A mutated file and its suffix: RECCON JSON or JSON lines, up to three mutations of value and bytes."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        mutate_value(document, rng)
    suffix = rng.choice((".json", ".jsonl"))
    if suffix == ".jsonl" or rng.random() < 0.1:
        lines = [
            {"id": key, "utterances": v[0] if isinstance(v, list) and v else v} for key, v in document.items()
        ]
        for line in lines[:1] * (rng.random() < 0.3):
            mutate_value(line, rng)
        data = "\n".join(json.dumps(line) for line in lines).encode()
    else:
        data = json.dumps(document, indent=rng.choice((None, 0))).encode()
    for _ in range(rng.choice((0, 0, 1, 2))):
        data = mutate_bytes(data, rng)
    return data, suffix


def outcome_of(path: Path, labelled: bool) -> str:
    """ "corpus" or "refusal" after checking that reading, verifying, streaming and pairing agree."""
    faults = find_faults(path, labelled=labelled)
    for fault in faults:
        assert len(str(fault).splitlines()) == 1
        str(fault).encode()
    if faults:
        with pytest.raises(CorpusError) as refusal:
            read_corpus(path, labelled=labelled)
        assert str(refusal.value).startswith(str(faults[0]))
        with pytest.raises(CorpusError):
            list(iter_dialogues(path, labelled=labelled))
        return "refusal"
    corpus = read_corpus(path, labelled=labelled)
    assert tuple(iter_dialogues(path, labelled=labelled)) == corpus.dialogues
    assert corpus.dialogues
    for dialogue in corpus.dialogues:
        assert [u.turn for u in dialogue.utterances] == list(range(1, len(dialogue.utterances) + 1))
        for universe in ("fold1", "fold1+neutral", "all"):
            pairs = pairs_of(dialogue, universe)
            assert len({pair.id for pair in pairs}) == len(pairs)
            rows = [row for pair in pairs for row in pair.row_ids]
            assert len(set(rows)) == len(rows) == sum(count_rows(pairs))
            for pair in pairs:
                text = dialogue.utterances[pair.candidate - 1].text
                assert all(span in text for span in pair.spans)
                assert len(pair.hash) == 32
    json.dumps(statistics_of(corpus).as_dict()).encode()
    assert len(find_duplicates(corpus, [corpus])) == len(corpus.dialogues)
    return "corpus"


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), labelled=st.booleans())
def test_a_mutated_file_is_read_or_refused(tmp_path_factory, make_valid_document, rng, labelled):
    data, suffix = mutated(make_valid_document(), rng)
    path = tmp_path_factory.getbasetemp() / f"mutated{suffix}"
    path.write_bytes(data)
    outcome_of(path, labelled)


def test_seeded_mutations_of_other_formats(tmp_path):
    said = [{"utterance_ID": n, "text": f"We won {n} !", "speaker": "A", "emotion": "joy"} for n in (1, 2)]
    pairs = [["2_joy", "1_We won"], ["1_joy", "2_2 !"], ["2_joy", "2"]]
    document = [{"conversation_ID": n, "conversation": said, "emotion-cause_pairs": pairs} for n in (1, 2)]
    texts = [
        "1 2\n(2,1),(2,2)\n1 | A | joy | We won ! | 0:1\n2 | B | joy | So ? | 0:2\n\n2 1\n\n1 | A | fear | Oh .\n",
        'dialogue,turn,speaker,text,emotion\n1,1,A,"We, too",joy\n1,2,B,So ?,neutral\n2,1,A,"Oh ""b"" .",fear\n',
        "A: We won !\nB: So ?\n\nA: Oh: no .\n",
    ]
    outcomes: Counter[str] = Counter()
    path = tmp_path / "mutated"
    for seed in range(600):
        rng = random.Random(seed)
        if seed % 2:
            changed = copy.deepcopy(document)
            for _ in range(rng.choice((0, 1, 2))):
                mutate_value(changed, rng)
            data = json.dumps(changed).encode()
        else:
            data = rng.choice(texts).encode()
        for _ in range(rng.choice((0, 1, 1, 2))):
            data = mutate_bytes(data, rng)
        path.write_bytes(data)
        outcomes[outcome_of(path, labelled=seed % 4 > 1)] += 1
    assert min(outcomes["corpus"], outcomes["refusal"]) > 100


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".json", ".jsonl"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(data)
    assert outcome_of(path, labelled=True) == "refusal"


def campaign(path: Path, document: dict[str, Any], num_inputs: int) -> Counter[str]:
    """Outcomes of seeded mutations; any exception but a refusal ends it."""
    outcomes: Counter[str] = Counter()
    for seed in range(num_inputs):
        rng = random.Random(seed)
        data, suffix = mutated(document, rng)
        file = path.with_suffix(suffix)
        file.write_bytes(data)
        outcomes[outcome_of(file, labelled=seed % 4 != 0)] += 1
    return outcomes


def test_seeded_mutations(tmp_path, valid_document):
    outcomes = campaign(tmp_path / "mutated", valid_document, 1000)
    assert outcomes.total() == 1000
    # Both outcomes must be common, or the mutations test little.
    assert min(outcomes.values()) > 100


@pytest.mark.slow
def test_the_campaign_or_a_seeded_fifth_of_it(tmp_path, valid_document, capsys):
    fifths = 5 if os.environ.get("KDECS_CAMPAIGN") == "1" else 1
    sample = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    outcomes = campaign(tmp_path / "worked", valid_document, 4_000 * fifths)
    outcomes += campaign(tmp_path / "sample", dict(list(sample.items())[:3]), 1_000 * fifths)
    with capsys.disabled():
        print(f"\n{outcomes.total()} inputs: {dict(outcomes)}, crashes 0")
    assert outcomes.total() == 5_000 * fifths
