"""What a sweep shows: a table on a terminal, quiet lines in a log."""

import dataclasses
import io

import pytest
from rich.console import Console

from kdecs.sweep.progress import SweepProgress
from kdecs.sweep.space import Space
from kdecs.sweep.status import trial_result


@pytest.fixture
def states(make_config):
    """Results of eight trials: two complete, two running, one pruned, one failed, two waiting."""
    config = make_config()
    plain = [trial_result(trial, is_live=True) for trial in Space(config).trials()]

    def become(number, status, epoch, **more):
        metrics = {"macro_f1": 60.0 + number} if epoch else {}
        values = {
            "status": status,
            "epoch": epoch,
            "metrics": metrics,
            "seconds": 90.0,
            "attempts": 1,
            **more,
        }
        plain[number] = dataclasses.replace(plain[number], **values)

    become(0, "complete", 3)
    become(1, "complete", 3, reused_from="/runs/other/trials/x")
    become(2, "running", 1)
    become(3, "running", 2)
    become(4, "pruned", 1)
    become(5, "failed", 1, error="the loss is not finite")
    return config, plain


def console(*, is_terminal):
    return Console(
        file=io.StringIO(),
        force_terminal=is_terminal,
        width=110,
        height=30,
        highlight=False,
        color_system=None,
    )


def test_a_log_gets_one_line_a_trial_that_ended(states):
    config, results = states
    out = console(is_terminal=False)
    with SweepProgress(config, 8, [], console=out) as progress:
        progress.update(results)
        progress.update(results)
    lines = out.file.getvalue().splitlines()
    assert lines == [
        "trial 1/8 llama-tiny α0.3 τ2 s0: validation macro F1 60.00, 1m30s",
        "trial 2/8 llama-tiny α0.3 τ2 s1: validation macro F1 61.00, taken from /runs/other/trials/x",
        "trial 3/8 t5-tiny α0.3 τ2 s0: validation macro F1 64.00, stopped by the search after 1 of 3 epochs",
        f"trial 4/8 t5-tiny α0.3 τ2 s1: failed (the loss is not finite); log: trials/{results[5].id}/log.txt",
    ]


def test_a_log_names_the_score_that_trials_are_ranked_by(states):
    config, results = states
    found = dataclasses.replace(results[0], metric="utterance_macro_f1", metrics={"utterance_macro_f1": 70.0})
    out = console(is_terminal=False)
    with SweepProgress(config, 8, [], console=out) as progress:
        progress.update([found])
        assert "best utterance macro F1 70.00 (llama-tiny α0.3 τ2 s0)" in progress.summary([found])
    assert "validation utterance macro F1 70.00, 1m30s" in out.file.getvalue()


def test_what_had_ended_before_is_not_printed_again(states):
    config, results = states
    out = console(is_terminal=False)
    with SweepProgress(config, 8, results, console=out) as progress:
        progress.update(results)
    assert out.file.getvalue().count("trial ") == 1, "a failed one is tried, and printed, again"


def test_a_terminal_shows_what_runs_and_the_time_left(states, monkeypatch):
    config, results = states
    clock = [1000.0]
    monkeypatch.setattr("kdecs.sweep.progress.time.monotonic", lambda: clock[0])
    out = console(is_terminal=True)
    before = [dataclasses.replace(result, epoch=0) for result in results]
    progress = SweepProgress(config, 8, before, console=out)
    clock[0] += 80
    # 3 + 1 + 2 + 1 + 1 epochs in 80 s, the taken student's cost nothing; 2 + 1 + 3 + 3 are left
    assert progress.seconds_left(results) == pytest.approx(90.0)
    out.print(progress.table(results))
    shown = out.file.getvalue()
    assert (
        "llama-tiny α0.6 τ2 s0" in shown
        and "━━━━╌╌╌╌╌╌╌╌ 1/3" in shown
        and "✓ llama-tiny α0.3 τ2 s1" in shown
    )
    assert (
        "3/8 trials done, 1 of them stopped by the search, 2 running, 1 failed, best macro F1 61.00" in shown
    )
    assert "about 1m30s left" in " ".join(shown.split())


def test_many_running_trials_leave_room(states):
    config, results = states
    running = [dataclasses.replace(results[2], id=str(n)) for n in range(60)]
    out = console(is_terminal=True)
    out.print(SweepProgress(config, 60, [], console=out).table(running))
    assert "and 40 more" in out.file.getvalue() and out.file.getvalue().count("\n") <= 30
