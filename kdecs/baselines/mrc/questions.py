"""Questions about pairs: their wording and context, how they are encoded, and those of the two splits.

The task is that of RECCON (Poria et al. 2021, section 5). The context of a pair is u_1 … u_i, joined by spaces. The
answer is the longest gold span, at u_j's place in the context; a pair that is no cause is an impossible question, as in
SQuAD 2.0.

Legend: P pairs, T tokens of question and context together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kdecs.baselines.config import MrcConfig
from kdecs.corpus.encoding import HistoryWindow
from kdecs.corpus.pairs import Ints, Pair, pairs_of
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import read_split, require_causes, require_spans, training_split
from kdecs.errors import DialogueError, ModelError

NO_ANSWER = 0
UNKNOWN_ANSWER = -1
"""The gold span lies in a part of u_j that was truncated, so the pair has no loss."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class MrcText:
    """Question and context, with the character ranges [start, end) of u_i and u_j in each."""

    question: str
    context: str
    question_target: Range
    question_candidate: Range
    context_target: Range
    context_candidate: Range


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """One question with its context, T tokens. Token 0 is the classifier token, which stands for "no answer".

    `type_ids` are segment ids, `answerable` marks the tokens that an answer may contain, and `offsets_T2` are the
    characters [start, end) of the context's tokens in `context`, (0, 0) elsewhere. `candidate_range` are u_j's
    characters in `context`. `answer_start` and `answer_end` are the first and last token of the gold answer: 0 for
    none, -1 if truncated away. `num_truncated` counts the tokens lost beyond old context.
    """

    token_ids: Ints
    type_ids: Ints
    answerable: npt.NDArray[np.bool_]
    offsets_T2: Ints
    context: str
    candidate_range: Range
    answer_start: int
    answer_end: int
    num_truncated: int


def mrc_text(pair: Pair, *, first_turn: int = 1) -> MrcText:
    """Question and context of a pair, without the turns before `first_turn` except for u_j.

    Raises DialogueError if the target has no emotion, which the question names.
    """
    target, candidate = (pair.dialogue.utterances[turn - 1] for turn in (pair.target, pair.candidate))
    if target.emotion is None:
        raise DialogueError(
            f"dialogue {pair.dialogue.id}, turn {pair.target}: no emotion, which the question names; "
            "give each utterance its emotion, or predict with those of another system (--emotions)"
        )
    question = "The target utterance is "
    question_target = (len(question), len(question) + len(target.text))
    # As in RECCON's released questions: no full stop after an utterance, and a space before the question mark.
    question += f"{target.text} The evidence utterance is "
    question_candidate = (len(question), len(question) + len(candidate.text))
    question += (
        f"{candidate.text} What is the causal span from context that is relevant to the target utterance's "
        f"emotion {target.emotion} ?"
    )
    # u_j stays even where the history before the window is dropped: the answer must lie in the context.
    turns = [turn for turn in range(1, pair.target + 1) if turn >= first_turn or turn == pair.candidate]
    places: dict[int, Range] = {}
    length = 0
    for turn in turns:
        end = length + len(pair.dialogue.utterances[turn - 1].text)
        places[turn] = (length, end)
        length = end + 1  # the space
    return MrcText(
        question=question,
        context=" ".join(pair.dialogue.utterances[turn - 1].text for turn in turns),
        question_target=question_target,
        question_candidate=question_candidate,
        context_target=places[pair.target],
        context_candidate=places[pair.candidate],
    )


class QuestionEncoder:
    """Encodes pairs for one tokenizer and one maximum length.

    `tokenizer` is a fast Transformers tokenizer whose inputs begin with a classifier token. Raises ModelError
    otherwise.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, *, only_candidate: bool = False) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"tokenizer {name}: not a fast tokenizer, expected one that gives character offsets"
            )
        self.max_tokens = max_tokens
        self.only_candidate = only_candidate
        # A copy: the tokenizer handed in keeps its own truncation and padding.
        self._backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._window = HistoryWindow(self._backend, max_tokens)
        # Tried out rather than read from the settings: what counts is where the template puts the token.
        if tokenizer.cls_token_id is None or self._backend.encode("a", "b").ids[0] != tokenizer.cls_token_id:
            raise ModelError(
                f"tokenizer {name}: its inputs do not begin with a classifier token, where a question without an "
                "answer points; choose a BERT, RoBERTa or similar base"
            )

    def encode(self, pairs: Sequence[Pair]) -> Iterator[EncodedQuestion]:
        """The encoded questions, in order.

        Raises DialogueError if a target has no emotion, or if even the bare question is too long.
        """
        texts = [mrc_text(p, first_turn=self._window.first_turn(p.dialogue, p.target)) for p in pairs]
        encodings = self._backend.encode_batch([(text.question, text.context) for text in texts])
        for pair, text, encoding in zip(pairs, texts, encodings, strict=True):
            yield self._encoded(pair, text, encoding)

    def _encoded(self, pair: Pair, text: MrcText, encoding: Any) -> EncodedQuestion:
        # 0 question, 1 context, -1 special tokens.
        sequence_T = np.array([-1 if s is None else s for s in encoding.sequence_ids], dtype=np.int8)
        offsets_T2 = np.array(encoding.offsets, dtype=np.int64)
        kept, num_truncated = self._kept(pair, text, sequence_T, offsets_T2)
        in_candidate = _inside(text.context_candidate, sequence_T == 1, offsets_T2)
        may_answer = in_candidate if self.only_candidate else sequence_T == 1
        offsets_T2[sequence_T != 1] = 0
        start, end = _answer_tokens(pair, text, in_candidate[kept], offsets_T2[kept])
        return EncodedQuestion(
            token_ids=np.array(encoding.ids, dtype=np.int32)[kept],
            type_ids=np.array(encoding.type_ids, dtype=np.int8)[kept],
            answerable=may_answer[kept],
            offsets_T2=offsets_T2[kept].astype(np.int32),
            context=text.context,
            candidate_range=text.context_candidate,
            answer_start=start,
            answer_end=end,
            num_truncated=num_truncated,
        )

    def _kept(
        self, pair: Pair, text: MrcText, sequence_T: npt.NDArray[np.int8], offsets_T2: Ints
    ) -> tuple[Ints, int]:
        """Indices of the tokens that fit, and how many were lost beyond old context.

        Old context goes first, then the ends of the target, of both utterances in the question, and of u_j.
        """
        surplus = len(sequence_T) - self.max_tokens
        if surplus <= 0:
            return np.arange(len(sequence_T)), 0
        in_question, in_context = sequence_T == 0, sequence_T == 1
        candidate = _inside(text.context_candidate, in_context, offsets_T2)
        # Of the pair (i, i) target and candidate are one utterance, which is kept as the candidate.
        target = _inside(text.context_target, in_context, offsets_T2) & ~candidate
        old = np.flatnonzero(in_context & ~candidate & ~target)
        ends = [
            np.flatnonzero(where)[::-1]
            for where in (
                target,
                _inside(text.question_target, in_question, offsets_T2),
                _inside(text.question_candidate, in_question, offsets_T2),
                candidate,
            )
        ]
        ends[-1] = ends[-1][:-1]  # one token of u_j stays
        order = np.concatenate([old, *ends])
        if surplus > len(order):
            raise DialogueError(
                f"pair {pair.id}: {self.max_tokens} tokens do not hold even the bare question; train with a larger "
                "model.max_tokens"
            )
        removed = order[:surplus]
        return np.setdiff1d(np.arange(len(sequence_T)), removed), max(0, surplus - len(old))


def answer_text(encoded: EncodedQuestion, first: int, last: int) -> tuple[str, Range | None]:
    """The answer from token `first` to `last`, and its characters [start, end) in u_j's text.

    The range is None if the answer is not entirely within u_j.
    """
    start, end = int(encoded.offsets_T2[first, 0]), int(encoded.offsets_T2[last, 1])
    answer = encoded.context[start:end]
    # A token of a byte-level tokenizer includes the space before its word.
    start, end = end - len(answer.lstrip()), start + len(answer.rstrip())
    left, right = encoded.candidate_range
    inside = left <= start and end <= right
    return answer.strip(), (start - left, end - left) if inside else None


def _inside(
    characters: Range, of_sequence_T: npt.NDArray[np.bool_], offsets_T2: Ints
) -> npt.NDArray[np.bool_]:
    """Tokens of a sequence that overlap a character range."""
    start, end = characters
    return of_sequence_T & (offsets_T2[:, 0] < end) & (offsets_T2[:, 1] > start)


def _answer_tokens(
    pair: Pair, text: MrcText, in_candidate_T: npt.NDArray[np.bool_], offsets_T2: Ints
) -> tuple[int, int]:
    if not pair.is_cause:
        return NO_ANSWER, NO_ANSWER
    # Searched in u_j alone: another utterance of the context may hold the same words.
    span = max(pair.spans, key=len).strip()
    start = text.context_candidate[0] + pair.dialogue.utterances[pair.candidate - 1].text.find(span)
    tokens = np.flatnonzero(_inside((start, start + len(span)), in_candidate_T, offsets_T2))
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else (UNKNOWN_ANSWER, UNKNOWN_ANSWER)


_PAIRS_AT_ONCE = 1024  # encoded in one call, in the tokenizer's threads


@dataclass(frozen=True)
class MrcData:
    """The encoded questions of the training and of the validation pairs (fold1)."""

    train: list[EncodedQuestion]
    valid: list[EncodedQuestion]
    valid_pairs: list[Pair]
    valid_corpus: Corpus


def load_mrc_data(config: MrcConfig, encoder: QuestionEncoder, *, shows: bool = True) -> MrcData:
    """Read and encode both splits, with progress bars if it `shows` them.

    Raises CorpusError for a faulty corpus or one without causes.
    """
    pairs = training_pairs(config)
    valid_corpus = read_split(config.corpus, config.corpus.valid)
    require_spans(valid_corpus)
    valid_pairs = [pair for dialogue in valid_corpus.dialogues for pair in pairs_of(dialogue, "fold1")]
    for path, found in ((config.corpus.train, pairs), (config.corpus.valid, valid_pairs)):
        require_causes(path, (pair.is_cause for pair in found))
    return MrcData(
        train=_encoded(encoder, pairs, "encode train", shows=shows),
        valid=_encoded(encoder, valid_pairs, "encode valid", shows=shows),
        valid_pairs=valid_pairs,
        valid_corpus=valid_corpus,
    )


def training_pairs(config: MrcConfig) -> list[Pair]:
    """The fold1 pairs of the training dialogues: every cause, and `negative_share` of the others."""
    pairs = [pair for d in training_split(config.corpus) for pair in pairs_of(d, "fold1")]
    # One draw per pair, causes included: a larger share then contains a smaller one.
    draw_P = np.random.default_rng(config.corpus.train_share_seed).random(len(pairs))
    return [
        pair
        for pair, draw in zip(pairs, draw_P, strict=True)
        if pair.is_cause or draw < config.negative_share
    ]


def _encoded(
    encoder: QuestionEncoder, pairs: Sequence[Pair], name: str, *, shows: bool
) -> list[EncodedQuestion]:
    questions: list[EncodedQuestion] = []
    with tqdm(total=len(pairs), unit="pair", desc=name, disable=None if shows else True, leave=False) as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            chunk = pairs[start : start + _PAIRS_AT_ONCE]
            questions += encoder.encode(chunk)
            bar.update(len(chunk))
    return questions
