"""Calibrates a teacher's labels against the gold of its training corpus, by the distance of a pair.

A teacher may be right about what is said and still favour some distances: a target's own utterance over the one before
it, say. For log-odds z of "cause" and distance d (target minus candidate), a logistic regression on the training pairs
of emotional targets finds

    z' = a z + b_d,     a near 1 and b_d near 0 by a ridge penalty, b_d the same from _FARTHEST turns on,

and every pair's causal logits are raised by z' - z, so that the words keep their shares of p(cause). Platt (1999) fits
one a and one b. Labels of other splits are calibrated with the same numbers; their gold is never read. The fit is to
what the teacher was trained on, so it corrects a preference for distances better than overconfidence: cross-fitted
labels, which no teacher gives to its own training pairs, have neither problem.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from tqdm import tqdm

from kdecs.artifact import Manifest
from kdecs.config import config_hash, input_checksums
from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.pairs import EXPORT_UNIVERSE
from kdecs.corpus.schema import NEUTRAL
from kdecs.errors import LabelError
from kdecs.output import refuse_overlaps
from kdecs.soft_labels.corpora import pair_batches
from kdecs.soft_labels.derive.config import CalibrateConfig
from kdecs.soft_labels.derive.write import LabelDirectory, check_label_output
from kdecs.soft_labels.format import ShardTable, candidates_after_of, iter_directory, reach_details
from kdecs.soft_labels.inspect.calibration import require_cause_words
from kdecs.soft_labels.labels import SoftLabels
from kdecs.soft_labels.verify import verified_labels

_FARTHEST = 7
_RIDGE = 1.0  # as strong as a pair or two: it decides only about distances that hardly occur
NUM_DISTANCES = _FARTHEST + 2


def calibrate(config: CalibrateConfig, *, cache_dir: Path) -> Manifest:
    """Write the calibrated directory, or return its manifest where it is complete and undamaged.

    Raises LabelError if the directory has no training pair of the corpus, ArtifactError for a damaged directory or an
    output of other work, and CorpusError for a fault in the corpus.
    """
    refuse_overlaps(config)
    if finished := verified_labels(config.output, config_hash(config), show_progress=True):
        return finished
    check_label_output(config, config.output)
    labels = SoftLabels.open(config.labels, cache_dir)
    require_cause_words(labels.directory, labels.answer_words)
    after = candidates_after_of(labels.directory, labels.manifest)
    rows, gold, distances = [], [], []
    for batch in pair_batches(config.train, EXPORT_UNIVERSE, after):
        scored = [pair for pair in batch if pair.emotion != NEUTRAL]
        found_n = labels.find([pair.id for pair in scored], [pair.hash for pair in scored], split="train")
        for pair, row in zip(scored, found_n.tolist(), strict=True):
            if row >= 0:
                rows.append(row)
                gold.append(pair.is_cause)
                distances.append(pair.target - pair.candidate)
    if not rows:
        raise LabelError(
            f"{labels.directory}: none of its training pairs is in the corpus; name the corpus that was labelled"
        )
    z_n = log_odds(labels.logits(np.array(rows)))
    gold_n, place_n = np.array(gold, dtype=np.float64), places(np.array(distances))
    scale, shift_D = fitted(z_n, place_n, gold_n)
    directory = LabelDirectory(config, config.output, labels.answer_words)
    directory.write(_calibrated(labels, scale, shift_D))
    names = {"labels": config.labels}
    return directory.finish(
        inputs=input_checksums(**names, corpus_train=config.train),
        details={
            "universe": labels.manifest.details.get("universe", EXPORT_UNIVERSE),
            **reach_details(after),
            "lineage": {"calibrated": input_checksums(**names)["labels"]},
            "parents": labels.manifest.details.get("parents", []),
            "calibration": {
                "scale": scale,
                "shift_by_distance": shift_D.tolist(),
                "training_pairs": len(rows),
                "log_loss_before": log_loss(z_n, gold_n),
                "log_loss": log_loss(scale * z_n + shift_D[place_n], gold_n),
            },
        },
    )


def log_odds(logits_nA: np.ndarray) -> np.ndarray:
    """log p(cause) - log p(other) of each row, (n,) float64."""
    logits_nA = logits_nA.astype(np.float64)
    found: np.ndarray = logsumexp(logits_nA[:, :NUM_CAUSAL], axis=1) - logsumexp(
        logits_nA[:, NUM_CAUSAL:], axis=1
    )
    return found


def places(distance_n: np.ndarray) -> np.ndarray:
    """The place of each distance among the shifts: later candidates, then 0, 1, … and _FARTHEST and beyond."""
    found: np.ndarray = distance_n.clip(-1, _FARTHEST) + 1
    return found


def fitted(z_n: np.ndarray, place_n: np.ndarray, gold_n: np.ndarray) -> tuple[float, np.ndarray]:
    """The scale a and the shifts b (NUM_DISTANCES,) with the least log loss and ridge penalty."""

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, shift_D = parameters[0], parameters[1:]
        new_n = scale * z_n + shift_D[place_n]
        error_n = expit(new_n) - gold_n
        away = np.concatenate(([scale - 1], shift_D))
        gradient = np.concatenate(([error_n @ z_n], np.bincount(place_n, error_n, minlength=NUM_DISTANCES)))
        total = np.logaddexp(0, new_n).sum() - new_n @ gold_n + _RIDGE * (away @ away) / 2
        return float(total), gradient + _RIDGE * away

    start = np.concatenate(([1.0], np.zeros(NUM_DISTANCES)))
    found = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return float(found[0]), found[1:]


def log_loss(z_n: np.ndarray, gold_n: np.ndarray) -> float:
    """The mean log loss of log-odds, in nats."""
    return float(np.mean(np.logaddexp(0, z_n) - z_n * gold_n))


def _calibrated(labels: SoftLabels, scale: float, shift_D: np.ndarray) -> Iterator[ShardTable]:
    with tqdm(
        total=len(labels), desc="calibrate", unit="pair", unit_scale=True, disable=None, delay=1
    ) as bar:
        for table in iter_directory(labels.directory, labels.manifest):
            z_n = log_odds(table.logits)
            turns_n2 = np.array([pair_id.rsplit("/", 2)[1:] for pair_id in table.pair_ids], dtype=np.int64)
            distance_n = turns_n2[:, 0] - turns_n2[:, 1]
            logits_nA = table.logits.astype(np.float64)
            logits_nA[:, :NUM_CAUSAL] += (scale * z_n + shift_D[places(distance_n)] - z_n)[:, None]
            yield ShardTable(
                table.pair_ids,
                table.pair_hashes,
                table.splits,
                logits_nA.astype(np.float32),
                table.log_rest_mass,
            )
            bar.update(len(table))
