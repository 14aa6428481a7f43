"""Several starts of `launch/train_teacher.py` in one launch, so that tests pay for a launcher and imports once.

Arguments: CONFIG.yaml, or CONFIG.yaml@N for a start that gets its SIGTERM after N steps. A refusal is printed by
every rank and ends its start only. Each start prints what a rank holds of its parameters; small ones are
partitioned too.
"""

import sys
from pathlib import Path
from typing import Any

from support import StopAfter

from kdecs.config import load_config
from kdecs.errors import KdecsError
from kdecs.process import run_entry
from kdecs.runtime import any_rank, import_deepspeed, process_group, start_runtime
from kdecs.teacher.config import TeacherConfig

import_deepspeed()

from kdecs.teacher import engine, training  # noqa: E402


def settings_without_whole_parameters(*args: Any, **kwargs: Any) -> dict[str, Any]:
    settings = deepspeed_config(*args, **kwargs)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def start_and_tell(config: TeacherConfig, *args: Any) -> Any:
    started = start_engine(config, *args)
    held = sum(parameter.numel() for parameter in started.module.parameters())
    # One write a line: ranks share the pipe.
    sys.stdout.write(f"HOLDS {config.output.name} stage {config.zero.stage}: {held} parameters\n")
    sys.stdout.flush()
    return started


deepspeed_config, start_engine = engine.deepspeed_config, engine.start_engine


def start_all(arguments: list[str]) -> None:
    engine.deepspeed_config = settings_without_whole_parameters
    training.start_engine = start_and_tell
    runtime = start_runtime(threads=1)
    with process_group(runtime, single=True):
        for argument in arguments:
            path, _, steps = argument.partition("@")
            config = load_config(TeacherConfig, Path(path))
            try:
                training.train_teacher(config, runtime, StopAfter(int(steps) if steps else None))
            except KdecsError as error:
                sys.stdout.write(f"RANK {runtime.rank} {type(error).__name__}: {error}\n")
                sys.stdout.flush()
            any_rank(False, runtime)  # a barrier


if __name__ == "__main__":
    run_entry(lambda: start_all(sys.argv[1:]))
