"""MGSAG: its keywords, the weights of its fine graph, and a rule that only shared keywords tell."""

import random

import torch

from kdecs.baselines.mgsag import BipartiteAttention, content_words


def test_keywords_are_content_words_once_each():
    assert content_words("The dog , the Dog and my cat's 2 hats !") == ["dog", "cat", "hats"]
    assert content_words("I was there .") == []


def test_a_node_without_neighbours_receives_nothing():
    torch.manual_seed(0)
    attention = BipartiteAttention(4)
    receivers, senders = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    is_edge = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    weights = attention(receivers, senders, is_edge)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 0.0, 1.0]))
    assert not weights[~is_edge].any()
    weights.square().sum().backward()
    assert torch.isfinite(receivers.grad).all()


def _by_keyword(make_dialogue, count, words, seed):
    """The causes are the utterances that name what the target names, its own among them."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        things = draw.sample(words, 3)
        held = [draw.choice(things) for _ in range(6)]
        lines = [
            (
                "AB"[turn % 2],
                f"so it is the {held[turn - 1]}",
                "happiness",
                tuple(j for j in range(1, turn + 1) if held[j - 1] == held[turn - 1]),
            )
            for turn in range(1, 7)
        ]
        found.append(make_dialogue(f"d{number}", lines))
    return found


def test_it_learns_from_shared_keywords_that_it_has_never_seen(make_bench, make_dialogue):
    # Many words, so that none of them can be learnt by heart.
    seen = [
        f"{begin}{end}"
        for begin in ("mala", "teno", "pira", "sogu", "luri")
        for end in ("kan", "bor", "dis", "fel")
    ]
    unseen = ["garden", "letter", "bridge", "planet"]
    train = _by_keyword(make_dialogue, 14, seen, seed=0)
    test = _by_keyword(make_dialogue, 8, unseen, seed=1)
    bench = make_bench("mgsag", task="ecpe")
    bench.fit(train, steps=60, rate=1e-2, heads_alone=True)
    assert bench.pair_accuracy(test) > 0.8
    bench.model.system = bench.model.system.model_copy(update={"keywords": 0})
    assert bench.pair_accuracy(test) < 0.6, "without keywords the same weights cannot tell"
