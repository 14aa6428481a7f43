"""Train a small base model and its tokenizer from scratch on the text of a corpus, to try kdecs without a model hub."""

from kdecs.artifact import is_complete
from kdecs.config import config_hash
from kdecs.demo.config import BaseModelConfig
from kdecs.process import StopSignal, quick_imports, run_entry, say_skipped, stage_config

EXAMPLES = """\
  python -m kdecs.launch.pretrain_base --config base_llama
  python -m kdecs.launch.pretrain_base --config base_llama --set max_steps=100
"""


def main() -> None:
    config = stage_config(BaseModelConfig, "demo", str(__doc__), EXAMPLES)
    if is_complete(config.output, "base-model", config_hash(config)):
        say_skipped(f"base model {config.name}: complete at {config.output}, skipped")
        return
    # torch takes seconds to import, so it waits until there is work.
    with quick_imports():
        from kdecs.demo.base_model import train_base_model
        from kdecs.runtime import start_runtime

    stop = StopSignal()
    stop.install()
    runtime = start_runtime(threads=config.threads)
    path = train_base_model(config, runtime, stop)
    print(f"base model {config.name}: {config.architecture}, {config.max_steps} steps, written to {path}")


if __name__ == "__main__":
    run_entry(main)
