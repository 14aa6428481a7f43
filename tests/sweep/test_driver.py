import json
import os

import pytest

from kdecs.artifact import is_complete, read_manifest, verify_artifact
from kdecs.errors import ArtifactError, Stopped, TrainingError
from kdecs.runtime import StopSignal
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.results import read_results
from kdecs.sweep.space import enumerate_trials, sweep_hash

TRAINER = "fake_trainer:train"


def logs_of(config):
    return {t.id: (t.directory / "log.txt").read_text() for t in enumerate_trials(config)}


def test_sweep_trains_tracks_and_completes(make_config, uri, runs_of, in_process, capfd):
    config = make_config()
    output = run_sweep(config, trainer=TRAINER, runner=in_process)
    trials = enumerate_trials(config)
    assert is_complete(output, "sweep", sweep_hash(trials))
    assert verify_artifact(output) == []
    assert set(read_manifest(output, "sweep").inputs) == {
        "train",
        "valid",
        "labels.llama-tiny",
        "labels.t5-tiny",
    }
    results = read_results(output)
    assert [r.id for r in results] == [t.id for t in trials]
    assert {r.status for r in results} == {"complete"}
    assert all(r.best_epoch == 3 and r.seconds > 0 and r.attempts == 1 for r in results)
    best = max(results, key=lambda r: r.score)
    assert best.label == "llama-tiny α0.6 τ2 s1"
    assert best.score == pytest.approx(60 + 2 + 0.3 + 6)

    client, parents, children = runs_of(uri)
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    assert set(children) == {t.id for t in trials}
    for trial in trials:
        run = children[trial.id]
        assert run.info.run_name == trial.label
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["kdecs.teacher"] == trial.teacher
        assert {"kdecs.corpus", "kdecs.version"} <= set(run.data.tags)
        assert run.data.params["alpha"] == str(trial.config.distillation.alpha)
        assert [m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")] == [1, 2, 3]
        assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["config.json"]
        points = [json.loads(line) for line in (trial.directory / "metrics.jsonl").read_text().splitlines()]
        stamps = [m.timestamp for m in client.get_metric_history(run.info.run_id, "train_loss")]
        assert stamps == [round(1000 * point["time"]) for point in points]
    printed = capfd.readouterr().out
    assert "8 trials, 0 complete, 8 to train" in printed
    assert "best on validation llama-tiny α0.6 τ2 s1" in printed


def test_second_start_skips_and_makes_no_run(make_config, uri, runs_of, in_process, capfd):
    config = make_config()
    run_sweep(config, trainer=TRAINER, runner=in_process)
    before = {t.id: (t.directory / "manifest.json").stat().st_mtime_ns for t in enumerate_trials(config)}
    capfd.readouterr()
    run_sweep(config, trainer=TRAINER, runner=in_process)
    assert "complete, skipped" in capfd.readouterr().out
    assert before == {
        t.id: (t.directory / "manifest.json").stat().st_mtime_ns for t in enumerate_trials(config)
    }
    _, parents, children = runs_of(uri)
    assert len(parents) == 1 and len(children) == 8


def test_one_failing_trial_leaves_the_others(make_config, uri, runs_of, in_process, monkeypatch):
    config = make_config(space={"optimization.seed": {"grid": [0, 1, 2]}, "teacher": {"grid": ["t5-tiny"]}})
    monkeypatch.setenv("FAKE_TRAINER", '{"refuse": [1], "raise": [2]}')
    with pytest.raises(TrainingError, match="2 of 3 trials failed") as caught:
        run_sweep(config, trainer=TRAINER, runner=in_process)
    message = str(caught.value)
    assert "\n" not in message
    assert "t5-tiny α0.6 τ2 s1" in message and "the loss is not finite at step 3" in message
    assert "RuntimeError: a fault of ours" in message and "log.txt" in message
    assert not (config.output / "manifest.json").exists()
    statuses = [r["status"] for r in json.loads((config.output / "trials.json").read_text())]
    assert statuses == ["complete", "failed", "failed"]
    assert "Traceback" in logs_of(config)[enumerate_trials(config)[2].id]
    _, parents, children = runs_of(uri)
    assert parents[0].info.status == "FAILED"
    assert sorted(run.info.status for run in children.values()) == ["FAILED", "FAILED", "FINISHED"]

    monkeypatch.delenv("FAKE_TRAINER")
    run_sweep(config, trainer=TRAINER, runner=in_process)
    client, parents, children = runs_of(uri)
    assert {run.info.status for run in [*parents, *children.values()]} == {"FINISHED"}
    resumed = children[enumerate_trials(config)[2].id]
    assert [m.step for m in client.get_metric_history(resumed.info.run_id, "macro_f1")] == [1, 2, 3]
    assert "seed 2: from epoch 1" in logs_of(config)[enumerate_trials(config)[2].id]


def test_stop_ends_the_sweep_and_the_same_command_goes_on(make_config, uri, runs_of, in_process):
    config = make_config()
    stop = StopSignal()

    def stopping(config, trials, trainer, stop, follow):
        in_process(config, trials[:3], trainer, stop, follow)
        stop.requested = True
        in_process(config, trials[3:], trainer, stop, follow)

    with pytest.raises(Stopped, match="3 of 8 trials complete; run the same command again"):
        run_sweep(config, trainer=TRAINER, runner=stopping, stop=stop)
    assert runs_of(uri)[1][0].info.status == "KILLED"
    (config.output / ".stop-test").unlink()
    run_sweep(config, trainer=TRAINER, runner=in_process)
    _, parents, children = runs_of(uri)
    assert parents[0].info.status == "FINISHED" and len(children) == 8


def test_a_lost_trial_is_trained_again(make_config, in_process):
    config = make_config()
    run_sweep(config, trainer=TRAINER, runner=in_process)
    lost = enumerate_trials(config)[2]
    (lost.directory / "weights.bin").unlink()
    seen = []

    def runner(config, trials, trainer, stop, follow):
        seen.extend(trial.id for trial in trials)
        in_process(config, trials, trainer, stop, follow)

    run_sweep(config, trainer=TRAINER, runner=runner)
    assert seen == [lost.id]


def test_another_sweep_in_the_directory_is_refused(make_config, in_process):
    run_sweep(make_config(), trainer=TRAINER, runner=in_process)
    other = make_config(space={"teacher": {"grid": ["t5-tiny"]}})
    with pytest.raises(ArtifactError, match="over other settings"):
        run_sweep(other, trainer=TRAINER, runner=in_process)


def test_second_driver_is_refused(make_config, in_process):
    config = make_config()

    def runner(*arguments):
        with pytest.raises(ArtifactError, match="another driver"):
            run_sweep(config, trainer=TRAINER, runner=in_process)
        in_process(*arguments)

    run_sweep(config, trainer=TRAINER, runner=runner)


def test_mlflow_away_costs_no_metric(make_config, runs, uri, runs_of, in_process, capfd):
    config = make_config()
    database, aside = runs / "mlflow.db", runs / "aside.db"
    os.rename(database, aside)
    database.mkdir()  # SQLite cannot open a directory
    run_sweep(config, trainer=TRAINER, runner=in_process)
    printed = capfd.readouterr()
    assert printed.err.count("does not answer") == 1
    assert read_results(config.output)
    database.rmdir()
    os.rename(aside, database)
    run_sweep(config, trainer=TRAINER, runner=in_process)
    client, parents, children = runs_of(uri)
    assert len(parents) == 1 and len(children) == 8
    for run in children.values():
        assert [m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")] == [1, 2, 3]
