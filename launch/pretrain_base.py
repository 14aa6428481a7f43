"""The door of a checkout to `kdecs.launch.pretrain_base`."""

from kdecs.launch.pretrain_base import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
