import json
import subprocess
import sys

import pytest

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.evaluation.predictions import Prediction, write_predictions

NUM_COPIES = 23


@pytest.fixture
def files(tmp_path):
    """A corpus of as many rows as RECCON's test split (7,224), and a prediction of each pair."""
    dialogues = json.loads(bundled_sample("test").read_text(encoding="utf-8"))
    copies = {f"{name}_{n}": dialogue for n in range(NUM_COPIES) for name, dialogue in dialogues.items()}
    corpus_file, predictions_file = tmp_path / "corpus.json", tmp_path / "predictions.jsonl"
    corpus_file.write_text(json.dumps(copies))
    pairs = [pair for dialogue in read_corpus(corpus_file).dialogues for pair in pairs_of(dialogue)]
    write_predictions(
        predictions_file,
        (
            Prediction(
                p.dialogue.id,
                p.target,
                p.candidate,
                p.emotion,
                True,
                p.dialogue.utterances[p.candidate - 1].text,
            )
            for p in pairs
        ),
    )
    return corpus_file, predictions_file


def test_a_test_split_is_scored_without_torch(files):
    code = (
        "import sys; from kdecs.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    command = ["evaluate", "--corpus", files[0], "--predictions", files[1], "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["num_positive"] + found["num_negative"] >= 7_224
    assert found["missing"] == 0
