"""Calibration by distance: the fit against a planted preference and a plain gradient, and what the labels keep."""

import json

import numpy as np
import pytest
from label_directories import WORDS, make_labels, make_table, names_of, sample_labels, sample_pairs
from scipy.special import expit, softmax
from typer.testing import CliRunner

from kdecs.artifact import content_checksum, read_manifest, verify_artifact
from kdecs.cli import app
from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import LabelError
from kdecs.soft_labels.derive.calibrate import NUM_DISTANCES, fitted, log_loss, log_odds, places
from kdecs.soft_labels.labels import SoftLabels


def calibrate(labels, output, train=None):
    train = train or bundled_sample("train")
    command = ["soft-labels", "calibrate", str(labels), "--train", str(train), "--output", str(output)]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def test_the_fit_undoes_a_planted_preference():
    draw = np.random.default_rng(0)
    distance_n = draw.integers(0, 9, 160_000)
    true_n = draw.normal(0, 2, len(distance_n))
    gold_n = (draw.random(len(true_n)) < expit(true_n)).astype(float)
    preference = np.array([1.0, -1.5, 0.5, 0, 0.3, -0.2, 0.8, -0.6])
    z_n = (true_n - preference[distance_n.clip(max=7)]) / 0.8
    scale, shift_D = fitted(z_n, places(distance_n), gold_n)
    assert scale == pytest.approx(0.8, abs=0.03)
    np.testing.assert_allclose(shift_D[1:], preference, atol=0.12)
    assert shift_D[0] == 0, "no candidate came later"
    new_n = scale * z_n + shift_D[places(distance_n)]
    assert log_loss(new_n, gold_n) < log_loss(z_n, gold_n) - 0.05

    # Nothing nearby has a smaller loss: the ridge penalty is half the squared distance from (1, 0).
    def loss(scale, shift_D):
        return (
            log_loss(scale * z_n + shift_D[places(distance_n)], gold_n) * len(z_n)
            + ((scale - 1) ** 2 + (shift_D**2).sum()) / 2
        )

    best = loss(scale, shift_D)
    for _ in range(20):
        step = draw.normal(0, 0.02, 1 + NUM_DISTANCES)
        assert loss(scale + step[0], shift_D + step[1:]) > best


def test_labels_that_are_right_stay_as_they_are():
    draw = np.random.default_rng(1)
    z_n, distance_n = draw.normal(0, 2, 200_000), draw.integers(-2, 9, 200_000)
    scale, shift_D = fitted(z_n, places(distance_n), (draw.random(len(z_n)) < expit(z_n)).astype(float))
    assert scale == pytest.approx(1, abs=0.03) and np.abs(shift_D).max() < 0.12
    # Few pairs move little.
    scale, shift_D = fitted(z_n[:2], places(distance_n[:2]), np.ones(2))
    assert abs(scale - 1) < 2 and np.abs(shift_D).max() < 1


def test_a_directory_is_calibrated(tmp_path):
    parent = sample_labels(tmp_path / "labels", seed=3)
    result = calibrate(parent, tmp_path / "out")
    assert result.exit_code == 0 and "log loss on" in result.output
    assert verify_artifact(tmp_path / "out") == []
    details = read_manifest(tmp_path / "out").details
    found = details["calibration"]
    assert found["log_loss"] < found["log_loss_before"]
    assert details["lineage"] == {"calibrated": read_manifest(tmp_path / "out").inputs["labels"]}
    before, after = (SoftLabels.open(d, tmp_path / "cache") for d in (parent, tmp_path / "out"))
    shift = found["shift_by_distance"]
    scored = [pair for pair in sample_pairs("train") if pair.emotion != "neutral"]
    assert found["training_pairs"] == len(scored)
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
    assert calibrate(parent, tmp_path / "out").exit_code == 0
    assert content_checksum(tmp_path / "out") == same


def test_other_splits_decide_nothing(tmp_path):
    """Labels of the validation split may say what they like: the numbers are those of the training split."""
    found = []
    for name, tilt in (("one", 2.0), ("two", 2.0)):
        splits = ("train",) if name == "one" else ("train", "valid")
        parent = sample_labels(tmp_path / name, seed=4, tilt=tilt, splits=splits)
        assert calibrate(parent, tmp_path / f"{name}-out").exit_code == 0
        found.append(read_manifest(tmp_path / f"{name}-out").details["calibration"])
    assert json.dumps(found[0]) == json.dumps(found[1])


def test_labels_of_another_corpus_are_refused(tmp_path):
    labels = make_labels(tmp_path / "labels", make_table(["nobody/1/1"]), words=WORDS)
    with pytest.raises(LabelError, match="none of its training pairs is in the corpus; name the corpus"):
        calibrate(labels, tmp_path / "out")
    assert not (tmp_path / "out").exists()
