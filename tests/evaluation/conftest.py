from pathlib import Path

import pytest

from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.predictions import write_predictions


@pytest.fixture(scope="session")
def sample_predictions(tmp_path_factory) -> dict[str, Path]:
    """Prediction files of the trivial rules on the bundled test sample, by a name for each."""
    folder = tmp_path_factory.mktemp("predictions")
    rules = trivial_predictions(read_corpus(bundled_sample("test")), "fold1")
    files = {"near": "j >= i-1", "self": "j = i", "majority": "majority emotion"}
    for name, rule in files.items():
        write_predictions(folder / f"{name}.jsonl", rules[rule].values())
    return {name: folder / f"{name}.jsonl" for name in files}
