"""The studies at small scale: what is changed of each space, and that each ends with its tables on test."""

import csv
import sys
from functools import partial

import pytest
from fake_trainer import train

from kdecs.launch import studies
from kdecs.process import StopSignal
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.report import page
from kdecs.sweep.selection.record import load_selection


@pytest.fixture
def run_studies(finished, in_process, tmp_path, monkeypatch):
    """A function that runs studies, named by their options, over a finished demo with the fake trainer."""
    monkeypatch.setattr("kdecs.sweep.driver.run_sweep", partial(run_sweep, trainer=train, runner=in_process))
    monkeypatch.setattr(StopSignal, "install", lambda stop: None)
    few = {"distillation.alpha": [0.3, 0.6], "distillation.temperature": [2.0]}
    monkeypatch.setattr(studies, "SMALL", few)
    monkeypatch.setattr(page, "_figures", lambda *arguments: [])

    def run(*options):
        where = ["--demo", str(finished.parent), "--output", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["studies", *where, *options])
        studies.main()
        return tmp_path / "runs"

    return run


def test_studies_end_with_both_halves_of_table_4_on_test(run_studies, capsys):
    output = run_studies("--only", "main", "--only", "ecpe", "--seeds", "1", "--epochs", "1")
    for study, num_settings in (("main", 2), ("ecpe", 1)):
        record = load_selection(output / study)
        assert len(record.table) == len(record.settings) == num_settings
        assert all(row.scores for row in record.table)
    assert load_selection(output / "ecpe").metric == "utterance_macro_f1"
    with (output / "main" / "report" / "table4.csv").open(encoding="utf-8") as file:
        ours = [row for row in csv.DictReader(file) if row["source"] == "ours"]
    assert any(row["spans (ECSPE): macro_f1"] for row in ours)
    assert any(row["cause utterances (ECPE): utterance_macro_f1"] for row in ours)
    assert capsys.readouterr().out.count("study main: ") == 2, "again once the other half is there"
