"""The corpora and soft labels that a run reads, as datasets with a digest of their content."""

import hashlib
import json
from pathlib import Path
from typing import Any

from kdecs.artifact import content_checksum
from kdecs.config import files_of
from kdecs.corpus.splits import CorpusConfig
from kdecs.tracking.record import DatasetRecord

TRAIN_UNIVERSE = "fold1+neutral"  # of a student's training pairs and of an export
VALID_UNIVERSE = "fold1"  # of every score on the validation split
_DIGEST_DIGITS = 12
_PLAIN_NAMES = ("train", "valid", "validation", "dev", "test")


def corpus_datasets(corpus: CorpusConfig, *, universe: str, has_test: bool = False) -> list[DatasetRecord]:
    """The splits that a run reads: those it trains and validates on and, with `has_test`, the test split.

    `universe` is that of the training pairs and of the test split's. The validation split counts the pairs that it is
    scored on, so a teacher, a student and a baseline that are validated on one file have that dataset in common.
    """
    labels: dict[str, str] = {"emotions": corpus.emotions} if corpus.emotions != "as-is" else {}
    if corpus.emotion_table is not None:
        labels["emotion_table"] = content_checksum(corpus.emotion_table)[:_DIGEST_DIGITS]
    selection: dict[str, Any] = {}
    if corpus.train_share < 1:
        selection = {"train_share": corpus.train_share, "train_share_seed": corpus.train_share_seed}
    if corpus.drop_cross_split:
        others = [path for path in (corpus.valid, corpus.test) if path is not None]
        selection["without_texts_of"] = [content_checksum(path)[:_DIGEST_DIGITS] for path in others]
    datasets = [
        *(
            _dataset(path, "train", {"universe": universe, **labels, **selection})
            for path in files_of(corpus.train)
        ),
        _dataset(corpus.valid, "valid", {"universe": VALID_UNIVERSE, **labels}),
    ]
    if has_test and corpus.test is not None:
        datasets.append(_dataset(corpus.test, "test", {"universe": universe, **labels}))
    return datasets


def label_dataset(labels: Path) -> DatasetRecord:
    """A directory of soft labels that a student is distilled from."""
    return DatasetRecord(
        name=labels.name,
        digest=content_checksum(labels)[:_DIGEST_DIGITS],
        split="soft labels",
        path=str(labels),
    )


def _dataset(path: Path, split: str, profile: dict[str, Any]) -> DatasetRecord:
    content = json.dumps({"file": content_checksum(path), **profile}, sort_keys=True)
    # `train.json` says nothing without its folder.
    name = f"{path.parent.name}-{path.stem}" if path.stem in _PLAIN_NAMES else path.stem
    return DatasetRecord(
        name=name,
        digest=hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_DIGITS],
        split=split,
        path=str(path),
        profile=profile,
    )
