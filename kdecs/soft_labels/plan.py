"""Which dialogue is labelled in which shard, decided by the corpus, the number of shards and the teacher's batching.

One worker makes the plan in a pass over the corpus, and all workers of the export read it from disk:

    .work/plan/entries.bin   one ENTRY per dialogue that has pairs, by shard, then split, then position
    .work/plan/plan.json     per shard: first entry, pairs, cost; pairs by split; sha256 of entries.bin and of itself

Rule: the dialogues, in order, are taken in blocks of BLOCK_DIALOGUES. Within a block the costliest dialogue comes
first, and each goes to the shard with the least cost so far. If the corpus fits in one block, this is plain
longest-first scheduling. A dialogue costs the characters that the teacher reads: those of a prefix tree of all its
prompts, or those of every prompt on its own.

A worker holds the plan in memory, 40 bytes per dialogue. Texts are read again from the corpus when they are labelled.
"""

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kdecs.artifact import Manifest, atomic_path
from kdecs.corpus.pairs import EXPORT_UNIVERSE, Pair, Universe, pairs_of
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
_TEMPLATE_CHARACTERS = 70  # of Eq. 1 around a candidate's text; an estimate, which only balances shards

Batching = Literal["tree", "pairs"]
"""How a teacher reads the prompts of a dialogue: as one prefix tree, or each on its own."""


@dataclass(frozen=True)
class PlanKind:
    """The settings that, together with the corpus, determine a plan."""

    work_hash: str
    num_shards: int
    batching: Batching = "tree"
    candidates_after: int = 0
    universe: Universe = EXPORT_UNIVERSE
    """Reach and universe are a part of the work, so its hash tells one plan from another."""


class PlanRecord(BaseModel):
    """The contents of plan.json; `starts` has one more item than there are shards."""

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
    """One dialogue of a shard with its pairs to label."""

    split: str
    pairs: list[Pair]


class Plan:
    """A plan and the corpus that it divides."""

    def __init__(
        self,
        record: PlanRecord,
        entries: np.ndarray,
        splits: Mapping[str, Dialogues],
        kind: PlanKind,
    ) -> None:
        self.record = record
        self._kind = kind
        self._entries = entries
        self._splits = splits

    @property
    def num_shards(self) -> int:
        """The number of shards as configured; some may be empty."""
        return len(self.record.pairs)

    @property
    def num_pairs(self) -> int:
        """Rows of all shards."""
        return sum(self.record.pairs)

    def dialogues(self, shard: int) -> Iterator[PlannedDialogue]:
        """The dialogues of a shard in order, each read when it is reached. Raises CorpusError for a changed file."""
        start, end = self.record.starts[shard : shard + 2]
        for entry in self._entries[start:end]:
            split = SPLITS[entry["split"]]
            dialogue = self._splits[split][int(entry["position"])]
            pairs = pairs_of(dialogue, self._kind.universe, self._kind.candidates_after)
            # A corpus that was edited or sorted meanwhile would put pairs into other shards than the plan says.
            if len(pairs) != entry["num_pairs"] or _key(split, dialogue) != tuple(entry["key"].tolist()):
                raise CorpusError(
                    f"dialogue {dialogue.id} of the split {split}: the corpus changed since its shards were planned; "
                    "restore the file, or choose another output"
                )
            yield PlannedDialogue(split, pairs)

    def chunks(self, shard: int, chunk_pairs: int) -> Iterator[list[PlannedDialogue]]:
        """Whole dialogues in order, in chunks that end once they hold `chunk_pairs` pairs: what is scored at once."""
        chunk: list[PlannedDialogue] = []
        num_pairs = 0
        for planned in self.dialogues(shard):
            chunk.append(planned)
            num_pairs += len(planned.pairs)
            if num_pairs >= chunk_pairs:
                yield chunk
                chunk, num_pairs = [], 0
        if chunk:
            yield chunk


def batching_of(teacher: Manifest) -> Batching:
    """How a teacher reads prompts according to its manifest; as a tree if the manifest does not say."""
    return "pairs" if teacher.details.get("batching") == "pairs" else "tree"


def open_plan(directory: Path, kind: PlanKind, splits: Mapping[str, Dialogues]) -> Plan | None:
    """The plan in a directory; None if there is none, or if it is damaged or of another kind."""
    try:
        record = PlanRecord.model_validate(read_checked(directory / PLAN_NAME))
        entries = (directory / ENTRIES_NAME).read_bytes()
    except (FileNotFoundError, ValidationError):
        return None
    # The two files may be of two plans if a worker was killed between their writes.
    is_undamaged = hashlib.sha256(entries).hexdigest() == record.entries_sha256
    found = replace(kind, work_hash=record.work_hash, num_shards=len(record.pairs), batching=record.batching)
    if not is_undamaged or found != kind:
        return None
    return Plan(record, np.frombuffer(entries, ENTRY), splits, kind)


def make_plan(directory: Path, kind: PlanKind, splits: Mapping[str, Dialogues]) -> Plan:
    """Plan every dialogue into exactly one shard, shards of like cost, and write the plan.

    A dialogue without pairs is left out; with fewer dialogues than shards some shards are empty. Workers that make the
    plan at the same time write the same bytes.
    Raises CorpusError for a faulty corpus.
    """
    entries = _entries_of(splits, kind)
    loads = [(0, shard) for shard in range(kind.num_shards)]  # a heap of (cost, shard)
    shards = np.empty(len(entries), np.uint32)
    for first in range(0, len(entries), BLOCK_DIALOGUES):
        # Signed, since they are negated: the costliest first. Equal costs keep the corpus' order (a stable sort), so
        # that every worker makes the same plan.
        costs = entries["cost"][first : first + BLOCK_DIALOGUES].astype(np.int64)
        for place in np.argsort(-costs, kind="stable"):
            load, shard = loads[0]
            shards[first + place] = shard
            heapq.heapreplace(loads, (load + int(costs[place]), shard))
    pairs = entries["num_pairs"].astype(np.int64)
    by_split = np.bincount(entries["split"], weights=pairs, minlength=len(SPLITS))
    counts = np.bincount(shards, minlength=kind.num_shards)
    entries = entries[np.argsort(shards, kind="stable")]  # within a shard by split and position
    record = PlanRecord(
        work_hash=kind.work_hash,
        batching=kind.batching,
        entries_sha256=hashlib.sha256(entries.tobytes()).hexdigest(),
        starts=(0, *np.cumsum(counts).tolist()),
        pairs=tuple(np.bincount(shards, weights=pairs, minlength=kind.num_shards).astype(int).tolist()),
        costs=tuple(load for load, _ in sorted(loads, key=lambda item: item[1])),
        pairs_by_split={split: int(by_split[n]) for n, split in enumerate(SPLITS) if split in splits},
    )
    try:
        # The record goes last. It holds the checksum of the entries, so a plan that was half written is not used.
        with atomic_path(directory / ENTRIES_NAME) as temporary:
            temporary.write_bytes(entries.tobytes())
        write_checked(directory / PLAN_NAME, record.model_dump(mode="json"))
    except FileNotFoundError:
        # This worker was suspended while others planned, labelled and completed the export, which removes all
        # temporary files. Their plan is there.
        if (found := open_plan(directory, kind, splits)) is None:
            raise
        return found
    return Plan(record, entries, splits, kind)


def tree_characters(pairs: Sequence[Pair]) -> int:
    """Characters of the prefix tree of a dialogue's prompts: an estimate of its tokens, without a tokenizer.

    The history up to the last target counts once, each target's clause once, and a candidate's clause once per pair.
    """
    if not pairs:
        return 0
    utterances = pairs[0].dialogue.utterances
    targets = {pair.target for pair in pairs}
    # The prompts of a later target continue those of an earlier one: only the longest history costs anything.
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


def _entries_of(splits: Mapping[str, Dialogues], kind: PlanKind) -> np.ndarray:
    """The ENTRY of every dialogue that has pairs, by split and position."""
    cost_of = _COSTS[kind.batching]
    blocks = [np.empty(0, ENTRY)]
    held: list[tuple[int, int, int, int, tuple[int, int]]] = []
    for number, split in enumerate(SPLITS):
        if split not in splits:
            continue
        for position, dialogue in enumerate(splits[split]):
            if pairs := pairs_of(dialogue, kind.universe, kind.candidates_after):
                key = _key(split, dialogue)
                held.append((number, len(pairs), position, cost_of(pairs), key))
            # Python's tuples take ten times the memory of their array.
            if len(held) == BLOCK_DIALOGUES:
                blocks.append(np.array(held, ENTRY))
                held = []
    return np.concatenate([*blocks, np.array(held, ENTRY)])


def _key(split: str, dialogue: Dialogue) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{split}\0{dialogue.id}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
