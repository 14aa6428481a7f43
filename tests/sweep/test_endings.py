"""How a sweep's driver ends: recorded whatever ends it, and made whole by the same command."""

import json
import shutil

import pytest
from fake_trainer import train

from kdecs.artifact import read_manifest, write_manifest
from kdecs.errors import ArtifactError, Stopped, TrainingError
from kdecs.process import StopSignal
from kdecs.sweep.commands import write_report_of
from kdecs.sweep.config import TeacherSource
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.report.page import write_report
from kdecs.sweep.selection.choose import select_student
from kdecs.sweep.selection.record import read_selection
from kdecs.sweep.space import trials_directory
from kdecs.sweep.status import TrialNote
from kdecs.tracking.mlflow import Tracker

pytestmark = pytest.mark.usefixtures("_coarse_figures")
TWO_TRIALS = {"optimization.seed": {"grid": [0, 1]}, "teacher": {"grid": ["t5-tiny"]}}


@pytest.fixture
def two_trials(make_config):
    """The config of a sweep of two trials."""
    return make_config(space=TWO_TRIALS)


def test_a_teacher_that_is_not_tried_need_not_be_there(two_trials, runs, in_process):
    absent = TeacherSource(labels=runs / "absent")
    config = two_trials.model_copy(update={"teachers": {**two_trials.teachers, "absent": absent}})
    manifest = json.loads((run_sweep(config, trainer=train, runner=in_process) / "manifest.json").read_text())
    assert {name for name in manifest["inputs"] if name.startswith("labels")} == {"labels.t5-tiny"}


def test_the_end_is_recorded_where_ray_dies(two_trials, uri, runs_of, in_process):
    def runner(stage, stop, follow):
        in_process(stage.model_copy(update={"trials": stage.trials[:1]}), stop, follow)
        raise TrainingError("Ray ended with exit code 1")

    with pytest.raises(TrainingError, match="Ray ended"):
        run_sweep(two_trials, trainer=train, runner=runner)
    trials = json.loads((two_trials.output / "trials.json").read_text())
    assert [trial["status"] for trial in trials] == ["complete", "waiting"]
    _, [parent], children = runs_of(uri)
    assert parent.info.status == "FAILED"
    assert [run.info.status for run in children.values()] == ["FINISHED"]


def test_a_trial_that_waits_for_room_when_the_sweep_is_stopped_has_not_failed(two_trials, in_process, capfd):
    stop = StopSignal()

    def runner(stage, stop, follow):
        in_process(stage.model_copy(update={"trials": stage.trials[:1]}), stop, follow)
        # The node that trained it is lost, and the others have no room yet.
        TrialNote(started=1.0, attempts=1).write(trials_directory(stage.sweep) / stage.trials[1])
        follow()
        stop.requested = True

    with pytest.raises(Stopped, match="1 of 2 trials complete"):
        run_sweep(two_trials, trainer=train, runner=runner, stop=stop)
    trials = json.loads((two_trials.output / "trials.json").read_text())
    assert [(trial["status"], trial["error"]) for trial in trials] == [("complete", None), ("stopped", None)]
    assert "failed" not in capfd.readouterr().out
    run_sweep(two_trials, trainer=train, runner=in_process)


def test_what_mlflow_lacks_is_reported_and_uploaded_by_the_same_command(
    two_trials, uri, runs_of, in_process, capfd
):
    with pytest.MonkeyPatch.context() as away:
        away.setattr(Tracker, "sync", lambda *arguments, **values: False)
        run_sweep(two_trials, trainer=train, runner=in_process)
    assert capfd.readouterr().out.count("Run the same command again to upload the rest.") == 1
    run_sweep(two_trials, trainer=train, runner=in_process)
    assert "could not upload" not in capfd.readouterr().out
    _, [parent], children = runs_of(uri)
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"} and len(children) == 2


def test_a_kill_before_the_report_and_the_last_upload_is_made_good(
    make_config, uri, runs_of, in_process, monkeypatch
):
    config = make_config(space=TWO_TRIALS, report=True)

    def killed(*arguments, **values):
        raise KeyboardInterrupt

    with monkeypatch.context() as kill:
        kill.setattr("kdecs.sweep.driver.write_report_of", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config, trainer=train, runner=in_process)
    assert (config.output / "manifest.json").exists() and not (config.output / "report").exists()
    run_sweep(config, trainer=train, runner=in_process)
    assert (config.output / "report" / "manifest.json").exists()
    client, [parent], _ = runs_of(uri)
    figures = {artifact.path for artifact in client.list_artifacts(parent.info.run_id, "report")}
    assert "report/leaderboard.png" in figures
    written = (config.output / "report" / "manifest.json").stat().st_mtime_ns
    run_sweep(config, trainer=train, runner=in_process)
    assert (config.output / "report" / "manifest.json").stat().st_mtime_ns == written, (
        "there is nothing left to do"
    )


def test_a_selection_of_an_earlier_state_does_not_stop_the_report(make_config, finish, in_process):
    sweep = finish(space=TWO_TRIALS)
    select_student(sweep)
    assert read_selection(sweep) is not None
    (sweep / "manifest.json").unlink()
    shutil.rmtree(sweep / "report", ignore_errors=True)
    wider = {**TWO_TRIALS, "optimization.seed": {"grid": [0, 1, 2]}}
    run_sweep(make_config(space=wider, report=True), trainer=train, runner=in_process)
    page = (sweep / "report" / "index.html").read_text()
    assert "Opened for an earlier state of this sweep" in page and "Not opened yet" not in page
    assert read_selection(sweep) is None


@pytest.mark.parametrize(
    "space",
    [
        {"optimization.seed": {"grid": [0]}, "teacher": {"grid": ["t5-tiny"]}},
        {"optimization.seed": {"grid": [0, 1]}, "distillation.mode": {"grid": ["joint"]}},
        {"optimization.seed": {"grid": [0]}, "distillation.mode": {"grid": ["kd", "joint"]}},
    ],
)
def test_small_sweeps_have_reports(finish, make_config, space):
    teachers = {"t5-tiny": make_config().teachers["t5-tiny"].model_dump(mode="json")}
    sweep = finish(space=space, teachers=teachers)
    assert "Every trial" in write_report(sweep).read_text()
    select_student(sweep)
    assert "Opened" in write_report(sweep).read_text() or "opened once" in write_report(sweep).read_text()


def test_settings_with_one_label_are_kept_apart(finish):
    alphas = [0.3000001, 0.3000002]
    sweep = finish(space={**TWO_TRIALS, "distillation.alpha": {"grid": alphas}})
    path = sweep / "trials.json"  # as earlier versions named them
    trials = json.loads(path.read_text())
    for trial in trials:
        trial["label"] = f"t5-tiny α0.3 τ2 s{trial['seed']}"
    path.write_text(json.dumps(trials))
    manifest = read_manifest(sweep, "sweep")
    files = [entry.path for entry in manifest.files]
    write_manifest(sweep, "sweep", config_hash=manifest.config_hash, inputs=manifest.inputs, files=files)
    write_report(sweep)
    rows = (sweep / "report" / "leaderboard.csv").read_text().splitlines()
    assert len({row.partition(",")[2] for row in rows[1:3]}) == 2
    record = select_student(sweep)
    assert len(record.settings) == 2 and record.runner_up is not None


def test_a_report_of_a_sweep_whose_trials_failed(finish, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINER", '{"refuse_alpha": 0.3}')
    space = {**TWO_TRIALS, "distillation.alpha": {"grid": [0.3, 0.6]}}
    sweep = finish(space=space, search={"method": "two-stage", "survivors": 1})
    page = write_report_of(sweep).read_text()
    assert "Not trained to the end" in page and "the loss is not finite" in page
    (sweep / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        write_report_of(sweep)
