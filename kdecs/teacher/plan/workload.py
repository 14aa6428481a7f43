"""How much there is to compute: steps, micro-batches and tokens of an epoch, for some number of ranks.

Counted on the corpus itself with the training's own units, batches and shares. Where the teacher's tokenizer is not
on this machine, tokens are estimated: words in pieces of up to seven letters, digits and signs one by one (on English
dialogues 1 to 4% more than the 49,152-word tokenizer of SmolLM2). What is shared between prompts stays shared.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import teacher_prompt
from kdecs.teacher.batches import (
    MicroBatch,
    Unit,
    global_batches,
    pair_units,
    pairs_a_tree,
    share_among_ranks,
    tree_units,
)
from kdecs.teacher.families import EncodedPrompt
from kdecs.teacher.prefix_tree import pack

_PIECES = re.compile(r"[^\W\d_]{1,7}|\d|[^\w\s]|\n")


@dataclass(frozen=True)
class Workload:
    """An epoch of optimizer steps on some number of ranks.

    `tokens` are computed ones, padding included; `rank_tokens`, `rank_attended` and `rank_answers` those of the busiest
    rank of each step. `micro_steps` are forwards of a rank, empty ones included. `attended` counts what a dense mask
    computes, `ancestors` what the prompts need. `largest_*` describe the micro-batch that needs most memory.
    """

    pairs: float
    steps: float
    tokens: float
    ancestors: float
    rank_tokens: float
    rank_attended: float
    rank_ancestors: float
    rank_answers: float
    micro_steps: float
    accumulation: int
    largest_tokens: int
    largest_rows: int
    largest_answers: int

    def scaled(self, factor: float) -> "Workload":
        """The same for `factor` times as many dialogues: sums grow, the largest micro-batch stays."""
        sums = ("pairs", "steps", "tokens", "ancestors", "micro_steps")
        ranks = ("rank_tokens", "rank_attended", "rank_ancestors", "rank_answers")
        return replace(self, **{name: getattr(self, name) * factor for name in (*sums, *ranks)})


def estimated_prompts(pairs: Sequence[Pair], *, max_prompt_tokens: int) -> list[EncodedPrompt]:
    """Stand-ins for tokenised prompts: as long, about, and alike where the texts are."""
    prompts = []
    for pair in pairs:
        text = teacher_prompt(pair.dialogue, pair.target, pair.candidate, emotion=str(pair.emotion)).text
        ids = [0, *(crc32(piece.encode()) & 0x7FFFFFFF for piece in _PIECES.findall(text))]
        tokens = np.asarray(ids[-max_prompt_tokens:], dtype=np.int32)
        prompts.append(EncodedPrompt(tokens=tokens, answer=len(tokens) - 1))
    return prompts


def measure_workload(
    pairs: Sequence[Pair],
    prompts: Sequence[EncodedPrompt],
    *,
    use_tree: bool,
    ranks: int,
    micro_batch_tokens: int,
    global_batch_pairs: int,
    seed: int = 0,
    epochs: int = 1,
) -> Workload:
    """An epoch as the training cuts it with this seed: the mean over so many epochs, the most micro-batches of any."""
    units = (
        tree_units(pairs, prompts, max_tokens=micro_batch_tokens, max_pairs=pairs_a_tree(global_batch_pairs))
        if use_tree
        else pair_units(prompts)
    )
    costs = _Costs(units, prompts, use_tree=use_tree)
    steps = [
        step
        for epoch in range(epochs)
        for step in global_batches(
            units,
            batch_pairs=global_batch_pairs,
            bucket_batches=1 if use_tree else 50,
            seed=seed,
            epoch=epoch,
        )
    ]
    total = np.zeros(4)
    busiest = np.zeros(4)
    micro_steps, accumulation = 0, 1
    largest = _Cost(0, 0, 0, 0, 0)
    for step in steps:
        shares = share_among_ranks(
            step, world_size=ranks, micro_batch_tokens=micro_batch_tokens, padded=not use_tree
        )
        sums = np.zeros((ranks, 4))
        for rank, micro_batches in enumerate(shares):
            for micro in micro_batches:
                cost = costs.of(micro)
                sums[rank] += (cost.tokens, cost.attended, cost.ancestors, cost.answers)
                largest = max(largest, cost, key=lambda c: (c.tokens, c.attended))
        total += sums.sum(axis=0)
        busiest += sums.max(axis=0)
        longest = max(len(micro_batches) for micro_batches in shares)
        micro_steps += longest
        accumulation = max(accumulation, longest)
    total /= epochs
    busiest /= epochs
    return Workload(
        pairs=len(pairs),
        steps=len(steps) / epochs,
        tokens=float(total[0]),
        ancestors=float(total[2]),
        rank_tokens=float(busiest[0]),
        rank_attended=float(busiest[1]),
        rank_ancestors=float(busiest[2]),
        rank_answers=float(busiest[3]),
        micro_steps=micro_steps / epochs,
        accumulation=accumulation,
        largest_tokens=largest.tokens // largest.rows,
        largest_rows=largest.rows,
        largest_answers=largest.answers,
    )


@dataclass(frozen=True)
class _Cost:
    """A forward: rows × length tokens, (query, key) pairs with and without what the mask hides, prompts."""

    tokens: int
    attended: int
    ancestors: int
    answers: int
    rows: int


class _Costs:
    """What micro-batches cost, from the units that they are made of."""

    def __init__(self, units: Sequence[Unit], prompts: Sequence[EncodedPrompt], *, use_tree: bool) -> None:
        self.use_tree = use_tree
        self.unit_of = {pair: unit for unit in units for pair in unit.pairs}
        self.ancestors: dict[tuple[int, ...], int] = {}
        for unit in units:
            if use_tree:
                tree = pack([prompts[n].tokens for n in unit.pairs])
                self.ancestors[unit.pairs] = int((tree.positions_N + 1).sum())
            else:
                self.ancestors[unit.pairs] = unit.longest**2

    def of(self, micro: MicroBatch) -> _Cost:
        units = list({self.unit_of[pair].pairs: self.unit_of[pair] for pair in micro.pairs}.values())
        ancestors = sum(self.ancestors[unit.pairs] for unit in units)
        if self.use_tree:
            tokens = sum(unit.tokens for unit in units)
            return _Cost(tokens, tokens**2, ancestors, len(micro.pairs), 1)
        longest = max(unit.longest for unit in units)
        rows = len(units)
        return _Cost(rows * longest, rows * longest**2, ancestors, rows, rows)
