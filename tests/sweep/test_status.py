"""The table of a trial's status: every combination of last note, files and process, against the rules in words."""

import itertools
import json

import pytest

from kdecs.artifact import MANIFEST_NAME
from kdecs.config import write_config
from kdecs.errors import ArtifactError
from kdecs.sweep.space import Space
from kdecs.sweep.status import DIED, read_note, trial_result, trial_status

NOTES = (None, "running", "complete", "failed", "stopped", "pruned")


WANTED = (None, "stop", "drop")


def expected(note, is_complete, is_live, wanted=None):
    """The rules, one a line, first match wins."""
    rules = [
        # A process that may live, and has noted no end, may still write to its trial, even if the student is complete.
        (note == "running" and is_live, "running"),
        # What a person drops is left out, whatever it is.
        (wanted == "drop", "dropped"),
        # What a person stops stays out, but what is complete has nothing left to stop.
        (wanted == "stop" and not is_complete, "held"),
        # The files are the truth: a complete student is complete, whatever was noted of an attempt before.
        (is_complete, "complete"),
        # Nothing was ever noted, so it never began.
        (note is None, "waiting"),
        # It was complete and its files are gone, so it is trained again.
        (note == "complete", "waiting"),
        # It was running and its process is gone: killed, or out of memory.
        (note == "running", "failed"),
        # An end that a process noted is the end.
        (True, note),
    ]
    return next(status for holds, status in rules if holds)


@pytest.fixture
def trial(make_config):
    """A trial with its config on disk."""
    trial = Space(make_config()).trials()[0]
    trial.directory.mkdir(parents=True)
    write_config(trial.config, trial.directory)
    return trial


@pytest.fixture
def complete_files(trial, in_process):
    """The files of the trial's student, complete: name -> content."""
    from fake_trainer import train

    from kdecs.process import StopSignal

    train(trial.config, lambda metrics: None, StopSignal())
    return {path.name: path.read_bytes() for path in trial.directory.iterdir()}


@pytest.mark.parametrize(("is_complete", "is_live"), itertools.product((True, False), repeat=2))
@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("wanted", WANTED)
def test_every_combination(note, is_complete, is_live, wanted):
    assert trial_status(note, is_complete=is_complete, is_live=is_live, wanted=wanted) == expected(
        note, is_complete, is_live, wanted
    )


def test_results_read_the_table_from_files(trial, complete_files):
    for note, is_complete, is_live, wanted in itertools.product(NOTES, (True, False), (True, False), WANTED):
        for name, content in complete_files.items():
            (trial.directory / name).write_bytes(content)
        if not is_complete:
            (trial.directory / MANIFEST_NAME).unlink()
        (trial.directory / "trial.json").unlink(missing_ok=True)
        if note:
            values = {"status": note, "error": "what it said" if note == "failed" else None}
            (trial.directory / "trial.json").write_text(json.dumps(values))
        result = trial_result(trial, is_live=is_live, wanted=wanted)
        assert result.status == expected(note, is_complete, is_live, wanted)
        if result.status == "failed":
            assert result.error == ("what it said" if note == "failed" else DIED)
        else:
            assert result.error is None


@pytest.mark.parametrize("text", ["{", '{"status": "resting"}', '{"state": "running"}', "[]"])
def test_a_damaged_note_is_refused_in_one_line(trial, text):
    (trial.directory / "trial.json").write_text(text)
    with pytest.raises(ArtifactError, match="remove the file") as caught:
        read_note(trial.directory)
    assert "\n" not in str(caught.value)
