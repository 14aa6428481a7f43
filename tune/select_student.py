"""The door of a checkout to `kdecs.launch.select_student`."""

from kdecs.launch.select_student import main
from kdecs.process import run_entry

if __name__ == "__main__":
    run_entry(main)
