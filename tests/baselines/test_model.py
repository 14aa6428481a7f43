"""What all systems must do: no look ahead, nothing from neighbours in a batch, the span head, learning by heart."""

from dataclasses import replace

import pytest
import torch
from support import ANSWER_WORDS, made_once, save_tiny_encoder

from kdecs.baselines.dialogues import UNKNOWN
from kdecs.baselines.model import SPAN_SIZE, SpanHead, cross_entropy, pair_loss
from kdecs.corpus.pairs import candidate_pairs
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue
from kdecs.runtime import autocast

WORDS = [*ANSWER_WORDS, *map(str, range(1, 13)), "yes", "no", "none"]
NAMES = ("ecpe-2d", "kec", "mgsag", "ueca-prompt")


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    """Three dialogues of different lengths."""
    found = read_corpus(bundled_sample("test")).dialogues
    return [replace(d, utterances=d.utterances[:n]) for d, n in zip(found, (6, 3, 5), strict=False)]


def _changed(dialogue: Dialogue, turn: int) -> Dialogue:
    utterances = list(dialogue.utterances)
    utterances[turn - 1] = replace(
        utterances[turn - 1], text="What a fine day it is for all of us !", speaker="Z"
    )
    return replace(dialogue, utterances=tuple(utterances))


CASES = [
    *((name, 0, {}) for name in NAMES),
    *(("ecpe-2d", *case) for case in ((2, {}), (0, {"window": 1}), (2, {"window": 1}))),
]
"""System, reach, settings."""


@pytest.mark.parametrize(("name", "reach", "settings"), CASES)
def test_a_target_sees_nothing_that_comes_later(make_bench, dialogues, name, reach, settings):
    """Except for the later candidates that it may have, on which its emotion never depends."""
    bench, dialogue = make_bench(name, after=reach, **settings), dialogues[0]
    before, after = bench.output([dialogue]), bench.output([_changed(dialogue, 5)])
    pairs = candidate_pairs(dialogue, after=reach)
    is_early = torch.tensor([pair.target + reach < 5 for pair in pairs])
    torch.testing.assert_close(before.cause_P[is_early], after.cause_P[is_early], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before.emotion_DNE[:, :4], after.emotion_DNE[:, :4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before.cause_P[~is_early], after.cause_P[~is_early], atol=1e-4), (
        "it reads them at all"
    )
    if before.start_QS is not None:
        width = min(before.start_QS.size(1), after.start_QS.size(1))
        for left, right in ((before.start_QS, after.start_QS), (before.end_QS, after.end_QS)):
            torch.testing.assert_close(left[is_early, :width], right[is_early, :width], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "reach", "settings"), CASES)
def test_dialogues_of_a_batch_do_not_mix(make_bench, dialogues, name, reach, settings):
    bench = make_bench(name, after=reach, **settings)
    together = bench.output(dialogues)
    start = 0
    for index, dialogue in enumerate(dialogues):
        alone = bench.output([dialogue])
        count, size = len(candidate_pairs(dialogue, after=reach)), len(dialogue.utterances)
        torch.testing.assert_close(
            together.cause_P[start : start + count], alone.cause_P, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            together.emotion_DNE[index, :size], alone.emotion_DNE[0], rtol=1e-4, atol=1e-5
        )
        if alone.start_QS is not None:
            width = alone.start_QS.size(1)
            torch.testing.assert_close(
                together.start_QS[start : start + count, :width], alone.start_QS, rtol=1e-4, atol=1e-5
            )
            assert (together.start_QS[start : start + count, width:] == -torch.inf).all()
        start += count


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_other_encoders_and_bfloat16_serve_too(make_bench, dialogues, tmp_path_factory, kind):
    place = made_once(tmp_path_factory, f"baseline-{kind}", lambda path: save_tiny_encoder(path, kind, WORDS))
    for name in NAMES:
        bench = make_bench(name, place=place)
        inputs, pairs_P3, spanned_P, labels = bench.batch(dialogues[:2])
        losses = {}
        for precision in ("float32", "bfloat16"):
            with autocast(torch.device("cpu"), precision):
                output = bench.model(inputs, pairs_P3, spanned_P)
            losses[precision] = sum(part.mean for part in bench.model.losses(output, labels, spanned_P))
        losses["bfloat16"].backward()
        gradients = [p.grad for p in bench.model.parameters() if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients) and len(gradients) > 20
        torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.1, atol=0.1)


def test_span_logits_against_a_slow_loop():
    torch.manual_seed(0)
    head = SpanHead(hidden_size=5, pair_size=4)
    states, vectors = torch.randn(3, 6, 5), torch.randn(2, 4)
    is_text = torch.arange(6) < torch.tensor([[6], [2], [4]])
    rows = torch.tensor([1, 2])
    for found, half in zip(head(states, is_text, rows, vectors), (0, 1), strict=True):
        part = slice(half * SPAN_SIZE, (half + 1) * SPAN_SIZE)
        for q in range(2):
            torch.testing.assert_close(found[q, 0], head.none(vectors[q])[half])
            for m in range(6):
                if not is_text[rows[q], m]:
                    assert found[q, m + 1] == -torch.inf
                    continue
                mixed = torch.tanh((head.token(states[rows[q], m]) + head.pair(vectors[q]))[part])
                torch.testing.assert_close(found[q, m + 1], (mixed * head.score[half]).sum())


def test_losses_are_means_over_what_is_known():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    known = torch.tensor([0, UNKNOWN, 1])
    expected = (torch.log(1 + torch.exp(torch.tensor(-2.0))) + torch.log(torch.tensor(2.0))) / 2
    torch.testing.assert_close(cross_entropy(logits, known).mean, expected)
    assert cross_entropy(logits, torch.full((3,), UNKNOWN)).mean == 0
    torch.testing.assert_close(
        pair_loss(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([1, 0, UNKNOWN])).mean,
        (torch.log(torch.tensor(2.0)) + torch.log(1 + torch.exp(torch.tensor(2.0)))) / 2,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_few_dialogues_are_learnt_by_heart(make_bench, name):
    dialogues = [
        replace(d, utterances=d.utterances[:5]) for d in read_corpus(bundled_sample("train")).dialogues[:4]
    ]
    bench = make_bench(name)
    bench.fit(dialogues, steps=120)
    assert bench.pair_accuracy(dialogues) > 0.97
