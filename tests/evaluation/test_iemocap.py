"""RECCON's second part: one speaker several turns running, emotional utterances without evidence."""

import json

import pytest

from kdecs.corpus.pairs import count_rows, pairs_of
from kdecs.corpus.reading import find_faults, read_corpus
from kdecs.evaluation.metrics import SCORE_KEYS, breakdowns, evaluate
from kdecs.evaluation.predictions import read_predictions

EVIDENCE, SPAN = "expanded emotion cause evidence", "expanded emotion cause span"
TEXTS = (
    ("F", "Excuse me .", "neutral", None),
    ("F", "I have been standing here for an hour !", "frustrated", [(2, "standing here for an hour")]),
    (
        "F",
        "And nobody says a word .",
        "angry",
        [(2, "for an hour"), (3, "nobody says a word"), (2, "standing")],
    ),
    ("M", "Is there a problem ?", "neutral", None),
    ("F", "You lost my bag .", "frustrated", None),
    ("F", "All of it .", "sad", [("b", "b")]),
    ("M", "Look , we found it !", "excited", [(7, "found it"), (5, "lost my bag")]),
)


@pytest.fixture
def corpus_file(tmp_path):
    def raw(turn, speaker, text, emotion, evidence):
        found = {"turn": turn, "speaker": speaker, "utterance": text, "emotion": emotion}
        if evidence is not None:
            found |= {EVIDENCE: [j for j, _ in evidence], SPAN: [span for _, span in evidence]}
        return found

    dialogue = [raw(turn, *values) for turn, values in enumerate(TEXTS, start=1)]
    path = tmp_path / "test.json"
    path.write_text(json.dumps({"Ses01F_impro01": [dialogue], "Ses05M_script03_2": [dialogue[:4]]}))
    return path


def test_it_loads_and_pairs(corpus_file):
    assert find_faults(corpus_file) == []
    corpus = read_corpus(corpus_file)
    first, second = corpus.dialogues
    assert {dialogue.part for dialogue in corpus.dialogues} == {"iemocap"}
    assert [u.emotion for u in first.utterances[4:]] == ["frustrated", "sadness", "excited"]
    assert sorted({pair.target for pair in pairs_of(first)}) == [2, 3, 6, 7]
    assert count_rows(pairs_of(first)) == (1 + 3 + 0 + 2, 1 + 1 + 6 + 5)
    assert len(pairs_of(first, "all")) == 28
    # Target 5 is emotional without evidence: neither scored in fold 1 nor a neutral target to train on.
    assert [p.target for p in pairs_of(first, "fold1+neutral") if p not in pairs_of(first)] == [1, 4]
    rows = [row for pair in pairs_of(second) for row in pair.row_ids]
    assert "iemocap_Ses05M_script03_2_utt_3_true_cause_utt_2_span_2" in rows


def test_it_is_scored(corpus_file, tmp_path):
    corpus = read_corpus(corpus_file)
    lines = [
        {"dialogue_id": d.id, "target": p.target, "candidate": p.candidate, "emotion": p.emotion}
        | {"is_cause": p.is_cause, "span": p.spans[0] if p.is_cause else ""}
        for d in corpus.dialogues
        for p in pairs_of(d, "all")
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for universe, num_rows in (("fold1", 19 + 6), ("all", 28 + 1 + 10 + 1)):
        scores = evaluate(corpus, read_predictions(path, corpus), universe=universe)
        assert scores.num_positive + scores.num_negative == num_rows
        assert scores["emotion_accuracy"] == scores["utterance_macro_f1"] == scores["negative_f1"] == 100
        # One pair of each dialogue has two spans, of which a system can give one: F of the other is 0.
        assert scores["exact_match"] == pytest.approx(100 * 8 / 10)
        assert {key: scores[f"strict_{key}"] for key in ("exact_match", "macro_f1")} == {
            key: scores[key] for key in ("exact_match", "macro_f1")
        }
        assert all(key in scores.as_dict() for key in SCORE_KEYS)
        assert {"frustrated", "excited", "anger"} <= set(breakdowns(scores)["emotion"])
