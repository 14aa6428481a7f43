"""Labels that no model made, as controls of a study: what a perfect teacher is worth, and what one that knows nothing.

    oracle   gold, smoothed: probability 1 - s of the right decision. With `wrong_share` w it decides wrongly for a
             random share w of the pairs, so that a row of them is a scale of teachers' quality
    rule     the rule j >= i - 1, smoothed. It reads no word, so a good teacher's student must gain more than its
    random   p(cause) is uniform over 0 to 1, whatever the pair

If a student gains from the oracle and not from a teacher, the teacher is too weak; if it gains from neither, the
student or the task is the limit; if it gains from the random labels, the gain is regularisation.

p(cause) is divided equally among the causal connectives, and no mass is left for other words. Random numbers depend on
the seed and the pair alone, so that the order of the corpora changes nothing.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from kdecs.artifact import Manifest
from kdecs.config import config_hash, files_of, input_checksums
from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL
from kdecs.corpus.pairs import EXPORT_UNIVERSE, Pair
from kdecs.output import refuse_overlaps
from kdecs.soft_labels.corpora import pair_batches
from kdecs.soft_labels.derive.config import ControlConfig
from kdecs.soft_labels.derive.write import LabelDirectory, check_label_output
from kdecs.soft_labels.format import NO_REST_MASS, SPLITS, ShardTable, reach_details
from kdecs.soft_labels.verify import verified_labels

_LEAST = 1e-6  # of a probability, so that its log is finite


def write_control(config: ControlConfig) -> Manifest:
    """Write a control's label directory, or return its manifest where it is complete and undamaged.

    Raises CorpusError for a fault in a corpus, and ArtifactError for an output that holds other work.
    """
    refuse_overlaps(config)
    if finished := verified_labels(config.output, config_hash(config), show_progress=True):
        return finished
    check_label_output(config, config.output)
    corpora = {split: files_of(path) for split in SPLITS if (path := getattr(config, split)) is not None}
    directory = LabelDirectory(config, config.output, CONNECTIVES)
    for split, files in corpora.items():
        directory.write(
            _labelled(config, split, pair_batches(files, EXPORT_UNIVERSE, config.candidates.after))
        )
    return directory.finish(
        inputs=input_checksums(**{f"corpus_{split}": path for split, path in corpora.items()}),
        details={
            "universe": EXPORT_UNIVERSE,
            **reach_details(config.candidates.after),
            "lineage": {
                "control": config.control,
                "smoothing": config.smoothing,
                "wrong_share": config.wrong_share,
                "seed": config.seed,
            },
        },
    )


def cause_probabilities(config: ControlConfig, pairs: list[Pair]) -> np.ndarray:
    """p(cause) of each pair, (n,) float64, between 0 and 1."""
    if config.control == "random":
        return np.array([_uniform(config.seed, "probability", pair) for pair in pairs])
    if config.control == "rule":
        decided_n = np.array([pair.target - 1 <= pair.candidate <= pair.target for pair in pairs])
    else:
        decided_n = np.array([pair.is_cause for pair in pairs])
        decided_n ^= np.array([_uniform(config.seed, "wrong", pair) < config.wrong_share for pair in pairs])
    return np.where(decided_n, 1 - config.smoothing, config.smoothing)


def _labelled(config: ControlConfig, split: str, batches: Iterator[list[Pair]]) -> Iterator[ShardTable]:
    with tqdm(desc=f"label {split}", unit="pair", unit_scale=True, disable=None, delay=1) as bar:
        for batch in batches:
            p_n = np.clip(cause_probabilities(config, batch), _LEAST, 1 - _LEAST)
            p_nA = np.empty((len(batch), len(CONNECTIVES)))
            p_nA[:, :NUM_CAUSAL] = p_n[:, None] / NUM_CAUSAL
            p_nA[:, NUM_CAUSAL] = 1 - p_n
            yield ShardTable(
                [pair.id for pair in batch],
                [pair.hash for pair in batch],
                [split] * len(batch),
                np.log(p_nA).astype(np.float32),
                np.full(len(batch), NO_REST_MASS, dtype=np.float32),
            )
            bar.update(len(batch))


def _uniform(seed: int, purpose: str, pair: Pair) -> float:
    """A number from 0 up to 1 that depends on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed} {purpose} {pair.id} {pair.hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
