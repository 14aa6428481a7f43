"""Fine-tune a teacher under DeepSpeed ZeRO to predict the connective between two utterances.

--dry-run: resolve the config, build the network on the meta device, print memory, steps and time; start nothing.
"""

import sys

from kdecs.artifact import is_complete
from kdecs.config import config_hash
from kdecs.process import is_main_rank, launched_rank, run_entry, say_skipped, stage_config
from kdecs.teacher.config import TeacherConfig

EXAMPLES = """\
  deepspeed --no_local_rank launch/train_teacher.py --config launch/configs/teacher/llama-7b.yaml
  deepspeed --hostfile cluster/hostfile --no_local_rank launch/train_teacher.py \\
      --config launch/configs/teacher/llama-13b.yaml --set zero.stage=3
  python launch/train_teacher.py --config launch/configs/teacher/roberta-base.yaml   # one process
  python launch/train_teacher.py --config launch/configs/teacher/llama-7b.yaml --dry-run
"""
DRY_RUN = "--dry-run"


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != DRY_RUN]
    config = stage_config(TeacherConfig, str(__doc__), EXAMPLES, argv=arguments)
    if DRY_RUN in sys.argv[1:]:
        from kdecs.teacher.plan.planning import dry_run

        if is_main_rank():
            dry_run(config, world_size=launched_rank()[2])
        return
    if is_complete(config.output, "teacher", config_hash(config)):
        say_skipped(f"teacher {config.name}: complete at {config.output}, skipped")
        return
    from kdecs.process import StopSignal
    from kdecs.runtime import process_group, start_runtime

    runtime = start_runtime(threads=config.threads_per_rank)
    from kdecs.teacher.training import train_teacher

    stop = StopSignal()
    stop.install()
    with process_group(runtime, single=True):
        train_teacher(config, runtime, stop)


if __name__ == "__main__":
    run_entry(main)
