"""Labels that are calibrated by distance: what changes, and what they keep."""

import json

import numpy as np
import pytest
from label_directories import WORDS, make_labels, make_table, names_of, sample_labels, sample_pairs
from scipy.special import softmax
from typer.testing import CliRunner

from kdecs.artifact import content_checksum, read_manifest, verify_artifact
from kdecs.cli import app
from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import LabelError
from kdecs.soft_labels.derive.calibrate import log_odds
from kdecs.soft_labels.labels import SoftLabels


def calibrate(labels, output, *splits, catch=False):
    corpora = [part for split in splits for part in ("--corpus", f"{split}={bundled_sample(split)}")]
    command = ["soft-labels", "calibrate", str(labels), *corpora, "--output", str(output)]
    return CliRunner().invoke(app, command, catch_exceptions=catch)


@pytest.mark.parametrize("fitted_to", ["train", "valid"])
def test_a_directory_is_calibrated(tmp_path, fitted_to):
    parent = sample_labels(tmp_path / "labels", seed=3)
    result = calibrate(parent, tmp_path / "out", fitted_to)
    assert result.exit_code == 0 and "log loss on" in result.output
    assert verify_artifact(tmp_path / "out") == []
    details = read_manifest(tmp_path / "out").details
    found = details["calibration"]
    assert found["log_loss"] < found["log_loss_before"]
    assert details["lineage"] == {"calibrated": read_manifest(tmp_path / "out").inputs["labels"]}
    before, after = (SoftLabels.open(d, tmp_path / "cache") for d in (parent, tmp_path / "out"))
    shift = found["shifts"]
    scored = [pair for pair in sample_pairs(fitted_to) if pair.emotion != "neutral"]
    assert (found["split"], found["pairs"]) == (fitted_to, len(scored))
    for split in ("train", "valid"):
        pairs = sample_pairs(split)
        old_nA, new_nA = (
            of.logits(of.rows_of(*names_of(pairs), split=split)).astype(np.float64) for of in (before, after)
        )
        for pair, old, new in zip(pairs, old_nA, new_nA, strict=True):
            expected = (
                found["scale"] * log_odds(old[None])[0] + shift[1 + min(pair.target - pair.candidate, 7)]
            )
            assert log_odds(new[None])[0] == pytest.approx(expected, abs=1e-4)
        # The causal words keep their shares, and the other mass stays.
        np.testing.assert_allclose(
            softmax(new_nA[:, :NUM_CAUSAL], axis=1), softmax(old_nA[:, :NUM_CAUSAL], axis=1), atol=1e-5
        )
        rests = [of.log_rest_mass(of.rows_of(*names_of(pairs), split=split)) for of in (before, after)]
        np.testing.assert_array_equal(*rests)
    same = content_checksum(tmp_path / "out")
    assert calibrate(parent, tmp_path / "out", fitted_to).exit_code == 0
    assert content_checksum(tmp_path / "out") == same


def test_other_splits_decide_nothing(tmp_path):
    """Labels of the validation split may say what they like: the numbers are those of the training split."""
    found = []
    for name, tilt in (("one", 2.0), ("two", 2.0)):
        splits = ("train",) if name == "one" else ("train", "valid")
        parent = sample_labels(tmp_path / name, seed=4, tilt=tilt, splits=splits)
        assert calibrate(parent, tmp_path / f"{name}-out", "train").exit_code == 0
        found.append(read_manifest(tmp_path / f"{name}-out").details["calibration"])
    assert json.dumps(found[0]) == json.dumps(found[1])


def test_labels_of_another_corpus_are_refused(tmp_path):
    labels = make_labels(tmp_path / "labels", make_table(["nobody/1/1"]), words=WORDS)
    with pytest.raises(LabelError, match="none of its pairs of train is in the corpus; name the corpus"):
        calibrate(labels, tmp_path / "out", "train")
    for splits in ((), ("train", "valid")):
        assert calibrate(labels, tmp_path / "out", *splits, catch=True).exit_code != 0
    assert not (tmp_path / "out").exists()
