"""Which dialogue is labelled in which shard: decided by the corpus, the number of shards and the teacher's batching.

The plan is made in one pass over the corpus and kept on disk, so that its size in memory does not grow with the corpus:

    .work/plan/entries.bin   one ENTRY a dialogue that has pairs, by shard, then split, then place in the file
    .work/plan/plan.json     per shard: first entry, pairs, cost; pairs by split; sha256 of entries.bin and of itself

Rule: dialogues in order are taken BLOCK_DIALOGUES at a time; those of a block go, the costliest first, each into the
shard that is lightest by then. Any corpus of one block is thereby planned longest-first as a whole. A dialogue's cost
is in characters of what the teacher reads: a prefix tree of all its prompts, or every prompt whole.
"""

import hashlib
import heapq
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kdecs.artifact import Manifest, sha256_of_file
from kdecs.corpus.pairs import EXPORT_UNIVERSE, Pair, pairs_of
from kdecs.corpus.reading import Dialogues
from kdecs.corpus.schema import Dialogue
from kdecs.errors import CorpusError
from kdecs.soft_labels.format import SPLITS, read_checked, write_checked

BLOCK_DIALOGUES = 65_536
PLAN_DIRECTORY = "plan"
PLAN_NAME, ENTRIES_NAME = "plan.json", "entries.bin"
ENTRY = np.dtype(
    [
        ("split", "<u4"),
        ("num_pairs", "<u4"),
        ("position", "<u8"),  # in the split
        ("cost", "<u8"),
        ("key", "<u8", 2),  # blake2b of split and dialogue id, 16 bytes
    ]
)
_KEYS_AT_ONCE = 1 << 21
_TEMPLATE_CHARACTERS = 70
"""Characters of Eq. 1 around a candidate's text."""


Batching = Literal["tree", "pairs"]
"""How a teacher reads the prompts of a dialogue: as one prefix tree, or each on its own."""


@dataclass(frozen=True)
class PlanKind:
    """What fixes a plan beside the corpus."""

    work_hash: str
    num_shards: int
    batching: Batching = "tree"


class PlanRecord(BaseModel):
    """plan.json; `starts` has one more item than there are shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    work_hash: str
    batching: Batching
    entries_sha256: str
    starts: tuple[int, ...]
    pairs: tuple[int, ...]
    costs: tuple[int, ...]
    pairs_by_split: dict[str, int]


@dataclass(frozen=True, slots=True)
class PlannedDialogue:
    """One dialogue of a shard with the pairs that are labelled."""

    split: str
    pairs: list[Pair]


class Plan:
    """A plan on disk and the corpus it is of."""

    def __init__(self, directory: Path, record: PlanRecord, splits: Mapping[str, Dialogues]) -> None:
        self.record = record
        self._entries = directory / ENTRIES_NAME
        self._splits = splits

    @property
    def num_shards(self) -> int:
        """As configured; some may be empty."""
        return len(self.record.pairs)

    @property
    def num_pairs(self) -> int:
        """Rows of all shards."""
        return sum(self.record.pairs)

    def entries(self, shard: int) -> Iterator[np.void]:
        """The ENTRYs of a shard, a block at a time in memory."""
        start, end = self.record.starts[shard : shard + 2]
        for first in range(start, end, BLOCK_DIALOGUES):
            yield from _read_entries(self._entries, first, min(BLOCK_DIALOGUES, end - first))

    def dialogues(self, shard: int) -> Iterator[PlannedDialogue]:
        """The dialogues of a shard in order, each read when it is asked for. Raises CorpusError for a changed file."""
        for entry in self.entries(shard):
            split = SPLITS[entry["split"]]
            dialogue = self._splits[split][int(entry["position"])]
            pairs = pairs_of(dialogue, EXPORT_UNIVERSE)
            if len(pairs) != entry["num_pairs"] or _key(split, dialogue) != tuple(entry["key"].tolist()):
                raise CorpusError(
                    f"dialogue {dialogue.id} of the split {split}: the corpus changed since its shards were planned; "
                    "put the file back, or choose another output"
                )
            yield PlannedDialogue(split, pairs)

    def chunks(self, shard: int, pairs_a_chunk: int) -> Iterator[list[PlannedDialogue]]:
        """Whole dialogues, in order, about so many pairs at a time: what is scored at once."""
        chunk: list[PlannedDialogue] = []
        num_pairs = 0
        for planned in self.dialogues(shard):
            chunk.append(planned)
            num_pairs += len(planned.pairs)
            if num_pairs >= pairs_a_chunk:
                yield chunk
                chunk, num_pairs = [], 0
        if chunk:
            yield chunk


def batching_of(teacher: Manifest) -> Batching:
    """How a teacher reads prompts, as its manifest says; a tree where that says nothing."""
    return "pairs" if teacher.details.get("batching") == "pairs" else "tree"


def open_plan(directory: Path, kind: PlanKind, splits: Mapping[str, Dialogues]) -> Plan | None:
    """The plan that lies in a directory, or None where there is none of this kind or it is damaged."""
    try:
        record = PlanRecord.model_validate(read_checked(directory / PLAN_NAME))
        whole = sha256_of_file(directory / ENTRIES_NAME) == record.entries_sha256
    except (FileNotFoundError, ValidationError):
        return None
    if not whole or PlanKind(record.work_hash, len(record.pairs), record.batching) != kind:
        return None
    return Plan(directory, record, splits)


def make_plan(directory: Path, kind: PlanKind, splits: Mapping[str, Dialogues]) -> Plan:
    """Plan every dialogue into exactly one shard, shards of like cost, and put the plan in place by rename.

    A dialogue without pairs is left out; with fewer dialogues than shards some shards are empty.
    Raises CorpusError for a faulty corpus, or where an id stands twice in one split (in two splits is fine).
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        record = _write_plan(temporary, kind, splits)
        if directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
        try:
            temporary.rename(directory)
        except OSError:
            if (found := open_plan(directory, kind, splits)) is None:
                raise
            return found  # another worker was quicker
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Plan(directory, record, splits)


def remove_leftovers(directory: Path) -> None:
    """Remove what workers that were killed left of their plans."""
    for leftover in directory.parent.glob(f"{directory.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def tree_characters(pairs: Sequence[Pair]) -> int:
    """Characters of the prefix tree of a dialogue's prompts: an estimate of its tokens, without a tokenizer.

    The history counts once up to the last target, a target's clause once, a candidate's clause once a pair.
    """
    if not pairs:
        return 0
    utterances = pairs[0].dialogue.utterances
    targets = {pair.target for pair in pairs}
    history = sum(len(u.text) for u in utterances[: max(targets) - 1])
    clauses = sum(len(utterances[target - 1].text) for target in targets)
    candidates = sum(len(utterances[pair.candidate - 1].text) + _TEMPLATE_CHARACTERS for pair in pairs)
    return history + clauses + candidates


def prompt_characters(pairs: Sequence[Pair]) -> int:
    """Characters of all prompts of a dialogue, each whole: history, the target's clause, the candidate's clause."""
    if not pairs:
        return 0
    lengths = [len(u.text) for u in pairs[0].dialogue.utterances]
    before = [0, *itertools.accumulate(lengths)]
    return sum(before[pair.target] + lengths[pair.candidate - 1] + _TEMPLATE_CHARACTERS for pair in pairs)


_COSTS: dict[Batching, Callable[[Sequence[Pair]], int]] = {
    "tree": tree_characters,
    "pairs": prompt_characters,
}


def _write_plan(directory: Path, kind: PlanKind, splits: Mapping[str, Dialogues]) -> PlanRecord:
    num_shards = kind.num_shards
    unsorted, shards_file = directory / "unsorted.bin", directory / "shards.bin"
    counts, pairs = np.zeros(num_shards, np.int64), np.zeros(num_shards, np.int64)
    loads = [(0, index) for index in range(num_shards)]
    by_split = np.zeros(len(SPLITS), np.int64)
    with unsorted.open("wb") as entries_file, shards_file.open("wb") as assigned_file:
        for block in _blocks(splits, _COSTS[kind.batching]):
            assigned = _assign(block["cost"], loads)
            entries_file.write(block.tobytes())
            assigned_file.write(assigned.tobytes())
            np.add.at(counts, assigned, 1)
            np.add.at(pairs, assigned, block["num_pairs"].astype(np.int64))
            np.add.at(by_split, block["split"], block["num_pairs"].astype(np.int64))
    _refuse_twins(unsorted, splits)
    starts = np.concatenate([[0], np.cumsum(counts)])
    _sort_by_shard(unsorted, shards_file, directory / ENTRIES_NAME, starts)
    unsorted.unlink()
    shards_file.unlink()
    costs = {index: load for load, index in loads}
    record = PlanRecord(
        work_hash=kind.work_hash,
        batching=kind.batching,
        entries_sha256=sha256_of_file(directory / ENTRIES_NAME),
        starts=tuple(starts.tolist()),
        pairs=tuple(pairs.tolist()),
        costs=tuple(costs[index] for index in range(num_shards)),
        pairs_by_split={
            split: int(count) for split, count in zip(SPLITS, by_split, strict=True) if split in splits
        },
    )
    write_checked(directory / PLAN_NAME, record.model_dump(mode="json"))
    return record


def _blocks(
    splits: Mapping[str, Dialogues], cost_of: Callable[[Sequence[Pair]], int]
) -> Iterator[np.ndarray]:
    """The ENTRYs of all dialogues with pairs, by split and place, a block at a time."""
    held: list[tuple[int, int, int, int, tuple[int, int]]] = []
    for number, split in enumerate(SPLITS):
        if split not in splits:
            continue
        for position, dialogue in enumerate(splits[split]):
            if pairs := pairs_of(dialogue, EXPORT_UNIVERSE):
                key = _key(split, dialogue)
                held.append((number, len(pairs), position, cost_of(pairs), key))
            if len(held) == BLOCK_DIALOGUES:
                yield np.array(held, dtype=ENTRY)
                held = []
    if held:
        yield np.array(held, dtype=ENTRY)


def _assign(costs: np.ndarray, loads: list[tuple[int, int]]) -> np.ndarray:
    """The shard of each dialogue of a block, (n,) uint32; `loads`, a heap of (cost, shard), is brought up to date."""
    assigned = np.zeros(len(costs), np.uint32)
    for item in np.argsort(-costs.astype(np.int64), kind="stable"):
        load, shard = loads[0]
        assigned[item] = shard
        heapq.heapreplace(loads, (load + int(costs[item]), shard))
    return assigned


def _sort_by_shard(unsorted: Path, shards_file: Path, target: Path, starts: np.ndarray) -> None:
    """Write the entries by shard, each shard's in the order they had: a counting sort, a block in memory."""
    cursors = starts[:-1].copy()
    with target.open("wb") as file:
        for first in range(0, int(starts[-1]), BLOCK_DIALOGUES):
            block = _read_entries(unsorted, first, BLOCK_DIALOGUES)
            assigned = np.fromfile(shards_file, np.uint32, BLOCK_DIALOGUES, offset=first * 4)
            order = np.argsort(assigned, kind="stable")
            present, firsts = np.unique(assigned[order], return_index=True)
            for shard, part in zip(present, np.split(block[order], firsts[1:]), strict=True):
                file.seek(int(cursors[shard]) * ENTRY.itemsize)
                file.write(part.tobytes())
                cursors[shard] += len(part)
        file.flush()
        os.fsync(file.fileno())


def _refuse_twins(entries: Path, splits: Mapping[str, Dialogues]) -> None:
    """Raise CorpusError where a dialogue id stands twice in one split; keys are compared a bucket at a time."""
    total = entries.stat().st_size // ENTRY.itemsize
    num_buckets = 1 + total // _KEYS_AT_ONCE
    for bucket in range(num_buckets):
        parts = []
        for first in range(0, total, BLOCK_DIALOGUES):
            keys = _read_entries(entries, first, BLOCK_DIALOGUES)["key"]
            parts.append(keys[keys[:, 0] % np.uint64(num_buckets) == bucket])
        if not parts:
            continue
        keys = np.concatenate(parts)
        keys = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
        twins = np.flatnonzero((keys[1:] == keys[:-1]).all(axis=1))
        if len(twins):
            _name_twin(entries, keys[twins[0]], splits)


def _name_twin(entries: Path, key: np.ndarray, splits: Mapping[str, Dialogues]) -> None:
    total = entries.stat().st_size // ENTRY.itemsize
    for first in range(0, total, BLOCK_DIALOGUES):
        block = _read_entries(entries, first, BLOCK_DIALOGUES)
        for item in block[(block["key"] == key).all(axis=1)]:
            split = SPLITS[item["split"]]
            dialogue = splits[split][int(item["position"])]
            raise CorpusError(
                f"dialogue {dialogue.id}: stands twice in the split {split}, ids must be unique"
            )


def _read_entries(path: Path, first: int, count: int) -> np.ndarray:
    return np.fromfile(path, ENTRY, count, offset=first * ENTRY.itemsize)


def _key(split: str, dialogue: Dialogue) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{split}\0{dialogue.id}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
