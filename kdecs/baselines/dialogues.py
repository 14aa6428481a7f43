"""Dialogues as the baselines read them: the tokens of each utterance, gold labels, and batches.

Each utterance is tokenised by itself, once, whatever the number of pairs that it takes part in.

Legend: D dialogues of a batch, N utterances of the longest, R utterances of the batch one below the other, G rows of a
group of R, T tokens, M tokens of a candidate's text, P pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdecs.corpus.encoding import UNKNOWN_SPAN, span_tokens
from kdecs.corpus.pairs import Ints, Pair, padded, pairs_of
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.errors import DialogueError, ModelError
from kdecs.runtime import on_device

UNKNOWN = -1
"""A label that is not known: no loss."""
MAX_UTTERANCES = 400
"""Of a dialogue: the attention over its matrix of pairs grows with the third power of this."""
_GROUP_TOKENS = 4096  # of rows that pass the encoder together


@dataclass(frozen=True, slots=True)
class EncodedDialogue:
    """The tokens of each utterance without special tokens, and their characters [start, end) in its text.

    `num_truncated` counts the utterances that lost tokens beyond the maximum.
    """

    dialogue: Dialogue
    token_ids: list[list[int]]
    offsets: list[list[tuple[int, int]]]
    num_truncated: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all utterances, with two special tokens each."""
        return sum(len(ids) + 2 for ids in self.token_ids)


class DialogueEncoder:
    """Tokenises dialogues. Raises ModelError for a tokenizer without offsets, [CLS] or [SEP]."""

    def __init__(self, tokenizer: Any, max_utterance_tokens: int) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False) or None in (
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
        ):
            raise ModelError(
                f"tokenizer {name}: gives no character offsets or has no [CLS] and [SEP], which the baselines need; "
                "choose a RoBERTa, MPNet, BERT or similar base"
            )
        self.max_tokens = max_utterance_tokens
        self.cls_id: int = tokenizer.cls_token_id
        self.sep_id: int = tokenizer.sep_token_id
        self.pad_id: int = tokenizer.pad_token_id or 0
        # A copy: the tokenizer handed in keeps its own truncation and padding.
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, dialogue: Dialogue) -> EncodedDialogue:
        """Raises DialogueError if the dialogue has too many utterances, or an utterance has no token."""
        texts = [utterance.text for utterance in dialogue.utterances]
        if len(texts) > MAX_UTTERANCES:
            raise DialogueError(
                f"dialogue {dialogue.id}: {len(texts)} utterances, and a baseline reads at most {MAX_UTTERANCES}; "
                "split the dialogue"
            )
        token_ids, offsets, num_truncated = [], [], 0
        for turn, encoding in enumerate(self._backend.encode_batch(texts, add_special_tokens=False), start=1):
            places = [_visible(texts[turn - 1], *place) for place in encoding.offsets]
            if not encoding.ids:
                raise DialogueError(
                    f"dialogue {dialogue.id}, turn {turn}: the tokenizer has no token for the text; "
                    "give the utterance a visible character"
                )
            num_truncated += len(encoding.ids) > self.max_tokens
            token_ids.append(list(encoding.ids[: self.max_tokens]))
            offsets.append(places[: self.max_tokens])
        return EncodedDialogue(dialogue, token_ids, offsets, num_truncated)

    def tokens_of(self, text: str, max_tokens: int) -> list[int]:
        """The first tokens of any text, without special tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids[:max_tokens]


def _visible(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's characters without the white space at either end, which byte-level tokenizers include."""
    inside = text[start:end]
    return (
        (start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip()))
        if inside.strip()
        else (start, end)
    )


class Labels(NamedTuple):
    """Gold labels, int64, -1 where a label is not known.

    `start_P` and `end_P` are the first and last token of the longest gold span, 1-based within u_j, 0 for no span;
    they are known for the pairs of fold1. `causes_DN` is 1 for an utterance that causes any emotion.
    """

    is_cause_P: Tensor
    start_P: Tensor
    end_P: Tensor
    emotion_DN: Tensor
    causes_DN: Tensor


@dataclass(frozen=True, slots=True)
class TrainingDialogue:
    """An encoded dialogue with its labels: the candidates of each target whose causes are known.

    These are the targets with the evidence key and the neutral ones, which have no cause. `places_P2` holds target and
    candidate, 0-based. `emotions_N` and `causes_N` have a label per utterance.
    """

    encoded: EncodedDialogue
    places_P2: Ints
    is_cause_P: Ints
    start_P: Ints
    end_P: Ints
    emotions_N: Ints
    causes_N: Ints


def training_dialogue(
    encoded: EncodedDialogue, emotions: Sequence[str], candidates_after: int = 0
) -> TrainingDialogue:
    """The labels of a dialogue. An emotion that is not among `emotions` counts as not known."""
    dialogue = encoded.dialogue
    places, is_cause, starts, ends = [], [], [], []
    for pair in pairs_of(dialogue, "all", candidates_after):
        target = dialogue.utterances[pair.target - 1]
        if target.evidence is None and target.emotion != NEUTRAL:
            continue
        # Where no annotator looked for a span, "no span" is no label either.
        span = (UNKNOWN_SPAN, UNKNOWN_SPAN)
        if target.evidence is not None:
            span = span_tokens(pair, encoded.offsets[pair.candidate - 1])
        places.append((pair.target - 1, pair.candidate - 1))
        is_cause.append(pair.is_cause)
        starts.append(span[0])
        ends.append(span[1])
    number = {emotion: index for index, emotion in enumerate(emotions)}
    places_P2 = np.array(places, dtype=np.int64).reshape(-1, 2)
    is_cause_P = np.array(is_cause, dtype=np.int64)
    causes_N = np.zeros(len(dialogue.utterances), dtype=np.int64)
    causes_N[places_P2[is_cause_P == 1, 1]] = 1
    return TrainingDialogue(
        encoded,
        places_P2,
        is_cause_P,
        np.array(starts, dtype=np.int64),
        np.array(ends, dtype=np.int64),
        np.array([number.get(str(u.emotion), UNKNOWN) for u in dialogue.utterances], dtype=np.int64),
        causes_N,
    )


def without_labels(item: TrainingDialogue) -> TrainingDialogue:
    """The same dialogue with no label known: it passes the model and teaches it nothing."""
    names = ("is_cause_P", "start_P", "end_P", "emotions_N", "causes_N")
    return replace(item, **{name: np.full_like(getattr(item, name), UNKNOWN) for name in names})


def batch_labels(dialogues: Sequence[TrainingDialogue]) -> tuple[Tensor, Tensor, Labels]:
    """`pairs_P3` (dialogue of the batch, target, candidate), which of them have a span label, and the labels."""
    pairs_P3 = np.concatenate([_placed(index, item.places_P2) for index, item in enumerate(dialogues)])
    starts_P = np.concatenate([item.start_P for item in dialogues])
    arrays = (
        np.concatenate([item.is_cause_P for item in dialogues]),
        starts_P,
        np.concatenate([item.end_P for item in dialogues]),
        _rectangle([item.emotions_N for item in dialogues]),
        _rectangle([item.causes_N for item in dialogues]),
    )
    labels = Labels(*map(torch.from_numpy, arrays))
    return torch.from_numpy(pairs_P3), torch.from_numpy(starts_P != UNKNOWN_SPAN), labels


def pair_places(dialogues: Sequence[Sequence[Pair]]) -> Tensor:
    """`pairs_P3` of the pairs asked for, given by dialogue of the batch."""
    found = [
        (index, pair.target - 1, pair.candidate - 1)
        for index, pairs in enumerate(dialogues)
        for pair in pairs
    ]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 3)


def _placed(index: int, places_P2: Ints) -> Ints:
    return np.concatenate((np.full((len(places_P2), 1), index, dtype=np.int64), places_P2), axis=1)


def _rectangle(rows: Sequence[Ints]) -> Ints:
    found = np.full((len(rows), max(map(len, rows))), UNKNOWN, dtype=np.int64)
    for row, values in enumerate(rows):
        found[row, : len(values)] = values
    return found


class RowGroup(NamedTuple):
    """Rows of similar length, which pass the encoder together: their numbers (G,), and tokens padded on the right."""

    rows_G: Tensor
    token_ids_GT: Tensor
    attention_GT: Tensor


class UtteranceBatch(NamedTuple):
    """The utterances of D dialogues, each by itself between [CLS] and [SEP].

    `row_DN` is the row in R of an utterance (0 for padding), `is_real_DN` marks what is no padding, `speaker_DN` counts
    the speakers of a dialogue. `is_text_RM` marks the tokens of a row's text: its token m stands at place m + 1.
    """

    groups: tuple[RowGroup, ...]
    row_DN: Tensor
    is_real_DN: Tensor
    speaker_DN: Tensor
    is_text_RM: Tensor


def utterance_batch(dialogues: Sequence[EncodedDialogue], encoder: DialogueEncoder) -> UtteranceBatch:
    """The utterances of some dialogues as tensors."""
    texts = [ids for dialogue in dialogues for ids in dialogue.token_ids]
    lengths_R = np.array([len(ids) for ids in texts])
    sizes = [len(dialogue.token_ids) for dialogue in dialogues]
    row_DN = np.zeros((len(sizes), max(sizes)), dtype=np.int64)
    speaker_DN = np.zeros_like(row_DN)
    start = 0
    for index, (dialogue, size) in enumerate(zip(dialogues, sizes, strict=True)):
        row_DN[index, :size] = np.arange(start, start + size)
        numbers: dict[str, int] = {}
        speaker_DN[index, :size] = [
            numbers.setdefault(u.speaker, len(numbers)) for u in dialogue.dialogue.utterances
        ]
        start += size
    return UtteranceBatch(
        row_groups([[encoder.cls_id, *ids, encoder.sep_id] for ids in texts], encoder.pad_id),
        torch.from_numpy(row_DN),
        torch.from_numpy(np.arange(max(sizes)) < np.array(sizes)[:, None]),
        torch.from_numpy(speaker_DN),
        torch.from_numpy(np.arange(lengths_R.max()) < lengths_R[:, None]),
    )


def row_groups(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[RowGroup, ...]:
    """The rows by length, in groups of bounded size.

    Utterances differ much in length: padded to the longest of a batch, half of what the encoder computes is padding.
    """
    order = np.argsort([len(row) for row in rows], kind="stable")
    groups: list[list[int]] = []
    for row in order.tolist():
        if not groups or not _fits(len(rows[row]), len(rows[groups[-1][0]]), len(groups[-1])):
            groups.append([])
        groups[-1].append(row)
    found = []
    for group in groups:
        token_ids_GT, attention_GT = padded([rows[row] for row in group], pad_id)
        found.append(RowGroup(torch.tensor(group), *map(torch.from_numpy, (token_ids_GT, attention_GT))))
    return tuple(found)


def _fits(length: int, shortest: int, num_rows: int) -> bool:
    """Whether a longer row joins a group: it is not much longer than the shortest, and the group stays small."""
    return length <= max(16, 2 * shortest) and length * (num_rows + 1) <= _GROUP_TOKENS


def moved(batch: Any, device: torch.device) -> Any:
    """The same nested named tuples with every tensor on a device."""
    if batch is None:  # what an input leaves out
        return None
    if isinstance(batch, Tensor):
        return on_device(batch, device)
    parts: Iterator[Any] = (moved(part, device) for part in batch)
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
