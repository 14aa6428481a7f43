"""What a student trains on: the cached prompts of train and valid, the teacher's logits, the rows in use."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.cache import CorpusCache, open_cache
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.schema import NEUTRAL, Corpus
from kdecs.corpus.splits import emotion_table, read_split, training_dialogues
from kdecs.errors import CorpusError
from kdecs.soft_labels.reader import SoftLabels
from kdecs.student.batches import Ints, Targets, cached_batch, gold_targets
from kdecs.student.config import StudentConfig
from kdecs.student.model import Batch


@dataclass(frozen=True)
class TrainingData:
    """Rows of the training cache in use, with their soft labels; the validation corpus and its cache.

    `emotions` are the labels of the training corpus in canonical order; `emotion_labels` takes the cache's
    emotion index to theirs; `label_rows` the soft-label row of each row of the cache in use (-1 elsewhere).
    """

    train: CorpusCache
    valid: CorpusCache
    valid_corpus: Corpus
    rows: Ints
    emotions: tuple[str, ...]
    emotion_labels: Ints
    labels: SoftLabels | None
    label_rows: Ints
    emotion_weights: npt.NDArray[np.float32]
    pad_id: int

    def batch(self, rows: Ints, weights: npt.NDArray[np.float32]) -> tuple[Batch, Targets]:
        """Prompts and targets of some rows of the training cache."""
        teacher = self.labels.logits(self.label_rows[rows]) if self.labels else None
        targets = gold_targets(
            self.train, rows, weights, self.emotion_weights[rows], self.emotion_labels, teacher
        )
        return cached_batch(self.train, rows, self.pad_id), targets


def load_training_data(config: StudentConfig, tokenizer: Any, max_prompt_tokens: int) -> TrainingData:
    """Open (or build) the caches and join the soft labels by pair id and hash.

    Raises CorpusError, LabelError (labels that do not cover the training pairs, or of other answer words),
    ArtifactError (labels unfinished or damaged).
    """
    encoder = PairEncoder(tokenizer, max_prompt_tokens)
    table = emotion_table(config.corpus)
    train = open_cache(config.corpus.train, encoder, config.cache, table)
    valid = open_cache(config.corpus.valid, encoder, config.cache, table)
    valid_corpus = read_split(config.corpus, config.corpus.valid)
    if len(valid) == 0:
        raise CorpusError(f"{config.corpus.valid}: no pair to validate on, expected targets with causes")
    rows = training_rows(config, train)
    labels, label_rows = _joined_labels(config, train, rows)
    return TrainingData(
        train=train,
        valid=valid,
        valid_corpus=valid_corpus,
        rows=rows,
        emotions=train.emotions,
        emotion_labels=np.arange(len(train.emotions)),
        labels=labels,
        label_rows=label_rows,
        emotion_weights=emotion_weights(config, train, rows),
        pad_id=tokenizer.pad_token_id or 0,
    )


def emotion_weights(config: StudentConfig, train: CorpusCache, rows: Ints) -> npt.NDArray[np.float32]:
    """What each row of the cache weighs in L_emo, 1 on average over the rows trained on.

    pair: 1, Eq. 10 as written. target: the rows of a target share one weight; a neutral target has a single pair
    where an emotional one has many, so else neutral is hardly learnt.
    """
    weights = np.ones(len(train), dtype=np.float32)
    if config.emotion_weight == "target":
        place = train.column("dialogue").astype(np.int64) * 2**32 + train.column("target")
        _, target_of_row, num_pairs = np.unique(place[rows], return_inverse=True, return_counts=True)
        weights[rows] = len(rows) / len(num_pairs) / num_pairs[target_of_row]
    return weights


def training_rows(config: StudentConfig, train: CorpusCache) -> Ints:
    """The rows trained on: the dialogues of `train_share`, and `neutral_share` of the neutral targets' pairs.

    Raises CorpusError where none is left.
    """
    rows = np.arange(len(train))
    if config.corpus.train_share < 1 or config.corpus.drop_cross_split:
        dialogues = read_split(config.corpus, config.corpus.train).dialogues
        index = {dialogue.id: number for number, dialogue in enumerate(dialogues)}
        chosen = training_dialogues(config.corpus)
        rows = rows[np.isin(train.column("dialogue"), [index[dialogue.id] for dialogue in chosen])]
    if config.neutral_share < 1 and NEUTRAL in train.emotions:
        generator = np.random.default_rng(config.corpus.train_share_seed)
        draw_P = generator.random(
            len(train)
        )  # over all rows: the choice does not depend on the share of dialogues
        is_neutral = train.column("emotion")[rows] == train.emotions.index(NEUTRAL)
        rows = rows[~is_neutral | (draw_P[rows] < config.neutral_share)]
    if len(rows) == 0:
        raise CorpusError(f"{config.corpus.train}: no pair to train on; raise corpus.train_share")
    return rows


def _joined_labels(config: StudentConfig, train: CorpusCache, rows: Ints) -> tuple[SoftLabels | None, Ints]:
    label_rows = np.full(len(train), -1, dtype=np.int64)
    if config.distillation.mode != "kd":
        return None, label_rows
    assert config.distillation.labels is not None  # the config requires it of mode kd
    labels = SoftLabels.open(config.distillation.labels, config.cache)
    labels.require_answer_words(CONNECTIVES)
    label_rows[rows] = labels.rows_of(train.identities(rows), split="train")
    return labels, label_rows
