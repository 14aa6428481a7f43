"""The three ways of attending along a tree against a dense sum, and against prompts one by one in a whole network."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kdecs.teacher.tree.attention as attention
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ModelError
from kdecs.teacher.data import global_batches, max_pairs_per_tree, share_among_ranks, tree_units
from kdecs.teacher.families import EncodedPrompt, Family
from kdecs.teacher.tree.attention import (
    FLEX_BLOCK,
    TREE_ATTENTION,
    attend,
    block_mask,
    mask_arguments,
    resolve,
    tree_blocks,
    use_tree_attention,
)
from kdecs.teacher.tree.prefix_tree import PackedTree, ancestor_mask, pack

CPU = torch.device("cpu")
Kind = Literal["flex", "blocks", "mask"]

# A few tokens only, so that shared beginnings, duplicates and prompts that begin others are frequent.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=14)


def packed(prompts: list[list[int]]) -> PackedTree:
    return pack([np.asarray(prompt, dtype=np.int32) for prompt in prompts])


def random_tree(seed: int, *, num_prompts: int = 40, length: int = 60) -> PackedTree:
    """Prompts that leave one another at random depths: several blocks of queries, deep and shallow."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 50, length).tolist()]
    for _ in range(num_prompts - 1):
        kept = prompts[rng.integers(len(prompts))]
        kept = kept[: rng.integers(1, len(kept) + 1)]
        prompts.append(kept + rng.integers(0, 50, rng.integers(0, length)).tolist())
    return packed(prompts)


def random_states(size: int, *, heads: int, groups: int) -> list[torch.Tensor]:
    shapes = [(1, heads, size, 8), (1, groups, size, 8), (1, groups, size, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense_sum(tree: PackedTree, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax over all scores, with those of other branches at minus infinity."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    mask = ancestor_mask(torch.from_numpy(tree.ends_N))
    scores = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


@pytest.mark.parametrize("kind", ["blocks", "flex"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_attention_is_the_dense_sum(kind: Kind, heads: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    tree = random_tree(seed)
    assert tree.num_tokens > 2 * FLEX_BLOCK
    states = [tensor.detach() for tensor in random_states(tree.num_tokens, heads=heads, groups=groups)]
    arguments = mask_arguments(tree, kind, CPU)
    with torch.no_grad():
        output, _ = attend(nn.Module(), *states, **arguments)
        torch.testing.assert_close(output, dense_sum(tree, *states), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_of_blocks_are_those_of_the_dense_sum(seed: int) -> None:
    torch.manual_seed(seed)
    tree = random_tree(seed)
    states = random_states(tree.num_tokens, heads=6, groups=2)
    weights = torch.randn(1, tree.num_tokens, 6, 8, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((output * weights).sum(), states)
        for output in (
            attend(nn.Module(), *states, **mask_arguments(tree, "blocks", CPU))[0],
            dense_sum(tree, *states),
        )
    )
    for ours, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-12, rtol=0)


@given(PROMPTS)
@settings(max_examples=100, deadline=None)
def test_blocks_show_each_query_its_ancestors_once(prompts: list[list[int]]) -> None:
    tree = packed(prompts)
    blocks = tree_blocks(tree.ends_N, CPU, block=4)
    keys_BK = blocks.keys.view(blocks.is_seen_B1QK.shape[0], -1)
    mask_NN = ancestor_mask(torch.from_numpy(tree.ends_N))[0, 0]
    for query in range(tree.num_tokens):
        seen = keys_BK[query // 4][blocks.is_seen_B1QK[query // 4, 0, query % 4]]
        assert sorted(seen.tolist()) == torch.nonzero(mask_NN[query])[:, 0].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_block_mask_is_the_one_made_from_every_entry(seed: int) -> None:
    tree = random_tree(seed, num_prompts=30 + 40 * seed)
    ends = torch.from_numpy(tree.ends_N)
    size = tree.num_tokens

    def is_ancestor(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < ends[key])

    expected = create_block_mask(is_ancestor, None, None, size, size, device="cpu", BLOCK_SIZE=FLEX_BLOCK)
    found = block_mask(tree.ends_N, CPU)
    assert torch.equal(found.to_dense(), expected.to_dense())
    # Only whole blocks of queries and keys may go without the mask; padding makes the last ones partial there.
    full = found.full_kv_num_blocks.sum()
    assert full <= expected.full_kv_num_blocks.sum() + found.shape[-1]


def tiny_llama(*, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).to(dtype)


def leaf_states(network: Any, tree: PackedTree, kind: Kind) -> torch.Tensor:
    output = network.model(
        input_ids=torch.from_numpy(tree.tokens_N)[None],
        position_ids=torch.from_numpy(tree.positions_N)[None],
        use_cache=False,
        **mask_arguments(tree, kind, CPU),
    )
    return output.last_hidden_state[0, torch.from_numpy(tree.leaves_P)]


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    llama = tiny_llama().eval()
    assert use_tree_attention(llama)
    return llama


@given(PROMPTS)
@settings(max_examples=25, deadline=None)
def test_network_gives_each_prompt_its_own_states(
    network: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    tree = packed(prompts)
    with torch.no_grad():
        singles = torch.stack(
            [network.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
        )
        for kind in ("blocks", "mask", "flex"):
            torch.testing.assert_close(leaf_states(network, tree, kind), singles, atol=1e-4, rtol=0)


@given(PROMPTS)
@settings(max_examples=15, deadline=None)
def test_network_has_the_gradients_of_its_prompts(
    network: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    tree = packed(prompts)
    weights = torch.randn(len(prompts), 48, generator=torch.Generator().manual_seed(len(prompts)))
    parameters = [p for p in network.model.parameters() if p.requires_grad]

    def gradient(states: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad((states * weights).sum(), parameters)])

    singles = gradient(
        torch.stack(
            [network.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
        )
    )
    for kind in ("blocks", "mask"):
        found = gradient(leaf_states(network, tree, kind))
        assert float((found - singles).norm() / singles.norm()) < 1e-5


def test_without_a_tree_the_network_attends_as_before(network: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    plain = tiny_llama().eval()
    with torch.no_grad():
        ours = network(input_ids=ids, attention_mask=mask).logits
        theirs = plain(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])


def test_attention_is_chosen_by_device_and_by_what_the_model_takes(network: LlamaForCausalLM) -> None:
    assert resolve("auto", network, CPU) == "blocks"
    assert resolve("auto", network, torch.device("cuda")) == "flex"
    assert resolve("mask", network, torch.device("cuda")) == "mask"
    with pytest.raises(ModelError, match="no backward on CPU"):
        resolve("flex", network, CPU)
    with torch.no_grad():
        assert resolve("flex", network, CPU) == "flex"
    foreign = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    foreign._supports_attention_backend = False
    assert not use_tree_attention(foreign)
    assert resolve("auto", foreign, CPU) == "mask"


def test_padding_nodes_change_nothing(network: LlamaForCausalLM) -> None:
    tree = random_tree(3, num_prompts=10, length=20)
    filled = tree.padded_to(FLEX_BLOCK)
    assert filled.num_tokens % FLEX_BLOCK == 0
    with torch.no_grad():
        found, expected = (leaf_states(network, t, "flex") for t in (filled, tree))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"dropout": 0.1}])
def test_what_a_tree_cannot_do_is_refused(extra: dict[str, float]) -> None:
    tree = random_tree(0, num_prompts=3, length=5)
    states = random_states(tree.num_tokens, heads=2, groups=2)
    with pytest.raises(ValueError, match="tree attention has no"):
        attend(nn.Module(), *states, **mask_arguments(tree, "blocks", CPU), **extra)


def test_a_model_that_loses_the_tree_on_the_way_is_noticed() -> None:
    tree = random_tree(0, num_prompts=3, length=5)
    states = random_states(tree.num_tokens, heads=2, groups=2)
    with pytest.raises(ValueError, match="does not pass the tree on"):
        attend(nn.Module(), *states, attention_mask=torch.from_numpy(tree.ends_N)[None, None, None])


def test_name_is_registered_once_for_all_models(network: LlamaForCausalLM) -> None:
    assert network.config._attn_implementation == TREE_ATTENTION
    assert use_tree_attention(network)


def trees_of_an_epoch(family: Family) -> list[PackedTree]:
    """The trees of a training epoch's forwards and then of a validation's, over the bundled sample, in their order."""
    forwards: list[list[EncodedPrompt]] = []
    for split in ("train", "valid"):
        pairs = [p for d in read_corpus(bundled_sample(split)).dialogues for p in pairs_of(d, "fold1")]
        prompts = [family.encode(pair) for pair in pairs]
        units = tree_units(pairs, prompts, max_tokens=1024, max_pairs=max_pairs_per_tree(32))
        for step in global_batches(units, batch_pairs=32, bucket_batches=1, seed=0, epoch=0):
            (micro,) = share_among_ranks(step, world_size=1, micro_batch_tokens=1024, padded=False)
            forwards += [[prompts[n] for n in batch.pairs] for batch in micro]
    return [pack([prompt.tokens for prompt in prompts]) for prompts in forwards]


@pytest.mark.slow
def test_an_epoch_compiles_flex_attention_at_most_six_times(
    families: Callable[..., Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three kernels for training and three for scoring: the first length, any length, and a tree of a single block.

    With Dynamo's tracing and guards, but without a code generator: what is counted does not depend on the device.
    """
    from torch._dynamo.testing import CompileCounter  # takes a second of processor time

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # which refuses gradients on a CPU
    trees = [tree.padded_to(FLEX_BLOCK) for tree in trees_of_an_epoch(families("causal"))]
    # Once a length, in the order of the epoch; then the shortest and the longest again.
    of_length = {tree.num_tokens: tree for tree in [*trees, packed([[1, 2]]).padded_to(FLEX_BLOCK)]}
    lengths = [*of_length, min(of_length), max(of_length)]
    assert len(of_length) >= 7
    counts = []
    for is_training in (True, False):
        counter = CompileCounter()
        monkeypatch.setattr(attention, "flex_attention", torch.compile(flex_attention, backend=counter))
        for length in lengths:
            states = [torch.randn(1, heads, length, 16, requires_grad=is_training) for heads in (2, 1, 1)]
            with torch.set_grad_enabled(is_training):
                found, _ = attend(nn.Module(), *states, **mask_arguments(of_length[length], "flex", CPU))
                assert found.requires_grad == is_training
        counts.append(counter.frame_count)
    assert all(1 <= count <= 3 for count in counts), counts


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1])
def test_compiled_flex_attention_has_the_gradients_of_the_dense_sum(seed: int) -> None:
    torch.manual_seed(seed)
    tree = random_tree(seed).padded_to(FLEX_BLOCK)
    cuda = torch.device("cuda")
    states = [
        torch.randn(1, heads, tree.num_tokens, 64, device=cuda, requires_grad=True) for heads in (4, 2, 2)
    ]
    weights = torch.randn(1, tree.num_tokens, 4, 64, device=cuda)
    mask = ancestor_mask(torch.from_numpy(tree.ends_N).to(cuda))
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in states[1:])
    dense = nn.functional.scaled_dot_product_attention(states[0], key, value, attn_mask=mask).transpose(1, 2)
    flex, _ = attend(nn.Module(), *states, **mask_arguments(tree, "flex", cuda))
    for ours, theirs in zip(
        torch.autograd.grad((flex * weights).sum(), states),
        torch.autograd.grad((dense * weights).sum(), states),
        strict=True,
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 5e-3  # TF32 products
