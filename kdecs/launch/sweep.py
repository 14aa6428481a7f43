"""Train a sweep of students over seeds, alpha, temperature, teacher and more, by Ray Tune, tracked in MLflow.

Trials that are complete are skipped; the same command goes on after any stop or kill.
"""

import argparse
from pathlib import Path

from kdecs.config import load_config
from kdecs.process import run_entry
from kdecs.sweep.config import SweepConfig

EXAMPLES = """examples:
  python tune/sweep.py tune/spaces/demo.yaml --dry-run
  python tune/sweep.py tune/spaces/demo.yaml --set output=runs/sweep --set max_concurrent_trials=4
  python tune/sweep.py tune/spaces/teacher_scale.yaml --build
  python tune/sweep.py tune/spaces/main.yaml --set gpus_per_trial=0.5 --set tracking.uri=http://mlflow:5000
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="the sweep's config")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one dotted key of the config; repeatable",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print trials, hours by estimate and what is done; train nothing",
    )
    parser.add_argument(
        "--build", action="store_true", help="train and export teachers whose soft labels are missing, first"
    )
    arguments = parser.parse_args()
    config = load_config(SweepConfig, arguments.space, arguments.overrides)
    if arguments.dry_run:
        from kdecs.sweep.progress import print_dry_run

        print_dry_run(config)
        return
    from kdecs.process import StopSignal
    from kdecs.sweep.driver import run_sweep

    stop = StopSignal()
    stop.install()
    run_sweep(config, stop=stop, build=arguments.build)


if __name__ == "__main__":
    run_entry(main)
