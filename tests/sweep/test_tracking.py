"""A sweep in MLflow: settings above their seeds, corpora, models; ends as they were noted; nothing twice."""

import json
from collections import Counter

import numpy as np
import pytest
from fake_trainer import train

from kdecs.artifact import content_checksum
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.search import Search
from kdecs.sweep.space import trials_directory
from kdecs.sweep.status import by_settings, read_results
from kdecs.sweep.tracking import SETTING_TAG
from kdecs.tracking.datasets import corpus_datasets

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


TWO_SETTINGS = {"distillation.alpha": {"grid": [0.3, 0.6]}, "teacher": {"grid": ["t5-tiny"]}}


def test_a_setting_has_mean_and_sd_over_its_seeds_also_after_more_of_them(
    make_config, uri, runs_of, in_process
):
    for seeds in ([0, 1], [0, 1, 2]):
        config = make_config(space={**TWO_SETTINGS, "optimization.seed": {"grid": seeds}})
        for leftover in config.output.glob("manifest.json"):  # the sweep is extended
            leftover.unlink()
        run_sweep(config, trainer=train, runner=in_process)
        client, [sweep], children = runs_of(uri)
        groups = by_settings(read_results(config.output))
        assert len(groups) == 2
        for key, results in groups.items():
            experiment = [sweep.info.experiment_id]
            [setting] = client.search_runs(experiment, f"tags.`{SETTING_TAG}` = '{key}'")
            assert setting.data.tags["mlflow.parentRunId"] == sweep.info.run_id
            assert {children[r.id].data.tags["mlflow.parentRunId"] for r in results} == {setting.info.run_id}
            assert setting.info.status == "FINISHED" and setting.data.metrics["num_seeds"] == len(seeds)
            for name in ("macro_f1", "utterance_macro_f1"):
                values = [result.metrics[name] for result in results]
                assert setting.data.metrics[f"mean/{name}"] == pytest.approx(np.mean(values))
                assert setting.data.metrics[f"sd/{name}"] == pytest.approx(np.std(values, ddof=1))
            assert setting.data.params["alpha"] == str(json.loads(key)["distillation.alpha"])
            assert "seed" not in setting.data.params
        better = client.search_runs(
            experiment, "metrics.`mean/macro_f1` > 0", order_by=["metrics.`mean/macro_f1` DESC"]
        )
        assert [run.data.params["alpha"] for run in better] == ["0.6", "0.3"]


def test_students_are_models_that_are_found_by_their_score_on_a_corpus(make_config, uri, runs_of, in_process):
    config = make_config(space={**TWO_SETTINGS, "optimization.seed": {"grid": [0]}})
    run_sweep(config, trainer=train, runner=in_process)
    client, [sweep], children = runs_of(uri)
    trial = next(iter(Search(config).trials().values()))[0]
    corpora = corpus_datasets(trial.config.corpus, universe="fold1+neutral")
    valid = {"dataset_name": corpora[1].name, "dataset_digest": corpora[1].digest}
    order = [{"field_name": "metrics.macro_f1", "ascending": False, **valid}]
    experiment = [sweep.info.experiment_id]
    models = client.search_logged_models(experiment, "metrics.macro_f1 > 0", datasets=[valid], order_by=order)
    results = sorted(read_results(config.output), key=lambda result: -result.score)
    assert [model.source_run_id for model in models] == [
        children[result.id].info.run_id for result in results
    ]
    for model, result in zip(models, results, strict=True):
        directory = config.output / result.directory
        assert model.tags["kdecs.directory"] == str(directory) and model.status == "READY"
        assert model.tags["kdecs.checksum"] == content_checksum(directory)[:16]
        assert model.name == result.label.replace(".", "·")
        scores = {metric.key: (metric.value, metric.dataset_digest) for metric in model.metrics}
        assert scores["macro_f1"] == (result.score, corpora[1].digest)
        run = client.get_run(model.source_run_id)
        assert [made.model_id for made in run.outputs.model_outputs] == [model.model_id]
        split_of = {made.dataset.name: made.tags[0].value for made in run.inputs.dataset_inputs}
        assert split_of == {"sample-train": "train", "sample-valid": "valid", "t5-tiny": "soft labels"}
        assert run.data.tags["mlflow.source.name"] == "kdecs.launch.sweep"
        # The model's metrics are those of the epoch that the run has already.
        assert Counter(m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")) == {
            1: 1,
            2: 1,
            3: 1,
        }
    assert (
        client.search_logged_models(
            experiment, "metrics.macro_f1 > 0", datasets=[{**valid, "dataset_digest": "0"}]
        )
        == []
    )
