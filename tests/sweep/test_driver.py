"""A sweep by its driver: what it trains, skips, tracks and refuses, with a fake trainer and without Ray."""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from fake_trainer import train
from mlflow import MlflowClient

from kdecs.artifact import is_complete, read_manifest, verify_artifact
from kdecs.config import COMMITTED, load_config, write_config
from kdecs.corpus.reading import bundled_sample
from kdecs.corpus.schema import FINE_TO_COARSE
from kdecs.errors import ArtifactError, ConfigError, CorpusError, Stopped, TrainingError
from kdecs.process import StopSignal
from kdecs.sweep import driver
from kdecs.sweep.config import Dimension, SweepConfig
from kdecs.sweep.driver import refuse_equal_emotions, refuse_unequal_reaches, run_sweep, run_with_ray
from kdecs.sweep.search import Search
from kdecs.sweep.selection.record import rank_settings
from kdecs.sweep.space import Space, sweep_hash
from kdecs.sweep.status import read_results
from kdecs.sweep.teachers import build_commands
from kdecs.sweep.trial import OUT_OF_MEMORY, StageRun, TrialRun

# Two settings of two seeds, for tests that every trial costs some requests to MLflow.
FOUR_TRIALS = {
    "teacher": {"grid": ["t5-tiny"]},
    "distillation.alpha": {"grid": [0.3, 0.6]},
    "optimization.seed": {"grid": [0, 1]},
}


def logs_of(config):
    return {t.id: (t.directory / "log.txt").read_text() for t in Space(config).trials()}


def test_a_store_that_mlflow_has_retired_is_refused_before_anything_begins(make_config, in_process):
    config = make_config(tracking={"uri": "./mlruns"})
    with pytest.raises(ConfigError, match="retired"):
        run_sweep(config, trainer=train, runner=in_process)
    assert not config.output.exists()


def test_sweep_trains_tracks_and_completes(make_config, uri, runs_of, in_process, capfd):
    config = make_config()
    output = run_sweep(config, trainer=train, runner=in_process)
    trials = Space(config).trials()
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
        setting = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert setting.info.run_name == trial.setting_label
        assert setting.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["kdecs.teacher"] == trial.teacher
        assert {"kdecs.corpus", "kdecs.version"} <= set(run.data.tags)
        assert run.data.params["alpha"] == str(trial.config.distillation.alpha)
        assert [m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")] == [1, 2, 3]
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert names == {"config.json", "environment.json"}
        assert run.data.metrics["system/trial_memory_usage_megabytes"] > 10
        assert run.data.tags["kdecs.sweep_name"] == "small" and run.data.tags["kdecs.state"] == "complete"
        points = [json.loads(line) for line in (trial.directory / "metrics.jsonl").read_text().splitlines()]
        stamps = [m.timestamp for m in client.get_metric_history(run.info.run_id, "train_loss")]
        assert stamps == [round(1000 * point["time"]) for point in points]
    printed = capfd.readouterr().out
    assert "8 trials, 0 complete, 8 to train" in printed
    assert "best on validation llama-tiny α0.6 τ2 s1" in printed


def test_second_start_skips_and_makes_no_run(make_config, uri, runs_of, in_process, capfd):
    config = make_config(space=FOUR_TRIALS)
    run_sweep(config, trainer=train, runner=in_process)
    before = {t.id: (t.directory / "manifest.json").stat().st_mtime_ns for t in Space(config).trials()}
    capfd.readouterr()
    run_sweep(config, trainer=train, runner=in_process)
    assert "complete, skipped" in capfd.readouterr().out
    assert before == {
        t.id: (t.directory / "manifest.json").stat().st_mtime_ns for t in Space(config).trials()
    }
    _, parents, children = runs_of(uri)
    assert len(parents) == 1 and len(children) == 4


def test_one_failing_trial_leaves_the_others(make_config, uri, runs_of, in_process, monkeypatch):
    config = make_config(space={"optimization.seed": {"grid": [0, 1, 2]}, "teacher": {"grid": ["t5-tiny"]}})
    monkeypatch.setenv("FAKE_TRAINER", '{"refuse": [1], "raise": [2]}')
    with pytest.raises(TrainingError, match="2 of 3 trials failed") as caught:
        run_sweep(config, trainer=train, runner=in_process)
    message = str(caught.value)
    assert "\n" not in message
    assert "t5-tiny α0.6 τ2 s1" in message and "the loss is not finite at step 3" in message
    assert "RuntimeError: a fault of ours" in message and "log.txt" in message
    assert not (config.output / "manifest.json").exists()
    statuses = [r["status"] for r in json.loads((config.output / "trials.json").read_text())]
    assert statuses == ["complete", "failed", "failed"]
    assert "Traceback" in logs_of(config)[Space(config).trials()[2].id]
    _, parents, children = runs_of(uri)
    assert parents[0].info.status == "FAILED"
    assert sorted(run.info.status for run in children.values()) == ["FAILED", "FAILED", "FINISHED"]

    monkeypatch.delenv("FAKE_TRAINER")
    run_sweep(config, trainer=train, runner=in_process)
    client, parents, children = runs_of(uri)
    assert {run.info.status for run in [*parents, *children.values()]} == {"FINISHED"}
    resumed = children[Space(config).trials()[2].id]
    assert [m.step for m in client.get_metric_history(resumed.info.run_id, "macro_f1")] == [1, 2, 3]
    assert "seed 2: from epoch 1" in logs_of(config)[Space(config).trials()[2].id]


def test_stop_ends_the_sweep_and_the_same_command_goes_on(make_config, uri, runs_of, in_process):
    config = make_config(space=FOUR_TRIALS)
    stop = StopSignal()

    def stopping(stage, stop, follow):
        in_process(stage.model_copy(update={"trials": stage.trials[:3]}), stop, follow)
        stop.requested = True
        in_process(stage.model_copy(update={"trials": stage.trials[3:]}), stop, follow)

    with pytest.raises(Stopped, match="3 of 4 trials complete; run the same command again"):
        run_sweep(config, trainer=train, runner=stopping, stop=stop)
    assert runs_of(uri)[1][0].info.status == "KILLED"
    run_sweep(config, trainer=train, runner=in_process)
    _, parents, children = runs_of(uri)
    assert parents[0].info.status == "FINISHED" and len(children) == 4


def test_a_lost_trial_is_trained_again(make_config, in_process):
    config = make_config(space=FOUR_TRIALS)
    run_sweep(config, trainer=train, runner=in_process)
    lost = Space(config).trials()[2]
    (lost.directory / "weights.bin").unlink()
    seen = []

    def runner(stage, stop, follow):
        seen.extend(stage.trials)
        in_process(stage, stop, follow)

    run_sweep(config, trainer=train, runner=runner)
    assert seen == [lost.id]


def test_another_sweep_in_the_directory_is_refused(make_config, in_process):
    run_sweep(make_config(), trainer=train, runner=in_process)
    other = make_config(space={"teacher": {"grid": ["t5-tiny"]}})
    with pytest.raises(ArtifactError, match="a finished sweep directory of another config"):
        run_sweep(other, trainer=train, runner=in_process)


def test_second_driver_is_refused(make_config, in_process):
    config = make_config(space=FOUR_TRIALS)

    def runner(*arguments):
        with pytest.raises(ArtifactError, match="another driver"):
            run_sweep(config, trainer=train, runner=in_process)
        in_process(*arguments)

    run_sweep(config, trainer=train, runner=runner)


def test_mlflow_away_costs_no_metric(make_config, runs, uri, runs_of, in_process, capfd):
    config = make_config(space=FOUR_TRIALS)
    database, aside = runs / "mlflow.db", runs / "aside.db"
    os.rename(database, aside)
    database.mkdir()  # SQLite cannot open a directory
    run_sweep(config, trainer=train, runner=in_process)
    printed = capfd.readouterr()
    assert printed.err.count("does not answer") == 1
    assert read_results(config.output)
    database.rmdir()
    os.rename(aside, database)
    run_sweep(config, trainer=train, runner=in_process)
    client, parents, children = runs_of(uri)
    assert len(parents) == 1 and len(children) == 4
    for run in children.values():
        assert [m.step for m in client.get_metric_history(run.info.run_id, "macro_f1")] == [1, 2, 3]


def test_no_credential_is_written_anywhere(make_config, runs, uri, in_process, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:topsecret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "topsecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    run_sweep(make_config(), trainer=train, runner=in_process)
    printed = capfd.readouterr()
    assert "topsecret" not in printed.out + printed.err
    assert "http://…@127.0.0.1:9" in printed.out
    files = [path for path in runs.rglob("*") if path.is_file()]
    assert {"environment.json", "config.json", "system.jsonl", "log.txt"} <= {path.name for path in files}
    assert not [path for path in files if b"topsecret" in path.read_bytes()]


def test_finished_students_are_taken_from_other_sweeps(make_config, uri, in_process, capfd):
    first = make_config(space=FOUR_TRIALS)
    run_sweep(first, trainer=train, runner=in_process)
    wider = {**first.space, "optimization.seed": Dimension(grid=(0, 1, 2))}
    second = first.model_copy(
        update={"name": "second", "output": first.output.parent / "second", "space": wider}
    )
    capfd.readouterr()
    run_sweep(second, trainer=train, runner=in_process)
    printed = capfd.readouterr().out
    assert printed.count("taken from") == 4
    results = read_results(second.output)
    assert [bool(r.reused_from) for r in results] == [r.seed < 2 for r in results]
    trained = {r.id: r for r in read_results(first.output)}
    for result in results:
        assert verify_artifact(second.output / result.directory) == []
        if result.reused_from:
            assert (
                result.metrics == trained[result.id].metrics and result.seconds == trained[result.id].seconds
            )
            ours = second.output / result.directory / "weights.bin"
            assert ours.stat().st_ino == (first.output / result.directory / "weights.bin").stat().st_ino
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("kdecs").experiment_id], max_results=1000)
    parents = Counter(run.data.tags.get("mlflow.parentRunId") for run in runs)
    assert sorted(parents.values()) == [2, *[2] * 4, 3, 3], "two sweeps, their settings, and their seeds"


def test_students_are_trained_again_on_request_or_when_the_other_sweep_is_gone(make_config, in_process):
    first = make_config(space=FOUR_TRIALS)
    run_sweep(first, trainer=train, runner=in_process)
    asked = first.model_copy(update={"output": first.output.parent / "asked", "reuse_students": False})
    run_sweep(asked, trainer=train, runner=in_process)
    assert not any(r.reused_from for r in read_results(asked.output))
    shutil.rmtree(first.output)
    third = first.model_copy(update={"output": first.output.parent / "third"})
    run_sweep(third, trainer=train, runner=in_process)
    assert not any(r.reused_from for r in read_results(third.output)), "links that lead nowhere are ignored"
    fourth = first.model_copy(update={"output": first.output.parent / "fourth"})
    run_sweep(fourth, trainer=train, runner=in_process)
    assert all(r.reused_from for r in read_results(fourth.output)), "and replaced by who trains next"


def test_missing_teachers_are_built_by_their_scripts(
    make_config, make_labels, runs, in_process, monkeypatch, capfd
):
    labels = runs / "later"
    teachers = {"later": {"labels": str(labels), "export": {"config": "x.yaml", "set": {"num_shards": 2}}}}
    config = make_config(teachers=teachers, space={"teacher": {"grid": ["later"]}})
    script = runs / "export.py"
    script.write_text(
        "import sys\nprint(sys.argv)\nfrom pathlib import Path\nfrom kdecs.artifact import write_manifest\n"
        f"folder = Path({str(labels)!r})\nfolder.mkdir()\n"
        "write_manifest(folder, 'soft-labels', config_hash='0' * 64, inputs={}, files=[])\n"
    )
    with pytest.raises(ArtifactError, match=r"soft labels of 1 teachers are missing: later .*--build"):
        run_sweep(config, trainer=train, runner=in_process)
    unknown = make_config(
        teachers=teachers, space={"teacher": {"grid": ["later"]}, "model.width": {"grid": [1]}}
    )
    with pytest.raises(ConfigError, match=r"model\.width: unknown key"):  # and not after hours of --build
        run_sweep(unknown, trainer=train, runner=in_process, build=True)
    assert not config.output.exists(), "what is refused leaves nothing behind"
    [(stage, command)] = build_commands(config, "later")
    assert stage == "export" and command[1:3] == ["-m", "kdecs.launch.export_soft_labels"]
    assert command[-4:] == ["--set", f"output={labels}", "--set", "num_shards=2"]
    assert f"corpus.test={bundled_sample('test')}" in command, "what the students read is labelled"
    space = load_config(SweepConfig, COMMITTED / "spaces" / "coarse_to_fine.yaml")
    (_, train_command), (_, export_command) = build_commands(space, "llama-7b")
    assert "corpus.train=data/dailydialog_train.json" in train_command, (
        "the teacher learns from the coarse corpus"
    )
    assert "corpus.train=data/fg_reccon/train.json" in export_command
    control = {"labels": str(labels), "control": {"kind": "oracle", "wrong_share": 0.25}}
    [(stage_of_control, command)] = build_commands(make_config(teachers={"later": control}), "later")
    assert stage_of_control == "control" and command[3:6] == ["soft-labels", "control", "oracle"]
    assert command[command.index("--wrong") + 1] == "0.25"
    assert f"train={bundled_sample('train')}" in command and f"test={bundled_sample('test')}" not in command
    with pytest.raises(ConfigError, match="control: found beside train or export"):
        make_config(teachers={"later": control | {"export": {"config": "x.yaml"}}})
    monkeypatch.setattr(
        "kdecs.sweep.teachers.build_commands", lambda *a: [(stage, [sys.executable, str(script)])]
    )
    run_sweep(config, trainer=train, runner=in_process, build=True)
    assert "export of teacher later, log:" in capfd.readouterr().out
    assert "export.py" in (config.output / "build" / "later-export.log").read_text()
    script.write_text("import sys\nsys.exit('kdecs: error: no such teacher')\n")
    shutil.rmtree(labels)
    with pytest.raises(
        ArtifactError, match="export of teacher later failed with exit code 1: no such teacher"
    ):
        run_sweep(config, trainer=train, runner=in_process, build=True)


def test_search_gives_all_seeds_to_the_survivors_alone(make_config, in_process, capfd):
    space = {
        "teacher": {"grid": ["llama-tiny", "t5-tiny"]},
        "distillation.alpha": {"grid": [0.1, 0.3, 0.6]},
        "optimization.seed": {"grid": [0, 1, 2]},
    }
    config = make_config(space=space, search={"method": "two-stage", "survivors": 2})
    output = run_sweep(config, trainer=train, runner=in_process)
    assert "search over 6 trials is done, 2 settings are trained with all seeds" in capfd.readouterr().out
    results = read_results(output)
    assert len(results) == 6 + 2 * 2, "the search's seed serves both stages"
    ranked = rank_settings(results)
    assert [s.label for s in ranked] == ["llama-tiny α0.6 τ2", "llama-tiny α0.3 τ2"]
    assert [s.num_seeds for s in ranked] == [3, 3]
    capfd.readouterr()
    run_sweep(config, trainer=train, runner=in_process)
    assert "complete, skipped" in capfd.readouterr().out


def test_a_search_ranks_by_the_metric_of_its_task_before_any_trial_is_known(make_config):
    pytest.importorskip("optuna")
    config = make_config(
        student={**make_config().student, "task": "ecpe"},
        teachers={},
        space={"distillation.mode": {"grid": ["joint"]}, "distillation.alpha": {"uniform": [0.1, 0.9]}},
        search={"method": "tpe", "num_trials": 2},
    )

    def runner(stage, stop, follow):
        assert stage.metric == "utterance_macro_f1" and not stage.trials
        raise TrainingError("seen")

    with pytest.raises(TrainingError, match="seen"):
        run_sweep(config, trainer=train, runner=runner)


def test_a_failure_in_the_search_is_listed_and_ends_nothing(make_config, in_process, monkeypatch, capfd):
    space = {
        "teacher": {"grid": ["t5-tiny"]},
        "distillation.alpha": {"grid": [0.3, 0.6]},
        "optimization.seed": {"grid": [1, 2]},
    }
    monkeypatch.setenv("FAKE_TRAINER", '{"refuse_alpha": 0.3}')
    config = make_config(space=space, search={"method": "two-stage", "survivors": 1})
    results = read_results(run_sweep(config, trainer=train, runner=in_process))
    assert sorted(r.status for r in results) == ["complete", "complete", "failed"]
    assert "in the search t5-tiny α0.3 τ2 s1 failed" in capfd.readouterr().out


# How the driver takes the end of its Ray process. A script stands in for it; no Ray is started.

RAY_SCRIPT = """
import json, os, pathlib, sys
stage = pathlib.Path(sys.argv[-1])
starts = stage.with_name("starts")
environment = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
stage.with_name("environment.json").write_text(json.dumps(environment))
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
code, epochs = json.loads(stage.with_name("script.json").read_text())[number]
with (stage.parent / "trials" / "a" / "metrics.jsonl").open("a") as metrics:
    for epoch in range(epochs):
        # A generative baseline's lines between validations are no progress.
        for line in ({"epoch": epoch, "time": 0}, {"epoch": epoch, "time": 0, "macro_f1": 50}):
            metrics.write(json.dumps(line) + chr(10))
    metrics.write(json.dumps({"epoch": epochs, "time": 0}) + chr(10))
print("the last line")
sys.exit(code)
"""


@pytest.fixture
def run_script(make_config, tmp_path, monkeypatch):
    """A function of the exit code and epochs of each start: runs a stage, returns how often Ray was started."""
    config = make_config()
    (config.output / "trials" / "a").mkdir(parents=True)
    write_config(config, config.output)
    script = tmp_path / "script.py"
    script.write_text(RAY_SCRIPT)
    monkeypatch.setattr(driver, "_RAY_COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(driver, "_POLL_S", 0.05)
    run = TrialRun(stop_file=config.output / ".stop-1-2", store=tmp_path / "students")
    stage = StageRun(sweep=config.output, run=run, trials=("a",), driver=os.getpid())

    def run_stage(*ends):
        (config.output / "script.json").write_text(json.dumps(ends))
        try:
            run_with_ray(stage, StopSignal(), lambda: None)
        finally:
            starts.append(len((config.output / "starts").read_text()))

    starts = []
    return run_stage, starts


def test_a_sweep_out_of_memory_resumes_while_trials_get_further(run_script, capsys):
    run, starts = run_script
    run((OUT_OF_MEMORY, 2), (OUT_OF_MEMORY, 1), (0, 0))
    assert starts == [3]
    assert capsys.readouterr().out.count("resume from their checkpoints") == 2


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([(OUT_OF_MEMORY, 1), (OUT_OF_MEMORY, 0)], "lower max_concurrent_trials"),
        ([(1, 3)], "exit code 1: the last line"),
    ],
)
def test_ray_that_gets_nowhere_or_fails_ends_in_one_line(run_script, ends, message):
    run, starts = run_script
    with pytest.raises(TrainingError, match=message) as caught:
        run(*ends)
    assert starts == [len(ends)] and "\n" not in str(caught.value)


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_ray_of_its_own_asks_for_a_token_and_a_joined_one_keeps_the_users_settings(
    run_script, make_config, monkeypatch, address
):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the cluster's")
    run, _ = run_script
    config = make_config(ray_address=address)
    write_config(config, config.output)
    run((0, 0))
    found = json.loads((config.output / "environment.json").read_text())
    assert found["RAY_AUTH_MODE"] == ("disabled" if address else "token")
    assert found.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == (None if address else "0")
    assert found["RAY_AUTH_TOKEN"] == "the cluster's" and found["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_stage_is_read_as_it_was_written(tmp_path):
    run = TrialRun(stop_file=Path("/x/.stop"), store=Path("/x/students"), trainer=train, max_failures=3)
    stage = StageRun(sweep=Path("/x"), run=run, trials=("a",), settled=("b",), driver=1234)
    stage.write(tmp_path / "stage.json")
    assert StageRun.read(tmp_path / "stage.json") == stage


def test_a_sweep_that_could_only_score_0_is_refused_before_it_begins(make_config, in_process, tmp_path):
    raw = json.loads(bundled_sample("valid").read_text())
    for nested in raw.values():
        for utterance in nested[0]:
            for key in [key for key in utterance if key.startswith("expanded")]:
                utterance[key.replace(" ", "_")] = utterance.pop(key)
    valid = tmp_path / "misspelt.json"
    valid.write_text(json.dumps(raw))
    student = make_config().student
    config = make_config(student={**student, "corpus": {**student["corpus"], "valid": str(valid)}})
    with pytest.raises(CorpusError, match=r"misspelt\.json: no cause to learn from or to validate on"):
        run_sweep(config, trainer=train, runner=in_process)
    assert not config.output.exists()


def test_students_that_look_ahead_differently_far_are_not_ranked_together(make_config, in_process):
    teachers = {"llama-tiny": str(make_config().teachers["llama-tiny"].labels)}
    space = {"candidates.after": {"grid": [0, 1]}}
    for search in ({"method": "grid"}, {"method": "tpe", "num_trials": 4, "grace_epochs": None}):
        drawn = {"candidates.after": {"choice": [0, 1]}} if search["method"] == "tpe" else space
        config = make_config(space=drawn, teachers=teachers, search=search)
        with pytest.raises(ConfigError, match=r"candidates.after: found 0, 1 in one sweep") as caught:
            run_sweep(config, trainer=train, runner=in_process)
        assert "\n" not in str(caught.value) and not config.output.exists()
    refuse_unequal_reaches(Search(make_config(space={"candidates.after": {"grid": [1]}}, teachers=teachers)))


def test_given_emotions_need_a_corpus_in_which_fine_and_coarse_differ(make_config, runs):
    """On coarse labels Table 6 would train the same students twice."""
    coarse = {}
    for split in ("train", "valid"):
        dialogues = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        for utterances in dialogues.values():
            for utterance in utterances[0]:
                utterance["emotion"] = FINE_TO_COARSE[utterance["emotion"]]
        coarse[split] = runs / f"{split}.json"
        coarse[split].write_text(json.dumps(dialogues), encoding="utf-8")
    variants = {name: {"model.given_emotions": name} for name in ("none", "fine", "coarse")}
    space = {"variant": {"grid": list(variants)}}
    teachers = {"llama-tiny": str(make_config().teachers["llama-tiny"].labels)}
    plain = make_config(variants=variants, space=space, teachers=teachers)
    student = {**plain.student, "corpus": {name: str(path) for name, path in coarse.items()}}
    refused = make_config(variants=variants, space=space, teachers=teachers, student=student)
    with pytest.raises(
        CorpusError, match=r"train\.json: no emotion that a coarse one would replace"
    ) as caught:
        run_sweep(refused, trainer=train, runner=run_with_ray)
    assert "\n" not in str(caught.value) and not refused.output.exists()
    refuse_equal_emotions(Search(plain))
    some = {"variant": {"grid": ["none", "coarse"]}}
    refuse_equal_emotions(
        Search(make_config(variants=variants, space=some, teachers=teachers, student=student))
    )
