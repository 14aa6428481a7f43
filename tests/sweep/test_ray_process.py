"""How the driver takes the end of its Ray process. A script stands in for it; no Ray is started."""

import json
import os
import sys
from pathlib import Path

import pytest

from kdecs.errors import TrainingError
from kdecs.process import StopSignal
from kdecs.sweep import ray as ray_process
from kdecs.sweep.ray import OUT_OF_MEMORY, Plan, _is_out_of_memory, run_with_ray
from kdecs.sweep.trial import TrialRun

SCRIPT = """
import json, pathlib, sys
plan = pathlib.Path(sys.argv[-1])
starts = plan.with_name("starts")
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
code, epochs = json.loads(plan.with_name("script.json").read_text())[number]
with (plan.parent / "trials" / "a" / "metrics.jsonl").open("a") as metrics:
    for epoch in range(epochs):
        metrics.write(json.dumps({"epoch": epoch, "time": 0}) + chr(10))
print("the last line")
sys.exit(code)
"""


@pytest.fixture
def plan(make_config, tmp_path: Path, monkeypatch) -> Plan:
    config = make_config()
    (config.output / "trials" / "a").mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(ray_process, "_COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(ray_process, "_POLL_S", 0.05)
    run = TrialRun("fake_trainer:train", config.output / ".stop-1-2", tmp_path / "students")
    return Plan(config, run, ["a"], [], None, 3.0, 0, "macro_f1", os.getppid())


def script(plan: Plan, *ends: tuple[int, int]) -> None:
    """Exit code and epochs of each start."""
    (plan.config.output / "script.json").write_text(json.dumps(ends))


def starts(plan: Plan) -> int:
    return len((plan.config.output / "starts").read_text())


def test_a_sweep_out_of_memory_goes_on_while_trials_get_further(plan, capsys):
    script(plan, (OUT_OF_MEMORY, 2), (OUT_OF_MEMORY, 1), (0, 0))
    run_with_ray(plan, StopSignal(), lambda: None)
    assert starts(plan) == 3
    assert capsys.readouterr().out.count("go on from their checkpoints") == 2


def test_a_sweep_that_memory_never_suffices_for_ends_in_one_line(plan):
    script(plan, (OUT_OF_MEMORY, 1), (OUT_OF_MEMORY, 0))
    with pytest.raises(TrainingError, match="lower max_concurrent_trials"):
        run_with_ray(plan, StopSignal(), lambda: None)
    assert starts(plan) == 2


def test_another_failure_is_not_tried_again(plan):
    script(plan, (1, 3))
    with pytest.raises(TrainingError, match="exit code 1: the last line"):
        run_with_ray(plan, StopSignal(), lambda: None)
    assert starts(plan) == 1


def test_only_want_of_memory_is_taken_for_it():
    from ray.exceptions import OutOfMemoryError

    def of(cause: Exception) -> RuntimeError:
        try:
            raise RuntimeError("Caught unexpected exception") from cause
        except RuntimeError as error:
            return error

    assert _is_out_of_memory(of(OutOfMemoryError("1 worker was killed")))
    assert not _is_out_of_memory(of(ValueError("something else")))
