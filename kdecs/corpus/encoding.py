"""Encode a pair as the student reads it: token ids, positions of the masks, tokens of u_j's copy, gold span.

There are two layouts of the same text (Eq. 5). In the layout `pair` a prompt is tokenised as a whole; if it is too
long, it loses its oldest history tokens, then the end of u_i, then the end of u_j. In the layout `tree` the prompts of
a target share one trunk, which ends with the target clause, and each candidate adds a branch. In both, every position
is found by its character offset in the text.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import (
    EQ_5,
    PROMPT_VERSION,
    BranchPrompt,
    PromptVariant,
    StudentPrompt,
    history_separator,
    kept_tokens,
    lost_of_trunk,
    room_for_branch,
    student_branch,
    student_prompt,
    student_trunk,
)
from kdecs.corpus.schema import Dialogue
from kdecs.errors import DialogueError, ModelError

NO_SPAN = 0
UNKNOWN_SPAN = -1
"""The gold span was truncated away, so this pair has no span loss."""

# English has 4 to 5 characters per token: texts below this bound hardly reach twice the limit.
_LONG_CHARACTERS_PER_TOKEN = 8

# Said in training and in prediction, where a trained student's limit is fixed.
_SHORTER = "shorten the speakers' names, or train with a larger model.max_prompt_tokens"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One prompt in tokens. All positions are indices into the prompt; masks missing from the variant have position 0.

    The prompt is `token_ids`; in the layout `tree` it is `trunk_ids`, a list that all pairs of a target share, and then
    the branch, `token_ids`. `distance` is i - j, negative for a later candidate. `candidate_first` is the first token
    of u_j's copy, and `candidate_offsets` holds the characters [start, end) in u_j's text of each of its M tokens.
    `span_start` and `span_end` are the first and last token of the longest gold span, 1-based within the copy; 0 stands
    for no span, -1 for one that was truncated away. `num_truncated` counts the tokens lost beyond the history.
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
    trunk_ids: Sequence[int] = ()


Layout = Literal["pair", "tree"]


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

    layout: ClassVar[Layout] = "pair"

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
        self._separator = history_separator(tokenizer)
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
            parts.append(json.dumps(self.variant.key, sort_keys=True))
        if self.layout != "pair":
            parts.append(self.layout)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, pairs: Sequence[Pair]) -> Iterator[EncodedPair]:
        """The encoded pairs, in order.

        Raises DialogueError if the bare template is too long already, or if an utterance has no token.
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
            raise _no_token(pair.dialogue, pair.candidate, prompt.text[slice(*visible)])
        first, last = tokens
        offsets = _offsets_within(encoding, prompt.text, first, last, prompt.candidate_range)
        removed, num_truncated = self._removed(pair, prompt, encoding, first)
        # History is never part of u_j's copy, so only these tokens shorten it.
        if num_truncated:
            offsets = [o for token, o in enumerate(offsets, start=first) if token not in removed]
        if removed:
            ids = [token for index, token in enumerate(ids) if index not in removed]
        shift = _Shift(removed)
        start, end = span_tokens(pair, offsets)
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
            raise DialogueError(
                f"pair {pair.id}: the prompt has {num_tokens} tokens, and the template with its speakers alone has "
                f"more than {self.max_tokens}; {_SHORTER}"
            )
        return removed, sum(offsets[token][0] >= prompt.history_end for token in removed)


@dataclass(frozen=True, slots=True)
class _Branch:
    """A candidate's branch in tokens; positions count from the branch's own begin."""

    token_ids: list[int]
    connective_mask: int | None
    start_mask: int
    end_mask: int
    first: int
    offsets: list[tuple[int, int]]

    def cut(self, max_tokens: int) -> "_Branch | None":
        """The branch without the last tokens of u_j that are too many; None if less than a token of u_j would stay."""
        surplus = len(self.token_ids) - max_tokens
        if surplus <= 0:
            return self
        if surplus >= len(self.offsets):
            return None
        # The connective's mask is before u_j and the span's masks are behind it.
        end = self.first + len(self.offsets)
        return replace(
            self,
            token_ids=self.token_ids[: end - surplus] + self.token_ids[end:],
            start_mask=self.start_mask - surplus,
            end_mask=self.end_mask - surplus,
            offsets=self.offsets[:-surplus],
        )


class TreeEncoder(PairEncoder):
    """Encodes the pairs of a target as one trunk with a branch per candidate. Thread-safe.

    Branches do not depend on the target, so those of a dialogue are tokenised once. How a trunk is cut depends on all
    candidates that its target could have, not on those asked for: a pair's prompt is the same whatever stands beside
    it. If the trunk and the longest branch are too long together, the trunk loses its oldest history, then the end of
    u_i; a branch then gets what the trunk leaves, which is at least half of the maximum.
    """

    layout = "tree"

    def __init__(self, tokenizer: Any, max_tokens: int, variant: PromptVariant = EQ_5) -> None:
        super().__init__(tokenizer, max_tokens, variant)
        # [CLS] begins the trunk and [SEP] ends each branch: between them they have the special tokens of a prompt.
        added = self._backend.encode("a").special_tokens_mask
        self._num_leading, self._num_trailing = added.index(0), added[::-1].index(0)
        self._last_branches: tuple[Dialogue | None, list[_Branch | DialogueError]] = (None, [])

    def encode(self, pairs: Sequence[Pair]) -> Iterator[EncodedPair]:
        """The encoded pairs, in order; those of a target that follow one another share their `trunk_ids`.

        Raises DialogueError if the bare template is too long already, or if an utterance has no token.
        """
        starts = [
            index
            for index, pair in enumerate(pairs)
            if index == 0 or not _share_trunk(pair, pairs[index - 1])
        ]
        trunks = [
            student_trunk(
                pairs[start].dialogue,
                pairs[start].target,
                mask=self._mask,
                separator=self._separator,
                variant=self._within_reach(pairs[start]),
            )
            for start in starts
        ]
        encodings = self._backend.encode_batch([trunk.text for trunk in trunks])
        for start, end, trunk, encoding in zip(
            starts, [*starts[1:], len(pairs)], trunks, encodings, strict=True
        ):
            target = pairs[start]
            branches = self._branches(target.dialogue)
            num_tokens = len(encoding.ids) - self._num_trailing
            possible = branches[: target.target + self.variant.candidates_after]
            limit = self.max_tokens - room_for_branch(
                ((len(b.token_ids), len(b.offsets)) for b in possible if isinstance(b, _Branch)),
                self.max_tokens,
            )
            offsets = _covering_offsets(encoding)[:num_tokens]
            removed = lost_of_trunk(offsets, trunk, num_tokens - limit)
            trunk_ids = [t for index, t in enumerate(encoding.ids[:num_tokens]) if index not in removed]
            emotion_mask = 0
            if trunk.emotion_mask is not None:
                emotion_mask = _Shift(removed)(encoding.char_to_token(trunk.emotion_mask))
            num_lost = sum(offsets[token][0] >= trunk.history_end for token in removed)
            for pair in pairs[start:end]:
                branch = branches[pair.candidate - 1]
                if isinstance(branch, DialogueError):
                    raise branch
                kept = branch.cut(self.max_tokens - len(trunk_ids))
                if kept is None or len(trunk_ids) > limit:
                    raise DialogueError(
                        f"pair {pair.id}: the template with its speakers alone has more than {self.max_tokens} tokens; "
                        f"{_SHORTER}"
                    )
                yield self._joined(
                    pair,
                    trunk_ids,
                    emotion_mask,
                    kept,
                    num_lost + len(branch.token_ids) - len(kept.token_ids),
                )

    def _joined(
        self, pair: Pair, trunk_ids: list[int], emotion_mask: int, branch: _Branch, num_truncated: int
    ) -> EncodedPair:
        start, end = span_tokens(pair, branch.offsets)
        shift = len(trunk_ids)
        return EncodedPair(
            token_ids=branch.token_ids,
            emotion_mask=emotion_mask,
            connective_mask=0 if branch.connective_mask is None else shift + branch.connective_mask,
            start_mask=shift + branch.start_mask,
            end_mask=shift + branch.end_mask,
            candidate_first=shift + branch.first,
            candidate_offsets=branch.offsets,
            span_start=start,
            span_end=end,
            num_truncated=num_truncated,
            distance=pair.target - pair.candidate,
            trunk_ids=trunk_ids,
        )

    def _branches(self, dialogue: Dialogue) -> list[_Branch | DialogueError]:
        """The branch of each utterance; an error in the place of one that has no token."""
        # Read once and replaced as a whole, as in HistoryWindow.
        last, branches = self._last_branches
        if dialogue is not last:
            numbers = range(1, len(dialogue.utterances) + 1)
            prompts = [student_branch(dialogue, j, mask=self._mask, variant=self.variant) for j in numbers]
            encodings = self._backend.encode_batch([prompt.text for prompt in prompts])
            branches = [
                self._branch(dialogue, j, prompt, encoding)
                for j, prompt, encoding in zip(numbers, prompts, encodings, strict=True)
            ]
            self._last_branches = (dialogue, branches)
        return branches

    def _branch(
        self, dialogue: Dialogue, candidate: int, prompt: BranchPrompt, encoding: Any
    ) -> _Branch | DialogueError:
        visible = _visible(prompt.text, prompt.candidate_range)
        if (tokens := _token_range(encoding, visible)) is None:
            return _no_token(dialogue, candidate, prompt.text[slice(*visible)])
        skipped = self._num_leading
        connective = None
        if prompt.connective_mask is not None:
            connective = encoding.char_to_token(prompt.connective_mask) - skipped
        return _Branch(
            token_ids=encoding.ids[skipped:],
            connective_mask=connective,
            start_mask=encoding.char_to_token(prompt.start_mask) - skipped,
            end_mask=encoding.char_to_token(prompt.end_mask) - skipped,
            first=tokens[0] - skipped,
            offsets=_offsets_within(encoding, prompt.text, *tokens, prompt.candidate_range),
        )


ENCODERS: dict[Layout, type[PairEncoder]] = {"pair": PairEncoder, "tree": TreeEncoder}


def _share_trunk(pair: Pair, other: Pair) -> bool:
    return pair.dialogue is other.dialogue and pair.target == other.target


def _no_token(dialogue: Dialogue, turn: int, text: str) -> DialogueError:
    return DialogueError(
        f"dialogue {dialogue.id}, turn {turn}: the tokenizer has no token for the text {text!a}; "
        "give the utterance a visible character"
    )


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


def span_tokens(pair: Pair, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The longest gold span as 1-based first and last token of u_j's copy, whose tokens have these characters."""
    if not pair.is_cause:
        return NO_SPAN, NO_SPAN
    # A student predicts one span per pair, so one of several gold spans has to be its label.
    span = max(pair.spans, key=len).strip()
    # The annotation gives no place, so of several equal pieces of text the first is the label.
    start = pair.dialogue.utterances[pair.candidate - 1].text.find(span)
    end = start + len(span)
    inside = [k for k, (left, right) in enumerate(offsets, start=1) if left < end and right > start]
    if not inside or start < 0:
        return UNKNOWN_SPAN, UNKNOWN_SPAN
    return inside[0], inside[-1]
