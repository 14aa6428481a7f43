"""Calibrates a teacher's labels by distance (`kdecs.evaluation.by_distance`), against the gold of one split.

The fit is to the pairs of emotional targets. Every pair's causal logits are raised by z' - z, so that the words keep
their shares of p(cause); the other splits are calibrated with the same numbers, and their gold is never read.

A teacher that knows its training pairs by heart has other log-odds there than elsewhere, so that a fit to them says
little about other pairs. Fit such a teacher to the validation split. Cross-fitted labels, which no teacher gives to its
own training pairs, can be fitted to either.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.special import logsumexp
from tqdm import tqdm

from kdecs.artifact import Manifest
from kdecs.config import config_hash, input_checksums
from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.pairs import EXPORT_UNIVERSE
from kdecs.corpus.schema import NEUTRAL
from kdecs.errors import LabelError
from kdecs.evaluation.by_distance import DistanceCalibration, fit_by_distance, log_loss
from kdecs.output import refuse_overlaps
from kdecs.soft_labels.corpora import pair_batches
from kdecs.soft_labels.derive.config import CalibrateConfig
from kdecs.soft_labels.derive.write import LabelDirectory, check_label_output
from kdecs.soft_labels.format import ShardTable, candidates_after_of, iter_directory, reach_details
from kdecs.soft_labels.inspect.calibration import require_cause_words
from kdecs.soft_labels.labels import SoftLabels
from kdecs.soft_labels.verify import verified_labels


def calibrate(config: CalibrateConfig, *, cache_dir: Path) -> Manifest:
    """Write the calibrated directory, or return its manifest where it is complete and undamaged.

    Raises LabelError if the directory has no pair of the corpus in its split, ArtifactError for a damaged directory or
    an output of other work, and CorpusError for a fault in the corpus.
    """
    refuse_overlaps(config)
    if finished := verified_labels(config.output, config_hash(config), show_progress=True):
        return finished
    check_label_output(config, config.output)
    labels = SoftLabels.open(config.labels, cache_dir)
    require_cause_words(labels.directory, labels.answer_words)
    after = candidates_after_of(labels.directory, labels.manifest)
    rows, gold, distances = [], [], []
    corpus, split = config.valid or config.train, config.split
    assert corpus is not None
    for batch in pair_batches(corpus, EXPORT_UNIVERSE, after):
        scored = [pair for pair in batch if pair.emotion != NEUTRAL]
        row_n = labels.find([pair.id for pair in scored], [pair.hash for pair in scored], split=split)
        for pair, row in zip(scored, row_n.tolist(), strict=True):
            if row >= 0:
                rows.append(row)
                gold.append(pair.is_cause)
                distances.append(pair.target - pair.candidate)
    if not rows:
        raise LabelError(
            f"{labels.directory}: none of its pairs of {split} is in the corpus; name the corpus that was labelled"
        )
    z_n = log_odds(labels.logits(np.array(rows)))
    gold_n, distance_n = np.array(gold), np.array(distances)
    found = fit_by_distance(z_n, distance_n, gold_n)
    directory = LabelDirectory(config, config.output, labels.answer_words)
    directory.write(_calibrated(labels, found))
    names = {"labels": config.labels}
    return directory.finish(
        inputs=input_checksums(**names, **{f"corpus_{split}": corpus}),
        details={
            "universe": labels.manifest.details.get("universe", EXPORT_UNIVERSE),
            **reach_details(after),
            "lineage": {"calibrated": input_checksums(**names)["labels"]},
            "parents": labels.manifest.details.get("parents", []),
            "calibration": {
                **found.model_dump(mode="json"),
                "split": split,
                "pairs": len(rows),
                "log_loss_before": log_loss(z_n, gold_n),
                "log_loss": log_loss(found.log_odds(z_n, distance_n), gold_n),
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


def _calibrated(labels: SoftLabels, calibration: DistanceCalibration) -> Iterator[ShardTable]:
    with tqdm(
        total=len(labels), desc="calibrate", unit="pair", unit_scale=True, disable=None, delay=1
    ) as bar:
        for table in iter_directory(labels.directory, labels.manifest):
            z_n = log_odds(table.logits)
            turns_n2 = np.array([pair_id.rsplit("/", 2)[1:] for pair_id in table.pair_ids], dtype=np.int64)
            distance_n = turns_n2[:, 0] - turns_n2[:, 1]
            logits_nA = table.logits.astype(np.float64)
            logits_nA[:, :NUM_CAUSAL] += (calibration.log_odds(z_n, distance_n) - z_n)[:, None]
            yield ShardTable(
                table.pair_ids,
                table.pair_hashes,
                table.splits,
                logits_nA.astype(np.float32),
                table.log_rest_mass,
            )
            bar.update(len(table))
