"""What a student reads and trains on: batches of prompts in two layouts, gold and soft labels, the weights of rows.

In the layout `pair` each pair is a sequence, padded to the longest (R = B). In the layout `tree` the pairs of a target
share its trunk, and all of them are one sequence without padding (R = 1, T = N; kdecs.trees).

Legend: P rows of a cache, B pairs of a batch, K teachers, A connective answer words, R sequences, T tokens of the
longest, N tokens of all, U of them read, M tokens of u_j's copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdecs.config import names_of
from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL, answer_words_digest
from kdecs.corpus.encoding import ENCODERS, EncodedPair
from kdecs.corpus.pairs import Ints, padded, training_subset
from kdecs.corpus.schema import NEUTRAL, Corpus
from kdecs.corpus.splits import emotion_table, read_split, require_causes, require_spans, training_split
from kdecs.errors import CorpusError, LabelError
from kdecs.runtime import on_device
from kdecs.student.config import StudentConfig
from kdecs.student.priors import TrainingCounts, count_training
from kdecs.trees import Tree, plant

if TYPE_CHECKING:  # prediction runs without pyarrow
    from kdecs.corpus.cache import CorpusCache
    from kdecs.soft_labels.labels import SoftLabels

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Weighting = Literal["uniform", "correct", "confidence"]
_JOINED_AT_ONCE = 1 << 18
_LEAST_MASS = 1e-30  # of what float32 rounds to nothing, so that its logarithm stays finite
_MASK_COLUMNS = ("emotion_mask", "connective_mask", "start_mask", "end_mask")


class Batch(NamedTuple):
    """Tensors of B pairs, int64 except for the bool `candidate_mask_BM`. Positions count from the prompt's begin.

    `masks_B4` are the positions of mask_emo, mask_cau, mask_st and mask_ed; masks missing from the prompt have
    position 0. `candidate_BM` are the positions of u_j's tokens, `distance_B` is i - j. `attention_RT` is 0 for
    padding and 1 for others. In the layout tree `read_U` are the tokens (of N) of which a state is read, each once, and
    `places_BP` are indices into them: of each pair the last token of its branch, the four masks, and the tokens of u_j
    (P = 5 + M).
    """

    token_ids_RT: Tensor
    attention_RT: Tensor
    masks_B4: Tensor
    candidate_BM: Tensor
    candidate_mask_BM: Tensor
    distance_B: Tensor
    tree: Tree | None = None
    read_U: Tensor | None = None
    places_BP: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; to a GPU without waiting for it."""
        moved = {
            name: on_device(part, device) for name, part in self._asdict().items() if isinstance(part, Tensor)
        }
        if self.tree is not None:
            moved["tree"] = self.tree.to(device)
        return self._replace(**moved)


def cached_batch(cache: "CorpusCache", rows: Ints, pad_id: int) -> Batch:
    """The prompts of some rows of a memory-mapped cache."""
    trunks = None
    if cache.layout == "tree":
        # One array per target, so that equal trunks are known by their identity.
        found = {int(row): cache.list_at("trunk_ids", int(row)) for row in np.unique(cache.trunk_row[rows])}
        trunks = [found[int(row)] for row in cache.trunk_row[rows]]
    return padded_batch(
        [cache.list_at("token_ids", int(row)) for row in rows],
        np.stack([cache.column(name)[rows] for name in _MASK_COLUMNS], axis=1),
        cache.column("candidate_first")[rows],
        cache.num_candidate_tokens[rows],
        cache.column("target")[rows] - cache.column("candidate")[rows],
        pad_id,
        trunks,
    )


def encoded_batch(encoded: Sequence[EncodedPair], pad_id: int) -> Batch:
    """The prompts of freshly encoded pairs."""
    return padded_batch(
        [np.asarray(pair.token_ids) for pair in encoded],
        np.array([(p.emotion_mask, p.connective_mask, p.start_mask, p.end_mask) for p in encoded]),
        np.array([pair.candidate_first for pair in encoded]),
        np.array([len(pair.candidate_offsets) for pair in encoded]),
        np.array([pair.distance for pair in encoded]),
        pad_id,
        [pair.trunk_ids for pair in encoded] if encoded[0].trunk_ids else None,
    )


def padded_batch(
    prompts: Sequence[Ints],
    masks_B4: Ints,
    first_B: Ints,
    length_B: Ints,
    distance_B: Ints,
    pad_id: int,
    trunks: Sequence[Sequence[int] | Ints] | None = None,
) -> Batch:
    """Prompts padded on the right to the longest, rounded up to a multiple of 8 tokens.

    `first_B` and `length_B` give the place of u_j's copy in each prompt, `distance_B` is i - j. With `trunks` (layout
    tree) `prompts` are branches; pairs whose trunk is the same object share it.
    """
    places_M = np.arange(int(length_B.max()))
    candidate_mask_BM = places_M < length_B[:, None]
    # Padding points to a token that the prompt has; the mask keeps it out of every softmax.
    inside_BM = first_B[:, None] + places_M
    candidate_BM = np.where(candidate_mask_BM, inside_BM, 0 if trunks is None else first_B[:, None])
    tree = read_U = places_BP = None
    if trunks is None:
        token_ids_RT, is_token_RT = padded(prompts, pad_id)
        attention_RT: Ints = is_token_RT.astype(np.int64)
    else:
        numbers: dict[int, int] = {}
        trunk_of_B = np.array([numbers.setdefault(id(trunk), len(numbers)) for trunk in trunks])
        of_number = dict(zip(trunk_of_B.tolist(), trunks, strict=True))
        token_ids_N, trunk_starts_R, branch_starts_B, tree = plant(
            [of_number[number] for number in range(len(numbers))], prompts, trunk_of_B
        )
        token_ids_RT = token_ids_N[None]
        attention_RT = np.ones_like(token_ids_RT)
        # Positions in a branch count from the trunk's begin.
        shift_B1 = (branch_starts_B - np.array([len(trunk) for trunk in trunks]))[:, None]
        last_B1 = (branch_starts_B + np.array([len(prompt) - 1 for prompt in prompts]))[:, None]
        # mask_emo stands in the target's clause, which is part of the trunk; the other masks stand in the branch.
        in_trunk_B1 = trunk_starts_R[trunk_of_B][:, None] + masks_B4[:, :1]
        # A mask that this mode's prompt lacks has position 0. The last token is read in its place, by no output of the
        # mode.
        in_branch_B3 = np.where(masks_B4[:, 1:] > 0, masks_B4[:, 1:] + shift_B1, last_B1)
        places = (last_B1, in_trunk_B1, in_branch_B3, candidate_BM + shift_B1)
        # Candidates are padded to the longest, and pairs share a mask: half of the places repeat others.
        all_places_BP = np.concatenate(places, axis=1)
        read_U, index = np.unique(all_places_BP, return_inverse=True)
        places_BP = index.reshape(all_places_BP.shape)
    return Batch(
        token_ids_RT=torch.from_numpy(token_ids_RT),
        attention_RT=torch.from_numpy(attention_RT),
        masks_B4=torch.from_numpy(masks_B4.astype(np.int64)),
        candidate_BM=torch.from_numpy(candidate_BM.astype(np.int64)),
        candidate_mask_BM=torch.from_numpy(candidate_mask_BM),
        distance_B=torch.from_numpy(distance_B.astype(np.int64)),
        tree=tree,
        read_U=None if read_U is None else torch.from_numpy(read_U),
        places_BP=None if places_BP is None else torch.from_numpy(places_BP),
    )


class Targets(NamedTuple):
    """The labels that a batch is trained towards, and the weight of each row in each loss.

    Labels are int64 (B,), -1 if unknown: the row then has no part in that loss. Weights are float32 (B,).
    """

    emotion_B: Tensor
    is_cause_B: Tensor
    start_B: Tensor
    end_B: Tensor
    weights_B: Tensor
    """In every loss; 0 for a row that only pads a rank's share."""
    emotion_weights_B: Tensor
    """In L_emo, times `weights_B` and `gold_weights_B`."""
    gold_weights_B: Tensor
    """In the losses on gold labels, times `weights_B`; 0 outside `hard_share`."""
    teacher_BA: Tensor | None
    """Raw logits of the teacher, float32; None without distillation."""
    teacher_weights_B: Tensor | None
    """In L_KD, times `weights_B`."""
    top_ids_BK: Tensor | None = None
    """Token ids of the teacher's K largest logits, int64; None unless `distillation.space` is vocabulary."""
    top_log_p_BC: Tensor | None = None
    """Log-probabilities at τ = 1 of these tokens and, last, of all others together; C = K + 1."""

    def to(self, device: torch.device) -> "Targets":
        """The same targets on a device; to a GPU without waiting for it."""
        return Targets(*(None if tensor is None else on_device(tensor, device) for tensor in self))


@dataclass(frozen=True)
class TrainingData:
    """The training cache with what is learnt of it, and the validation split with its cache.

    `rows` are the rows in use. `teacher_rows_KP` holds the soft-label row of each of them (-1 for others),
    `teacher_weights_K` the weights of the mixture. `is_gold_P`, `emotion_weights_P` and `gold_weights_P` are over all
    rows of the cache.
    """

    train: "CorpusCache"
    valid: "CorpusCache"
    valid_corpus: Corpus
    rows: Ints
    is_gold_P: Bools
    emotion_weights_P: Floats
    gold_weights_P: Floats
    teachers: "tuple[SoftLabels, ...]"
    teacher_rows_KP: Ints
    teacher_weights_K: npt.NDArray[np.float64]
    weighting: Weighting
    pad_id: int
    has_later: bool
    has_top: bool = False
    """Whether batches hold the teacher's top logits."""
    gold_repeats: int = 1
    """How many times the rows with gold labels occur in an epoch."""

    @property
    def epoch_rows(self) -> Ints:
        """The rows of an epoch: `rows`, and those with gold labels again for each further repeat."""
        return np.concatenate([self.rows, *[self.gold_rows] * (self.gold_repeats - 1)])

    @property
    def gold_rows(self) -> Ints:
        """The rows in use that have gold labels."""
        return self.rows[self.is_gold_P[self.rows]]

    @property
    def emotions(self) -> tuple[str, ...]:
        """The labels of the training corpus in canonical order: the student's emotions."""
        return self.train.emotions

    def batch(self, rows: Ints, weights_B: Floats) -> tuple[Batch, Targets]:
        """Prompts and targets of some rows of the training cache; `weights_B` as from `rank_share`."""
        teacher_BA, teacher_weights_B = self._soft_labels(rows)
        top_ids_BK = top_log_p_BC = None
        if self.has_top:
            (labels,), at = self.teachers, self.teacher_rows_KP[0][rows]
            ids_BK, top_BK = labels.top(at)
            top_ids_BK = torch.from_numpy(ids_BK.astype(np.int64))
            top_log_p_BC = torch.from_numpy(
                top_log_probabilities(labels.logits(at), labels.log_rest_mass(at), top_BK)
            )

        def labels_of(column: str) -> Tensor:
            return torch.from_numpy(self.train.column(column)[rows].astype(np.int64))

        targets = Targets(
            emotion_B=labels_of("emotion"),
            is_cause_B=labels_of("is_cause"),
            start_B=labels_of("span_start"),
            end_B=labels_of("span_end"),
            weights_B=torch.from_numpy(weights_B),
            emotion_weights_B=torch.from_numpy(self.emotion_weights_P[rows]),
            gold_weights_B=torch.from_numpy(self.gold_weights_P[rows]),
            teacher_BA=None if teacher_BA is None else torch.from_numpy(teacher_BA),
            teacher_weights_B=None if teacher_weights_B is None else torch.from_numpy(teacher_weights_B),
            top_ids_BK=top_ids_BK,
            top_log_p_BC=top_log_p_BC,
        )
        return cached_batch(self.train, rows, self.pad_id), targets

    def _soft_labels(self, rows: Ints) -> tuple[Floats, Floats] | tuple[None, None]:
        if not self.teachers:
            return None, None
        # Every row in use has a label: `rows_of` refuses to join with fewer. A -1 here would read the last label.
        logits_BKA = np.stack(
            [labels.logits(at[rows]) for labels, at in zip(self.teachers, self.teacher_rows_KP, strict=True)],
            axis=1,
        )
        return mixed_teachers(
            logits_BKA,
            self.teacher_weights_K,
            self.train.column("is_cause")[rows] > 0,
            self.is_gold_P[rows],
            self.weighting,
        )

    def counts(self) -> TrainingCounts:
        """Frequencies over the rows with gold labels, which the priors begin at."""
        rows = self.gold_rows
        column = self.train.column
        distance = column("target")[rows] - column("candidate")[rows]
        return count_training(
            column("emotion")[rows],
            distance == 0,
            distance,
            column("is_cause")[rows],
            column("span_start")[rows],
            column("span_end")[rows],
            self.train.num_candidate_tokens[rows],
            len(self.emotions),
            has_later=self.has_later,
        )


def load_training_data(
    config: StudentConfig,
    tokenizer: Any,
    max_prompt_tokens: int,
    *,
    connective_ids: Sequence[int] = (),
    vocabulary_size: int = 0,
) -> TrainingData:
    """Open (or build) the caches and join the soft labels by pair id and hash.

    The student's token ids of the connectives and the size of its vocabulary are compared with the labels' where
    `distillation.space` is vocabulary.

    Raises CorpusError, LabelError (labels that do not cover the training pairs, or have other answer words),
    ArtifactError (labels unfinished or damaged).
    """
    from kdecs.corpus.cache import open_cache

    encoder = ENCODERS[config.model.layout](tokenizer, max_prompt_tokens, config.prompt)
    table = emotion_table(config.corpus)
    train = open_cache(config.corpus.train, encoder, config.cache, table)
    valid = open_cache(config.corpus.valid, encoder, config.cache, table)
    valid_corpus = read_split(config.corpus, config.corpus.valid)
    if config.task == "ecspe":
        require_spans(valid_corpus)
    rows, is_gold_P = training_rows(config, train)
    require_causes(config.corpus.train, train.column("is_cause")[rows[is_gold_P[rows]]] > 0)
    require_causes(config.corpus.valid, valid.column("is_cause") > 0)
    teachers, teacher_rows_KP = _joined_labels(config, train, rows)
    if config.distillation.space == "vocabulary":
        _require_tokenizer(teachers[0], connective_ids, vocabulary_size, teacher_rows_KP[0][rows])
    gold_weights_P = np.zeros(len(train), dtype=np.float32)
    # A batch holds rows without gold labels, too. The factor makes the batch mean over all rows, in expectation, the
    # mean over those with gold labels; it is 1 if all have them.
    num_gold, repeats = int(is_gold_P[rows].sum()), config.distillation.gold_repeats
    gold_weights_P[rows] = is_gold_P[rows] * ((len(rows) + (repeats - 1) * num_gold) / (repeats * num_gold))
    return TrainingData(
        train=train,
        valid=valid,
        valid_corpus=valid_corpus,
        rows=rows,
        is_gold_P=is_gold_P,
        emotion_weights_P=emotion_weights(config.emotion_weight, train, rows[is_gold_P[rows]]),
        gold_weights_P=gold_weights_P,
        teachers=teachers,
        teacher_rows_KP=teacher_rows_KP,
        teacher_weights_K=np.array([teacher.weight for teacher in config.distillation.used_teachers]),
        weighting=config.distillation.teacher_weighting,
        pad_id=tokenizer.pad_token_id or 0,
        has_top=config.distillation.space == "vocabulary",
        has_later=config.candidates.after > 0,
        gold_repeats=repeats,
    )


def _require_tokenizer(
    labels: "SoftLabels", connective_ids: Sequence[int], vocabulary_size: int, label_rows: Ints
) -> None:
    """Raise LabelError unless the top logits of these rows are of tokens of the student's tokenizer.

    A manifest says which tokens its answer words were: two vocabularies that agree in all five are the same one.
    """
    if not labels.top_k:
        raise LabelError(
            f"{labels.directory}: holds no top logits, which distillation.space vocabulary needs; export with top_k "
            "above 0, or set distillation.space=answers"
        )
    lineage = labels.manifest.details.get("lineage")
    found = lineage.get("answer_words") if isinstance(lineage, dict) else None
    if found != answer_words_digest(connective_ids):
        raise LabelError(
            f"{labels.directory}: its answer words are other tokens than the student's ({tuple(connective_ids)}), so "
            "the teacher has another tokenizer; choose a base with the teacher's, or set distillation.space=answers"
        )
    for start in range(0, len(label_rows), _JOINED_AT_ONCE):
        ids_NK, _ = labels.top(label_rows[start : start + _JOINED_AT_ONCE])
        if ids_NK.min() < 0 or ids_NK.max() >= vocabulary_size:
            raise LabelError(
                f"{labels.directory}: a top logit has the token id {int(ids_NK.max())}, expected one below "
                f"{vocabulary_size}, the size of the student's vocabulary; set distillation.space=answers"
            )


def top_log_probabilities(
    logits_BA: npt.NDArray[np.floating[Any]],
    log_rest_B: npt.NDArray[np.floating[Any]],
    top_BK: npt.NDArray[np.floating[Any]],
) -> Floats:
    """Log-probabilities at τ = 1 of a teacher's K top tokens and, last, of all others together: (B, K + 1).

    The answer words' logits and the mass of the rest of the vocabulary give the norm that the top logits lack.
    """
    logits_BA, top_BK = logits_BA.astype(np.float64), top_BK.astype(np.float64)
    # The answer words hold 1 - exp(log_rest) of the mass.
    log_answers_B = np.log(np.maximum(-np.expm1(log_rest_B.astype(np.float64)), _LEAST_MASS))
    log_norm_B = np.logaddexp.reduce(logits_BA, axis=1) - log_answers_B
    log_p_BK = top_BK - log_norm_B[:, None]
    log_others_B = np.log(np.maximum(1 - np.exp(log_p_BK).sum(axis=1), _LEAST_MASS))
    log_p_BC = np.concatenate((log_p_BK, log_others_B[:, None]), axis=1)
    # Sums to 1 whatever the rounding: labels are float32, and a top token may take all of the mass.
    return (log_p_BC - np.logaddexp.reduce(log_p_BC, axis=1)[:, None]).astype(np.float32)


def training_rows(config: StudentConfig, train: "CorpusCache") -> tuple[Ints, Bools]:
    """The rows of the cache to train on, and which rows (P,) have gold labels that may be used.

    Three choices narrow the cache down: the dialogues of the training split (`train_share`, `drop_cross_split`);
    of these, those with gold labels (`hard_share`), where the others serve distillation alone or are left out; and
    `neutral_share` of the pairs of neutral targets. Raises CorpusError if no row with gold labels is left.
    """
    distillation, corpus = config.distillation, config.corpus
    # The cache holds the whole file, whatever the share, so that all trials of a node use one cache.
    in_split_P, is_gold_P = np.ones(len(train), dtype=bool), np.ones(len(train), dtype=bool)
    if corpus.train_share < 1 or corpus.drop_cross_split or distillation.hard_share < 1:
        split = training_split(corpus)
        places = np.array(split.places)
        labelled: Sequence[int] = range(len(places))
        if distillation.hard_share < 1:
            ids = [dialogue.id for dialogue in split]
            labelled = training_subset(ids, distillation.hard_share, corpus.train_share_seed)
        in_split_P = np.isin(train.column("dialogue"), places)
        is_gold_P = np.isin(train.column("dialogue"), places[labelled])
    is_used_P = in_split_P
    if distillation.mode != "kd" or distillation.outside_share == "drop":
        is_used_P = is_gold_P
    if config.neutral_share < 1 and NEUTRAL in train.emotions:
        # Drawn over all rows of the cache, so that the choice does not depend on the share of dialogues.
        draw_P = np.random.default_rng(corpus.train_share_seed).random(len(train))
        is_neutral_P = train.column("emotion") == train.emotions.index(NEUTRAL)
        is_used_P = is_used_P & (~is_neutral_P | (draw_P < config.neutral_share))
    if not (is_used_P & is_gold_P).any():
        raise CorpusError(
            f"{names_of(corpus.train)}: no pair to train on; raise corpus.train_share or distillation.hard_share"
        )
    return np.flatnonzero(is_used_P), is_gold_P


def emotion_weights(choice: Literal["pair", "target", "own"], train: "CorpusCache", rows: Ints) -> Floats:
    """What each row of the cache weighs in L_emo (P,), 1 on average over `rows`, those with gold labels.

    pair: 1, Eq. 10 as written. target: the rows of a target share one weight, because a neutral target has a single
    pair where an emotional one has many, so that neutral would hardly be learnt. own: only (i, i), where emotions are
    decided: a target's other pairs, which only emotional targets have, teach nothing about it.
    """
    weights_P = np.ones(len(train), dtype=np.float32)
    if choice == "target":
        # One number per target: the dialogue's position above, the turn in the lower 32 bits.
        place = train.column("dialogue").astype(np.int64) * 2**32 + train.column("target")
        _, target_of_row, num_pairs = np.unique(place[rows], return_inverse=True, return_counts=True)
        weights_P[rows] = len(rows) / len(num_pairs) / num_pairs[target_of_row]
    elif choice == "own":
        is_own = train.column("target")[rows] == train.column("candidate")[rows]
        weights_P[rows] = is_own * (len(rows) / max(int(is_own.sum()), 1))
    return weights_P


def _joined_labels(
    config: StudentConfig, train: "CorpusCache", rows: Ints
) -> "tuple[tuple[SoftLabels, ...], Ints]":
    """The soft labels of the mode's teachers, and their row (K, P) for each row in use, -1 for the others."""
    from kdecs.soft_labels.labels import SoftLabels

    used = config.distillation.used_teachers
    teacher_rows_KP = np.full((len(used), len(train)), -1, dtype=np.int64)
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
            teacher_rows_KP[number, some] = labels.rows_of(*identities, split="train")
    return tuple(opened), teacher_rows_KP


def mixed_teachers(
    logits_BKA: npt.NDArray[np.floating[Any]],
    weights_K: npt.NDArray[np.floating[Any]],
    is_cause_B: Bools,
    is_known_B: Bools,
    weighting: Weighting = "uniform",
) -> tuple[Floats, Floats]:
    """Logits (B, A) of the mixture of teachers, and its weight (B,) in L_KD.

    c_k is what teacher k counts for a pair whose gold label is known: 1 (uniform); 1 if p_k(gold) >= 1/2, else 0
    (correct); p_k(gold) (confidence). Here p_k is at τ = 1, and p(gold) the sum over the causal words for a causal
    pair, p("other") for another. For a pair whose gold label is not known c_k is 1. With w_k the weights over their
    sum:

        q_t = Σ_k w_k c_k p_k / Σ_k w_k c_k,  logits log q_t;  weight Σ_k w_k c_k

    If no teacher counts, the weight is 0 and the mixture is that of the weights alone.
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
    # Where no teacher counts the weight is 0, but the mixture must still be finite: 0 times NaN is NaN.
    mix_BK = np.where(weight_B[:, None] > 0, share_BK, weights_K / weights_K.sum())
    mix_BK /= mix_BK.sum(axis=1, keepdims=True)
    if logits_BKA.shape[1] == 1:  # nothing to mix: the raw logits, bit for bit
        return logits_BKA[:, 0].astype(np.float32), weight_B.astype(np.float32)
    with np.errstate(divide="ignore"):  # log 0 of a teacher that does not count
        log_q_BA = np.logaddexp.reduce(log_p_BKA + np.log(mix_BK)[:, :, None], axis=1)
    return log_q_BA.astype(np.float32), weight_B.astype(np.float32)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
