import csv
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kdecs.corpus.pairs import candidate_pairs, count_rows, pairs_of, training_subset
from kdecs.corpus.reading import bundled_sample, find_faults, read_corpus
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import ConfigError

RECCON = Path(os.environ.get("KDECS_RECCON", Path(__file__).parents[2].parent / "shared" / "reccon"))
needs_reccon = pytest.mark.skipif(not RECCON.is_dir(), reason="the RECCON files are not here (KDECS_RECCON)")

# dialogues, utterances, positive rows, negative rows, pairs of "all": RECCON's own released row ids.
COUNTS = {
    "train": (834, 8206, 7269, 20646, 52419),
    "valid": (47, 493, 347, 838, 3170),
    "test": (225, 2405, 1894, 5330, 15819),
}


def dialogue_of(*texts: str, speakers: str = "", emotion: str = "neutral") -> Dialogue:
    speakers = speakers or "AB" * len(texts)
    utterances = (
        Utterance(n, s, t, emotion, None) for n, (t, s) in enumerate(zip(texts, speakers, strict=False), 1)
    )
    return Dialogue("d", tuple(utterances))


@needs_reccon
@pytest.mark.parametrize("split", COUNTS)
def test_counts_equal_the_released_row_ids(split):
    corpus = read_corpus(RECCON / f"dailydialog_{split}.json")
    fold1 = count_rows(pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue))
    num_all = sum(len(pairs_of(dialogue, "all")) for dialogue in corpus.dialogues)
    num_utterances = sum(len(dialogue.utterances) for dialogue in corpus.dialogues)
    assert (len(corpus.dialogues), num_utterances, *fold1, num_all) == COUNTS[split]


@needs_reccon
def test_row_ids_are_the_released_ones():
    corpus = read_corpus(RECCON / "dailydialog_valid.json")
    ids = [row for dialogue in corpus.dialogues for pair in pairs_of(dialogue) for row in pair.row_ids]
    with (RECCON / "fold1_valid_ids.csv").open(newline="", encoding="utf-8") as file:
        released = {row["id"]: row["labels"] for row in csv.DictReader(file)}
    assert len(ids) == len(released)
    assert set(ids) == set(released)
    assert {row for row in ids if "_true_cause_" in row} == {
        row for row, label in released.items() if label == "1"
    }


def test_row_ids_of_a_worked_dialogue(write, valid_document):
    corpus = read_corpus(write(valid_document))
    rows = {pair.id: pair.row_ids for pair in pairs_of(corpus.dialogues[0])}
    head = "dailydialog_tr_1_utt"
    assert rows["tr_1/1/1"] == (f"{head}_1_true_cause_utt_1_span_0",)
    assert rows["tr_1/2/1"] == (f"{head}_2_true_cause_utt_1_span_1", f"{head}_2_true_cause_utt_1_span_2")
    assert rows["tr_1/2/2"] == (f"{head}_2_true_cause_utt_2_span_0",)
    # "b" takes no number: the causes inside the dialogue are counted alone.
    assert rows["tr_1/4/4"] == (f"{head}_4_true_cause_utt_4_span_0",)
    assert rows["tr_1/4/1"] == (f"{head}_4_impossible_cause_utt_1",)
    assert [pair.id for pair in pairs_of(corpus.dialogues[0])][-5:] == [f"tr_1/5/{j}" for j in range(1, 6)]


def test_a_cause_in_the_future_makes_no_row_but_keeps_its_number(write, valid_document):
    corpus = read_corpus(write(valid_document))
    first = pairs_of(corpus.dialogues[1])[0]
    assert first.row_ids == ("dailydialog_tr_2_utt_1_true_cause_utt_1_span_1",)
    assert first.spans == ("Hello .",)
    assert len(corpus.warnings) == 1
    assert "tr_2, turn 1" in corpus.warnings[0]


def test_universes_of_a_worked_dialogue(write, valid_document):
    dialogue = read_corpus(write(valid_document)).dialogues[0]
    fold1, trained, everything = (pairs_of(dialogue, u) for u in ("fold1", "fold1+neutral", "all"))
    assert [pair.id for pair in trained if pair not in fold1] == ["tr_1/3/3"]
    assert len(everything) == 15
    assert set(fold1) < set(trained) < set(everything)
    assert count_rows(everything)[0] == count_rows(fold1)[0] == 6
    assert [p.is_cause for p in fold1 if p.target == 5] == [False] * 5


def test_emotional_targets_need_no_annotation_where_nobody_has_annotated(write, valid_document):
    dialogue = read_corpus(write(valid_document)).dialogues[0]
    assert pairs_of(dialogue, "emotional+neutral") == pairs_of(dialogue, "fold1+neutral")
    bare = replace(dialogue, utterances=tuple(replace(u, evidence=None) for u in dialogue.utterances))
    assert [pair.id for pair in pairs_of(bare, "fold1+neutral")] == ["tr_1/3/3"]
    found, same = (pairs_of(d, "emotional+neutral") for d in (bare, dialogue))
    assert [pair.id for pair in found] == [pair.id for pair in same]
    assert not any(pair.is_cause for pair in found)


def test_candidates_of_an_unlabelled_dialogue():
    pairs = candidate_pairs(dialogue_of("a", "b", "c"))
    assert [(p.target, p.candidate) for p in pairs] == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    near = candidate_pairs(dialogue_of("a", "b", "c"), max_distance=1)
    assert [(p.target, p.candidate) for p in near] == [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]


def test_the_hash_covers_context_alone():
    dialogue = dialogue_of("a", "b", "c")
    assert len(dialogue.context_hashes[1]) == 32
    assert dialogue.context_hashes[1] == dialogue_of("a", "b", "x").context_hashes[1]
    assert dialogue.context_hashes[1] == dialogue_of("a", "b", emotion="anger").context_hashes[1]
    assert dialogue.context_hashes[1] != dialogue_of("a", "x").context_hashes[1]
    assert dialogue.context_hashes[1] != dialogue_of("a", "b", speakers="AA").context_hashes[1]
    assert dialogue.context_hashes[2] != dialogue.context_hashes[1]


def test_the_hash_frames_its_strings():
    contexts = [
        dialogue_of("ab", "c"),
        dialogue_of("a", "bc"),
        dialogue_of("abc"),
        dialogue_of("A", speakers="bc"),
    ]
    contexts.append(Dialogue("d", (Utterance(1, "AB", "c", None, None),)))
    contexts.append(Dialogue("d", (Utterance(1, "A", "Bc", None, None),)))
    hashes = [dialogue.context_hashes[-1] for dialogue in contexts]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_is_stable_across_releases():
    # Soft labels on disk are joined by it: a change of this value orphans all of them.
    assert dialogue_of("Hello .", "Hi !").context_hashes[1] == "17d2cd0ba455ae8f3ca76b0b5d1bb6c8"


def test_training_subsets_are_nested_and_seeded():
    ids = [f"tr_{n}" for n in range(97)]
    shares = [0.001, 0.1, 0.25, 0.5, 0.9, 1.0]
    subsets = [training_subset(ids, share, seed=3) for share in shares]
    assert [len(s) for s in subsets] == [1, 10, 25, 49, 88, 97]
    for small, large in itertools.pairwise(subsets):
        assert set(small) < set(large)
    assert subsets[-1] == list(range(97))
    assert training_subset(ids, 0.5, seed=4) != subsets[3]
    shuffled = training_subset(ids[::-1], 0.5, seed=3)
    assert {96 - position for position in shuffled} == set(subsets[3])
    for share in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            training_subset(ids, share, seed=3)


def test_the_bundled_sample_has_pairs_of_both_kinds():
    corpus = read_corpus(bundled_sample("train"))
    positive, negative = count_rows(pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue))
    assert positive > 50
    assert negative > positive
    json.dumps([pair.row_ids for dialogue in corpus.dialogues for pair in pairs_of(dialogue)])


def test_iemocap_like_dialogues(write):
    """One speaker several turns running, and emotional utterances without evidence."""
    key, span = "expanded emotion cause evidence", "expanded emotion cause span"
    utterances = [
        {"turn": 1, "speaker": "F", "utterance": "I can't find it .", "emotion": "frustrated"},
        {
            "turn": 2,
            "speaker": "F",
            "utterance": "I just can't .",
            "emotion": "frustrated",
            key: [1],
            span: ["find it"],
        },
        {"turn": 3, "speaker": "M", "utterance": "Here !", "emotion": "excited"},
    ]
    dialogue = read_corpus(write({"Ses05F_impro01": [utterances]})).dialogues[0]
    rows = [row for pair in pairs_of(dialogue) for row in pair.row_ids]
    assert rows == [
        "iemocap_Ses05F_impro01_utt_2_true_cause_utt_1_span_0",
        "iemocap_Ses05F_impro01_utt_2_impossible_cause_utt_2",
    ]
    assert len(pairs_of(dialogue, "all")) == 6
    assert pairs_of(dialogue, "fold1+neutral") == pairs_of(dialogue)


@needs_reccon
def test_reading_verifying_and_pairing_costs_a_few_calls_per_pair():
    """All of RECCON takes half a second. Calls are counted, because a time would be the machine's."""
    calls = num_pairs = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        path = RECCON / "dailydialog_valid.json"
        assert not find_faults(path)
        for dialogue in read_corpus(path).dialogues:
            pairs_of(dialogue)
            num_pairs += len(pairs_of(dialogue, "all"))
    finally:
        sys.setprofile(None)
    assert calls < 60 * num_pairs, "20 at present"


LATER = """[{"conversation_ID": 1, "conversation": [
 {"utterance_ID": 1, "text": "Oh no !", "speaker": "A", "emotion": "fear"},
 {"utterance_ID": 2, "text": "Wait .", "speaker": "B", "emotion": "neutral"},
 {"utterance_ID": 3, "text": "I lost my bag .", "speaker": "A", "emotion": "sadness"},
 {"utterance_ID": 4, "text": "Here .", "speaker": "B", "emotion": "neutral"}],
 "emotion-cause_pairs": [["1_fear", "3_lost my bag"], ["1_fear", "1_Oh"], ["3_sadness", "4_Here"],
  ["3_sadness", "3_I"]]}]"""


def test_candidates_reach_as_far_past_the_target_as_asked(tmp_path):
    (tmp_path / "later").write_text(LATER)
    (dialogue,) = read_corpus(tmp_path / "later").dialogues
    for after, causes in (
        (0, {(1, 1), (3, 3)}),
        (1, {(1, 1), (3, 3), (3, 4)}),
        (2, {(1, 1), (1, 3), (3, 3), (3, 4)}),
    ):
        pairs = pairs_of(dialogue, "fold1", after)
        assert [(p.target, p.candidate) for p in pairs] == [
            (i, j) for i in (1, 3) for j in range(1, 5) if j <= i + after
        ]
        assert {(p.target, p.candidate) for p in pairs if p.is_cause} == causes
        assert [(p.target, p.candidate) for p in candidate_pairs(dialogue, after=after)] == [
            (i, j) for i in range(1, 5) for j in range(1, min(4, i + after) + 1)
        ]
        rows = [row for pair in pairs for row in pair.row_ids]
        assert len(set(rows)) == len(rows) == sum(count_rows(pairs))
    # A later candidate is part of what a pair's labels depend on; the other pairs keep their hashes.
    assert pairs[2].hash == dialogue.context_hashes[2] != dialogue.context_hashes[0] == pairs[0].hash
    assert [p.spans for p in pairs if p.is_cause] == [("Oh",), ("lost my bag",), ("I",), ("Here",)]
    near = candidate_pairs(dialogue, max_distance=0, after=1)
    assert [(p.target, p.candidate) for p in near] == [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)]
