"""The door of a checkout to `kdecs.launch.train_generative`."""

from kdecs.launch.train_generative import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
