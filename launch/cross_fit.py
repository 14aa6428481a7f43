"""The door of a checkout to `kdecs.launch.cross_fit`."""

from kdecs.launch.cross_fit import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
