"""What people ask of a sweep: trials that stop, go on, are left out, settings that join; without Ray."""

import json

import pytest
from fake_trainer import train

from kdecs.artifact import read_manifest
from kdecs.config import load_config, write_config
from kdecs.errors import ArtifactError, ConfigError, KdecsError, Stopped, TrainingError
from kdecs.process import StopSignal
from kdecs.sweep import commands
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.control import Control, read_control, wanted_of
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.progress import print_dry_run
from kdecs.sweep.search import Search
from kdecs.sweep.selection.record import rank_settings
from kdecs.sweep.space import Space
from kdecs.sweep.status import read_note, read_results
from kdecs.sweep.trial import TrialRun, run_trial

FOUR = {"distillation.alpha": {"grid": [0.3, 0.6]}, "teacher": {"grid": ["t5-tiny"]}}
FOUR = {**FOUR, "optimization.seed": {"grid": [0, 1]}}


@pytest.fixture
def four(make_config):
    """The config of a sweep of two settings with two seeds, as its driver has written it."""
    config = make_config(space=FOUR)
    config.output.mkdir()
    write_config(config, config.output)
    return config


def statuses(config):
    return {t["label"]: t["status"] for t in json.loads((config.output / "trials.json").read_text())}


def acting(in_process, actions):
    """A runner that does something before the trials with these numbers."""

    def run(stage, stop, follow):
        for number, identity in enumerate(stage.trials):
            actions.pop(number, lambda: None)()
            in_process(stage.model_copy(update={"trials": (identity,)}), stop, follow)
        actions.pop("end", lambda: None)()

    return run


def test_every_kind_of_name_finds_its_trials(four, capsys):
    trials = Space(four).trials()
    names = {
        "t5-tiny α0.3 τ2 s0": trials[:1],
        trials[1].id: trials[1:2],
        trials[1].id[:8]: trials[1:2],
        "t5-tiny-a0.3-t2-s1": trials[1:2],
        "t5-tiny α0.6 τ2": trials[2:],
        "t5-tiny-a0.6-t2": trials[2:],
        json.dumps(trials[2].settings, sort_keys=True): trials[2:],
    }
    for name, expected in names.items():
        commands.drop(four.output, [name])
        assert read_control(four.output).trials == {trial.id: "drop" for trial in expected}, name
        commands.resume(four.output, [name, expected[0].id])
        assert read_control(four.output) == Control()
    out = capsys.readouterr().out
    assert f"t5-tiny α0.3 τ2 s0 ({trials[0].id}): dropped at epoch 0 of 3, left out" in out
    assert "goes on from epoch 0 of 3" in out and "follows within seconds" in out


def test_names_of_nothing_or_several_are_refused_in_one_line(four, monkeypatch):
    trials = Space(four).trials()
    with pytest.raises(
        ArtifactError, match=r"^t6 s0: no trial has this id .*t5-tiny α0.3 τ2; t5-tiny α0.6"
    ) as caught:
        commands.stop(four.output, ["t6 s0"])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(commands, "_SHORTEST_ID", 0)  # no two of four ids begin with the same four digits
    digits = next(d for d in "0123456789abcdef" if sum(t.id.startswith(d) for t in trials) > 1)
    with pytest.raises(ArtifactError, match=r"trials have such an id: .*; write more of it"):
        commands.stop(four.output, [digits])
    assert read_control(four.output) == Control()


def test_a_stopped_trial_keeps_its_state_until_it_is_resumed(four, in_process, monkeypatch, capfd):
    """Asked while it trains; the others are trained, the sweep is not complete, and the same command goes on."""
    first = Space(four).trials()[0]
    monkeypatch.setenv("FAKE_TRAINER", '{"epoch_s": 0.01}')
    epochs = []

    def stopping(config, on_epoch, stop):
        def on_each(metrics):
            on_epoch(metrics)
            if config.output == first.directory and not epochs:
                epochs.append(metrics["epoch"])
                commands.stop(four.output, [first.label])
                stop.requested = wanted_of(config.output) is not None  # as its watching thread does

        return train(config, on_each, stop)

    with pytest.raises(
        TrainingError, match=f"not complete; stopped by hand: {first.label}; resume or drop"
    ) as caught:
        run_sweep(four, trainer=stopping, runner=in_process)
    assert "\n" not in str(caught.value)
    assert [*statuses(four).values()] == ["held", "complete", "complete", "complete"]
    note = read_note(first.directory)
    assert (note.status, note.epoch, note.stalled) == ("stopped", 1, 0)
    out = capfd.readouterr().out
    assert f"{first.label}: stopped by hand after 1 of 3 epochs" in out
    print_dry_run(four)
    assert "4 trials, 3 complete, 0 to train, 1 kept out by hand" in capfd.readouterr().out

    commands.resume(four.output, [first.id])
    run_sweep(four, trainer=train, runner=in_process)
    assert {*statuses(four).values()} == {"complete"}
    assert "seed 0: from epoch 1" in (first.directory / "log.txt").read_text()
    with pytest.raises(
        ArtifactError, match=r"this sweep is complete; to change it, remove its manifest\.json"
    ):
        commands.drop(four.output, [first.id])


def test_what_is_resumed_or_added_meanwhile_is_trained_by_the_same_start(four, in_process, capfd):
    first = Space(four).trials()[0]
    commands.stop(four.output, ["t5-tiny α0.3 τ2"])
    actions = {
        0: lambda: commands.resume(four.output, [first.label]),
        "end": lambda: commands.add(four.output, ["distillation.alpha=0.9"]),
    }
    with pytest.raises(TrainingError, match=r"stopped by hand: t5-tiny α0.3 τ2 s1;"):
        run_sweep(four, trainer=train, runner=acting(in_process, actions))
    found = statuses(four)
    assert found == {
        "t5-tiny α0.3 τ2 s0": "complete",
        "t5-tiny α0.3 τ2 s1": "held",
        "t5-tiny α0.6 τ2 s0": "complete",
        "t5-tiny α0.6 τ2 s1": "complete",
        "t5-tiny α0.9 τ2 s0": "complete",
        "t5-tiny α0.9 τ2 s1": "complete",
    }
    out = capfd.readouterr().out
    assert f"joining the queue: {first.label}\n" in out and f"{first.label}: resumed" in out
    commands.drop(four.output, ["t5-tiny α0.3 τ2"])
    run_sweep(four, trainer=train, runner=in_process)
    out = capfd.readouterr().out
    assert "4 trials complete (2 more were dropped)" in out
    results = read_results(four.output)
    assert [s.label for s in rank_settings(results)] == ["t5-tiny α0.6 τ2", "t5-tiny α0.9 τ2"]
    manifest = read_manifest(four.output, "sweep")
    assert "control.json" in {entry.path for entry in manifest.files}
    run_sweep(four, trainer=train, runner=in_process)
    assert "complete, skipped" in capfd.readouterr().out, "a later start knows what was asked"


def test_a_drop_while_the_last_trial_trains_is_in_the_sweep_that_completes(four, in_process):
    trials = Space(four).trials()
    actions = {"end": lambda: commands.drop(four.output, [trials[0].label])}
    run_sweep(four, trainer=train, runner=acting(in_process, actions))
    assert [r.status for r in read_results(four.output)] == ["dropped", "complete", "complete", "complete"]
    assert read_manifest(four.output, "sweep").config_hash != Search(four, control=Control()).digest()


def test_a_sweep_of_which_everything_was_dropped_says_so(four, in_process):
    commands.drop(four.output, ["t5-tiny α0.3 τ2", "t5-tiny α0.6 τ2"])
    with pytest.raises(
        TrainingError, match="every trial was dropped, so there is nothing to compare; resume"
    ):
        run_sweep(four, trainer=train, runner=in_process)


def test_what_cannot_be_stopped_is_refused_and_what_is_so_already_is_not(four, in_process, capsys):
    trials = Space(four).trials()
    stop = StopSignal()
    actions = {2: lambda: setattr(stop, "requested", True)}
    with pytest.raises(Stopped):
        run_sweep(four, trainer=train, runner=acting(in_process, actions), stop=stop)
    with pytest.raises(
        ArtifactError, match=r"s0 \(.*\) is complete; leave it out .* \(and 1 more likewise\)"
    ):
        commands.stop(four.output, ["t5-tiny α0.3 τ2"])
    commands.stop(four.output, ["t5-tiny α0.3 τ2", "t5-tiny α0.6 τ2 s0"])
    assert read_control(four.output).trials == {trials[2].id: "stop"}, "two are complete"
    commands.drop(four.output, [trials[0].id])
    with pytest.raises(ArtifactError, match="is dropped; take it back with kdecs sweep resume"):
        commands.stop(four.output, [trials[0].id])
    capsys.readouterr()
    commands.stop(four.output, [trials[2].id])
    commands.drop(four.output, [trials[0].id])
    commands.resume(four.output, [trials[3].id])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "stopped already",
        "dropped already",
        "neither stopped nor dropped already",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["distillation.alpha"], "expected KEY=VALUE"),
        ([], "distillation.alpha: expected a value for each key"),
        (["distillation.alpha=2"], "distillation.alpha"),
        (["distillation.alpha=0.3"], "t5-tiny α0.3 τ2: the sweep has this setting already$"),
        (["distillation.alpha=0.9", "optimization.seed=3"], "leave the seed out"),
        (
            ["distillation.alpha=0.9", "teacher=llama-7b"],
            r"teacher: found 'llama-7b', expected a key of teachers",
        ),
        (["distillation.alpha=0.9", "distillation.alhpa=0.9"], "alhpa"),
        (
            ["distillation.alpha=0.95"],
            "the constraints of the sweep refuse this setting: distillation.alpha < 0.95",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_in_one_line(make_config, values, message):
    config = make_config(space=FOUR, constraints=["distillation.alpha < 0.95"])
    config.output.mkdir()
    write_config(config, config.output)
    with pytest.raises(ConfigError, match=message) as caught:
        commands.add(config.output, values)
    assert "\n" not in str(caught.value) and not (config.output / "control.json").exists()


def test_settings_with_other_keys_and_teachers_join(four, in_process):
    values = ["distillation.alpha=0.9", "teacher=llama-tiny", "optimization.learning_rate=0.0001"]
    commands.add(four.output, values)
    commands.add(four.output, ["distillation.alpha=0.6", "distillation.mode=joint"])
    run_sweep(four, trainer=train, runner=in_process)
    assert [s.label for s in rank_settings(read_results(four.output))] == [
        "llama-tiny α0.9 τ2 learning_rate=0.0001",
        "t5-tiny α0.6 τ2",
        "t5-tiny α0.3 τ2",
        "joint α0.6",
    ]
    inputs = read_manifest(four.output, "sweep").inputs
    assert {"labels.t5-tiny", "labels.llama-tiny"} <= set(inputs)


def test_a_key_that_makes_no_difference_need_not_be_given(make_config):
    space = {
        "teacher": {"grid": ["t5-tiny", "llama-tiny"]},
        "distillation.mode": {"grid": ["kd", "joint"]},
        "distillation.alpha": {"grid": [0.3]},
    }
    config = make_config(space=space)
    config.output.mkdir()
    write_config(config, config.output)
    commands.add(config.output, ["distillation.mode=joint", "distillation.alpha=0.7"])
    with pytest.raises(ConfigError, match=r"^teacher: expected a value"):
        commands.add(config.output, ["distillation.mode=kd", "distillation.alpha=0.8"])
    assert [t.label for t in Search(config).stage().trials][-1] == "joint α0.7 s0"


def test_in_a_search_the_added_and_the_dropped_take_their_part(make_config, in_process):
    config = make_config(space=FOUR, search={"method": "two-stage", "survivors": 1})
    config.output.mkdir()
    write_config(config, config.output)
    first = Search(config)
    commands.add(config.output, ["distillation.alpha=0.58"])
    commands.drop(config.output, ["t5-tiny α0.6 τ2"])
    late = lambda: commands.add(config.output, ["distillation.alpha=0.1"])  # noqa: E731
    stages = []

    def runner(stage, stop, follow):
        in_process(stage, stop, follow)
        stages.append(len(stage.trials))
        if len(stages) == 2:
            late()

    run_sweep(config, trainer=train, runner=runner)
    compared = {r.label for r in read_results(config.output) if r.is_compared}
    assert compared == {f"t5-tiny α{alpha} τ2 s{seed}" for alpha in (0.58, 0.1) for seed in (0, 1)}
    assert stages == [2, 1, 2], "the search, the survivor's second seed, what was added after the search"
    assert Search(config).digest() != first.digest()


def test_a_held_trial_keeps_a_search_from_its_end(make_config, in_process):
    config = make_config(space=FOUR, search={"method": "two-stage", "survivors": 1})
    config.output.mkdir()
    write_config(config, config.output)
    commands.stop(config.output, ["t5-tiny α0.6 τ2"])
    with pytest.raises(TrainingError, match=r"stopped by hand: t5-tiny α0.6 τ2 s0"):
        run_sweep(config, trainer=train, runner=in_process)
    assert not (config.output / "search.json").exists()


def test_stops_and_resumes_do_not_use_up_a_trials_attempts(four, monkeypatch):
    trial = Space(four).trials()[0]
    trial.directory.mkdir(parents=True)
    write_config(trial.config, trial.directory)
    monkeypatch.setenv("FAKE_TRAINER", '{"epoch_s": 5}')
    monkeypatch.setattr("kdecs.sweep.trial._STOP_POLL_S", 0.01)
    run = TrialRun(trainer=train, stop_file=four.output / ".stop", store=four.student_store, max_failures=0)

    def stopped(config, on_epoch, stop):
        Control(trials={trial.id: "stop"}).write(four.output)
        return train(config, on_epoch, stop)

    for attempt in range(3):
        Control().write(four.output)
        note = run_trial(trial.directory, run.model_copy(update={"trainer": stopped}), lambda metrics: None)
        assert (note.status, note.attempts, note.stalled) == ("stopped", attempt + 1, 0)
    assert run_trial(trial.directory, run, lambda metrics: None).attempts == 3, "it does not begin"
    Control().write(four.output)
    monkeypatch.setenv("FAKE_TRAINER", "{}")
    assert run_trial(trial.directory, run, lambda metrics: None).status == "complete"


def test_a_damaged_file_is_named_and_disturbs_no_trial_that_trains(four, in_process, capfd):
    path = four.output / "control.json"
    actions = {1: lambda: path.write_text('{"trials": {"a": "pause"}}'), 3: path.unlink}
    run_sweep(four, trainer=train, runner=acting(in_process, actions))
    assert (
        capfd.readouterr().out.count("control.json: trials.a: Input should be 'stop' or 'drop'; correct it")
        == 1
    )
    assert {*statuses(four).values()} == {"complete"}
    (four.output / "manifest.json").unlink()
    for text, message in (
        ("[]", "correct it, or remove it"),
        (
            '{"added": [{"teacher": "gone"}]}',
            "control.json: an added setting does not fit the config: teacher: found",
        ),
    ):
        path.write_text(text)
        with pytest.raises(KdecsError, match=message) as caught:
            run_sweep(four, trainer=train, runner=in_process)
        assert "\n" not in str(caught.value)


def test_where_no_sweep_is_nothing_can_be_asked(tmp_path):
    with pytest.raises(ArtifactError, match=r"no sweep has begun here \(no config.json\)"):
        commands.stop(tmp_path, ["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_moved_sweep_is_controlled_where_it_lies(four, tmp_path):
    moved = four.output.rename(tmp_path / "moved")
    commands.stop(moved, ["t5-tiny α0.3 τ2 s0"])
    assert len(read_control(moved).trials) == 1
    assert load_config(SweepConfig, moved / "config.json").output == four.output
