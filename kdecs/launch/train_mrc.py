"""Train the MRC baseline of RECCON, an encoder that answers questions. The same command resumes after any stop."""

import functools

from kdecs.artifact import is_complete
from kdecs.config import config_hash
from kdecs.mrc.config import MrcConfig
from kdecs.process import run_entry, say_skipped, stage_config

EXAMPLES = """\
  python -m kdecs.launch.train_mrc --config roberta-base
  python -m kdecs.launch.train_mrc --config spanbert --set optimization.seed=1
  python -m kdecs.launch.train_mrc --config minilm --set corpus.train_share=0.1
"""


def main() -> None:
    config = stage_config(MrcConfig, "mrc", str(__doc__), EXAMPLES)
    if is_complete(config.output, "mrc", config_hash(config)):
        say_skipped(f"MRC baseline {config.name}: complete at {config.output}, skipped")
        return
    # torch takes seconds to import, so it waits until there is work.
    from kdecs.mrc.training import mrc_record, train_mrc
    from kdecs.process import StopSignal
    from kdecs.runtime import start_runtime
    from kdecs.tracking.stage import stage_upload

    stop = StopSignal()
    stop.install()
    record = functools.partial(mrc_record, config)
    with stage_upload(config.tracking, config.output, record, is_main=True) as upload:
        runtime = start_runtime(threads=config.threads)
        train_mrc(config, runtime, on_epoch=upload.sync, stop=stop)


if __name__ == "__main__":
    run_entry(main)
