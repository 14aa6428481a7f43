"""What an MRC baseline trains on: the encoded questions of the training split and of the validation split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import read_split, training_dialogues
from kdecs.errors import CorpusError
from kdecs.mrc.config import MrcConfig
from kdecs.mrc.encoding import EncodedQuestion, QuestionEncoder
from kdecs.student.batches import Ints

_PAIRS_AT_ONCE = 1024


@dataclass(frozen=True)
class MrcData:
    """Questions of the training pairs (fold1) with their lengths (P,), and of the validation pairs."""

    train: list[EncodedQuestion]
    num_tokens_P: Ints
    valid: list[EncodedQuestion]
    valid_pairs: list[Pair]
    valid_corpus: Corpus

    @property
    def num_cut(self) -> int:
        """Training questions that lost more than old context to the maximum length: ends of utterances."""
        return sum(question.num_truncated > 0 for question in self.train)


def load_mrc_data(config: MrcConfig, encoder: QuestionEncoder) -> MrcData:
    """Read and encode both splits. Raises CorpusError for a faulty corpus or one without causes."""
    pairs = training_pairs(config)
    valid_corpus = read_split(config.corpus, config.corpus.valid)
    valid_pairs = [pair for dialogue in valid_corpus.dialogues for pair in pairs_of(dialogue, "fold1")]
    for path, found in ((config.corpus.train, pairs), (config.corpus.valid, valid_pairs)):
        if not any(pair.is_cause for pair in found):
            raise CorpusError(f"{path}: no cause to learn from or to score, expected targets with evidence")
    train = _encoded(encoder, pairs, "encode train")
    return MrcData(
        train=train,
        num_tokens_P=np.array([len(question.token_ids) for question in train]),
        valid=_encoded(encoder, valid_pairs, "encode valid"),
        valid_pairs=valid_pairs,
        valid_corpus=valid_corpus,
    )


def training_pairs(config: MrcConfig) -> list[Pair]:
    """The fold1 pairs of the training dialogues: every cause, and `negative_share` of the others."""
    pairs = [pair for d in training_dialogues(config.corpus) for pair in pairs_of(d, "fold1")]
    draw_P = np.random.default_rng(config.corpus.train_share_seed).random(len(pairs))
    return [
        pair
        for pair, draw in zip(pairs, draw_P, strict=True)
        if pair.is_cause or draw < config.negative_share
    ]


def _encoded(encoder: QuestionEncoder, pairs: Sequence[Pair], name: str) -> list[EncodedQuestion]:
    questions: list[EncodedQuestion] = []
    with tqdm(total=len(pairs), unit="pair", desc=name, disable=None, leave=False) as bar:
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            chunk = pairs[start : start + _PAIRS_AT_ONCE]
            questions += encoder.encode(chunk)
            bar.update(len(chunk))
    return questions
