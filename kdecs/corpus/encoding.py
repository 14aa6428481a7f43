"""Encode a pair as the student reads it: token ids, positions of the masks, tokens of u_j's copy, gold span.

Prompts are tokenised as a whole, and every position is found by its character offset in the prompt. A prompt that is
too long loses its oldest history tokens, then the end of u_i, then the end of u_j.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import (
    EQ_5,
    PROMPT_VERSION,
    PromptVariant,
    StudentPrompt,
    kept_tokens,
    student_prompt,
)
from kdecs.corpus.schema import Dialogue
from kdecs.errors import ModelError

NO_SPAN = 0
UNKNOWN_SPAN = -1
"""The gold span was truncated away, so this pair has no span loss."""

# English has 4 to 5 characters per token: texts below this bound hardly reach twice the limit.
_LONG_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One prompt in tokens. All positions are indices into `token_ids`; masks missing from the variant have position 0.

    `distance` is i - j. `candidate_first` is the first token of u_j's copy, and `candidate_offsets` holds the
    characters [start, end) in u_j's text of each of its M tokens. `span_start` and `span_end` are the first and last
    token of the longest gold span, 1-based within the copy; 0 stands for no span, -1 for one that was truncated away.
    `num_truncated` counts the tokens lost beyond the history.
    """

    token_ids: list[int]
    emotion_mask: int
    connective_mask: int
    start_mask: int
    end_mask: int
    candidate_first: int
    candidate_offsets: list[tuple[int, int]]
    span_start: int
    span_end: int
    num_truncated: int
    distance: int = 0


class HistoryWindow:
    """Finds the turns of a long dialogue that can be part of a prompt of `max_tokens`; the others are not tokenised.

    The encoded prompts stay the same, but the cost of a dialogue of n turns no longer grows as n³.
    """

    def __init__(self, backend: Any, max_tokens: int) -> None:
        self._backend = backend
        self._max_tokens = max_tokens
        self._last: tuple[Dialogue | None, list[int]] = (None, [])

    def first_turn(self, dialogue: Dialogue, target: int) -> int:
        """The latest turn from which the history alone has at least twice `max_tokens` tokens; 1 if there is none."""
        # Read once and replaced as a whole, so that threads never see a dialogue with the counts of another.
        last, tokens_before = self._last
        if dialogue is not last:
            tokens_before = self._counted(dialogue)
            self._last = (dialogue, tokens_before)
        if not tokens_before:
            return 1
        # Twice, since an utterance tokenised alone may have a few tokens more or fewer than inside the prompt.
        reach = tokens_before[target - 1] - 2 * self._max_tokens
        return max(1, bisect_right(tokens_before, reach))

    def _counted(self, dialogue: Dialogue) -> list[int]:
        """Tokens before each turn; empty for a dialogue that is too short to be worth counting."""
        texts = [utterance.text for utterance in dialogue.utterances]
        if sum(map(len, texts)) <= _LONG_CHARACTERS_PER_TOKEN * self._max_tokens:
            return []
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return list(accumulate((len(encoding.ids) for encoding in encodings), initial=0))


class PairEncoder:
    """Encodes pairs for one tokenizer, maximum length and variant of the prompt. Thread-safe.

    `tokenizer` is a fast Transformers tokenizer with a mask token. Raises ModelError otherwise.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, variant: PromptVariant = EQ_5) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"tokenizer {name}: found a slow tokenizer, expected a fast one, which gives character offsets"
            )
        if tokenizer.mask_token is None:
            raise ModelError(
                f"tokenizer {name}: found no mask token, expected the tokenizer of a masked language model"
            )
        self.max_tokens = max_tokens
        self.variant = variant
        self._mask: str = tokenizer.mask_token
        self._separator: str = tokenizer.sep_token or "\n"
        # A copy: the tokenizer handed in keeps its own truncation and padding.
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._window = HistoryWindow(self._backend, max_tokens)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over everything that changes an encoding: tokenizer, template, variant and maximum length."""
        parts = [
            self._backend.to_str(),
            self._mask,
            self._separator,
            str(self.max_tokens),
            str(PROMPT_VERSION),
        ]
        # Only for variants, so that the plain prompt keeps the key of its existing caches.
        if self.variant != EQ_5:
            parts.append(json.dumps(asdict(self.variant), sort_keys=True))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, pairs: Sequence[Pair]) -> Iterator[EncodedPair]:
        """The encoded pairs, in order.

        Raises ModelError if the bare template is too long already, or if an utterance has no token.
        """
        prompts = [
            student_prompt(
                p.dialogue,
                p.target,
                p.candidate,
                mask=self._mask,
                separator=self._separator,
                variant=self._within_reach(p),
            )
            for p in pairs
        ]
        encodings = self._backend.encode_batch([prompt.text for prompt in prompts])
        for pair, prompt, encoding in zip(pairs, prompts, encodings, strict=True):
            yield self._encoded(pair, prompt, encoding)

    def _within_reach(self, pair: Pair) -> PromptVariant:
        first = self._window.first_turn(pair.dialogue, pair.target)
        if first == 1:
            return self.variant
        num_kept, wanted = pair.target - first, self.variant.history_utterances
        return replace(self.variant, history_utterances=num_kept if wanted is None else min(num_kept, wanted))

    def _encoded(self, pair: Pair, prompt: StudentPrompt, encoding: Any) -> EncodedPair:
        ids: list[int] = encoding.ids
        masks = [
            0 if place is None else encoding.char_to_token(place)
            for place in (prompt.emotion_mask, prompt.connective_mask, prompt.start_mask, prompt.end_mask)
        ]
        visible = _visible(prompt.text, prompt.candidate_range)
        if (tokens := _token_range(encoding, visible)) is None:
            raise ModelError(
                f"dialogue {pair.dialogue.id}, turn {pair.candidate}: the tokenizer has no token for the text "
                f"{prompt.text[slice(*visible)]!a}; give the utterance a visible character"
            )
        first, last = tokens
        offsets = _offsets_within(encoding, prompt.text, first, last, prompt.candidate_range)
        removed, num_truncated = self._removed(pair, prompt, encoding, first)
        # History is never part of u_j's copy, so only these tokens shorten it.
        if num_truncated:
            offsets = [o for token, o in enumerate(offsets, start=first) if token not in removed]
        if removed:
            ids = [token for index, token in enumerate(ids) if index not in removed]
        shift = _Shift(removed)
        start, end = _span_tokens(pair, offsets)
        return EncodedPair(
            token_ids=ids,
            emotion_mask=shift(masks[0]),
            connective_mask=shift(masks[1]),
            start_mask=shift(masks[2]),
            end_mask=shift(masks[3]),
            candidate_first=shift(first),
            candidate_offsets=offsets,
            span_start=start,
            span_end=end,
            num_truncated=num_truncated,
            distance=pair.target - pair.candidate,
        )

    def _removed(self, pair: Pair, prompt: StudentPrompt, encoding: Any, first: int) -> tuple[set[int], int]:
        """Indices of the tokens to drop, and how many of them are not part of the history."""
        num_tokens = len(encoding.ids)
        if num_tokens <= self.max_tokens:
            return set(), 0
        offsets = _covering_offsets(encoding)
        kept = kept_tokens(offsets, prompt, self.max_tokens)
        removed = set(range(num_tokens)).difference(kept)
        # `kept_tokens` drops only texts. If that is not enough, or u_j has lost its first token, no usable prompt is
        # left.
        if len(kept) > self.max_tokens or first in removed:
            raise ModelError(
                f"pair {pair.id}: the prompt has {num_tokens} tokens, and the template with its speakers alone has "
                f"more than {self.max_tokens}; raise max_prompt_tokens or shorten the speakers' names"
            )
        return removed, sum(offsets[token][0] >= prompt.history_end for token in removed)


class _Shift:
    """The new position of a kept token after others were dropped."""

    def __init__(self, removed: set[int]) -> None:
        self._removed = sorted(removed)

    def __call__(self, token: int) -> int:
        return token - sum(index < token for index in self._removed)


def _token_range(encoding: Any, characters: tuple[int, int]) -> tuple[int, int] | None:
    """First and last token of a character range; None if none of its characters has a token."""
    start, end = characters
    first = last = None
    for place in range(start, end):
        if (first := encoding.char_to_token(place)) is not None:
            break
    for place in range(end - 1, start - 1, -1):
        if (last := encoding.char_to_token(place)) is not None:
            break
    if first is None or last is None:
        return None
    # One character can be several tokens (the bytes of an emoji), of which char_to_token names the first.
    while last + 1 < len(encoding.ids) and _starts_before(encoding, last + 1, end):
        last += 1
    return first, last


def _starts_before(encoding: Any, token: int, end: int) -> bool:
    characters = encoding.token_to_chars(token)
    return characters is not None and characters[0] < end and characters[1] <= end


def _covering_offsets(encoding: Any) -> list[tuple[int, int]]:
    """Characters of each token; a token of white space, whose range some tokenizers trim to nothing, covers one."""
    return [
        (left - 1, right) if left == right and not is_special and left > 0 else (left, right)
        for (left, right), is_special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    ]


def _visible(text: str, characters: tuple[int, int]) -> tuple[int, int]:
    """The range without white space at either end, which may be part of a neighbouring token."""
    start, end = characters
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


def _offsets_within(
    encoding: Any, text: str, first: int, last: int, candidate_range: tuple[int, int]
) -> list[tuple[int, int]]:
    """Characters of tokens first … last, relative to u_j's text, without white space at either end."""
    begin, finish = candidate_range
    offsets = []
    for token in range(first, last + 1):
        start, end = encoding.token_to_chars(token)
        start, end = max(start, begin), min(end, finish)
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        offsets.append((start - begin, end - begin))
    return offsets


def _span_tokens(pair: Pair, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The longest gold span as 1-based first and last token of u_j's copy."""
    if not pair.is_cause:
        return NO_SPAN, NO_SPAN
    # A student predicts one span per pair, so one of several gold spans has to be its label.
    span = max(pair.spans, key=len).strip()
    start = pair.dialogue.utterances[pair.candidate - 1].text.find(span)
    end = start + len(span)
    inside = [k for k, (left, right) in enumerate(offsets, start=1) if left < end and right > start]
    if not inside or start < 0:
        return UNKNOWN_SPAN, UNKNOWN_SPAN
    return inside[0], inside[-1]
