"""Prompts in tokens: masks, u_j's copy, spans and truncation, checked against the text they came from."""

import itertools
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kdecs.corpus.encoding import UNKNOWN_SPAN, PairEncoder
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.errors import ModelError

RECCON = Path(os.environ.get("KDECS_RECCON", Path(__file__).parents[2] / "../shared/reccon"))


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def dialogue_of(*texts: str, span: str | None = None) -> Dialogue:
    """Texts by A and B in turn; the last one is happy because of `span` in itself."""
    last = len(texts)
    utterances = [
        Utterance(turn, "AB"[turn % 2], text, "neutral", None) for turn, text in enumerate(texts, start=1)
    ]
    evidence = (Evidence(last, span or texts[-1]),)
    utterances[-1] = Utterance(last, "A", texts[-1], "happiness", evidence)
    return Dialogue("d", tuple(utterances))


def encoded(tokenizer, pair: Pair, max_tokens: int = 256):
    (found,) = PairEncoder(tokenizer, max_tokens).encode([pair])
    return found


def test_masks_and_candidate_tokens_are_where_the_template_has_them(tokenizer):
    for dialogue in read_corpus(bundled_sample("valid")).dialogues[:4]:
        pairs = pairs_of(dialogue, "all")
        for pair, found in zip(pairs, PairEncoder(tokenizer, 512).encode(pairs), strict=True):
            masks = (found.emotion_mask, found.connective_mask, found.start_mask, found.end_mask)
            assert [found.token_ids[place] for place in masks] == [tokenizer.mask_token_id] * 4
            assert sorted(masks) == list(masks)
            assert found.token_ids.count(tokenizer.mask_token_id) == 4
            text = dialogue.utterances[pair.candidate - 1].text
            assert found.candidate_offsets[0][0] == len(text) - len(text.lstrip())
            assert found.candidate_offsets[-1][1] == len(text.rstrip())
            for token, (start, end) in enumerate(found.candidate_offsets, start=found.candidate_first):
                assert tokenizer.decode([found.token_ids[token]]).strip() in (
                    text[start:end],
                    "..",
                    "?.",
                    "!.",
                )


@pytest.mark.parametrize(
    "path",
    [
        bundled_sample("train"),
        pytest.param(
            RECCON / "dailydialog_valid.json",
            marks=pytest.mark.skipif(not RECCON.is_dir(), reason="no RECCON files (KDECS_RECCON)"),
        ),
    ],
    ids=["sample", "reccon"],
)
def test_span_tokens_cover_the_longest_gold_span(tokenizer, path):
    num_causes = 0
    for dialogue in read_corpus(path).dialogues[:10]:
        pairs = pairs_of(dialogue, "fold1+neutral")
        for pair, found in zip(pairs, PairEncoder(tokenizer, 512).encode(pairs), strict=True):
            if not pair.is_cause:
                assert (found.span_start, found.span_end) == (0, 0)
                continue
            num_causes += 1
            span = max(pair.spans, key=len).strip()
            start, end = (
                found.candidate_offsets[found.span_start - 1][0],
                found.candidate_offsets[found.span_end - 1][1],
            )
            covered = dialogue.utterances[pair.candidate - 1].text[start:end]
            assert span in covered
            assert len(covered) <= len(span) + 12  # at most the rest of a token on either side
    assert num_causes > 10


def test_a_mask_typed_by_a_speaker_does_no_harm(tokenizer):
    pair = pairs_of(dialogue_of("I typed <mask> again", "so <mask> it is", span="it is"))[1]
    found = encoded(tokenizer, pair)
    masks = (found.emotion_mask, found.connective_mask, found.start_mask, found.end_mask)
    plain = encoded(tokenizer, pairs_of(dialogue_of("I typed it again", "so it is", span="it is"))[1])
    gaps = [after - before for before, after in itertools.pairwise(masks)]
    plain_masks = (plain.emotion_mask, plain.connective_mask, plain.start_mask, plain.end_mask)
    assert gaps[2] == plain_masks[3] - plain_masks[2]


@pytest.mark.parametrize(
    "text", ["Oh 😀😀 great", "ça va très bien", "你好 世界", "  padded  ", "won ..", "👩‍👩‍👧"]
)
def test_any_text_gives_offsets_inside_the_utterance(tokenizer, text: str):
    found = encoded(tokenizer, pairs_of(dialogue_of("Hi .", text))[1])
    offsets = found.candidate_offsets
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert text[offsets[0][0] : offsets[-1][1]] == text.strip()
    assert (found.span_start, found.span_end) == (1, len(offsets))


def test_over_long_prompts_lose_their_oldest_history_only(tokenizer):
    dialogue = dialogue_of(*["one two three four five six seven"] * 12, "We won !", span="We won")
    pair = pairs_of(dialogue)[-1]
    full, cut = encoded(tokenizer, pair, 512), encoded(tokenizer, pair, 100)
    removed = len(full.token_ids) - 100
    assert len(cut.token_ids) == 100
    assert cut.num_truncated == 0
    assert cut.token_ids == [full.token_ids[0], *full.token_ids[1 + removed :]]
    assert cut.end_mask == full.end_mask - removed
    assert cut.candidate_first == full.candidate_first - removed
    assert (cut.span_start, cut.span_end) == (full.span_start, full.span_end)


def test_without_history_the_end_of_u_i_then_of_u_j_is_cut_and_counted(tokenizer):
    (pair,) = pairs_of(dialogue_of("happy words " * 30, span="happy words"))
    full = encoded(tokenizer, pair, 10_000)
    size, num_own = len(full.token_ids), len(full.candidate_offsets)
    for num_cut, num_left in ((30, num_own), (num_own + 5, num_own - 5)):
        found = encoded(tokenizer, pair, size - num_cut)
        assert len(found.token_ids) == size - num_cut
        assert found.num_truncated == num_cut
        assert found.candidate_offsets == full.candidate_offsets[:num_left]
        assert found.token_ids[found.start_mask] == tokenizer.mask_token_id
        assert (found.span_start, found.span_end) == (full.span_start, full.span_end)
    lost = pairs_of(dialogue_of("Hi", "x " * 150 + "the cause", span="the cause"))[-1]
    assert encoded(tokenizer, lost, 120).span_start == UNKNOWN_SPAN


def test_a_template_that_does_not_fit_is_refused_with_the_pair(tokenizer):
    utterances = (Utterance(1, "speaker " * 60, "Hi", "happiness", (Evidence(1, "Hi"),)),)
    with pytest.raises(ModelError, match=r"pair long/1/1.*max_prompt_tokens"):
        encoded(tokenizer, pairs_of(Dialogue("long", utterances))[0], 64)


def test_a_tokenizer_without_a_mask_is_refused(tokenizer, base):
    plain = AutoTokenizer.from_pretrained(base)
    plain.mask_token = None
    with pytest.raises(ModelError, match="no mask token"):
        PairEncoder(plain, 64)
