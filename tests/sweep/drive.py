"""Drives a sweep with the fake trainer in a process of its own, as `tune/sweep.py` does with the real one."""

import sys
from pathlib import Path

from fake_trainer import train

from kdecs.config import load_config
from kdecs.process import StopSignal, run_entry
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.driver import run_sweep


def main():
    stop = StopSignal()
    stop.install()
    run_sweep(load_config(SweepConfig, Path(sys.argv[1])), trainer=train, stop=stop)


if __name__ == "__main__":
    run_entry(main)
