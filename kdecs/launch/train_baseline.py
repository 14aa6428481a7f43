"""Train a system of Table 4: MRC, ECPE-2D, MGSAG, KEC or UECA-Prompt.

Run one process, or one per GPU with torchrun or the deepspeed launcher. The same command resumes after any stop.
"""

import functools

from kdecs.artifact import is_complete
from kdecs.baselines.config import MrcConfig, type_of_config
from kdecs.config import config_hash
from kdecs.process import StopSignal, quick_imports, run_entry, say_skipped, stage_config

EXAMPLES = """\
  python -m kdecs.launch.train_baseline --config ecpe-2d
  python -m kdecs.launch.train_baseline --config kec --set optimization.seed=1
  python -m kdecs.launch.train_baseline --config minilm --set system=mgsag
  torchrun --nproc_per_node 4 -m kdecs.launch.train_baseline --config mrc-roberta-base
"""


def main(*, is_mrc: bool = False) -> None:
    """Run the entry. `is_mrc`: for the MRC baseline alone, whose configs may be named without `mrc-`."""
    config = stage_config(
        MrcConfig if is_mrc else type_of_config,
        "baseline",
        str(__doc__),
        EXAMPLES,
        prefix="mrc-" if is_mrc else "",
    )
    if is_complete(config.output, config.kind, config_hash(config)):
        say_skipped(f"baseline {config.name}: complete at {config.output}, skipped")
        return
    # torch takes seconds to import, so it waits until there is work.
    with quick_imports():
        from kdecs.baselines.training import baseline_record, train_baseline
        from kdecs.runtime import process_group, start_runtime
        from kdecs.tracking.stage import stage_upload

    stop = StopSignal()
    runtime = start_runtime(threads=config.threads)
    with process_group(runtime, lost_rank_s=config.lost_rank_s):
        # Not before: a rank that waits for the others has nothing to save, and SIGTERM should end it at once.
        stop.install()
        record = functools.partial(baseline_record, config)
        with stage_upload(config.tracking, config.output, record, is_main=runtime.is_main) as upload:
            train_baseline(config, runtime, on_epoch=upload.sync, stop=stop)


if __name__ == "__main__":
    run_entry(main)
