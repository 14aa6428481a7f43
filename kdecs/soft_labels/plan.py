"""Which dialogue is labelled in which shard: decided by the corpus and the number of shards, nothing else."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.pairs import Pair, Universe, pairs_of
from kdecs.corpus.schema import Dialogue
from kdecs.corpus.splits import read_split, training_dialogues
from kdecs.errors import CorpusError
from kdecs.soft_labels.format import SPLITS

EXPORT_UNIVERSE: Universe = "fold1+neutral"
"""What is exported: the pairs that students train on and predict for scoring, of every split."""

_TEMPLATE_CHARACTERS = 70
"""Characters of Eq. 1 around a candidate's text."""


@dataclass(frozen=True, slots=True)
class PlannedDialogue:
    """One dialogue of a shard; `position` is its place in the file, `cost` its prompt tree in characters."""

    split: str
    position: int
    dialogue: Dialogue
    num_pairs: int
    cost: int

    def pairs(self) -> list[Pair]:
        """The pairs that are labelled."""
        return pairs_of(self.dialogue, EXPORT_UNIVERSE)


@dataclass(frozen=True, slots=True)
class Shard:
    """The work of one shard file; dialogues by split and position."""

    index: int
    dialogues: tuple[PlannedDialogue, ...]

    @property
    def num_pairs(self) -> int:
        """Rows of the shard."""
        return sum(planned.num_pairs for planned in self.dialogues)

    @property
    def cost(self) -> int:
        """Characters of its prompt trees."""
        return sum(planned.cost for planned in self.dialogues)

    def chunks(self, pairs_a_chunk: int) -> Iterator[list[PlannedDialogue]]:
        """Whole dialogues, in order, about so many pairs at a time: what is scored at once."""
        chunk: list[PlannedDialogue] = []
        num_pairs = 0
        for planned in self.dialogues:
            chunk.append(planned)
            num_pairs += planned.num_pairs
            if num_pairs >= pairs_a_chunk:
                yield chunk
                chunk, num_pairs = [], 0
        if chunk:
            yield chunk


def read_splits(config: CorpusConfig) -> dict[str, list[Dialogue]]:
    """The labelled dialogues by split; the training split as `training_dialogues` gives it. Raises CorpusError."""
    evaluated = {"valid": config.valid, "test": config.test}
    return {
        "train": training_dialogues(config),
        **{
            split: list(read_split(config, path).dialogues)
            for split, path in evaluated.items()
            if path is not None
        },
    }


def plan_shards(splits: Mapping[str, Sequence[Dialogue]], num_shards: int) -> tuple[Shard, ...]:
    """Every dialogue in exactly one shard, shards of like cost (longest first, into the lightest shard).

    A dialogue without pairs is left out; with fewer dialogues than shards some shards are empty.
    Raises CorpusError where an id stands twice in one split (the same id in two splits is fine).
    """
    planned = [item for split in SPLITS for item in _planned(split, splits.get(split, ()))]
    loads = [(0, index) for index in range(num_shards)]
    contents: list[list[PlannedDialogue]] = [[] for _ in range(num_shards)]
    for item in sorted(planned, key=lambda item: (-item.cost, SPLITS.index(item.split), item.position)):
        load, index = heapq.heappop(loads)
        contents[index].append(item)
        heapq.heappush(loads, (load + item.cost, index))
    return tuple(
        Shard(index, tuple(sorted(content, key=lambda item: (SPLITS.index(item.split), item.position))))
        for index, content in enumerate(contents)
    )


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


def _planned(split: str, dialogues: Sequence[Dialogue]) -> Iterator[PlannedDialogue]:
    seen: set[str] = set()
    for position, dialogue in enumerate(dialogues):
        if dialogue.id in seen:
            raise CorpusError(
                f"dialogue {dialogue.id}: stands twice in the split {split}, ids must be unique"
            )
        seen.add(dialogue.id)
        pairs = pairs_of(dialogue, EXPORT_UNIVERSE)
        if pairs:
            yield PlannedDialogue(split, position, dialogue, len(pairs), tree_characters(pairs))
