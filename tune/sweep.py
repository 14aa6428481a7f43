"""The door of a checkout to `kdecs.launch.sweep`."""

from kdecs.launch.sweep import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
