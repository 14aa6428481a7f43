"""Configs of a cross-fitting of the bundled sample."""

from pathlib import Path

from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample
from kdecs.soft_labels.derive.config import CrossFitConfig


def config_of(output: Path, **changes: object) -> CrossFitConfig:
    values = {
        "name": "cross",
        "output": str(output),
        "corpus": {split: str(bundled_sample(split)) for split in ("train", "valid", "test")},
        "num_folds": 3,
        "teacher": {"model": {"family": "causal", "base": "some/hub-name"}},
        "export": {"num_shards": 2},
    }
    return parse_config(CrossFitConfig, values | changes, source="test")
