"""What a teacher trains and validates on: pairs, their tokenised prompts, and the batches that they form.

Pairs are grouped into units (a prefix tree, or a single prompt), units into the global batch of an optimizer step, and
each rank's share of that into micro-batches of at most `micro_batch_tokens` tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.splits import read_split, require_causes, training_split
from kdecs.runtime import Runtime
from kdecs.teacher.config import TeacherConfig, TuningConfig
from kdecs.teacher.families import EncodedPrompt, Family
from kdecs.teacher.tree.prefix_tree import tree_size


@dataclass(frozen=True)
class Unit:
    """Pairs (by index) that are computed together. `tokens` is what their forward costs."""

    pairs: tuple[int, ...]
    tokens: int
    longest: int


@dataclass(frozen=True)
class MicroBatch:
    """The pair indices of one forward of one rank; empty if only other ranks have more to do."""

    pairs: tuple[int, ...]


def tree_units(
    pairs: Sequence[Pair], prompts: Sequence[EncodedPrompt], *, max_tokens: int, max_pairs: int
) -> list[Unit]:
    """Trees of a dialogue's consecutive targets, within `max_tokens` and `max_pairs` unless one target exceeds them."""
    units: list[Unit] = []
    order = range(len(pairs))
    # By identity: equality of dialogues would compare all their texts.
    for _, of_dialogue in groupby(order, key=lambda n: id(pairs[n].dialogue)):
        chunk: list[int] = []
        for _, group in groupby(of_dialogue, key=lambda n: pairs[n].target):
            for target in _split_target(list(group), prompts, max_tokens):
                joined = [*chunk, *target]
                # Consecutive targets share most of their history, so they belong into one tree as long as it fits.
                if chunk and (len(joined) > max_pairs or _size(joined, prompts) > max_tokens):
                    units.append(_unit(chunk, prompts))
                    chunk = target
                else:
                    chunk = joined
        if chunk:
            units.append(_unit(chunk, prompts))
    return units


def pair_units(prompts: Sequence[EncodedPrompt]) -> list[Unit]:
    """A unit for each prompt."""
    return [Unit((n,), len(p.tokens), len(p.tokens)) for n, p in enumerate(prompts)]


def target_units(prompts: Sequence[EncodedPrompt], *, max_tokens: int, max_pairs: int) -> list[Unit]:
    """Sequences of consecutive prompts that share a trunk, within both limits unless a single prompt exceeds them."""
    units: list[Unit] = []
    for _, group in groupby(range(len(prompts)), key=lambda n: prompts[n].trunk):
        held: list[int] = []
        size = 0
        for n in group:
            num_branch = len(prompts[n].tokens) - prompts[n].num_trunk
            if held and (size + num_branch > max_tokens or len(held) == max_pairs):
                units.append(Unit(tuple(held), size, size))
                held = []
            size = num_branch + (size if held else prompts[n].num_trunk)
            held.append(n)
        units.append(Unit(tuple(held), size, size))
    return units


def single_units(prompts: Sequence[EncodedPrompt], *, max_tokens: int, max_pairs: int) -> list[Unit]:
    """Units of a teacher without prefix trees: a target's tree if the prompts have trunks, otherwise single prompts."""
    if not is_padded(prompts):
        return target_units(prompts, max_tokens=max_tokens, max_pairs=max_pairs)
    return pair_units(prompts)


def is_padded(prompts: Sequence[EncodedPrompt]) -> bool:
    """True unless the prompts are branches of target trees, which stand one after the other."""
    return not (prompts and prompts[0].num_trunk)


def make_units(
    family: Family,
    pairs: Sequence[Pair],
    prompts: Sequence[EncodedPrompt],
    *,
    use_tree: bool,
    max_tokens: int,
    max_pairs: int,
) -> list[Unit]:
    """Prefix trees if they are wanted and the family shares prefixes, otherwise target trees or single prompts."""
    if use_tree and family.can_share_prefixes:
        return tree_units(pairs, prompts, max_tokens=max_tokens, max_pairs=max_pairs)
    return single_units(prompts, max_tokens=max_tokens, max_pairs=max_pairs)


def max_pairs_per_tree(batch_pairs: int) -> int:
    """The most pairs of a tree in training: half of an optimizer step's.

    A dialogue holds about as many pairs as a step, so with whole dialogues a step would see just one, whose pairs
    differ little. Halves mix two or three dialogues and keep the size near `batch_pairs`. The price is tokens, since
    each part repeats its dialogue's history: over RECCON 10% more than with parts of up to `batch_pairs` = 32 (6% at
    64), which is still 3.8 times fewer than prompt by prompt. Quarters would cost 20%.
    """
    return max(1, batch_pairs // 2)


def global_batches(
    units: Sequence[Unit], *, batch_pairs: int, bucket_batches: int, seed: int, epoch: int
) -> list[list[Unit]]:
    """An epoch's global batches in a seeded order. Every unit comes once.

    Sizes are as near to `batch_pairs` as whole units allow, and their mean is at most that. If `bucket_batches` is 1,
    shuffled units are cut into batches. Otherwise units of like length share a batch, which saves padding: units are
    shuffled, sorted within buckets of `bucket_batches` batches, cut, and the batches shuffled.
    """
    # One generator per epoch, so that the steps of an epoch do not depend on how many were drawn before.
    generator = np.random.default_rng([seed, epoch])
    shuffled = [units[n] for n in generator.permutation(len(units))]
    bucket = max(1, len(shuffled))
    if bucket_batches > 1:
        pairs_per_unit = sum(len(u.pairs) for u in units) / max(1, len(units))
        bucket = max(1, round(bucket_batches * batch_pairs / pairs_per_unit))
    batches: list[list[Unit]] = []
    for start in range(0, len(shuffled), bucket):
        part = shuffled[start : start + bucket]
        if bucket_batches > 1:
            part.sort(key=lambda unit: unit.longest)
        batches.extend(_cut(part, batch_pairs))
    # Otherwise each bucket would train from its shortest prompts to its longest.
    return [batches[n] for n in generator.permutation(len(batches))]


def share_among_ranks(
    batch: Sequence[Unit], *, world_size: int, micro_batch_tokens: int, padded: bool
) -> list[list[MicroBatch]]:
    """The micro-batches of each rank. The heaviest unit goes first, always to the rank with the fewest tokens.

    If `padded`, a forward costs (number of prompts) × (longest), otherwise the sum of tokens.
    """
    loads = [0] * world_size
    shares: list[list[Unit]] = [[] for _ in range(world_size)]
    # The slowest rank decides how long a step takes. Ties go by pairs, so that all ranks deal alike.
    for unit in sorted(batch, key=lambda u: (-u.tokens, u.pairs)):
        rank = loads.index(min(loads))
        loads[rank] += unit.tokens
        shares[rank].append(unit)
    return [_micro_batches(share, micro_batch_tokens, padded) for share in shares]


def fixed_batches(units: Sequence[Unit], *, micro_batch_tokens: int, padded: bool) -> list[MicroBatch]:
    """Micro-batches for scoring, like lengths together. They depend on the units alone."""
    # Like lengths together waste the least padding.
    ordered = sorted(units, key=lambda u: (u.longest, u.pairs)) if padded else list(units)
    return _micro_batches(ordered, micro_batch_tokens, padded)


def _cut(units: Sequence[Unit], batch_pairs: int) -> list[list[Unit]]:
    """Cut consecutive units into the fewest batches of about `batch_pairs` pairs.

    The k-th cut falls at the unit that ends nearest to k shares of all pairs, so a large batch makes no other one
    small. A unit of more than `batch_pairs` may swallow a cut, which makes one batch fewer.
    """
    ends = np.cumsum([len(unit.pairs) for unit in units])
    num_batches = -(-int(ends[-1]) // batch_pairs)
    wanted = ends[-1] * np.arange(1, num_batches + 1) / num_batches
    cuts = sorted({int(np.argmin(np.abs(ends - share))) + 1 for share in wanted})
    return [list(units[start:stop]) for start, stop in zip([0, *cuts[:-1]], cuts, strict=True)]


def _micro_batches(units: Sequence[Unit], budget: int, padded: bool) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    held: list[Unit] = []
    for unit in units:
        longer = [*held, unit]
        cost = len(longer) * max(u.longest for u in longer) if padded else sum(u.tokens for u in longer)
        # A unit that exceeds the budget by itself still gets a micro-batch.
        if held and cost > budget:
            batches.append(MicroBatch(tuple(n for u in held for n in u.pairs)))
            held = [unit]
        else:
            held = longer
    if held:
        batches.append(MicroBatch(tuple(n for u in held for n in u.pairs)))
    return batches


def _split_target(group: list[int], prompts: Sequence[EncodedPrompt], max_tokens: int) -> list[list[int]]:
    """Halve a target whose tree exceeds the budget, until each part fits or is a single prompt."""
    if len(group) == 1 or _size(group, prompts) <= max_tokens:
        return [group]
    middle = len(group) // 2
    return [
        *_split_target(group[:middle], prompts, max_tokens),
        *_split_target(group[middle:], prompts, max_tokens),
    ]


def _size(indices: Sequence[int], prompts: Sequence[EncodedPrompt]) -> int:
    return tree_size([prompts[n].tokens for n in indices])


def _unit(indices: Sequence[int], prompts: Sequence[EncodedPrompt]) -> Unit:
    return Unit(tuple(indices), _size(indices, prompts), max(len(prompts[n].tokens) for n in indices))


@dataclass(frozen=True)
class PromptSet:
    """Pairs with their prompts and units, in corpus order."""

    pairs: list[Pair]
    prompts: list[EncodedPrompt]
    units: list[Unit]

    @cached_property
    def shortest(self) -> int:
        """Index of the shortest prompt."""
        return min(range(len(self.prompts)), key=lambda n: len(self.prompts[n].tokens))

    @cached_property
    def target_of_pair(self) -> torch.Tensor:
        """A number per pair (int64): equal for the pairs of a target that are in one unit.

        A target is in several units, with a number in each, only if its candidates exceed the limits of a unit, or if
        one after the target is so long that, in the layout tree, its trunk is cut more than the others'.
        Micro-batches hold whole units, so whatever the number of ranks, pairs with one number are computed together.
        """
        numbers: dict[tuple[int, int, int], int] = {}
        of_pair = torch.zeros(len(self.pairs), dtype=torch.int64)
        for unit_number, unit in enumerate(self.units):
            for n in unit.pairs:
                # By identity, as in `tree_units`.
                key = (unit_number, id(self.pairs[n].dialogue), self.pairs[n].target)
                of_pair[n] = numbers.setdefault(key, len(numbers))
        return of_pair

    @property
    def num_split_targets(self) -> int:
        """How many targets with a cause have candidates in several units."""
        units_of: dict[tuple[int, int], set[int]] = {}
        has_cause: set[tuple[int, int]] = set()
        for pair, number in zip(self.pairs, self.target_of_pair.tolist(), strict=True):
            key = (id(pair.dialogue), pair.target)
            units_of.setdefault(key, set()).add(number)
            if pair.is_cause:
                has_cause.add(key)
        return sum(len(units_of[key]) > 1 for key in has_cause)

    @property
    def num_cut(self) -> dict[str, int]:
        """How many over-long prompts lost only history, and how many lost text of an utterance."""
        return {part: sum(prompt.cut == part for prompt in self.prompts) for part in ("history", "text")}

    @property
    def num_tokens(self) -> int:
        """Tokens of one forward over everything."""
        return sum(unit.tokens for unit in self.units)


@dataclass(frozen=True)
class TeacherData:
    """Training and validation prompts, and the global batch of every optimizer step.

    `accumulation_steps` is the most micro-batches that any step takes on this number of ranks. `batching` is tree for
    prefix trees, else pairs; only single prompts are `padded`.
    """

    train: PromptSet
    valid: PromptSet
    steps: list[list[Unit]]
    steps_per_epoch: int
    accumulation_steps: int
    batching: Literal["tree", "pairs"]
    padded: bool


def connective_pairs(config: TeacherConfig) -> tuple[list[Pair], list[Pair]]:
    """The pairs that a teacher trains and validates on."""
    corpus = config.corpus
    train_pairs = [
        pair
        for dialogue in training_split(corpus)
        for pair in pairs_of(dialogue, config.train_pairs, config.candidates.after)
    ]
    # Always fold1, over which RECCON's scores are defined, whatever the training adds.
    valid_pairs = [
        pair
        for dialogue in read_split(corpus, corpus.valid).dialogues
        for pair in pairs_of(dialogue, "fold1", config.candidates.after)
    ]
    return train_pairs, valid_pairs


def has_hint(config: TeacherConfig, pair: Pair) -> bool:
    """Whether a training pair is one of the `gold_hint_share` whose prompt shows the gold relation.

    A hash of seed and pair id decides, so that a resume, other ranks and other dialogues of the corpus change nothing.
    With one seed the pairs of a smaller share are among those of a larger one.
    """
    drawn = hashlib.blake2b(f"{config.optimization.seed}\0{pair.id}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) < config.gold_hint_share * 2**64


def training_encoder(config: TeacherConfig, family: Family) -> Callable[[Pair], EncodedPrompt]:
    """What encodes a teacher's training pairs: a share of them with a hint. All else is encoded by the family alone."""
    return lambda pair: (family.encode_with_hint if has_hint(config, pair) else family.encode)(pair)


def prepare_data(
    config: TeacherConfig, family: Family, *, use_tree: bool, world_size: int, show_progress: bool
) -> TeacherData:
    """Read a teacher's corpus, and prepare what it trains on (`deal`)."""
    return deal(
        config,
        family,
        connective_pairs(config),
        encode=training_encoder(config, family),
        use_tree=use_tree,
        world_size=world_size,
        show_progress=show_progress,
    )


def deal(
    config: TuningConfig,
    family: Family,
    pairs: tuple[list[Pair], list[Pair]],
    *,
    encode: Callable[[Pair], EncodedPrompt],
    use_tree: bool,
    world_size: int,
    show_progress: bool,
) -> TeacherData:
    """Encode the prompts of the training and validation pairs, and deal the pairs to every step of every epoch.

    `encode` encodes a training pair. Those of validation are encoded by the family, as for scoring.
    """
    corpus = config.corpus
    train_pairs, valid_pairs = pairs
    for path, of_split in ((corpus.train, train_pairs), (corpus.valid, valid_pairs)):
        require_causes(path, (pair.is_cause for pair in of_split))
    tree_pairs = max_pairs_per_tree(config.batches.global_batch_pairs)
    train = _prompt_set(
        config,
        family,
        train_pairs,
        use_tree,
        encode=encode,
        max_pairs=tree_pairs,
        show_progress=show_progress,
    )
    # Validation has no optimizer step to mix, so its trees may hold whole dialogues.
    valid = _prompt_set(
        config,
        family,
        valid_pairs,
        use_tree,
        encode=family.encode,
        max_pairs=len(valid_pairs),
        show_progress=False,
    )
    has_prefix_trees = use_tree and family.can_share_prefixes
    padded = not has_prefix_trees and is_padded(train.prompts)
    epochs = [
        global_batches(
            train.units,
            batch_pairs=config.batches.global_batch_pairs,
            # Random batches of 16 RECCON prompts are half padding (53%), those of such buckets hardly (2.3%). Trees
            # have none, and their length says much about their labels: small ones are neutral or first turns.
            bucket_batches=50 if padded else 1,
            seed=config.optimization.seed,
            epoch=epoch,
        )
        for epoch in range(config.optimization.epochs)
    ]
    steps = [batch for epoch in epochs for batch in epoch]
    # Over the steps of all epochs, because DeepSpeed sizes its buffers once, when the engine starts.
    accumulation = max(
        len(micro_batches)
        for batch in steps
        for micro_batches in share_among_ranks(
            batch,
            world_size=world_size,
            micro_batch_tokens=config.batches.micro_batch_tokens,
            padded=padded,
        )
    )
    batching: Literal["tree", "pairs"] = "tree" if has_prefix_trees else "pairs"
    return TeacherData(train, valid, steps, len(epochs[0]), accumulation, batching, padded)


def _prompt_set(
    config: TuningConfig,
    family: Family,
    pairs: list[Pair],
    use_tree: bool,
    *,
    encode: Callable[[Pair], EncodedPrompt],
    max_pairs: int,
    show_progress: bool,
) -> PromptSet:
    """Encode every pair's prompt and form units."""
    progress = tqdm(pairs, desc="prompts", unit="pair", disable=None if show_progress else True)
    prompts = [encode(pair) for pair in progress]
    units = make_units(
        family,
        pairs,
        prompts,
        use_tree=use_tree,
        max_tokens=config.batches.micro_batch_tokens,
        max_pairs=max_pairs,
    )
    return PromptSet(pairs, prompts, units)


def prompts_and_gold(
    data: PromptSet, micro: MicroBatch, runtime: Runtime
) -> tuple[list[EncodedPrompt], torch.Tensor]:
    """Prompts and gold labels of a micro-batch. An empty one gets the shortest prompt, so that collectives match."""
    indices = micro.pairs or (data.shortest,)
    is_cause_P = torch.tensor([data.pairs[n].is_cause for n in indices], device=runtime.device)
    return [data.prompts[n] for n in indices], is_cause_P
