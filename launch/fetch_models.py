"""The door of a checkout to `kdecs.launch.fetch_models`."""

from kdecs.launch.fetch_models import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
