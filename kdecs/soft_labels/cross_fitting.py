"""Cross-fitting: a training pair's label comes from the teacher that did not train on its dialogue.

A teacher is over-sure of pairs that it was trained on, and what it is over-sure of teaches a student little. Here K
teachers are trained, each on the training dialogues but one fold's, and each labels its own fold:

    WORK/fold-k/train.json      what teacher k is trained on         WORK/fold-k/teacher/   kind teacher
    WORK/fold-k/held-out.json   what it labels                       WORK/fold-k/labels/    kind soft-labels
    OUTPUT/                     the merged labels, kind soft-labels; details.folds: fold by fold the teacher, the
                                checksums of both files, and the shards that hold its pairs

Labels of valid and test, which no teacher trained on: the mean probability of all K (`evaluation_labels: mean`), or
those of one of them.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdecs.artifact import Manifest, content_checksum, read_manifest
from kdecs.config import input_checksums
from kdecs.errors import ArtifactError
from kdecs.soft_labels.cross_fit_config import CrossFitConfig
from kdecs.soft_labels.ensemble import combined_rows
from kdecs.soft_labels.folds import check_apart
from kdecs.soft_labels.format import ShardTable
from kdecs.soft_labels.plan import EXPORT_UNIVERSE
from kdecs.soft_labels.reader import SoftLabels
from kdecs.soft_labels.shard_rows import iter_directory
from kdecs.soft_labels.writing import begin_directory, finish_directory, rows_where, write_rows


def merge_folds(config: CrossFitConfig) -> Manifest:
    """Merge the exports of all folds into the output, lineage checked fold by fold.

    Raises ArtifactError where a fold's teacher was not trained on just its training file, or its labels are not that
    teacher's of the held-out file; LabelError where the exports do not cover the same evaluation pairs.
    """
    facts = [_checked_fold(config, fold) for fold in range(config.num_folds)]
    labels = [
        SoftLabels.open(config.fold_directory(fold) / "labels", config.work_directory / "joined")
        for fold in range(config.num_folds)
    ]
    for other in labels[1:]:
        other.require_answer_words(labels[0].answer_words)
    work_hash = begin_directory(config, config.output)
    rows: dict[str, int] = {}
    by_split: Counter[str] = Counter()

    def write(tables: Iterator[ShardTable]) -> list[str]:
        written, counts = write_rows(config.output, tables, labels[0].answer_words, first_shard=len(rows))
        rows.update(written)
        by_split.update(counts)
        return list(written)

    for fold, fold_labels in enumerate(labels):
        facts[fold]["shards"] = write(_split_rows(fold_labels, is_train=True))
    evaluation_shards = write(_evaluation_rows(config, labels))
    return finish_directory(
        config.output,
        work_hash,
        rows,
        by_split,
        labels[0].answer_words,
        inputs=input_checksums(
            corpus_train=config.corpus.train,
            corpus_valid=config.corpus.valid,
            corpus_test=config.corpus.test,
            **{
                f"teacher_{fold}": config.fold_directory(fold) / "teacher" for fold in range(config.num_folds)
            },
            **{f"labels_{fold}": config.fold_directory(fold) / "labels" for fold in range(config.num_folds)},
        ),
        details={
            "universe": EXPORT_UNIVERSE,
            "lineage": _lineage(config, facts),
            "folds": facts,
            "evaluation_shards": evaluation_shards,
        },
    )


def _lineage(config: CrossFitConfig, facts: list[dict[str, Any]]) -> dict[str, str]:
    return {
        "cross_fit": f"{config.num_folds} folds",
        "fold_seed": str(config.fold_seed),
        "evaluation_labels": str(config.evaluation_labels),
        **{f"teacher_{fold}": fact["teacher"] for fold, fact in enumerate(facts)},
    }


def _checked_fold(config: CrossFitConfig, fold: int) -> dict[str, Any]:
    """The lineage of a fold, after it was held against the files. Raises ArtifactError."""
    directory = config.fold_directory(fold)
    train, held_out = config.fold_corpus(fold, "train"), config.fold_corpus(fold, "held-out")
    teacher = read_manifest(directory / "teacher", "teacher")
    labels = read_manifest(directory / "labels", "soft-labels")
    found = {"train": content_checksum(train), "held_out": content_checksum(held_out)}
    found["teacher"] = content_checksum(directory / "teacher")
    for path, inputs, name, expected in (
        (directory / "teacher", teacher.inputs, "corpus_train", found["train"]),
        (directory / "labels", labels.inputs, "corpus_train", found["held_out"]),
        (directory / "labels", labels.inputs, "teacher", found["teacher"]),
    ):
        if inputs.get(name) != expected:
            raise ArtifactError(
                f"{path}: made with another {name} ({str(inputs.get(name))[:12]}…, expected {expected[:12]}…); "
                f"remove {directory} and run the same command again"
            )
    num_dialogues = check_apart(train, held_out)
    return {
        **found,
        "fold": fold,
        "labels": content_checksum(directory / "labels"),
        "dialogues": num_dialogues,
        "pairs": labels.details["num_pairs"].get("train", 0),
        "lineage": labels.details["lineage"],
    }


def _split_rows(labels: SoftLabels, *, is_train: bool) -> Iterator[ShardTable]:
    for table in iter_directory(labels.directory, labels.manifest):
        yield rows_where(table, [(split == "train") == is_train for split in table.splits])


def _evaluation_rows(config: CrossFitConfig, labels: list[SoftLabels]) -> Iterator[ShardTable]:
    """Rows of valid and test in the first (or chosen) fold's order."""
    chosen = 0 if config.evaluation_labels == "mean" else config.evaluation_labels
    for table in _split_rows(labels[chosen], is_train=False):
        if config.evaluation_labels == "mean" and len(table):
            yield combined_rows("mean-probability", table, labels, np.ones(len(labels)).tolist())
        else:
            yield table
