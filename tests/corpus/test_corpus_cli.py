"""The installed command from outside: exit codes, one line on stderr, quick start."""

import os
import subprocess
import sys

import pytest

from kdecs.corpus.reading import bundled_sample


def kdecs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kdecs.cli", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_sound_exits_with_0():
    done = kdecs("corpus", "verify", bundled_sample("test"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [("corpus", "verify"), ("corpus", "stats"), ("corpus", "pairs")])
def test_what_is_refused_exits_with_1_and_one_line(tmp_path, command):
    broken = tmp_path / "broken.json"
    broken.write_text('{"tr_1": [[{"turn": 1, "speaker": "A", "utterance": "a", "emotion": "bliss"}]]}')
    for path in (broken, tmp_path / "nowhere.json"):
        done = kdecs(*command, path)
        assert done.returncode == 1
        assert done.stderr.startswith("kdecs: error: ")
        assert len(done.stderr.splitlines()) == 1
        assert str(path) in done.stderr


def test_a_refusal_is_one_line_where_the_corpus_has_notes_too(tmp_path):
    corpus = tmp_path / "corpus.json"
    corpus.write_text('{"tr_1": [[{"turn": 1, "speaker": "A", "utterance": "a", "emotion": "happy"}]]}')
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("")
    arguments = ("evaluate", "--corpus", corpus, "--predictions", predictions, "--json")
    done = kdecs(*arguments)
    assert (done.returncode, done.stderr) == (0, f"{corpus}: label variants replaced: happy (1)\n")
    predictions.write_text("{")
    done = kdecs(*arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)


def test_usage_errors_exit_with_2():
    assert kdecs("corpus", "verify").returncode == 2
    assert kdecs("evaluate", "--corpus", bundled_sample("test")).returncode == 2
    assert kdecs("corpus", "pairs", bundled_sample("test"), "--universe", "none").returncode == 2


def test_a_predicted_file_is_scored(sample_predictions_file):
    done = kdecs(
        "evaluate", "--corpus", bundled_sample("test"), "--predictions", sample_predictions_file, "--json"
    )
    assert done.returncode == 0
    assert '"macro_f1"' in done.stdout


@pytest.fixture
def sample_predictions_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("")
    return path


def test_help_starts_in_less_than_a_second():
    before = os.times()
    for command in ((), ("corpus",), ("corpus", "stats"), ("evaluate",), ("compare",)):
        done = kdecs(*command, "--help")
        assert done.returncode == 0
        assert "xample" in done.stdout or len(command) < 2
    after = os.times()
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
    ) / 5 < 1
