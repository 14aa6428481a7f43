"""Dialogues as tensors: offsets, labels against pairs and spans, groups of rows, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdecs.baselines.dialogues import (
    MAX_UTTERANCES,
    UNKNOWN,
    DialogueEncoder,
    batch_labels,
    row_groups,
    training_dialogue,
    utterance_batch,
)
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import DialogueError
from kdecs.models import load_tokenizer

EMOTIONS = ("happiness", "neutral", "sadness")


@pytest.fixture(scope="module")
def encoder(base):
    return DialogueEncoder(load_tokenizer(base), 64)


@pytest.fixture(scope="module")
def dialogues():
    return read_corpus(bundled_sample("valid")).dialogues[:4]


def test_labels_are_those_of_pairs_and_their_spans(encoder, dialogues):
    num_spans = 0
    for dialogue in dialogues:
        encoded = encoder.encode(dialogue)
        found = training_dialogue(encoded, EMOTIONS)
        expected = [
            pair
            for pair in pairs_of(dialogue, "all")
            if (target := dialogue.utterances[pair.target - 1]).evidence is not None
            or target.emotion == "neutral"
        ]
        assert found.places_P2.tolist() == [[pair.target - 1, pair.candidate - 1] for pair in expected]
        for row, pair in enumerate(expected):
            assert found.is_cause_P[row] == pair.is_cause
            start, end = found.start_P[row], found.end_P[row]
            if dialogue.utterances[pair.target - 1].evidence is None:
                assert (start, end) == (-1, -1), "nobody looked for a span"
            elif not pair.is_cause:
                assert (start, end) == (0, 0)
            else:
                num_spans += 1
                offsets = encoded.offsets[pair.candidate - 1]
                text = dialogue.utterances[pair.candidate - 1].text
                assert text[offsets[start - 1][0] : offsets[end - 1][1]] == max(pair.spans, key=len).strip()
        emotions = [u.emotion for u in dialogue.utterances]
        known = [EMOTIONS.index(e) if e in EMOTIONS else UNKNOWN for e in emotions]
        assert found.emotions_N.tolist() == known
        causes = {pair.candidate for pair in expected if pair.is_cause}
        assert found.causes_N.tolist() == [int(u.turn in causes) for u in dialogue.utterances]
    assert num_spans > 5


def test_targets_without_annotated_causes_have_no_pairs(encoder, make_dialogue):
    dialogue = make_dialogue("d", [("A", "We won", "happiness", (1,)), ("B", "Good", "neutral", ())])
    first, second = dialogue.utterances
    unlabelled = replace(dialogue, utterances=(replace(first, evidence=None), second))
    assert training_dialogue(encoder.encode(unlabelled), EMOTIONS).places_P2.tolist() == [[1, 0], [1, 1]]
    pairs_P3, spanned_P, labels = batch_labels(
        [training_dialogue(encoder.encode(d), EMOTIONS) for d in (dialogue, unlabelled)]
    )
    assert pairs_P3.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert spanned_P.tolist() == [True, False, False, False, False]
    assert labels.is_cause_P.tolist() == [1, 0, 0, 0, 0]


def test_a_batch_holds_every_utterance_once_between_its_special_tokens(encoder, dialogues):
    encoded = [encoder.encode(dialogue) for dialogue in dialogues]
    batch = utterance_batch(encoded, encoder)
    rows = {}
    for group in batch.groups:
        for row, ids, attention in zip(group.rows_G, group.token_ids_GT, group.attention_GT, strict=True):
            rows[int(row)] = ids[attention].tolist()
    for index, dialogue in enumerate(encoded):
        for turn, ids in enumerate(dialogue.token_ids):
            row = int(batch.row_DN[index, turn])
            assert rows.pop(row) == [encoder.cls_id, *ids, encoder.sep_id]
            assert int(batch.is_text_RM[row].sum()) == len(ids)
        speakers = [u.speaker for u in dialogue.dialogue.utterances]
        same = np.equal.outer(np.array(speakers), np.array(speakers))
        numbers = batch.speaker_DN[index, : len(speakers)]
        assert np.array_equal((numbers[:, None] == numbers).numpy(), same)
    assert rows == {}
    assert batch.is_real_DN.sum() == sum(len(dialogue.token_ids) for dialogue in encoded)


def test_rows_of_a_group_are_of_like_length():
    generator = np.random.default_rng(0)
    rows = [[1] * int(length) for length in generator.integers(1, 200, size=300)]
    groups = row_groups(rows, 0)
    assert sorted(torch.cat([group.rows_G for group in groups]).tolist()) == list(range(300))
    held = sum(group.token_ids_GT.numel() for group in groups)
    assert held < 1.25 * sum(map(len, rows)), "padding to one width would nearly double it"
    assert max(group.token_ids_GT.numel() for group in groups) < 5000


def test_long_utterances_are_cut_and_counted_and_long_dialogues_refused(base, make_dialogue):
    encoder = DialogueEncoder(load_tokenizer(base), 5)
    line = ("A", "we won the game and i am so happy", "happiness", (1,))
    encoded = encoder.encode(make_dialogue("d", [line, ("B", "Good", "neutral", ())]))
    assert [len(ids) for ids in encoded.token_ids] == [5, 1] and encoded.num_truncated == 1
    # The gold span is the whole utterance: its last token is the last one that is left.
    found = training_dialogue(encoded, EMOTIONS)
    assert (found.start_P[0], found.end_P[0]) == (1, 5)
    with pytest.raises(DialogueError, match=f"{MAX_UTTERANCES + 1} utterances, and a baseline reads at most"):
        encoder.encode(make_dialogue("long", [line] * (MAX_UTTERANCES + 1)))
    with pytest.raises(DialogueError, match="turn 2: the tokenizer has no token"):
        encoder.encode(make_dialogue("empty", [line, ("B", "", "neutral", ())]))
