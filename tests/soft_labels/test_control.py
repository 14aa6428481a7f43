"""Labels that no model made: their decisions, and that they are directories like any other."""

import numpy as np
import pytest
from label_directories import WORDS, names_of, sample_pairs
from scipy.special import softmax
from typer.testing import CliRunner

from kdecs.artifact import read_manifest
from kdecs.cli import app
from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.reading import bundled_sample
from kdecs.soft_labels.labels import SoftLabels


def make(output, *arguments, splits=("train",)):
    corpora = [part for split in splits for part in ("--corpus", f"{split}={bundled_sample(split)}")]
    command = ["soft-labels", "control", *arguments, *corpora, "--output", str(output)]
    return CliRunner().invoke(app, command)


def cause_probabilities(directory, cache, split="train"):
    """p(cause) of the sample's pairs, (n,), as a student reads it."""
    labels = SoftLabels.open(directory, cache)
    labels.require_answer_words(WORDS)
    rows_n = labels.rows_of(*names_of(sample_pairs(split)), split=split)
    p_nA = softmax(labels.logits(rows_n).astype(np.float64), axis=1)
    # Each causal connective has the same share.
    assert (np.ptp(p_nA[:, :NUM_CAUSAL], axis=1) < 1e-6).all()
    assert (labels.log_rest_mass(rows_n) < -20).all()
    return p_nA[:, :NUM_CAUSAL].sum(axis=1)


@pytest.mark.parametrize(
    ("arguments", "decide"),
    [
        (("oracle",), lambda pair: pair.is_cause),
        (("rule",), lambda pair: pair.candidate >= pair.target - 1),
    ],
    ids=["oracle", "rule"],
)
def test_the_decision_is_smoothed(tmp_path, arguments, decide):
    result = make(tmp_path / "labels", *arguments, "--smoothing", "0.2", splits=("train", "valid"))
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "labels")]).exit_code == 0
    for split in ("train", "valid"):
        expected = [0.8 if decide(pair) else 0.2 for pair in sample_pairs(split)]
        found = cause_probabilities(tmp_path / "labels", tmp_path / "cache", split)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (
        make(tmp_path / "labels", *arguments, "--smoothing", "0.2", splits=("train", "valid")).exit_code == 0
    )
    other = make(tmp_path / "labels", *arguments, splits=("train", "valid"))
    assert other.exit_code == 1 and "labels" in str(other.exception)


def test_an_oracle_is_wrong_for_its_share_and_a_random_control_knows_nothing(tmp_path):
    gold = np.array([pair.is_cause for pair in sample_pairs("train")])
    for seed in ("0", "1"):
        assert make(tmp_path / f"wrong-{seed}", "oracle", "--wrong", "0.3", "--seed", seed).exit_code == 0
        assert make(tmp_path / f"random-{seed}", "random", "--seed", seed).exit_code == 0
    found = {
        path.name: cause_probabilities(path, tmp_path / "cache") for path in sorted(tmp_path.glob("*-[01]"))
    }
    bound = 4 / np.sqrt(len(gold))  # four deviations of a share, at least
    for seed in ("0", "1"):
        assert abs(((found[f"wrong-{seed}"] > 0.5) != gold).mean() - 0.3) < bound
        assert abs(np.corrcoef(found[f"random-{seed}"], gold)[0, 1]) < bound
        assert abs(found[f"random-{seed}"].mean() - 0.5) < bound
    assert not np.array_equal(found["wrong-0"], found["wrong-1"])
    assert read_manifest(tmp_path / "wrong-0").details["lineage"]["wrong_share"] == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rule", "--wrong", "0.1"), "wrong_share is of the oracle"),
        (("oracle", "--smoothing", "0.5"), "smoothing"),
        (("gold",), "oracle"),
    ],
)
def test_refusals_name_the_option(tmp_path, arguments, message):
    result = make(tmp_path / "labels", *arguments)
    assert result.exit_code != 0
    assert message in f"{result.exception} {result.output}"
    assert not (tmp_path / "labels").exists()
