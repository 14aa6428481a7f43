import json
import random
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import Dialogues, LineDialogues, bundled_sample
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.corpus.splits import CorpusConfig, open_splits
from kdecs.errors import CorpusError
from kdecs.soft_labels import plan as planning
from kdecs.soft_labels.plan import Plan, PlanKind, make_plan, open_plan, prompt_characters, tree_characters

WORK = "0" * 64


def corpus(**changes: object) -> CorpusConfig:
    paths = {split: bundled_sample(split) for split in ("train", "valid", "test")}
    return CorpusConfig.model_validate(paths | changes)


def plan_of(directory: Path, splits: dict[str, Dialogues], num_shards: int) -> Plan:
    return make_plan(directory / f"plan{num_shards}", PlanKind(WORK, num_shards), splits)


def content(plan: Plan) -> list[list[tuple[str, str]]]:
    """(split, dialogue id) by shard."""
    return [
        [(d.split, d.pairs[0].dialogue.id) for d in plan.dialogues(shard)] for shard in range(plan.num_shards)
    ]


def as_lines(path: Path, directory: Path) -> Path:
    """A RECCON file as JSON lines."""
    lines = directory / f"{path.stem}.jsonl"
    value = json.loads(path.read_text(encoding="utf-8"))
    items = [{"id": name, "utterances": nested[0]} for name, nested in value.items()]
    lines.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return lines


def test_every_dialogue_with_pairs_is_in_one_shard(tmp_path: Path) -> None:
    splits = open_splits(corpus())
    plan = plan_of(tmp_path, splits, 4)
    counted = Counter(item for shard in content(plan) for item in shard)
    dialogues = {split: list(split_dialogues) for split, split_dialogues in splits.items()}
    expected = {(s, d.id) for s, ds in dialogues.items() for d in ds if pairs_of(d, "fold1+neutral")}
    assert set(counted) == expected
    assert set(counted.values()) == {1}
    totals = {s: sum(len(pairs_of(d, "fold1+neutral")) for d in ds) for s, ds in dialogues.items()}
    assert plan.record.pairs_by_split == totals
    assert plan.num_pairs == sum(totals.values())


def test_shards_are_longest_first_into_the_lightest(tmp_path: Path) -> None:
    """Against the rule written plainly, for all dialogues at once."""
    splits = open_splits(corpus())
    items = [
        (tree_characters(pairs), split, d.id)
        for split in ("train", "valid", "test")
        for d in splits[split]
        if (pairs := pairs_of(d, "fold1+neutral"))
    ]
    loads = [0] * 5
    expected: list[set[tuple[str, str]]] = [set() for _ in loads]
    for cost, split, name in sorted(items, key=lambda item: -item[0]):
        lightest = loads.index(min(loads))
        loads[lightest] += cost
        expected[lightest].add((split, name))
    plan = plan_of(tmp_path, splits, 5)
    assert [set(shard) for shard in content(plan)] == expected
    assert list(plan.record.costs) == loads
    assert max(loads) / min(loads) < 1.05


def test_rows_go_by_split_then_position(tmp_path: Path) -> None:
    splits = open_splits(corpus())
    place = {
        (split, d.id): (("train", "valid", "test").index(split), place)
        for split, split_dialogues in splits.items()
        for place, d in enumerate(split_dialogues)
    }
    for shard in content(plan_of(tmp_path, splits, 3)):
        order = [place[item] for item in shard]
        assert order == sorted(order)


def test_chunks_cover_a_shard_in_order(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, open_splits(corpus()), 2)
    chunks = list(plan.chunks(0, 50))
    names = [(d.split, d.pairs[0].dialogue.id) for chunk in chunks for d in chunk]
    assert names == content(plan)[0]
    assert all(sum(len(d.pairs) for d in chunk[:-1]) < 50 for chunk in chunks)
    assert len(chunks) > 1


def test_more_shards_than_dialogues_leaves_some_empty(tmp_path: Path) -> None:
    first_two = list(open_splits(corpus())["train"])[:2]
    plan = plan_of(tmp_path, {"train": first_two}, 5)
    assert [len(shard) for shard in content(plan)] == [1, 1, 0, 0, 0]
    assert plan.record.pairs[2:] == (0, 0, 0)


def test_an_id_in_two_splits_is_planned_in_both(tmp_path: Path) -> None:
    dialogue = open_splits(corpus())["train"][0]
    twice = {"train": [dialogue], "test": [replace(dialogue)]}
    assert content(plan_of(tmp_path, twice, 1)) == [[("train", dialogue.id), ("test", dialogue.id)]]


def test_lines_are_planned_as_the_whole_file_is(tmp_path: Path) -> None:
    """Streamed and loaded corpora give one plan, for every setting that chooses dialogues."""
    paths = {split: as_lines(bundled_sample(split), tmp_path) for split in ("train", "valid", "test")}
    for changes in (
        {},
        {"emotions": "coarse"},
        {"train_share": 0.3, "train_share_seed": 3},
    ):
        whole = open_splits(corpus(**changes))
        lines = open_splits(corpus(**(paths | changes)))
        found, expected = plan_of(tmp_path / "l", lines, 3), plan_of(tmp_path / "w", whole, 3)
        assert content(found) == content(expected)
        assert found.record.pairs_by_split == expected.record.pairs_by_split
        hashes = [
            [p.hash for s in range(3) for d in plan.dialogues(s) for p in d.pairs]
            for plan in (found, expected)
        ]
        emotions = [
            [p.emotion for s in range(3) for d in plan.dialogues(s) for p in d.pairs]
            for plan in (found, expected)
        ]
        assert hashes[0] == hashes[1]
        assert emotions[0] == emotions[1]


def test_a_worker_whose_files_were_removed_takes_the_plan_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was suspended until the export was complete, and all temporary files were removed."""
    splits = open_splits(corpus())
    made = plan_of(tmp_path / "others", splits, 2)

    def removed(path: Path, values: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(planning, "write_checked", removed)
    assert plan_of(tmp_path / "others", splits, 2).record == made.record
    with pytest.raises(FileNotFoundError):
        plan_of(tmp_path / "alone", splits, 2)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_corpus_without_a_training_dialogue_is_refused(tmp_path: Path, share: float) -> None:
    """None left where all stand in valid too, in either format; none there in an empty file."""
    lines = as_lines(bundled_sample("train"), tmp_path)
    for train in (bundled_sample("train"), lines):
        config = corpus(train=train, valid=bundled_sample("train"), drop_cross_split=True, train_share=share)
        with pytest.raises(CorpusError, match=f"{train}: .* none is left to train on"):
            list(open_splits(config)["train"])
    lines.write_text("\n")
    with pytest.raises(CorpusError, match="found no dialogue"):
        list(open_splits(corpus(train=lines, train_share=share))["train"])


def test_blocks_change_the_division_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = open_splits(corpus())
    whole = content(plan_of(tmp_path, splits, 3))
    monkeypatch.setattr(planning, "BLOCK_DIALOGUES", 7)
    plan = plan_of(tmp_path / "blocks", splits, 3)
    found = content(plan)
    assert sorted(item for shard in found for item in shard) == sorted(
        item for shard in whole for item in shard
    )
    assert max(plan.record.costs) / min(plan.record.costs) < 1.1


def test_a_faulty_line_is_named(tmp_path: Path) -> None:
    path = as_lines(bundled_sample("valid"), tmp_path)
    lines = path.read_text().splitlines()
    for broken, message in (
        ("{", "dialogue line 3: found no JSON"),
        ('{"id": "x"}', "dialogue line 3: found an object of 1 keys"),
        (lines[2].replace('"turn": 2', '"turn": 9'), "turn 2, field turn"),
    ):
        path.write_text("\n".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(CorpusError, match=message):
            list(LineDialogues(path))
    path.write_text("\n\n")
    with pytest.raises(CorpusError, match="found no dialogue"):
        list(LineDialogues(path))


def test_a_file_that_changed_under_its_plan_is_refused(tmp_path: Path) -> None:
    path = as_lines(bundled_sample("valid"), tmp_path)
    plan_of(tmp_path, {"train": LineDialogues(path)}, 1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[-1], *lines[1:-1], lines[0]]))
    with pytest.raises(CorpusError, match=r"the corpus changed since its shards were planned|found no JSON"):
        content(open_plan(tmp_path / "plan1", PlanKind(WORK, 1), {"train": LineDialogues(path)}))


def test_a_damaged_or_foreign_plan_is_none(tmp_path: Path) -> None:
    splits = open_splits(corpus())
    directory = tmp_path / "plan2"
    assert open_plan(directory, PlanKind(WORK, 2), splits) is None
    made = plan_of(tmp_path, splits, 2)
    found = open_plan(directory, PlanKind(WORK, 2), splits)
    assert found is not None
    assert content(found) == content(made)
    assert open_plan(directory, PlanKind("1" * 64, 2), splits) is None
    assert open_plan(directory, PlanKind(WORK, 3), splits) is None
    assert open_plan(directory, PlanKind(WORK, 2, "pairs"), splits) is None
    rng = random.Random(5)
    for name in ("entries.bin", "plan.json"):
        whole = (directory / name).read_bytes()
        for position in rng.sample(range(len(whole)), 40):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            (directory / name).write_bytes(damaged)
            again = open_plan(directory, PlanKind(WORK, 2), splits)
            assert again is None or again.record == made.record  # white space
        (directory / name).write_bytes(whole)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of planning and reading 2,000 dialogues against 500 of them, in blocks of 200."""
    monkeypatch.setattr(planning, "BLOCK_DIALOGUES", 200)
    line = as_lines(bundled_sample("valid"), tmp_path).read_text().splitlines()[0]
    value = json.loads(line)

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                file.write(json.dumps(value | {"id": f"d{number}"}) + "\n")
        tracemalloc.start()
        plan = plan_of(tmp_path / str(count), {"train": LineDialogues(path)}, 2)
        assert sum(len(d.pairs) > 0 for d in plan.dialogues(0)) == count // 2
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    small, large = peak(500), peak(2000)
    assert large - small < 200 * (2000 - 500)  # ids and entries, no dialogue
    assert (tmp_path / "2000.jsonl").stat().st_size > 2_500_000


def test_tree_characters_worked_by_hand() -> None:
    utterances = (
        Utterance(1, "A", "12345", "neutral", None),
        Utterance(2, "B", "1234567", "happiness", (Evidence(1, "12345"),)),
    )
    pairs = pairs_of(Dialogue("d", utterances), "fold1+neutral")
    assert [(p.target, p.candidate) for p in pairs] == [(1, 1), (2, 1), (2, 2)]
    assert tree_characters(pairs) == 5 + (5 + 7) + (5 + 5 + 7 + 3 * 70)
    assert tree_characters([]) == 0


def test_prompt_characters_worked_by_hand() -> None:
    utterances = (
        Utterance(1, "A", "12345", "neutral", None),
        Utterance(2, "B", "1234567", "happiness", (Evidence(1, "12345"),)),
    )
    pairs = pairs_of(Dialogue("d", utterances), "fold1+neutral")
    assert prompt_characters(pairs) == (5 + 5 + 70) + (12 + 5 + 70) + (12 + 7 + 70)
    assert prompt_characters([]) == 0


def test_a_teacher_that_reads_every_prompt_whole_is_planned_by_whole_prompts(tmp_path: Path) -> None:
    """Shards of like cost by either measure: what is level by trees is not by prompts."""
    splits = open_splits(corpus())
    costs = {}
    for batching in ("tree", "pairs"):
        plan = make_plan(tmp_path / batching, PlanKind(WORK, 8, batching), splits)
        shards = [[prompt_characters(d.pairs) for d in plan.dialogues(shard)] for shard in range(8)]
        costs[batching] = [sum(shard) for shard in shards]
    assert list(plan.record.costs) == costs["pairs"]
    assert max(costs["pairs"]) / min(costs["pairs"]) < 1.05
    assert max(costs["tree"]) / min(costs["tree"]) > max(costs["pairs"]) / min(costs["pairs"])
