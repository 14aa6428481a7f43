"""The prompts that a plan counts: with the teacher's own tokenizer where it is on this machine, else estimated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.schema import Dialogue
from kdecs.errors import CorpusError, ModelError
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import EncodedPrompt, make_family
from kdecs.teacher.plan.workload import estimated_prompts


@dataclass(frozen=True)
class CountedPrompts:
    """Pairs with their prompts. `scale`: the whole corpus has that many times as many pairs.

    `max_prompt_tokens`: the config's limit, or the tokenizer's where that is lower.
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
    dialogues: Sequence[Dialogue],
    config: TeacherConfig,
    *,
    max_dialogues: int | None = None,
    show_progress: bool = False,
) -> CountedPrompts:
    """The training pairs of (evenly drawn) dialogues with their prompts. Raises CorpusError where there are none."""
    pairs_by_dialogue = [pairs_of(dialogue, config.train_pairs) for dialogue in dialogues]
    num_pairs = sum(len(pairs) for pairs in pairs_by_dialogue)
    if num_pairs == 0:
        raise CorpusError("no pairs to plan for, expected dialogues with targets and causes")
    if max_dialogues is not None and len(pairs_by_dialogue) > max_dialogues:
        every = len(pairs_by_dialogue) / max_dialogues
        pairs_by_dialogue = [pairs_by_dialogue[int(n * every)] for n in range(max_dialogues)]
    pairs = [pair for of_dialogue in pairs_by_dialogue for pair in of_dialogue]
    scale = num_pairs / max(1, len(pairs))
    longest = config.batches.max_prompt_tokens
    if not has_tokenizer(config.model.base):
        return CountedPrompts(
            pairs, estimated_prompts(pairs, max_prompt_tokens=longest), True, longest, scale
        )
    family = make_family(config.model, max_prompt_tokens=longest, emotions_shown=config.emotions_shown)
    shown = tqdm(pairs, desc="prompts", unit="pair", disable=None if show_progress else True, leave=False)
    return CountedPrompts(
        pairs, [family.encode(pair) for pair in shown], False, family.max_prompt_tokens, scale
    )


def has_tokenizer(reference: str) -> bool:
    """Whether a model's tokenizer is in a local directory or in the hub's cache; nothing is downloaded."""
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
