"""Settings against each other on validation: paired over dialogues, seeds pooled.

    TRIAL/valid-predictions.jsonl               what a student said there when its training chose it
    SWEEP/valid-predictions/ID-CHECKSUM.jsonl   what it predicts there, made once where the former is not to be had

A setting's contribution of a dialogue is the sum over its seeds (only seeds that both settings have), so the test asks
whether one setting is better on these dialogues, not whether its luckiest seed is.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdecs.artifact import check_whole, content_checksum
from kdecs.config import CONFIG_NAME, config_hash, load_config
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import read_split
from kdecs.errors import ConfigError
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import PairKey, Prediction, read_predictions, write_predictions
from kdecs.evaluation.significance import compare_systems
from kdecs.student.config import StudentConfig
from kdecs.sweep.results import TrialResult, trial_directory

PREDICTIONS_FOLDER = "valid-predictions"
_EMOTIONS = "emotion_accuracy"
COMPARED = (
    "macro_f1",
    "positive_f1",
    "negative_f1",
    "exact_match",
    _EMOTIONS,
    "utterance_macro_f1",
)


def compare_settings(
    sweep: Path, first: Sequence[TrialResult], second: Sequence[TrialResult]
) -> dict[str, dict[str, Any]]:
    """By score: first minus second in points, its 95% bootstrap interval and the paired permutation p.

    Without the emotions' accuracy where one of the two was given them: it would be that of the gold.
    """
    seeds = {result.seed for result in first} & {result.seed for result in second}
    configs = [
        load_config(StudentConfig, trial_directory(sweep, group[0]) / CONFIG_NAME)
        for group in (first, second)
    ]
    corpus = read_split(configs[0].corpus, configs[0].corpus.valid)
    are_given = any(config.model.given_emotions != "none" for config in configs)
    keys = [key for key in COMPARED if not (are_given and key == _EMOTIONS)]
    sums = [
        np.sum([_sums(sweep, result, corpus) for result in group if result.seed in seeds], axis=0)
        for group in (first, second)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's on degenerate samples: equal systems
        found = compare_systems(sums[0], sums[1], keys=keys)
    return {key: asdict(comparison) for key, comparison in found.items()}


def _sums(sweep: Path, result: TrialResult, corpus: Corpus) -> NDArray[np.float64]:
    """(D, K) contributions of one student's predictions (kdecs.evaluation.rows)."""
    return evaluate(corpus, validation_predictions(sweep, result, corpus)).sums_by_dialogue


def validation_predictions(sweep: Path, result: TrialResult, corpus: Corpus) -> dict[PairKey, Prediction]:
    """A student's predictions for the validation pairs, from the files of sweep or trial where they are there.

    Raises ArtifactError for a student that is damaged.
    """
    from kdecs.runtime import start_runtime
    from kdecs.student.prediction import Student

    directory = trial_directory(sweep, result)
    path = sweep / PREDICTIONS_FOLDER / f"{result.id}-{content_checksum(directory)[:8]}.jsonl"
    if not path.is_file():
        if (kept := _kept_predictions(directory, corpus)) is not None:
            return kept
        student = Student.from_pretrained(directory, device=start_runtime().device)
        path.parent.mkdir(exist_ok=True)
        write_predictions(path, student.predict_pairs(corpus).values())
    return read_predictions(path, corpus)


def _kept_predictions(directory: Path, corpus: Corpus) -> dict[PairKey, Prediction] | None:
    """What the training kept beside the weights; None where it did not, or where an input is another one now."""
    from kdecs.student.product import VALIDATION_NAME

    manifest = check_whole(directory, "student")
    if VALIDATION_NAME not in {entry.path for entry in manifest.files}:
        return None
    try:
        is_same_work = (
            config_hash(load_config(StudentConfig, directory / CONFIG_NAME)) == manifest.config_hash
        )
    except ConfigError:  # an input is gone that predicting does without
        return None
    return read_predictions(directory / VALIDATION_NAME, corpus) if is_same_work else None
