"""A sweep in MLflow: ends as they were noted, every sample, nothing twice."""

import json

import pytest
from fake_trainer import train

from kdecs.sweep.driver import run_sweep
from kdecs.sweep.space import trials_directory
from kdecs.sweep.status import read_results

ONE_TRIAL = {"optimization.seed": {"grid": [0]}, "teacher": {"grid": ["t5-tiny"]}}


@pytest.fixture
def one_trial(make_config):
    """The config of a sweep of one trial."""
    return make_config(space=ONE_TRIAL)


def test_an_end_that_is_noted_late_is_delivered_as_it_is(one_trial, uri, runs_of, in_process):
    def runner(stage, stop, follow):
        in_process(stage, stop, lambda: None)
        directory = trials_directory(stage.sweep) / stage.trials[0]
        ended = json.loads((directory / "trial.json").read_text())
        between = {**ended, "status": "running", "finished": None, "seconds": 0.5}
        (directory / "trial.json").write_text(
            json.dumps(between)
        )  # its files are there, its end is not noted
        follow()
        with (directory / "system.jsonl").open("a") as file:
            file.write(json.dumps({"time": 5000.0, "system/cpu_utilization_percentage": 77.0}) + "\n")
        (directory / "trial.json").write_text(json.dumps({**ended, "seconds": 12.5, "finished": 6000.0}))

    run_sweep(one_trial, trainer=train, runner=runner)
    [result] = read_results(one_trial.output)
    assert (result.seconds, result.finished) == (12.5, 6000.0)
    client, _, children = runs_of(uri)
    run = children[result.id]
    assert run.info.end_time == 6_000_000
    history = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert 77.0 in [metric.value for metric in history]


def test_an_end_that_was_never_noted_is_that_of_its_manifest(one_trial, uri, runs_of, in_process):
    def runner(stage, stop, follow):
        in_process(stage, stop, lambda: None)
        directory = trials_directory(stage.sweep) / stage.trials[0]
        ended = json.loads((directory / "trial.json").read_text())
        (directory / "trial.json").write_text(json.dumps({**ended, "status": "running", "finished": None}))

    run_sweep(one_trial, trainer=train, runner=runner)
    [result] = read_results(one_trial.output)
    manifest = one_trial.output / result.directory / "manifest.json"
    assert (result.status, result.finished) == ("complete", manifest.stat().st_mtime)
    assert runs_of(uri)[2][result.id].info.end_time == round(1000 * result.finished)
