"""What a training epoch computes: the prompts of a corpus, and their tokens per step and rank.

Prompts are encoded with the teacher's own tokenizer if it is on this machine; otherwise their tokens are estimated.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.prompts import teacher_prompt
from kdecs.corpus.schema import Dialogue
from kdecs.errors import CorpusError, ModelError
from kdecs.teacher.config import MaskedModel, TeacherConfig
from kdecs.teacher.data import (
    MicroBatch,
    Unit,
    global_batches,
    has_hint,
    is_padded,
    max_pairs_per_tree,
    share_among_ranks,
    single_units,
    training_encoder,
    tree_units,
)
from kdecs.teacher.families import EncodedPrompt, make_family
from kdecs.teacher.tree.prefix_tree import pack

# Words in pieces of up to seven letters; digits and signs one by one. On English dialogues these are 1 to 4% more than
# the tokens of SmolLM2's tokenizer (49,152 entries).
_PIECES = re.compile(r"[^\W\d_]{1,7}|\d|[^\w\s]|\n")


_OF_RANKS = ("rank_tokens", "rank_attended", "rank_ancestors", "rank_answers")


@dataclass(frozen=True)
class Workload:
    """An epoch of optimizer steps on some number of ranks.

    `units` are the trees (or single prompts) that a step deals out: a step occupies no more ranks than it has units.
    `tokens` includes padding. `rank_*` are sums over steps of the busiest rank's. `attended` counts the (query, key)
    pairs that a dense mask computes, `ancestors` those that the prompts need. `micro_steps` counts the forwards of a
    rank, empty ones included. `largest_*` describe the micro-batch that needs the most memory.
    """

    pairs: float
    units: float
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
        """The same for `factor` times as many dialogues: the sums grow, the largest micro-batch stays."""
        sums = ("pairs", "units", "steps", "tokens", "ancestors", "micro_steps")
        return replace(self, **{name: getattr(self, name) * factor for name in (*sums, *_OF_RANKS)})

    def of_whole_batches(self, parts: int, share: float) -> "Workload":
        """The same if each step was a part of one that has `parts` of them, on a `share` of its ranks."""
        busiest = {name: getattr(self, name) * share for name in ("micro_steps", *_OF_RANKS)}
        return replace(self, steps=self.steps / parts, **busiest)


def estimated_prompts(
    pairs: Sequence[Pair],
    *,
    max_prompt_tokens: int,
    has_trunks: bool = False,
    is_hinted: Callable[[Pair], bool] = lambda _: False,
) -> list[EncodedPrompt]:
    """Stand-ins for encoded prompts: about as long, and with equal tokens wherever the texts are equal."""
    prompts = []
    for pair in pairs:
        prompt = teacher_prompt(
            pair.dialogue,
            pair.target,
            pair.candidate,
            emotion=str(pair.emotion),
            shown_relation=pair.is_cause if is_hinted(pair) else None,
        )
        # Equal pieces have equal ids, so that estimated prompts share the prefixes that real ones would.
        ids = [0, *(crc32(piece.encode()) & 0x7FFFFFFF for piece in _PIECES.findall(prompt.text))]
        # From the left, like a real prompt, which loses its oldest history first.
        tokens = np.asarray(ids[-max_prompt_tokens:], dtype=np.int32)
        num_trunk = 0
        if has_trunks:
            behind = len(_PIECES.findall(prompt.text[prompt.target_range[1] + 1 :]))
            num_trunk = max(0, len(tokens) - behind)
        prompts.append(EncodedPrompt(tokens=tokens, answer=len(tokens) - 1, num_trunk=num_trunk))
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
    """An epoch as the training deals it with this seed, averaged over `epochs`.

    `accumulation` is the greatest of any step.
    """
    tree_pairs = max_pairs_per_tree(global_batch_pairs)
    if use_tree:
        units = tree_units(pairs, prompts, max_tokens=micro_batch_tokens, max_pairs=tree_pairs)
    else:
        units = single_units(prompts, max_tokens=micro_batch_tokens, max_pairs=tree_pairs)
    padded = not use_tree and is_padded(prompts)
    costs = _Costs(units, prompts, use_tree=use_tree)
    steps = [
        step
        for epoch in range(epochs)
        for step in global_batches(
            units,
            batch_pairs=global_batch_pairs,
            # As `prepare_data` deals them, or the plan would count other steps than the training takes.
            bucket_batches=50 if padded else 1,
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
            step, world_size=ranks, micro_batch_tokens=micro_batch_tokens, padded=padded
        )
        sums = np.zeros((ranks, 4))
        for rank, micro_batches in enumerate(shares):
            for micro in micro_batches:
                cost = costs.of(micro)
                sums[rank] += (cost.tokens, cost.attended, cost.ancestors, cost.answers)
                largest = max(largest, cost, key=lambda c: (c.tokens, c.attended))
        total += sums.sum(axis=0)
        # The step lasts as long as its busiest rank.
        busiest += sums.max(axis=0)
        longest = max(len(micro_batches) for micro_batches in shares)
        micro_steps += longest
        accumulation = max(accumulation, longest)
    total /= epochs
    busiest /= epochs
    return Workload(
        pairs=len(pairs),
        units=len(units),
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
    """What a forward computes: tokens (rows × length), (query, key) pairs with and without hidden ones, prompts."""

    tokens: int
    attended: int
    ancestors: int
    answers: int
    rows: int


class _Costs:
    """What micro-batches cost, summed over their units."""

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
            # A dense mask computes every pair of the walk, hidden or not.
            return _Cost(tokens, tokens**2, ancestors, len(micro.pairs), 1)
        longest = max(unit.longest for unit in units)
        rows = len(units)
        return _Cost(rows * longest, rows * longest**2, ancestors, len(micro.pairs), rows)


@dataclass(frozen=True)
class CountedPrompts:
    """Pairs with their prompts. The whole corpus has `scale` times as many pairs.

    `max_prompt_tokens` is the config's limit, or the tokenizer's if that is lower.
    """

    pairs: list[Pair]
    prompts: list[EncodedPrompt]
    are_estimated: bool
    max_prompt_tokens: int
    scale: float = 1.0

    @property
    def num_pairs(self) -> int:
        """Pairs of the whole corpus."""
        return round(len(self.pairs) * self.scale)


def count_prompts(
    dialogues: Iterable[Dialogue],
    config: TeacherConfig,
    *,
    max_dialogues: int | None = None,
    show_progress: bool = False,
) -> CountedPrompts:
    """The training pairs of up to `max_dialogues` evenly drawn dialogues, with their prompts.

    Raises CorpusError if there are none.
    """
    pairs_by_dialogue = [
        pairs_of(dialogue, config.train_pairs, config.candidates.after) for dialogue in dialogues
    ]
    num_pairs = sum(len(pairs) for pairs in pairs_by_dialogue)
    if num_pairs == 0:
        raise CorpusError(
            "the corpus has no pairs to plan for; expected dialogues with targets and their causes"
        )
    if max_dialogues is not None and len(pairs_by_dialogue) > max_dialogues:
        every = len(pairs_by_dialogue) / max_dialogues
        pairs_by_dialogue = [pairs_by_dialogue[int(n * every)] for n in range(max_dialogues)]
    pairs = [pair for of_dialogue in pairs_by_dialogue for pair in of_dialogue]
    scale = num_pairs / max(1, len(pairs))
    longest = config.batches.max_prompt_tokens
    if not has_tokenizer(config.model.base):
        has_trunks = isinstance(config.model, MaskedModel) and config.model.layout == "tree"
        estimated = estimated_prompts(
            pairs,
            max_prompt_tokens=longest,
            has_trunks=has_trunks,
            is_hinted=partial(has_hint, config),
        )
        return CountedPrompts(pairs, estimated, True, longest, scale)
    family = make_family(config.model, max_prompt_tokens=longest, emotions_shown=config.emotions_shown)
    encode = training_encoder(config, family)
    shown = tqdm(pairs, desc="prompts", unit="pair", disable=None if show_progress else True, leave=False)
    return CountedPrompts(pairs, [encode(pair) for pair in shown], False, family.max_prompt_tokens, scale)


def has_tokenizer(reference: str) -> bool:
    """Whether a model's tokenizer is in a local directory or in the hub's cache. Nothing is downloaded."""
    if Path(reference).is_dir():
        return any(Path(reference, name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return _is_cached(reference)


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "tokenizer.json"), str)
    except HFValidationError as error:
        raise ModelError(f"model {name}: {str(error).splitlines()[0]}") from None
