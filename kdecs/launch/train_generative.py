"""Fine-tune a language model under DeepSpeed ZeRO to name a target's emotion and causes in words (Table 4's LLaMA).

The same command resumes after any stop.
"""

from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.launch.train_teacher import Trainer, train_under_deepspeed
from kdecs.process import run_entry, stage_config

EXAMPLES = """\
  deepspeed --module kdecs.launch.train_generative --config llama-7b
  deepspeed --hostfile cluster/hostfile --module kdecs.launch.train_generative --config llama-13b
  python -m kdecs.launch.train_generative --config smollm2-135m   # one process
"""


def main() -> None:
    def trainer() -> Trainer:
        from kdecs.baselines.generative.training import train_generative

        return train_generative

    config = stage_config(GenerativeConfig, "generative", str(__doc__), EXAMPLES)
    train_under_deepspeed(config, "generative", trainer)


if __name__ == "__main__":
    run_entry(main)
