"""The door of a checkout to `kdecs.launch.train_baseline` for the MRC baseline: `minilm` is the config mrc-minilm."""

import functools

from kdecs.launch.train_baseline import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(functools.partial(main, is_mrc=True))
