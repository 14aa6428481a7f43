"""A pair as a question: the wording, the answer's tokens, what is cut, against slow searches in the text."""

import pytest
from transformers import AutoTokenizer

from kdecs.baselines.mrc.questions import UNKNOWN_ANSWER, QuestionEncoder, answer_text, mrc_text
from kdecs.corpus.pairs import candidate_pairs, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.errors import CorpusError, ModelError


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def dialogue_of(*texts, emotion="happiness", evidence=None):
    turns = [Utterance(n, "AB"[n % 2], text, emotion, None) for n, text in enumerate(texts, start=1)]
    if evidence:
        last = turns[-1]
        turns[-1] = Utterance(last.turn, last.speaker, last.text, emotion, (Evidence(*evidence),))
    return Dialogue("d", tuple(turns))


def test_the_question_is_reccons_and_the_context_the_conversation():
    dialogue = dialogue_of("We won .", "Great !", "So what ?", evidence=(1, "We won"))
    text = mrc_text(next(p for p in pairs_of(dialogue) if p.candidate == 1))
    assert text.question == (
        "The target utterance is So what ? The evidence utterance is We won . What is the causal span from context "
        "that is relevant to the target utterance's emotion happiness ?"
    )
    assert text.context == "We won . Great ! So what ?"
    for sequence, characters, expected in (
        (text.question, text.question_target, "So what ?"),
        (text.question, text.question_candidate, "We won ."),
        (text.context, text.context_target, "So what ?"),
        (text.context, text.context_candidate, "We won ."),
    ):
        assert sequence[slice(*characters)] == expected


def test_gold_answers_read_back_as_the_spans(tokenizer):
    encoder = QuestionEncoder(tokenizer, 512)
    pairs = [p for d in read_corpus(bundled_sample("valid")).dialogues[:8] for p in pairs_of(d)]
    num_causes = 0
    for pair, encoded in zip(pairs, encoder.encode(pairs), strict=True):
        assert encoded.token_ids[0] == tokenizer.cls_token_id and not encoded.answerable[0]
        if not pair.is_cause:
            assert (encoded.answer_start, encoded.answer_end) == (0, 0)
            continue
        num_causes += 1
        text, place = answer_text(encoded, encoded.answer_start, encoded.answer_end)
        assert text == max(pair.spans, key=len).strip()
        assert place is not None
        assert pair.dialogue.utterances[pair.candidate - 1].text[slice(*place)] == text
    assert num_causes > 10


def test_a_repeated_sentence_is_answered_in_the_evidences_own_place(tokenizer):
    dialogue = dialogue_of("We won .", "We won .", "We won .", evidence=(2, "We won"))
    pair = next(p for p in pairs_of(dialogue) if p.candidate == 2)
    encoded = next(QuestionEncoder(tokenizer, 256).encode([pair]))
    assert encoded.offsets_T2[encoded.answer_start][0] == len("We won . ")


def test_only_the_candidate_may_be_answerable(tokenizer):
    dialogue = dialogue_of("We won .", "Great !", "So what ?", evidence=(2, "Great"))
    pair = next(p for p in pairs_of(dialogue) if p.candidate == 2)
    whole, narrow = (
        next(QuestionEncoder(tokenizer, 256, only_candidate=only).encode([pair])) for only in (False, True)
    )
    parts = [
        [encoded.context[slice(*encoded.offsets_T2[t])] for t in encoded.answerable.nonzero()[0]]
        for encoded in (whole, narrow)
    ]
    assert "".join(parts[0]) == "Wewon.Great!Sowhat?"
    assert "".join(parts[1]) == "Great!"


def test_the_oldest_context_goes_first_and_the_evidence_stays(tokenizer):
    texts = [f"word number {n} of many ." for n in range(1, 41)]
    dialogue = dialogue_of(*texts, evidence=(1, "number 1 of"))
    pair = next(p for p in pairs_of(dialogue) if p.candidate == 1)
    full = next(QuestionEncoder(tokenizer, 2000).encode([pair]))
    cut = next(QuestionEncoder(tokenizer, 120).encode([pair]))
    assert len(cut.token_ids) == 120 < len(full.token_ids)
    assert cut.num_truncated == 0
    assert answer_text(cut, cut.answer_start, cut.answer_end)[0] == "number 1 of"
    kept = cut.offsets_T2[cut.answerable]
    assert (kept[:, 0] < len(texts[0])).sum() == (
        full.offsets_T2[full.answerable][:, 0] < len(texts[0])
    ).sum()
    rest = kept[kept[:, 0] > len(texts[0])]
    assert rest[-1, 1] == len(cut.context)
    expected = full.offsets_T2[full.answerable][-len(rest) :]
    assert (rest == expected).all()


def test_over_long_utterances_are_cut_and_a_lost_answer_is_unknown(tokenizer):
    dialogue = dialogue_of("so " * 300 + "we won", "long " * 300, evidence=(1, "we won"))
    pair = next(p for p in pairs_of(dialogue) if p.candidate == 1)
    encoded = next(QuestionEncoder(tokenizer, 128).encode([pair]))
    assert len(encoded.token_ids) == 128
    assert encoded.num_truncated > 0
    assert (encoded.answer_start, encoded.answer_end) == (UNKNOWN_ANSWER, UNKNOWN_ANSWER)
    with pytest.raises(ModelError, match="do not hold even the bare question"):
        next(QuestionEncoder(tokenizer, 20).encode([pair]))


def test_a_window_on_a_long_dialogue_encodes_the_same(tokenizer, monkeypatch):
    dialogue = dialogue_of(*[f"turn {n} says hello there my friend ." for n in range(150)])
    pairs = [p for p in candidate_pairs(dialogue) if p.target == 150][::29]
    windowed = list(QuestionEncoder(tokenizer, 128).encode(pairs))
    monkeypatch.setattr("kdecs.corpus.encoding._LONG_CHARACTERS_PER_TOKEN", 10**9)
    plain = list(QuestionEncoder(tokenizer, 128).encode(pairs))
    assert len(windowed[0].context) < len(plain[0].context)
    for ours, theirs in zip(windowed, plain, strict=True):
        assert (ours.token_ids == theirs.token_ids).all()


def test_a_target_without_emotion_is_refused(tokenizer):
    with pytest.raises(CorpusError, match=r"turn 1: no emotion, which the question names"):
        list(QuestionEncoder(tokenizer, 256).encode(candidate_pairs(dialogue_of("Hi .", emotion=None))))
