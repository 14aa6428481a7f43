"""One trial in its directory: attempts that are counted, epochs that are seen, students from and for the store."""

import json
import threading
import time

import pytest
import torch
from fake_trainer import train
from support import Killed, flip_bit, kill, save_tiny_decoder

from kdecs.artifact import (
    MANIFEST_NAME,
    file_lock,
    is_complete,
    read_manifest,
    verify_artifact,
    write_manifest,
)
from kdecs.baselines.generative.prediction import GenerativeBaseline
from kdecs.config import load_config, write_config
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ArtifactError
from kdecs.runtime import Runtime
from kdecs.student.config import StudentConfig
from kdecs.sweep.selection.choose import validation_predictions
from kdecs.sweep.space import Space
from kdecs.sweep.status import read_note, trial_result
from kdecs.sweep.tracking import sweep_record, trial_record
from kdecs.sweep.trial import (
    TrialRun,
    add_student,
    find_student,
    run_trial,
    settle,
    take_student,
    train_student_trial,
    training_lock,
)
from kdecs.tracking.record import read_points


@pytest.fixture
def trial(make_config):
    """A trial with its config on disk."""
    trial = Space(make_config()).trials()[0]
    trial.directory.mkdir(parents=True)
    write_config(trial.config, trial.directory)
    return trial


@pytest.fixture
def make_run(trial):
    """A function that makes the run that the trial's sweep gives it."""
    sweep = trial.directory.parent.parent

    def make(**changes):
        values = {
            "trainer": train,
            "stop_file": sweep / ".stop",
            "store": sweep.parent / "students",
            **changes,
        }
        return TrialRun(**values)

    return make


def copied_trial(trial, folder):
    """The same student's config in a directory of another sweep."""
    other = folder / "other" / trial.id
    other.mkdir(parents=True)
    config = load_config(StudentConfig, trial.directory / "config.json")
    write_config(config.model_copy(update={"output": other}), other)
    return other


def become_running(directory):
    """What a kill between a student's manifest and its status leaves."""
    status = json.loads((directory / "trial.json").read_text())
    status.update(status="running", finished=None)
    (directory / "trial.json").write_text(json.dumps(status))


def test_a_student_is_complete_once_its_status_says_so(trial, make_run):
    run_trial(trial.directory, make_run(), lambda metrics: None)
    become_running(trial.directory)
    living = trial_result(trial, is_live=True)
    assert (living.status, living.is_settled) == ("running", False), "its process has not noted its end yet"
    settle(trial.directory)
    settled = trial_result(trial, is_live=True)
    assert settled.is_settled
    assert settled.finished == (trial.directory / "manifest.json").stat().st_mtime


def test_a_trial_that_a_process_holds_is_not_settled(trial, make_run):
    run_trial(trial.directory, make_run(), lambda metrics: None)
    become_running(trial.directory)
    with file_lock(trial.directory / ".lock"):
        settle(trial.directory)
    assert read_note(trial.directory).status == "running"


def test_a_trial_with_epochs_of_its_own_takes_no_other_student(trial, make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINER", '{"raise": [0]}')
    with pytest.raises(RuntimeError):
        run_trial(trial.directory, make_run(max_failures=1), lambda metrics: None)
    monkeypatch.delenv("FAKE_TRAINER")
    first = read_points(trial.directory / "metrics.jsonl")
    other = copied_trial(trial, tmp_path)
    run_trial(other, make_run(), lambda metrics: None)
    status = run_trial(trial.directory, make_run(), lambda metrics: None)
    assert (status.status, status.reused_from) == ("complete", None)
    points = read_points(trial.directory / "metrics.jsonl")
    assert points[:1] == first and len(points) == 3, "what was told of an epoch stays"


def test_taking_goes_on_after_a_kill_amid_it(trial, make_run, tmp_path, monkeypatch):
    other = copied_trial(trial, tmp_path)
    run_trial(other, make_run(), lambda metrics: None)

    def die_amid(source, target):
        (target / "metrics.jsonl").write_bytes((source / "metrics.jsonl").read_bytes())
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("kdecs.sweep.trial.take_student", die_amid)
        with pytest.raises(KeyboardInterrupt):
            run_trial(trial.directory, make_run(), lambda metrics: None)
    status = run_trial(trial.directory, make_run(), lambda metrics: None)
    assert status.reused_from == str(other.resolve()) and status.is_settled


def test_a_source_whose_end_was_not_noted_has_one(trial, make_run, tmp_path):
    other = copied_trial(trial, tmp_path)
    run_trial(other, make_run(), lambda metrics: None)
    become_running(other)
    status = run_trial(trial.directory, make_run(), lambda metrics: None)
    assert status.finished == (other / "manifest.json").stat().st_mtime


def test_a_refusal_before_the_training_is_a_status(trial, make_run, tmp_path):
    corpus = tmp_path / "train.json"
    corpus.write_bytes(trial.config.corpus.train.read_bytes())
    changed = trial.config.model_copy(
        update={"corpus": trial.config.corpus.model_copy(update={"train": corpus})}
    )
    write_config(changed, trial.directory)
    corpus.unlink()
    status = run_trial(trial.directory, make_run(max_failures=5), lambda metrics: None)
    assert (status.status, status.attempts) == ("failed", 1)
    assert str(corpus) in status.error and read_note(trial.directory) == status


def test_any_fault_before_the_training_is_counted(trial, make_run, monkeypatch):
    def fault(*arguments):
        raise ValueError("a fault of ours")

    monkeypatch.setattr("kdecs.sweep.trial.find_student", fault)
    for attempt in (1, 2):
        with pytest.raises(ValueError, match="of ours"):
            run_trial(trial.directory, make_run(max_failures=2), lambda metrics: None)
        assert read_note(trial.directory).attempts == attempt
    status = run_trial(trial.directory, make_run(max_failures=2), lambda metrics: None)
    assert (status.status, status.error) == ("failed", "ValueError: a fault of ours")


def test_an_epoch_that_only_the_checkpoint_holds_is_seen(trial, make_run, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINER", '{"raise_between": [0]}')
    run, seen = make_run(max_failures=0), []
    for epoch in (1, 2):
        again = make_run(max_failures=0, stop_file=run.stop_file) if epoch == 2 else run
        status = run_trial(trial.directory, again, seen.append)
        assert status.status == "failed", "no attempt is left after a fault without an epoch"
        assert len(read_points(trial.directory / "metrics.jsonl")) == epoch - 1
    assert [point["epoch"] for point in seen] == [1], "the second attempt knew the first one's epoch"
    assert status.epoch == 1
    monkeypatch.delenv("FAKE_TRAINER")
    status = run_trial(trial.directory, run, seen.append)
    assert status.status == "complete" and is_complete(trial.directory, "student", trial.config_hash)
    assert [point["epoch"] for point in seen] == [1, 1, 2]


def test_deaths_between_checkpoint_and_line_count_as_progress(trial, make_run, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINER", '{"raise_between": [0]}')
    run = make_run(max_failures=1)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            run_trial(trial.directory, run, lambda metrics: None)
        assert read_note(trial.directory).stalled == 1
    assert run_trial(trial.directory, run, lambda metrics: None).status == "complete"


def test_a_finished_student_is_found_until_it_is_damaged_or_gone(trial, make_run):
    run = make_run()
    assert find_student(run.store, trial.config_hash) is None
    run_trial(trial.directory, run, lambda metrics: None)
    assert find_student(run.store, trial.config_hash) == trial.directory.resolve()
    (trial.directory / "weights.bin").write_bytes(b"cut")
    assert find_student(run.store, trial.config_hash) is None


def test_a_student_of_the_same_size_with_another_byte_is_not_taken(trial, make_run, tmp_path):
    other = copied_trial(trial, tmp_path)
    run_trial(other, make_run(), lambda metrics: None)
    flip_bit(other / "weights.bin")
    note = run_trial(trial.directory, make_run(), lambda metrics: None)
    assert (note.status, note.reused_from) == ("complete", None), "it was trained anew"
    assert "weights.bin: sha256" in (trial.directory / "log.txt").read_text()


def test_a_changed_score_of_a_finished_student_is_seen(trial, make_run):
    run_trial(trial.directory, make_run(), lambda metrics: None)
    path = trial.directory / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"macro_f1": 6', b'"macro_f1": 9', 1))
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl: sha256 .*; restore the file, or remove"):
        trial_result(trial, is_live=False)


def test_a_taken_student_outlives_its_source(trial, make_run, tmp_path):
    run = make_run()
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


def test_two_sweeps_train_one_student_once(trial, make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRAINER", '{"epoch_s": 0.3}')
    first, run = trial, make_run()
    other = copied_trial(first, tmp_path)
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


def test_waiting_for_another_sweep_ends_with_a_stop(trial, make_run):
    run = make_run()
    with training_lock(run.store, trial.config_hash, lambda: False) as held:
        assert held
        with training_lock(run.store, trial.config_hash, lambda: True) as second:
            assert not second


def test_attempts_without_progress_are_counted_and_end(trial, make_run, monkeypatch):
    run = make_run(max_failures=2)
    monkeypatch.setenv("FAKE_TRAINER", '{"raise_early": true}')
    for attempt in (1, 2):
        with pytest.raises(RuntimeError):
            run_trial(trial.directory, run, lambda metrics: None)
        assert read_note(trial.directory).stalled == attempt
    assert run_trial(trial.directory, run, lambda metrics: None).status == "failed"
    again = make_run(max_failures=2, stop_file=run.stop_file.with_name(".stop-next"))
    monkeypatch.delenv("FAKE_TRAINER")
    status = run_trial(trial.directory, again, lambda metrics: None)
    assert (status.status, status.attempts, status.error) == ("complete", 4, None), (
        "another start tries again"
    )


def test_earlier_epochs_are_reported_again(trial, make_run, monkeypatch):
    run = make_run()
    monkeypatch.setenv("FAKE_TRAINER", '{"raise": [0]}')
    seen = []
    with pytest.raises(RuntimeError):
        run_trial(trial.directory, make_run(max_failures=1), seen.append)
    monkeypatch.delenv("FAKE_TRAINER")
    run_trial(trial.directory, run, seen.append)
    assert [point["epoch"] for point in seen] == [1, 1, 2], "the last epoch is nothing to stop at"


def test_a_trial_that_the_scheduler_stops_is_pruned_wherever_it_was(trial, make_run, monkeypatch):
    run = make_run()
    monkeypatch.setenv("FAKE_TRAINER", '{"raise": [0]}')
    with pytest.raises(RuntimeError):
        run_trial(trial.directory, make_run(max_failures=1), lambda metrics: None)
    monkeypatch.delenv("FAKE_TRAINER")

    def stop_it(metrics):
        raise SystemExit  # what Tune's report does

    for _ in range(2):  # by an epoch of an earlier attempt, then once more
        with pytest.raises(SystemExit):
            run_trial(trial.directory, run, stop_it)
        assert read_note(trial.directory).status == "pruned"
    keeping = make_run(is_search=True)
    assert run_trial(trial.directory, keeping, lambda metrics: None).status == "pruned"
    assert run_trial(trial.directory, run, lambda metrics: None).status == "complete", "a survivor trains on"


def test_a_student_that_is_taken_again_after_a_kill_leaves_no_second_links(tmp_path, monkeypatch):
    """A rename does nothing where both names are links to one file already."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "model").mkdir(parents=True)
    for name in ("model/weights", "card.json"):
        (source / name).write_text(name)
    write_manifest(source, "student", config_hash="c", inputs={}, files=["model/weights", "card.json"])
    with monkeypatch.context() as patch:
        patch.setattr("kdecs.sweep.trial.os.replace", kill)
        with pytest.raises(Killed):
            take_student(source, target)
    for _ in range(2):
        take_student(source, target)
    assert verify_artifact(target) == []
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == [
        "card.json",
        "manifest.json",
        "model/weights",
    ]


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        ({"system": "kec"}, "baseline"),
        ({"system": "mrc"}, "mrc"),
        ({"system": "generative", "model.base": "llama-tiny"}, "generative"),
    ],
)
def test_a_baseline_is_trained_as_one_and_taken_from_the_store(make_config, make_run, monkeypatch, own, kind):
    config = make_config(
        baselines={"it": own}, space={"variant": {"grid": ["it"]}, "teacher": {"grid": ["t5-tiny"]}}
    )
    (trial,) = Space(config).trials()
    if kind != "generative":  # which is trained below
        trained = []
        monkeypatch.setattr(
            "kdecs.baselines.training.train_baseline",
            lambda config, runtime, **options: trained.append(config),
        )
        train_student_trial(trial.config, lambda metrics: None, None)
        assert trained == [trial.config]
    trial.directory.mkdir(parents=True)
    write_config(trial.config, trial.directory)
    run = make_run()
    assert run_trial(trial.directory, run, lambda metrics: None).status == "complete"
    assert is_complete(trial.directory, kind, trial.config_hash)
    assert find_student(run.store, trial.config_hash) == trial.directory.resolve()
    other = trial.directory.parent / "other"
    other.mkdir()
    write_config(trial.config, other)
    assert run_trial(other, run, lambda metrics: None).reused_from == str(trial.directory.resolve())
    assert verify_artifact(other) == []


@pytest.mark.slow
def test_a_generative_baseline_goes_on_after_a_stop_and_its_validations_are_its_epochs(
    make_config, make_run, tmp_path
):
    raw = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    few = tmp_path / "few.json"
    few.write_text(json.dumps({key: [raw[key][0][:3]] for key in list(raw)[:3]}))
    config = make_config(
        student={**make_config().student, "corpus": {"train": str(few), "valid": str(few)}},
        baselines={
            "it": {
                "system": "generative",
                "model.base": str(save_tiny_decoder(tmp_path / "decoder")),
                "lora": {"rank": 4},
                "zero": {"stage": 0, "dtype": "float32"},
                "batches": {"global_batch_pairs": 2, "micro_batch_tokens": 1024, "max_prompt_tokens": 1024},
                "optimization": {"learning_rate": 0.005, "epochs": 2},
                "validate_per_epoch": 2,
                "max_answer_tokens": 8,
                "log_every_steps": 1,
            }
        },
        space={"variant": {"grid": ["it"]}, "teacher": {"grid": ["t5-tiny"]}},
    )
    (trial,) = Space(config).trials()
    trial.directory.mkdir(parents=True)
    write_config(trial.config, trial.directory)
    run = make_run(trainer=train_student_trial)
    seen = []

    def report(metrics):
        seen.append(metrics["epoch"])
        if len(seen) == 1:
            run.stop_file.touch()
            time.sleep(2)  # longer than the watch for this file sleeps

    assert run_trial(trial.directory, run, report).status == "stopped"
    run.stop_file.unlink()
    stopped = trial_result(trial, is_live=False)
    assert (stopped.status, stopped.epoch, stopped.epochs) == ("stopped", 1, 4) and seen == [1]
    assert run_trial(trial.directory, run, report).status == "complete"
    # A resume reports the first epoch again. The last one is not reported: a scheduler has nothing left to decide.
    assert seen == [1, 1, 2, 3]
    result = trial_result(trial, is_live=False)
    points = read_points(trial.directory / "metrics.jsonl")
    scored = [point for point in points if "macro_f1" in point]
    assert len(scored) == 4 < len(points) and (result.status, result.epoch) == ("complete", 4)
    # The metrics are those of the product, which the lowest loss chooses among equal scores.
    best = max(scored, key=lambda point: (point["macro_f1"], -point["valid_loss"]))
    assert result.metrics["valid_loss"] == best["valid_loss"]
    assert read_manifest(trial.directory, "generative").details["best_step"] == best["step"]
    assert len({point["macro_f1"] for point in scored}) < 4, "random answers are all without a cause"
    assert verify_artifact(trial.directory) == []
    assert find_student(run.store, trial.config_hash) == trial.directory.resolve()
    record = trial_record(trial, result, sweep_record(config, 1, [result], "FINISHED"))
    assert [point["epoch"] for point in record.points] == [1, 2, 3, 4]
    assert record.params["system"] == "generative" and record.model.kind == "generative"
    # Its own predictions are what it is compared by, and what it says again.
    corpus = read_corpus(few)
    kept = validation_predictions(config.output, result, corpus)
    again = GenerativeBaseline.load(
        trial.directory, runtime=Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    )
    assert kept == again.predict_pairs(corpus) and kept
