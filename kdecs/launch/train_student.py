"""Train a student to predict emotion, connective and cause span together, distilled from a teacher's soft labels.

Run one process, or one per GPU with torchrun or the deepspeed launcher. The same command resumes after any stop.
"""

import functools

from kdecs.artifact import is_complete
from kdecs.config import config_hash
from kdecs.process import StopSignal, quick_imports, run_entry, say_skipped, stage_config
from kdecs.student.config import StudentConfig

EXAMPLES = """\
  python -m kdecs.launch.train_student --config kd
  torchrun --nproc_per_node 4 -m kdecs.launch.train_student --config kd
  deepspeed --num_gpus 4 --module kdecs.launch.train_student --config kd
  python -m kdecs.launch.train_student --config joint --set optimization.seed=1
"""


def main() -> None:
    config = stage_config(StudentConfig, "student", str(__doc__), EXAMPLES)
    if is_complete(config.output, "student", config_hash(config)):
        say_skipped(f"student {config.name}: complete at {config.output}, skipped")
        return
    # torch takes seconds to import, so it waits until there is work.
    with quick_imports():
        from kdecs.runtime import process_group, start_runtime
        from kdecs.student.training import student_record, train_student
        from kdecs.tracking.stage import stage_upload

    stop = StopSignal()
    runtime = start_runtime(threads=config.threads)
    with process_group(runtime, lost_rank_s=config.lost_rank_s):
        # Not before: a rank that waits for the others has nothing to save, and SIGTERM should end it at once.
        stop.install()
        record = functools.partial(student_record, config)
        with stage_upload(config.tracking, config.output, record, is_main=runtime.is_main) as upload:
            train_student(config, runtime, on_epoch=upload.sync, stop=stop)


if __name__ == "__main__":
    run_entry(main)
