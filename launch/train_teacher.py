"""Fine-tune a teacher by LoRA under DeepSpeed ZeRO to predict the connective between two utterances."""

from kdecs.artifact import is_complete
from kdecs.config import config_hash
from kdecs.entry import run_entry, say_skipped, stage_config
from kdecs.teacher.config import TeacherConfig

EXAMPLES = """\
  deepspeed --no_local_rank launch/train_teacher.py --config launch/configs/teacher/llama-7b.yaml
  deepspeed --hostfile cluster/hostfile --no_local_rank launch/train_teacher.py \\
      --config launch/configs/teacher/llama-13b.yaml --set zero.stage=3
  python launch/train_teacher.py --config launch/configs/teacher/roberta-base.yaml   # one process
"""


def main() -> None:
    config = stage_config(TeacherConfig, str(__doc__), EXAMPLES)
    if is_complete(config.output, "teacher", config_hash(config)):
        say_skipped(f"teacher {config.name}: complete at {config.output}, skipped")
        return
    from kdecs.runtime import StopSignal, process_group, start_runtime

    runtime = start_runtime(threads=config.threads_per_rank)
    from kdecs.teacher.training import train_teacher

    stop = StopSignal()
    stop.install()
    with process_group(runtime, single=True):
        train_teacher(config, runtime, stop)


if __name__ == "__main__":
    run_entry(main)
