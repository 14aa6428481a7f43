from collections import Counter
from dataclasses import replace

import pytest

from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.errors import CorpusError
from kdecs.soft_labels.plan import plan_shards, read_splits, tree_characters


def corpus(**changes: object) -> CorpusConfig:
    paths = {split: bundled_sample(split) for split in ("train", "valid", "test")}
    return CorpusConfig.model_validate(paths | changes)


def test_every_dialogue_with_pairs_is_in_one_shard() -> None:
    splits = read_splits(corpus())
    shards = plan_shards(splits, 4)
    counted = Counter((item.split, item.dialogue.id) for shard in shards for item in shard.dialogues)
    expected = {(s, d.id) for s, ds in splits.items() for d in ds if pairs_of(d, "fold1+neutral")}
    assert set(counted) == expected
    assert set(counted.values()) == {1}
    total = sum(len(pairs_of(d, "fold1+neutral")) for ds in splits.values() for d in ds)
    assert sum(shard.num_pairs for shard in shards) == total


def test_shards_are_balanced_by_cost() -> None:
    costs = [shard.cost for shard in plan_shards(read_splits(corpus()), 4)]
    assert max(costs) / min(costs) < 1.05


def test_order_of_the_file_moves_no_dialogue_of_distinct_cost() -> None:
    splits = read_splits(corpus())
    content = [{(i.split, i.dialogue.id) for i in s.dialogues} for s in plan_shards(splits, 1)]
    turned = {split: dialogues[::-1] for split, dialogues in splits.items()}
    assert content == [{(i.split, i.dialogue.id) for i in s.dialogues} for s in plan_shards(turned, 1)]
    assert plan_shards(splits, 7) == plan_shards(splits, 7)


def test_rows_go_by_split_then_position() -> None:
    for shard in plan_shards(read_splits(corpus()), 3):
        order = [(("train", "valid", "test").index(i.split), i.position) for i in shard.dialogues]
        assert order == sorted(order)


def test_chunks_cover_a_shard_in_order() -> None:
    shard = plan_shards(read_splits(corpus()), 2)[0]
    chunks = list(shard.chunks(50))
    assert [item for chunk in chunks for item in chunk] == list(shard.dialogues)
    assert all(sum(i.num_pairs for i in chunk[:-1]) < 50 for chunk in chunks)
    assert len(chunks) > 1


def test_more_shards_than_dialogues_leaves_some_empty() -> None:
    splits = {"train": read_splits(corpus())["train"][:2]}
    shards = plan_shards(splits, 5)
    assert [len(shard.dialogues) for shard in shards] == [1, 1, 0, 0, 0]


def test_the_share_cuts_the_training_split_alone() -> None:
    whole, part = read_splits(corpus()), read_splits(corpus(train_share=0.5))
    assert 0 < len(part["train"]) < len(whole["train"])
    assert part["valid"] == whole["valid"]
    assert part["test"] == whole["test"]


def test_an_id_twice_in_a_split_is_refused_and_in_two_splits_is_fine() -> None:
    dialogue = read_splits(corpus())["train"][0]
    with pytest.raises(CorpusError, match=f"dialogue {dialogue.id}: stands twice in the split train"):
        plan_shards({"train": [dialogue, dialogue]}, 2)
    shards = plan_shards({"train": [dialogue], "test": [replace(dialogue)]}, 1)
    assert [item.split for item in shards[0].dialogues] == ["train", "test"]


def test_tree_characters_worked_by_hand() -> None:
    utterances = (
        Utterance(1, "A", "12345", "neutral", None),
        Utterance(2, "B", "1234567", "happiness", (Evidence(1, "12345"),)),
    )
    pairs = pairs_of(Dialogue("d", utterances), "fold1+neutral")
    assert [(p.target, p.candidate) for p in pairs] == [(1, 1), (2, 1), (2, 2)]
    assert tree_characters(pairs) == 5 + (5 + 7) + (5 + 5 + 7 + 3 * 70)
    assert tree_characters([]) == 0
