"""Fine-tune a teacher under DeepSpeed ZeRO to predict the connective between two utterances.

The same command resumes after any stop.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdecs.artifact import is_complete
from kdecs.config import config_hash, find_config, load_config
from kdecs.output import refuse_overlaps
from kdecs.process import (
    StopSignal,
    is_main_rank,
    launched_rank,
    quick_imports,
    run_entry,
    say_skipped,
    stage_parser,
)
from kdecs.teacher.config import TeacherConfig, TuningConfig

if TYPE_CHECKING:
    from kdecs.runtime import Runtime

EXAMPLES = """\
  deepspeed --module kdecs.launch.train_teacher --config llama-7b
  deepspeed --hostfile cluster/hostfile --module kdecs.launch.train_teacher --config llama-13b --set zero.stage=3
  python -m kdecs.launch.train_teacher --config roberta-base   # one process
  python -m kdecs.launch.train_teacher --config llama-7b --dry-run
"""


def main() -> None:
    parser = stage_parser("teacher", str(__doc__), EXAMPLES)
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory, steps and time by the plan; start nothing"
    )
    arguments = parser.parse_args()
    config = load_config(TeacherConfig, find_config("teacher", arguments.config), arguments.overrides)
    refuse_overlaps(config)
    if arguments.dry_run:
        with quick_imports():
            from kdecs.teacher.plan.planning import dry_run

        # Under a launcher every rank comes here.
        if is_main_rank():
            dry_run(config, world_size=launched_rank()[2])
        return

    def trainer() -> Trainer:
        from kdecs.teacher.training import train_teacher

        return train_teacher

    train_under_deepspeed(config, "teacher", trainer)


Trainer = Callable[[Any, "Runtime", StopSignal], Path]


def train_under_deepspeed(
    config: TuningConfig, kind: Literal["teacher", "generative"], trainer: Callable[[], Trainer]
) -> None:
    """Start the ranks of a fine-tuning and run it, unless its output is complete.

    `trainer` imports what trains, once the device is set.
    """
    if is_complete(config.output, kind, config_hash(config)):
        say_skipped(f"{kind} {config.name}: complete at {config.output}, skipped")
        return
    if config.tracking is not None:
        from kdecs.tracking.mlflow import tracking_uri

        tracking_uri(
            config.tracking, config.output
        )  # a store that MLflow has retired is refused before hours of work
    with quick_imports():
        from kdecs.runtime import import_deepspeed, process_group, start_runtime

        # This sets DS_ACCELERATOR on CPUs, which DeepSpeed reads once, when it is imported.
        runtime = start_runtime(threads=config.threads_per_rank)
        import_deepspeed()
        train = trainer()

    stop = StopSignal()
    # DeepSpeed's engine needs a group even for one rank.
    with process_group(runtime, single=True, lost_rank_s=config.lost_rank_s):
        # Not before: a rank that waits for the others has nothing to save, and SIGTERM should end it at once.
        stop.install()
        train(config, runtime, stop)


if __name__ == "__main__":
    run_entry(main)
