"""The packed walk against a slow trie: tokens, depths, subtrees, leaves and the ancestor mask."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdecs.teacher.tree.prefix_tree import ancestor_mask, common_prefix_length, pack, tree_size

# Three different tokens make shared prefixes, duplicates and prompts that begin others frequent.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


def arrays(prompts: list[list[int]]) -> list[np.ndarray]:
    return [np.asarray(prompt, dtype=np.int32) for prompt in prompts]


@given(PROMPTS)
@settings(max_examples=300, deadline=None)
def test_walk_holds_each_prefix_once(prompts: list[list[int]]) -> None:
    tree = pack(arrays(prompts))
    prefixes = {tuple(p[: n + 1]) for p in prompts for n in range(len(p))}
    assert tree.num_tokens == len(prefixes) == tree_size(arrays(prompts))


@given(PROMPTS)
@settings(max_examples=300, deadline=None)
def test_ancestors_of_a_leaf_spell_its_prompt(prompts: list[list[int]]) -> None:
    tree = pack(arrays(prompts))
    mask_NN = ancestor_mask(torch.from_numpy(tree.ends_N))[0, 0].numpy()
    for prompt, leaf in zip(prompts, tree.leaves_P, strict=True):
        seen = np.flatnonzero(mask_NN[leaf])
        assert tree.tokens_N[seen].tolist() == prompt
        assert tree.positions_N[seen].tolist() == list(range(len(prompt)))


@given(PROMPTS)
@settings(max_examples=200, deadline=None)
def test_every_node_sees_its_own_path_and_nothing_else(prompts: list[list[int]]) -> None:
    tree = pack(arrays(prompts))
    mask_NN = ancestor_mask(torch.from_numpy(tree.ends_N))[0, 0].numpy()
    for node in range(tree.num_tokens):
        path, depth = [node], tree.positions_N[node]
        while depth > 0:  # the parent is the nearest earlier node that is one level up
            path.append(max(k for k in range(path[-1]) if tree.positions_N[k] == depth - 1))
            depth -= 1
        assert np.flatnonzero(mask_NN[node]).tolist() == sorted(path)


def test_single_prompt_is_plain_causal_attention() -> None:
    tree = pack(arrays([[5, 6, 7]]))
    assert torch.equal(ancestor_mask(torch.from_numpy(tree.ends_N))[0, 0], torch.ones(3, 3).tril().bool())


def test_duplicates_share_a_leaf_and_a_prefix_ends_inside_another() -> None:
    tree = pack(arrays([[1, 2, 3], [1, 2], [1, 2, 3]]))
    assert tree.tokens_N.tolist() == [1, 2, 3]
    assert tree.leaves_P.tolist() == [2, 1, 2]


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        pack(arrays([[1], []]))


def test_common_prefix_length() -> None:
    assert common_prefix_length(np.array([1, 2, 3]), np.array([1, 2, 4])) == 2
    assert common_prefix_length(np.array([1, 2]), np.array([1, 2, 4])) == 2
    assert common_prefix_length(np.array([]), np.array([1])) == 0
