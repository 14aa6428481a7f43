"""What a student trains on: the cached prompts of train and valid, the teacher's logits, the rows in use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL
from kdecs.corpus.cache import CorpusCache, open_cache
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import training_subset
from kdecs.corpus.prompts import PromptVariant
from kdecs.corpus.schema import FINE_TO_COARSE, NEUTRAL, Corpus
from kdecs.corpus.splits import emotion_table, read_split, training_split
from kdecs.errors import CorpusError
from kdecs.soft_labels.labels import SoftLabels
from kdecs.student.batches import Floats, Ints, PairWeights, Targets, cached_batch, gold_targets
from kdecs.student.config import StudentConfig
from kdecs.student.model import Batch
from kdecs.student.priors import TrainingCounts, count_training

_JOINED_AT_ONCE = 1 << 18
Weighting = Literal["uniform", "correct", "confidence"]


def mixed_teachers(
    logits_BKA: npt.NDArray[np.floating[Any]],
    weights_K: npt.NDArray[np.floating[Any]],
    is_cause_B: npt.NDArray[np.bool_],
    is_known_B: npt.NDArray[np.bool_],
    weighting: Weighting = "uniform",
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(logits (B, A), weight of L_KD (B,)) of a pair's mixture of teachers.

    c_k: what teacher k counts for a pair by the gold: 1 (uniform); 1 where p_k(gold) >= 1/2, else 0 (correct);
    p_k(gold) (confidence), with p_k at τ = 1 and p(gold) the sum over the causal words of a causal pair, p("other")
    of another. Pairs whose gold is not known have c_k = 1. With w_k the weights over their sum:

        q_t = Σ_k w_k c_k p_k / Σ_k w_k c_k,  logits log q_t;  weight Σ_k w_k c_k

    Where no teacher counts, the weight is 0 and the mixture that of the weights alone.
    """
    log_p_BKA = _log_softmax(logits_BKA.astype(np.float64))
    counts_BK = np.ones(logits_BKA.shape[:2])
    if weighting != "uniform":
        causal_BK = np.exp(log_p_BKA[:, :, :NUM_CAUSAL]).sum(axis=-1)
        gold_BK = np.where(is_cause_B[:, None], causal_BK, 1 - causal_BK)
        counted_BK = (gold_BK >= 0.5).astype(np.float64) if weighting == "correct" else gold_BK
        counts_BK = np.where(is_known_B[:, None], counted_BK, 1.0)
    share_BK = counts_BK * (weights_K / weights_K.sum())
    weight_B = share_BK.sum(axis=1)
    mix_BK = np.where(weight_B[:, None] > 0, share_BK, weights_K / weights_K.sum())
    mix_BK /= mix_BK.sum(axis=1, keepdims=True)
    if logits_BKA.shape[1] == 1:  # nothing to mix: the raw logits, bit for bit
        return logits_BKA[:, 0].astype(np.float32), weight_B.astype(np.float32)
    with np.errstate(divide="ignore"):  # the log of a teacher that does not count
        log_q_BA = np.logaddexp.reduce(log_p_BKA + np.log(mix_BK)[:, :, None], axis=1)
    return log_q_BA.astype(np.float32), weight_B.astype(np.float32)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class TrainingData:
    """Rows of the training cache in use, with their soft labels; the validation corpus and its cache.

    `emotions` are the labels of the training corpus in canonical order; `emotion_labels` takes the cache's
    emotion index to theirs; `is_gold` says which rows of the cache have gold labels to train on; `teachers` are
    those of the mode, `teacher_rows` (K, P) the soft-label row of each row of the cache in use (-1 elsewhere).
    """

    train: CorpusCache
    valid: CorpusCache
    valid_corpus: Corpus
    rows: Ints
    is_gold: npt.NDArray[np.bool_]
    emotions: tuple[str, ...]
    emotion_labels: Ints
    teachers: tuple[SoftLabels, ...]
    teacher_rows: Ints
    teacher_weights: npt.NDArray[np.float64]
    weighting: Weighting
    emotion_weights: npt.NDArray[np.float32]
    gold_weights: npt.NDArray[np.float32]
    pad_id: int

    def batch(self, rows: Ints, weights: npt.NDArray[np.float32]) -> tuple[Batch, Targets]:
        """Prompts and targets of some rows of the training cache."""
        logits, teacher_weights = self._soft_labels(rows)
        targets = gold_targets(
            self.train,
            rows,
            PairWeights(weights, self.emotion_weights[rows], self.gold_weights[rows], teacher_weights),
            self.emotion_labels,
            logits,
        )
        return cached_batch(self.train, rows, self.pad_id), targets

    def _soft_labels(self, rows: Ints) -> tuple[Floats | None, Floats | None]:
        if not self.teachers:
            return None, None
        logits_BKA = np.stack(
            [labels.logits(at[rows]) for labels, at in zip(self.teachers, self.teacher_rows, strict=True)],
            axis=1,
        )
        return mixed_teachers(
            logits_BKA,
            self.teacher_weights,
            self.train.column("is_cause")[rows] > 0,
            self.is_gold[rows],
            self.weighting,
        )

    def counts(self) -> TrainingCounts:
        """What the rows with gold labels say before a word is read (for `Priors`)."""
        rows = self.rows[self.is_gold[self.rows]]
        column = self.train.column
        distance = column("target")[rows] - column("candidate")[rows]
        return count_training(
            self.emotion_labels[column("emotion")[rows]],
            distance == 0,
            distance,
            column("is_cause")[rows],
            column("span_start")[rows],
            column("span_end")[rows],
            self.train.num_candidate_tokens[rows],
            len(self.emotions),
        )


def load_training_data(config: StudentConfig, tokenizer: Any, max_prompt_tokens: int) -> TrainingData:
    """Open (or build) the caches and join the soft labels by pair id and hash.

    Raises CorpusError, LabelError (labels that do not cover the training pairs, or of other answer words),
    ArtifactError (labels unfinished or damaged).
    """
    encoder = PairEncoder(tokenizer, max_prompt_tokens, prompt_variant(config))
    table = emotion_table(config.corpus)
    train = open_cache(config.corpus.train, encoder, config.cache, table)
    valid = open_cache(config.corpus.valid, encoder, config.cache, table)
    valid_corpus = read_split(config.corpus, config.corpus.valid)
    if len(valid) == 0:
        raise CorpusError(f"{config.corpus.valid}: no pair to validate on, expected targets with causes")
    rows, is_gold = training_rows(config, train)
    teachers, teacher_rows = _joined_labels(config, train, rows)
    gold_weights = np.zeros(len(train), dtype=np.float32)
    # A mean over the pairs with gold labels, in expectation: 1 where all have them.
    gold_weights[rows] = is_gold[rows] * (len(rows) / is_gold[rows].sum())
    return TrainingData(
        train=train,
        valid=valid,
        valid_corpus=valid_corpus,
        rows=rows,
        is_gold=is_gold,
        emotions=train.emotions,
        emotion_labels=np.arange(len(train.emotions)),
        teachers=teachers,
        teacher_rows=teacher_rows,
        teacher_weights=np.array([teacher.weight for teacher in config.distillation.used_teachers]),
        weighting=config.distillation.teacher_weighting,
        emotion_weights=emotion_weights(config.emotion_weight, train, rows[is_gold[rows]]),
        gold_weights=gold_weights,
        pad_id=tokenizer.pad_token_id or 0,
    )


def prompt_variant(config: StudentConfig) -> PromptVariant:
    """The prompt that a student's config asks for."""
    return PromptVariant(
        has_connective=config.distillation.mode in ("kd", "joint"),
        given_emotions=given_emotions(config),
        history_utterances=config.model.history_utterances,
    )


def given_emotions(config: StudentConfig) -> dict[str, str] | None:
    """The table of the emotions that the prompt gives; None where they are predicted."""
    if config.model.given_emotions == "none":
        return None
    return {} if config.model.given_emotions == "fine" else dict(FINE_TO_COARSE)


def emotion_weights(
    choice: Literal["pair", "target", "own"], train: CorpusCache, rows: Ints
) -> npt.NDArray[np.float32]:
    """What each row of the cache weighs in L_emo, 1 on average over the rows with gold labels.

    pair: 1, Eq. 10 as written. target: the rows of a target share one weight; a neutral target has a single pair
    where an emotional one has many, so else neutral is hardly learnt. own: only (i, i), where emotions are decided:
    a target's other pairs, which only emotional targets have, teach nothing about it.
    """
    weights = np.ones(len(train), dtype=np.float32)
    if choice == "target":
        place = train.column("dialogue").astype(np.int64) * 2**32 + train.column("target")
        _, target_of_row, num_pairs = np.unique(place[rows], return_inverse=True, return_counts=True)
        weights[rows] = len(rows) / len(num_pairs) / num_pairs[target_of_row]
    elif choice == "own":
        is_own = train.column("target")[rows] == train.column("candidate")[rows]
        weights[rows] = is_own * (len(rows) / max(int(is_own.sum()), 1))
    return weights


def training_rows(config: StudentConfig, train: CorpusCache) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The rows trained on, and which rows of the cache have gold labels.

    Rows: those of the dialogues of `train_share`, and `neutral_share` of the neutral targets' pairs. Gold: those of
    the dialogues of `hard_share` of these; the other rows serve distillation alone, or are left out.
    Raises CorpusError where none is left.
    """
    rows = np.arange(len(train))
    distillation, corpus = config.distillation, config.corpus
    is_gold = np.ones(len(train), dtype=bool)
    if corpus.train_share < 1 or corpus.drop_cross_split or distillation.hard_share < 1:
        split = training_split(corpus)
        places = np.array(split.places)
        labelled: Sequence[int] = range(len(places))
        if distillation.hard_share < 1:
            ids = [dialogue.id for dialogue in split]
            labelled = training_subset(ids, distillation.hard_share, corpus.train_share_seed)
        in_use = np.isin(train.column("dialogue"), places)
        is_gold = np.isin(train.column("dialogue"), places[labelled])
        if distillation.mode != "kd" or distillation.outside_share == "drop":
            in_use = is_gold
        rows = rows[in_use]
    if config.neutral_share < 1 and NEUTRAL in train.emotions:
        generator = np.random.default_rng(corpus.train_share_seed)
        draw_P = generator.random(
            len(train)
        )  # over all rows: the choice does not depend on the share of dialogues
        is_neutral = train.column("emotion")[rows] == train.emotions.index(NEUTRAL)
        rows = rows[~is_neutral | (draw_P[rows] < config.neutral_share)]
    if not is_gold[rows].any():
        raise CorpusError(
            f"{corpus.train}: no pair to train on; raise corpus.train_share or distillation.hard_share"
        )
    return rows, is_gold


def _joined_labels(
    config: StudentConfig, train: CorpusCache, rows: Ints
) -> tuple[tuple[SoftLabels, ...], Ints]:
    used = config.distillation.used_teachers
    teacher_rows = np.full((len(used), len(train)), -1, dtype=np.int64)
    opened = []
    for teacher in used:
        labels = SoftLabels.open(teacher.labels, config.cache)
        labels.require_answer_words(CONNECTIVES)
        opened.append(labels)
    # Some at a time: the ids and hashes of ten million pairs would take 1.6 GiB.
    for start in range(0, len(rows), _JOINED_AT_ONCE) if used else ():
        some = rows[start : start + _JOINED_AT_ONCE]
        identities = train.identities(some)
        for number, labels in enumerate(opened):
            teacher_rows[number, some] = labels.rows_of(*identities, split="train")
    return tuple(opened), teacher_rows
