"""Batches: every pair once, budgets kept, composition independent of world size."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kdecs.config import Optimization
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.data import (
    PromptSet,
    Unit,
    fixed_batches,
    global_batches,
    has_hint,
    max_pairs_per_tree,
    pair_units,
    prepare_data,
    share_among_ranks,
    target_units,
    tree_units,
)
from kdecs.teacher.families import Family
from kdecs.teacher.network import target_loss
from kdecs.teacher.plan.workload import estimated_prompts
from kdecs.teacher.tree.prefix_tree import tree_size
from kdecs.training.loop import learning_rate_at


@pytest.fixture(scope="module")
def encoded(families: Callable[..., Family]) -> tuple[list, list]:
    family = families("causal")
    pairs = [p for d in read_corpus(bundled_sample("test")).dialogues for p in pairs_of(d, "fold1")]
    return pairs, [family.encode(pair) for pair in pairs]


def indices(units: list[Unit]) -> list[int]:
    return sorted(n for unit in units for n in unit.pairs)


def test_tree_units_hold_every_pair_once_within_budget(encoded: tuple[list, list]) -> None:
    pairs, prompts = encoded
    units = tree_units(pairs, prompts, max_tokens=300, max_pairs=16)
    assert indices(units) == list(range(len(pairs)))
    for unit in units:
        assert unit.tokens == tree_size([prompts[n].tokens for n in unit.pairs])
        assert unit.tokens <= 300 or len(unit.pairs) == 1
        assert len({pairs[n].dialogue.id for n in unit.pairs}) == 1
    whole = tree_units(pairs, prompts, max_tokens=100_000, max_pairs=1000)
    assert sum(unit.tokens for unit in whole) < sum(len(p.tokens) for p in prompts) / 2


def test_epoch_holds_every_unit_once_and_epochs_differ(encoded: tuple[list, list]) -> None:
    units = pair_units(encoded[1])
    epochs = [global_batches(units, batch_pairs=16, bucket_batches=5, seed=3, epoch=e) for e in (0, 1, 0)]
    for batches in epochs:
        assert indices([unit for batch in batches for unit in batch]) == list(range(len(units)))
        assert max(len(batch) for batch in batches) <= 16
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]


@pytest.fixture(scope="module")
def many_dialogues() -> tuple[list, list]:
    """Pairs and stand-in prompts of the whole sample: 98 dialogues of 23 pairs on average."""
    dialogues = [
        d for split in ("train", "valid", "test") for d in read_corpus(bundled_sample(split)).dialogues
    ]
    pairs = [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1+neutral")]
    return pairs, estimated_prompts(pairs, max_prompt_tokens=2048)


@pytest.mark.parametrize("batch_pairs", [16, 32, 64])
def test_steps_of_trees_hold_the_pairs_asked_for_of_several_dialogues(
    many_dialogues: tuple[list, list], batch_pairs: int
) -> None:
    pairs, prompts = many_dialogues
    units = tree_units(pairs, prompts, max_tokens=4096, max_pairs=max_pairs_per_tree(batch_pairs))
    for epoch in (0, 1):
        batches = global_batches(units, batch_pairs=batch_pairs, bucket_batches=1, seed=3, epoch=epoch)
        assert indices([unit for batch in batches for unit in batch]) == list(range(len(pairs)))
        sizes = [sum(len(unit.pairs) for unit in batch) for batch in batches]
        assert np.mean(sizes) == pytest.approx(batch_pairs, rel=0.1)
        # a cut lies at most half a unit beside its place, so a size at most a unit beside the mean
        assert np.abs(np.array(sizes) - np.mean(sizes)).max() <= max(len(unit.pairs) for unit in units)
        dialogues = [len({pairs[unit.pairs[0]].dialogue.id for unit in batch}) for batch in batches]
        assert np.mean(dialogues) >= 2
        assert batches == global_batches(
            units, batch_pairs=batch_pairs, bucket_batches=1, seed=3, epoch=epoch
        )


def test_a_tree_above_the_batch_is_a_step_of_its_own() -> None:
    units = [Unit(tuple(range(start, stop)), 1, 1) for start, stop in ((0, 50), (50, 53), (53, 55), (55, 57))]
    batches = global_batches(units, batch_pairs=4, bucket_batches=1, seed=0, epoch=0)
    assert indices([unit for batch in batches for unit in batch]) == list(range(57))
    assert all(batches)
    assert len(batches) >= 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("padded", [True, False])
def test_ranks_share_a_batch_completely(encoded: tuple[list, list], world_size: int, padded: bool) -> None:
    units = pair_units(encoded[1])
    batch = units[:37]
    shares = share_among_ranks(batch, world_size=world_size, micro_batch_tokens=400, padded=padded)
    assert len(shares) == world_size
    assert sorted(n for share in shares for micro in share for n in micro.pairs) == indices(batch)
    loads = [sum(units[n].tokens for micro in share for n in micro.pairs) for share in shares]
    assert max(loads) - min(loads) <= max(unit.tokens for unit in batch)
    for share in shares:
        for micro in share:
            longest = max(units[n].tokens for n in micro.pairs)
            cost = len(micro.pairs) * longest if padded else sum(units[n].tokens for n in micro.pairs)
            assert cost <= 400 or len(micro.pairs) == 1


def test_scoring_batches_hold_every_pair_once(encoded: tuple[list, list]) -> None:
    units = pair_units(encoded[1])
    batches = fixed_batches(units, micro_batch_tokens=500, padded=True)
    assert sorted(n for batch in batches for n in batch.pairs) == list(range(len(units)))


def test_hints_are_drawn_by_seed_and_pair(
    many_dialogues: tuple[list, list], make_config: Callable[..., TeacherConfig]
) -> None:
    pairs, _ = many_dialogues

    def drawn(share: float, seed: int, of: list[Pair] = pairs) -> set[str]:
        config = make_config(gold_hint_share=share, optimization__seed=seed)
        return {pair.id for pair in of if has_hint(config, pair)}

    every = {pair.id for pair in pairs}
    assert len(every) == len(pairs) > 2000
    assert (drawn(0.0, 3), drawn(1.0, 3)) == (set(), every)
    for share in (0.1, 0.5):
        expected, deviation = share * len(pairs), (share * (1 - share) * len(pairs)) ** 0.5
        for seed in (0, 3):
            assert abs(len(drawn(share, seed)) - expected) < 4 * deviation
            # The draw knows neither the label nor the other pairs.
            causes = [pair for pair in pairs if pair.is_cause]
            assert abs(len(drawn(share, seed, causes)) - share * len(causes)) < 4 * deviation
            assert drawn(share, seed, pairs[::-7]) == drawn(share, seed) & {p.id for p in pairs[::-7]}
    assert drawn(0.1, 3) < drawn(0.5, 3)
    assert drawn(0.1, 0) != drawn(0.1, 3)


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked"])
def test_only_training_prompts_have_hints_whatever_the_number_of_ranks(
    family: str, families: Callable[..., Family], make_config: Callable[..., TeacherConfig]
) -> None:
    config, read_by = make_config(family=family, gold_hint_share=0.4), families(family, max_prompt_tokens=400)
    one, three = (
        prepare_data(config, read_by, use_tree=True, world_size=ranks, show_progress=False)
        for ranks in (1, 3)
    )
    num_hinted = 0
    for pair, prompt, again in zip(one.train.pairs, one.train.prompts, three.train.prompts, strict=True):
        encode = read_by.encode_with_hint if has_hint(config, pair) else read_by.encode
        assert prompt.tokens.tolist() == again.tokens.tolist() == encode(pair).tokens.tolist()
        num_hinted += has_hint(config, pair)
    assert 0 < num_hinted < len(one.train.pairs)
    assert one.steps == three.steps
    # The validation file is the training file, and its pairs are drawn, too: they just have no hint.
    assert any(has_hint(config, pair) for pair in one.valid.pairs)
    for pair, prompt in zip(one.valid.pairs, one.valid.prompts, strict=True):
        assert prompt.tokens.tolist() == read_by.encode(pair).tokens.tolist()


@pytest.mark.parametrize("layout", ["prefix trees", "target trees"])
def test_micro_batches_hold_whole_targets_whatever_the_number_of_ranks(
    layout: str, many_dialogues: tuple[list, list]
) -> None:
    """A target is whole unless it exceeds a unit; its parts then count as separate targets."""
    pairs = many_dialogues[0][:600]
    prompts = estimated_prompts(pairs, max_prompt_tokens=512, has_trunks=layout == "target trees")

    def divided(max_tokens: int) -> PromptSet:
        if layout == "prefix trees":
            return PromptSet(pairs, prompts, tree_units(pairs, prompts, max_tokens=max_tokens, max_pairs=16))
        return PromptSet(pairs, prompts, target_units(prompts, max_tokens=max_tokens, max_pairs=16))

    assert divided(4096).num_split_targets == 0
    data = divided(200)
    # The slow count, and the slow loss: unit by unit, target by target.
    torch.manual_seed(0)
    logits_PA = torch.randn(len(pairs), 5)
    is_cause_P = torch.tensor([pair.is_cause for pair in pairs])
    expected, parts, with_cause = 0.0, Counter(), set()
    for unit in data.units:
        for target in {pairs[n].target for n in unit.pairs}:
            part = [n for n in unit.pairs if pairs[n].target == target]
            assert len(set(data.target_of_pair[part].tolist())) == 1
            key = (pairs[part[0]].dialogue.id, target)
            parts[key] += 1
            if any(pairs[n].is_cause for n in part):
                with_cause.add(key)
                expected += float(
                    target_loss(logits_PA[part], is_cause_P[part], torch.zeros(len(part), dtype=torch.int64))
                )
    assert len(set(data.target_of_pair.tolist())) == parts.total()
    assert data.num_split_targets == sum(parts[key] > 1 for key in with_cause) > 3
    for world_size in (1, 2, 5):
        found = 0.0
        for batch in global_batches(data.units, batch_pairs=32, bucket_batches=1, seed=0, epoch=0):
            shares = share_among_ranks(batch, world_size=world_size, micro_batch_tokens=400, padded=False)
            for micro in (micro for share in shares for micro in share):
                held = list(micro.pairs)
                found += float(target_loss(logits_PA[held], is_cause_P[held], data.target_of_pair[held]))
        assert found == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    optimization = Optimization(learning_rate=1.0, warmup_share=0.1)
    rates = np.array([learning_rate_at(step, 100, optimization) for step in range(100)])
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] == pytest.approx(1 / 90)


def test_buckets_of_like_length_pad_little_and_random_batches_much(encoded: tuple[list, list]) -> None:
    units = pair_units(encoded[1])

    def padding_share(bucket_batches: int) -> float:
        batches = global_batches(units, batch_pairs=8, bucket_batches=bucket_batches, seed=1, epoch=0)
        computed = sum(len(batch) * max(unit.longest for unit in batch) for batch in batches)
        return computed / sum(unit.tokens for unit in units) - 1

    assert padding_share(50) < 0.1
    assert padding_share(1) > 3 * padding_share(50)
