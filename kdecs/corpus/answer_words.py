"""The answer words of teacher and student (Table 3), and their token ids: each must be a single token in the prompt."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kdecs.errors import ModelError

CAUSAL_CONNECTIVES = ("because", "as", "since", "thus")
NON_CAUSAL_CONNECTIVE = "other"
CONNECTIVES = (*CAUSAL_CONNECTIVES, NON_CAUSAL_CONNECTIVE)
"""The order of connective logits wherever they are stored: causal words first."""

NUM_CAUSAL = len(CAUSAL_CONNECTIVES)


def answer_words_digest(connective_ids: Sequence[int]) -> str:
    """Hex sha256 over the connectives and their token ids: what the lineage of soft labels has as `answer_words`."""
    words = [list(pair) for pair in zip(CONNECTIVES, connective_ids, strict=True)]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def answer_token_ids(
    tokenizer: Any,
    words: Sequence[str],
    *,
    before: str,
    after: str = "",
    stand_ins: Mapping[str, str] | None = None,
) -> list[int]:
    """The token id of each answer word as it stands between `before` and `after`.

    `tokenizer` is a fast Transformers tokenizer, since offsets are needed. `stand_ins` maps a word that splits into
    several tokens to a single-token word that replaces it; None if the caller's config has no such setting.
    Raises ModelError, which names the words that split or that share a token.
    """
    takes_stand_ins = stand_ins is not None
    stand_ins = stand_ins or {}
    if unknown := sorted(set(stand_ins) - set(words)):
        raise ModelError(
            f"stand_ins: found {', '.join(unknown)}, expected some of the answer words {', '.join(words)}"
        )
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    ids: list[int] = []
    split: list[str] = []
    for word in words:
        pieces = _pieces(tokenizer, before, stand_ins.get(word, word), after)
        ids.append(pieces[0] if pieces else -1)
        if len(pieces) != 1:
            split.append(f"{word} ({len(pieces)} tokens)")
    if split:
        advice = (
            "map each of them to a single-token word in stand_ins, such as {disapproval: reject}"
            if takes_stand_ins
            else "choose a model whose tokenizer has each word as one token"
        )
        raise ModelError(
            f"tokenizer {name}: found answer words of several tokens: {', '.join(split)}, expected one token each; "
            f"{advice}"
        )
    # Two words of one token could not be told apart.
    if len(set(ids)) != len(ids):
        twins = [word for word, token in zip(words, ids, strict=True) if ids.count(token) > 1]
        raise ModelError(
            f"tokenizer {name}: the answer words {', '.join(twins)} share a token; choose another model"
        )
    return ids


def _pieces(tokenizer: Any, before: str, word: str, after: str) -> list[int]:
    """Ids of the tokens that overlap the word's characters; the first may include the space before the word."""
    encoded = tokenizer(before + word + after, return_offsets_mapping=True, add_special_tokens=False)
    start, end = len(before), len(before) + len(word)
    pieces = []
    for token, (left, right) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # An unknown token stands for any text, so it is no answer.
        if left < end and right > start and token != getattr(tokenizer, "unk_token_id", None):
            pieces.append(token)
    return pieces
