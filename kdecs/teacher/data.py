"""What a teacher trains and validates on: pairs, their prompts in tokens, and the units they form."""

from dataclasses import dataclass
from functools import cached_property

from tqdm import tqdm

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.splits import read_split, training_dialogues
from kdecs.errors import CorpusError
from kdecs.teacher.batches import Unit, global_batches, make_units, pairs_a_tree, share_among_ranks
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import EncodedPrompt, Family


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

    @property
    def num_cut(self) -> dict[str, int]:
        """How many prompts were over-long: those that lost history alone, and those that lost text of an utterance."""
        return {part: sum(prompt.cut == part for prompt in self.prompts) for part in ("history", "text")}

    @property
    def num_tokens(self) -> int:
        """Tokens of one forward over everything."""
        return sum(unit.tokens for unit in self.units)


@dataclass(frozen=True)
class TeacherData:
    """Training and validation prompts, and the plan of all optimizer steps.

    `accumulation_steps` is the most that any step takes on this world size.
    """

    train: PromptSet
    valid: PromptSet
    steps: list[list[Unit]]
    steps_per_epoch: int
    accumulation_steps: int
    padded: bool


def prepare_data(
    config: TeacherConfig, family: Family, *, use_tree: bool, world_size: int, show_progress: bool
) -> TeacherData:
    """Read the corpus, encode the prompts, plan every step of every epoch."""
    corpus = config.corpus
    train_pairs = [
        pair for dialogue in training_dialogues(corpus) for pair in pairs_of(dialogue, config.train_pairs)
    ]
    valid_pairs = [
        p for dialogue in read_split(corpus, corpus.valid).dialogues for p in pairs_of(dialogue, "fold1")
    ]
    for path, pairs in ((corpus.train, train_pairs), (corpus.valid, valid_pairs)):
        if not pairs:
            raise CorpusError(f"{path}: no pairs to train or validate on, expected targets with causes")
    tree_pairs = pairs_a_tree(config.batches.global_batch_pairs)
    train = _prompt_set(
        config, family, train_pairs, use_tree, max_pairs=tree_pairs, show_progress=show_progress
    )
    valid = _prompt_set(
        config, family, valid_pairs, use_tree, max_pairs=len(valid_pairs), show_progress=False
    )
    padded = not (use_tree and family.can_share_prefixes)
    epochs = [
        global_batches(
            train.units,
            batch_pairs=config.batches.global_batch_pairs,
            bucket_batches=50 if padded else 1,
            seed=config.optimization.seed,
            epoch=epoch,
        )
        for epoch in range(config.optimization.epochs)
    ]
    steps = [batch for epoch in epochs for batch in epoch]
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
    return TeacherData(train, valid, steps, len(epochs[0]), accumulation, padded)


def _prompt_set(
    config: TeacherConfig,
    family: Family,
    pairs: list[Pair],
    use_tree: bool,
    *,
    max_pairs: int,
    show_progress: bool,
) -> PromptSet:
    """Tokenise every pair's prompt and form units."""
    progress = tqdm(pairs, desc="prompts", unit="pair", disable=not show_progress)
    prompts = [family.encode(pair) for pair in progress]
    units = make_units(
        family,
        pairs,
        prompts,
        use_tree=use_tree,
        max_tokens=config.batches.micro_batch_tokens,
        max_pairs=max_pairs,
    )
    return PromptSet(pairs, prompts, units)
