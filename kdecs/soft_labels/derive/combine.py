"""Combines the labels of several teachers, pair by pair, into a directory that students use like any other.

Shapes: K teachers, n pairs of a batch, A answer words (causal ones first). For teacher k, p_k is the softmax of its
logits over the answer words at τ = 1, r_k its probability mass outside them, and w_k its share of the weights.

    mean-probability   p = Σ_k w_k p_k
    mean-logit         p ∝ exp Σ_k w_k log p_k, the geometric mean: the average of the logits up to a constant
    most-confident     the labels of the teacher with the lowest entropy of p_k, the first named among equals
    gold-correct       training pairs: mean-probability over the teachers that decide as gold does, or over all where
                       none does; a teacher decides "cause" where p_k(cause) > p_k(other). Pairs of other splits are
                       never compared with gold: mean-probability

The directory stores log p as logits (for most-confident, the chosen teacher's raw logits), and log r = log Σ w_k r_k
over the teachers that count (for most-confident, the chosen teacher's). A student's softmax at τ = 1 gives p again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from tqdm import tqdm

from kdecs.artifact import Manifest
from kdecs.config import config_hash, input_checksums
from kdecs.corpus.pairs import EXPORT_UNIVERSE
from kdecs.errors import LabelError
from kdecs.output import refuse_overlaps
from kdecs.soft_labels.corpora import pair_batches
from kdecs.soft_labels.derive.config import CombineConfig, CombineRule
from kdecs.soft_labels.derive.write import LabelDirectory, check_label_output
from kdecs.soft_labels.format import ShardTable, candidates_after_of, iter_directory, reach_details
from kdecs.soft_labels.inspect.calibration import require_cause_words
from kdecs.soft_labels.labels import SoftLabels
from kdecs.soft_labels.scoring import is_causal
from kdecs.soft_labels.verify import verified_labels


def combine(config: CombineConfig, *, cache_dir: Path) -> Manifest:
    """Write the combined directory, or return its manifest where it is complete and undamaged.

    All directories must label the same pairs (id, hash, split) over the same answer words; the pairs keep the order of
    the first directory. Raises LabelError naming the first pair that a directory lacks, ArtifactError for a damaged
    directory or an output of other work, and CorpusError for the training corpus.
    """
    refuse_overlaps(config)
    if finished := verified_labels(config.output, config_hash(config), show_progress=True):
        return finished
    # Refused now rather than after minutes of joining; `LabelDirectory` checks it again when it begins to write.
    check_label_output(config, config.output)
    teachers = [SoftLabels.open(directory, cache_dir) for directory in config.labels]
    first = teachers[0]
    for other in teachers[1:]:
        other.require_answer_words(first.answer_words)
        _require_same_pairs(first, other)
    gold_N = None
    if config.train:
        require_cause_words(first.directory, first.answer_words)
        gold_N = _gold(first, config.train)
    weights = config.weights or (1.0,) * len(teachers)
    directory = LabelDirectory(config, config.output, first.answer_words)
    directory.write(_combined(config.rule, teachers, weights, gold_N))
    names = {f"labels_{index}": path for index, path in enumerate(config.labels)}
    return directory.finish(
        inputs=input_checksums(**names, corpus_train=config.train),
        details={
            "universe": first.manifest.details.get("universe", EXPORT_UNIVERSE),
            **reach_details(candidates_after_of(first.directory, first.manifest)),
            "rule": config.rule,
            "lineage": {"rule": config.rule, **input_checksums(**names)},
            "parents": [_parent(teacher, weight) for teacher, weight in zip(teachers, weights, strict=True)],
        },
    )


def combined_labels(
    rule: CombineRule,
    logits_KnA: np.ndarray,
    log_rest_Kn: np.ndarray,
    weights_K: Sequence[float],
    gold_n: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, A) and log rest mass (n,), float32, by one of the rules above.

    `gold_n` is for gold-correct: 1 cause, 0 other, -1 where a pair must not be compared with gold.
    """
    # Normalised first: raw logits of two teachers differ by a constant that means nothing. In float64, so that the
    # result is rounded to float32 once.
    log_p_KnA = log_softmax(logits_KnA.astype(np.float64), axis=-1)
    n = logits_KnA.shape[1]
    weights_Kn = np.repeat(np.asarray(weights_K, dtype=np.float64)[:, None], n, axis=1)
    if rule == "most-confident":
        entropy_Kn = -(np.exp(log_p_KnA) * log_p_KnA).sum(axis=2)
        chosen_n = entropy_Kn.argmin(axis=0)
        return logits_KnA[chosen_n, np.arange(n)], log_rest_Kn[chosen_n, np.arange(n)]
    if rule == "gold-correct":
        assert gold_n is not None
        agrees_Kn = is_causal(log_p_KnA) == (gold_n == 1)
        # All teachers count where none agrees with gold, and where gold must not decide.
        counts_Kn = agrees_Kn | ~agrees_Kn.any(axis=0) | (gold_n < 0)
        weights_Kn = weights_Kn * counts_Kn
    weights_Kn = weights_Kn / weights_Kn.sum(axis=0)
    with np.errstate(divide="ignore"):  # a teacher that does not count has weight 0
        log_w_Kn = np.log(weights_Kn)
    # The mass outside the answer words is mixed as probabilities under every rule.
    log_rest_n = np.logaddexp.reduce(log_rest_Kn.astype(np.float64) + log_w_Kn, axis=0)
    if rule == "mean-logit":
        mixed_nA = log_softmax((weights_Kn[..., None] * log_p_KnA).sum(axis=0), axis=-1)
    else:
        mixed_nA = np.logaddexp.reduce(log_p_KnA + log_w_Kn[..., None], axis=0)
    return mixed_nA.astype(np.float32), log_rest_n.astype(np.float32)


def combined_rows(
    rule: CombineRule,
    table: ShardTable,
    teachers: Sequence[SoftLabels],
    weights: Sequence[float],
    gold_n: np.ndarray | None = None,
) -> ShardTable:
    """A batch of pairs with their combined labels; each teacher's are found by id, hash and split."""
    shape = (len(teachers), len(table))
    logits_KnA = np.empty((*shape, table.logits.shape[1]), np.float32)
    log_rest_Kn = np.empty(shape, np.float32)
    split_n = np.array(table.splits)
    for split in set(table.splits):
        places = np.flatnonzero(split_n == split)
        names = _names(table, places)
        for number, teacher in enumerate(teachers):
            rows_n = teacher.rows_of(*names, split=split)
            logits_KnA[number, places] = teacher.logits(rows_n)
            log_rest_Kn[number, places] = teacher.log_rest_mass(rows_n)
    logits_nA, log_rest_n = combined_labels(rule, logits_KnA, log_rest_Kn, weights, gold_n)
    return ShardTable(table.pair_ids, table.pair_hashes, table.splits, logits_nA, log_rest_n)


def _combined(
    rule: CombineRule, teachers: Sequence[SoftLabels], weights: Sequence[float], gold_N: np.ndarray | None
) -> Iterator[ShardTable]:
    first = teachers[0]
    with tqdm(total=len(first), desc="combine", unit="pair", unit_scale=True, disable=None, delay=1) as bar:
        for table in iter_directory(first.directory, first.manifest):
            gold_n = None if gold_N is None else _gold_of(table, first, gold_N)
            yield combined_rows(rule, table, teachers, weights, gold_n)
            bar.update(len(table))


def _gold(labels: SoftLabels, corpus: Path | tuple[Path, ...]) -> np.ndarray:
    """Gold of each row of a joined file, (N,) int8: 1 cause, 0 other, -1 unknown. Raises CorpusError."""
    gold_N = np.full(len(labels), -1, dtype=np.int8)
    after = candidates_after_of(labels.directory, labels.manifest)
    for batch in pair_batches(corpus, EXPORT_UNIVERSE, after):
        rows_n = labels.find([pair.id for pair in batch], [pair.hash for pair in batch], split="train")
        known_n = rows_n >= 0
        gold_N[rows_n[known_n]] = np.array([pair.is_cause for pair in batch])[known_n]
    return gold_N


def _gold_of(table: ShardTable, labels: SoftLabels, gold_N: np.ndarray) -> np.ndarray:
    """Gold of a batch's training pairs, -1 elsewhere. Raises LabelError for a training pair without gold."""
    gold_n = np.full(len(table), -1, dtype=np.int8)
    places = np.array([n for n, split in enumerate(table.splits) if split == "train"], dtype=np.int64)
    names = _names(table, places)
    gold_n[places] = gold_N[labels.rows_of(*names, split="train")]
    unknown = places[gold_n[places] < 0]
    if len(unknown):
        raise LabelError(
            f"{labels.directory}: the training pair {table.pair_ids[int(unknown[0])]} is not in the training corpus, "
            f"{len(unknown)} of {len(places)} are not; name the corpus that was labelled"
        )
    return gold_n


def _names(table: ShardTable, places_n: np.ndarray) -> tuple[list[str], list[str]]:
    """Ids and hashes of some rows."""
    places = places_n.tolist()
    return [table.pair_ids[n] for n in places], [table.pair_hashes[n] for n in places]


def _require_same_pairs(first: SoftLabels, other: SoftLabels) -> None:
    """Raise LabelError naming the first pair that one directory has and the other has not."""
    for having, lacking in ((first, other), (other, first)):
        # The second pass only finds a name for the error: if all pairs of the first are in the other, and it has as
        # many, it has no other ones.
        if having is other and len(first) == len(other):
            return
        for table in iter_directory(having.directory, having.manifest):
            split_n = np.array(table.splits)
            for split in set(table.splits):
                places = np.flatnonzero(split_n == split)
                names = _names(table, places)
                lacking.rows_of(*names, split=split)


def _parent(labels: SoftLabels, weight: float) -> dict[str, Any]:
    details = labels.manifest.details
    return {
        "name": labels.directory.name,
        "manifest": input_checksums(labels=labels.directory)["labels"],
        "weight": weight,
        "lineage": details.get("lineage", {}),
        "parents": details.get("parents", []),
    }
