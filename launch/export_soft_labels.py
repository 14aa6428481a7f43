"""The door of a checkout to `kdecs.launch.export_soft_labels`."""

from kdecs.launch.export_soft_labels import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
