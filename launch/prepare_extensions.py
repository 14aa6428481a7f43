"""The door of a checkout to `kdecs.launch.prepare_extensions`."""

from kdecs.launch.prepare_extensions import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
