"""Finished students by hash: links, hard-linked files, and one training for two sweeps side by side."""

import json
import threading

import pytest
from fake_trainer import train

from kdecs.artifact import MANIFEST_NAME, verify_artifact
from kdecs.config import load_config, write_config
from kdecs.student.config import StudentConfig
from kdecs.sweep.space import enumerate_trials
from kdecs.sweep.status import read_note
from kdecs.sweep.trial import (
    TrialRun,
    add_student,
    find_student,
    load,
    read_samples,
    run_trial,
    sampled_load,
    take_student,
    training_lock,
)


@pytest.fixture
def trial(make_config):
    """A trial with its config on disk, and the run that its sweep gives it."""
    config = make_config()
    trial = enumerate_trials(config)[0]
    trial.directory.mkdir(parents=True)
    write_config(trial.config, trial.directory)
    run = TrialRun(
        trainer=train,
        stop_file=config.output / ".stop",
        store=config.output.parent / "students",
    )
    return trial, run


def test_a_finished_student_is_found_until_it_is_damaged_or_gone(trial):
    trial, run = trial
    assert find_student(run.store, trial.config_hash) is None
    run_trial(trial.directory, run, lambda metrics: None)
    assert find_student(run.store, trial.config_hash) == trial.directory.resolve()
    (trial.directory / "weights.bin").write_bytes(b"cut")
    assert find_student(run.store, trial.config_hash) is None


def test_a_taken_student_outlives_its_source(trial, tmp_path):
    trial, run = trial
    run_trial(trial.directory, run, lambda metrics: None)
    copy = tmp_path / "copy"
    take_student(trial.directory, copy)
    before = (trial.directory / "weights.bin").read_bytes()
    (trial.directory / "weights.bin").unlink()
    assert verify_artifact(copy) == [] and (copy / "weights.bin").read_bytes() == before
    add_student(run.store, trial.config_hash, copy)
    assert find_student(run.store, trial.config_hash) == copy.resolve(), (
        "the link to the damaged one is replaced"
    )


def test_two_sweeps_train_one_student_once(trial, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINER", '{"epoch_s": 0.3}')
    first, run = trial
    other = tmp_path / "other" / first.id
    other.mkdir(parents=True)
    write_config(
        load_config(StudentConfig, first.directory / "config.json").model_copy(update={"output": other}),
        other,
    )
    held = threading.Event()

    def train_first():
        with training_lock(run.store, first.config_hash, lambda: False):
            held.set()
            # what run_trial does under the lock, here without its redirection of the process' output
            from kdecs.process import StopSignal

            train(first.config, lambda metrics: None, StopSignal())
            add_student(run.store, first.config_hash, first.directory)

    thread = threading.Thread(target=train_first)
    thread.start()
    held.wait()
    status = run_trial(other, run, lambda metrics: None)
    thread.join()
    assert status.status == "complete" and status.reused_from == str(first.directory.resolve())
    assert (other / MANIFEST_NAME).stat().st_ino == (first.directory / MANIFEST_NAME).stat().st_ino


def test_waiting_for_another_sweep_ends_with_a_stop(trial):
    trial, run = trial
    with training_lock(run.store, trial.config_hash, lambda: False) as held:
        assert held
        with training_lock(run.store, trial.config_hash, lambda: True) as second:
            assert not second


def test_attempts_without_progress_are_counted_and_end(trial, monkeypatch):
    trial, run = trial
    monkeypatch.setenv("FAKE_TRAINER", '{"raise_early": true}')
    run = run.model_copy(update={"max_failures": 2})
    for attempt in (1, 2):
        with pytest.raises(RuntimeError):
            run_trial(trial.directory, run, lambda metrics: None)
        assert read_note(trial.directory).stalled == attempt
    assert run_trial(trial.directory, run, lambda metrics: None).status == "failed"
    again = run.model_copy(update={"stop_file": run.stop_file.with_name(".stop-next")})
    monkeypatch.delenv("FAKE_TRAINER")
    status = run_trial(trial.directory, again, lambda metrics: None)
    assert (status.status, status.attempts, status.error) == ("complete", 4, None), (
        "another start tries again"
    )


def test_earlier_epochs_are_reported_again(trial, monkeypatch):
    trial, run = trial
    monkeypatch.setenv("FAKE_TRAINER", '{"raise": [0]}')
    seen = []
    with pytest.raises(RuntimeError):
        run_trial(trial.directory, run.model_copy(update={"max_failures": 1}), seen.append)
    monkeypatch.delenv("FAKE_TRAINER")
    run_trial(trial.directory, run, seen.append)
    assert [point["epoch"] for point in seen] == [1, 1, 2], "the last epoch is nothing to stop at"


def test_a_trial_that_the_scheduler_stops_is_pruned_wherever_it_was(trial, monkeypatch):
    trial, run = trial
    monkeypatch.setenv("FAKE_TRAINER", '{"raise": [0]}')
    with pytest.raises(RuntimeError):
        run_trial(trial.directory, run.model_copy(update={"max_failures": 1}), lambda metrics: None)
    monkeypatch.delenv("FAKE_TRAINER")

    def stop_it(metrics):
        raise SystemExit  # what Tune's report does

    for _ in range(2):  # by an epoch of an earlier attempt, then once more
        with pytest.raises(SystemExit):
            run_trial(trial.directory, run, stop_it)
        assert read_note(trial.directory).status == "pruned"
    keeping = run.model_copy(update={"is_search": True})
    assert run_trial(trial.directory, keeping, lambda metrics: None).status == "pruned"
    assert run_trial(trial.directory, run, lambda metrics: None).status == "complete", "a survivor trains on"


def test_load_is_sampled_at_both_ends_and_cut_lines_are_left_out(tmp_path):
    import psutil

    with sampled_load(tmp_path, interval_s=0.05):
        threading.Event().wait(0.2)
    samples = read_samples(tmp_path / "system.jsonl")
    assert len(samples) >= 2 and all(sample["system/trial_memory_usage_megabytes"] > 1 for sample in samples)
    assert load(psutil.Process()).keys() == samples[0].keys() - {"time"}
    with (tmp_path / "system.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1.0})[:-3])
    assert read_samples(tmp_path / "system.jsonl") == samples
