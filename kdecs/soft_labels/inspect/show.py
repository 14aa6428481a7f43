"""What `kdecs soft-labels show` reports: a directory's lineage, its labels by split, and how they compare with gold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kdecs.artifact import MANIFEST_NAME, Manifest, check_sizes, read_manifest, scratch_folder
from kdecs.corpus.pairs import Universe
from kdecs.corpus.schema import NO_TABLE
from kdecs.errors import ArtifactError, LabelError
from kdecs.soft_labels.corpora import labelled_corpora, pair_batches
from kdecs.soft_labels.format import SPLITS, answer_words_of, candidates_after_of, iter_directory, num_rows
from kdecs.soft_labels.inspect.calibration import SCORES, GoldSums, LabelSums, require_cause_words
from kdecs.soft_labels.labels import SoftLabels

_FACTS = ("temperature", "universe", "dtype", "devices", "num_pairs", "lineage", "parents", "folds", "rule")


def describe(
    directory: Path,
    corpora: Sequence[Path] = (),
    *,
    universe: Universe = "fold1",
    cache_dir: Path | None = None,
    table: Mapping[str, str] = NO_TABLE,
) -> dict[str, Any]:
    """The manifest's facts, sums by split, and for each corpus file agreement and calibration, as plain JSON values.

    Without `corpora`, those that were labelled are used where they are still there (`labelled_corpora`). The pairs of
    a corpus are found by id and hash in any split. Pairs without a label are counted; a named corpus of which no pair
    has a label is refused. `table` maps their emotions. Raises ArtifactError, CorpusError, LabelError.
    """
    manifest = read_manifest(directory, "soft-labels")
    check_sizes(directory, manifest)
    words = answer_words_of(directory, manifest)
    require_cause_words(directory, words)
    # Only the sizes of the files are compared here; the bytes are checked page by page as the shards are decoded.
    found: dict[str, Any] = {
        "directory": str(directory),
        "answer_words": list(words),
        "shards": len(manifest.files),
        "inputs": manifest.inputs,
        **{name: manifest.details[name] for name in _FACTS if name in manifest.details},
        "agreement": _agreement_of(directory, manifest),
        "splits": {},
        "gold": {},
    }
    sums = {split: LabelSums(words) for split in SPLITS}
    with _bar(num_rows(manifest), "labels") as bar:
        for rows in iter_directory(directory, manifest):
            split_n = np.array(rows.splits)
            for split in set(rows.splits):
                rows_n = split_n == split
                sums[split].add(rows.logits[rows_n], rows.log_rest_mass[rows_n])
            bar.update(len(rows))
    found["splits"] = {split: item.as_dict() for split, item in sums.items() if item.num_pairs}
    if compared := list(corpora) or labelled_corpora(directory, manifest):
        with scratch_folder("labels") as scratch:
            labels = SoftLabels.open(directory, cache_dir or scratch)
            for path in compared:
                against_gold = _compare_with_gold(labels, path, universe, table, labelled=bool(corpora))
                if against_gold["num_pairs"]:
                    found["gold"][str(path)] = against_gold
                # A file that `labelled_corpora` found may hold no pair with gold, or no gold labels at all. One that
                # the user named is meant to be compared.
                elif corpora:
                    raise LabelError(
                        f"{directory}: labels none of the {against_gold['missing']} pairs of {path}; "
                        "name the corpus that was labelled (ids and texts must agree)"
                    )
    return found


def _agreement_of(directory: Path, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Agreement with gold by split as the export counted it. Raises ArtifactError for malformed details."""
    found = manifest.details.get("agreement", {})
    scores: list[Any] = list(found.values()) if isinstance(found, dict) else [found]
    for item in scores:
        is_scores = isinstance(item, dict) and (not item or item.keys() == set(SCORES))
        if not is_scores or not all(isinstance(value, int | float) for value in item.values()):
            raise ArtifactError(f"{directory / MANIFEST_NAME}: details.agreement: expected scores by split")
    return {split: item for split, item in found.items() if item}


def _compare_with_gold(
    labels: SoftLabels, path: Path, universe: Universe, table: Mapping[str, str], *, labelled: bool
) -> dict[str, Any]:
    sums = GoldSums(labels.answer_words)
    after = candidates_after_of(labels.directory, labels.manifest)
    num_missing = 0
    with _bar(None, path.name) as bar:
        for batch in pair_batches(path, universe, after, table, labelled=labelled):
            rows_n = labels.find([pair.id for pair in batch], [pair.hash for pair in batch])
            is_cause_n = np.array([pair.is_cause for pair in batch])
            known_n = rows_n >= 0
            sums.add(labels.logits(rows_n[known_n]), is_cause_n[known_n])
            num_missing += int((~known_n).sum())
            bar.update(len(batch))
    return sums.as_dict() | {"universe": universe, "missing": num_missing}


def _bar(total: int | None, name: str) -> tqdm:
    return tqdm(total=total, desc=name, unit="pair", unit_scale=True, disable=None, delay=1)
