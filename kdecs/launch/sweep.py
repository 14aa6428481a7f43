"""Train a sweep of students over seeds, alpha, temperature, teacher and more with Ray Tune; track it in MLflow.

Complete trials are skipped, so the same command resumes after any stop or kill.
"""

from kdecs.config import find_config, load_config
from kdecs.process import StopSignal, quick_imports, run_entry, stage_parser
from kdecs.sweep.config import SweepConfig

EXAMPLES = """\
  python -m kdecs.launch.sweep demo --dry-run
  python -m kdecs.launch.sweep demo --set output=runs/sweep --set max_concurrent_trials=4
  python -m kdecs.launch.sweep teacher_scale --build
  python -m kdecs.launch.sweep main --set gpus_per_trial=0.5 --set tracking.uri=http://mlflow:5000
"""


def main() -> None:
    parser = stage_parser("spaces", str(__doc__), EXAMPLES, is_positional=True)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the trials, what is done and the estimated hours; train nothing",
    )
    parser.add_argument(
        "--build",
        action="store_true",
        help="first train and export the teachers whose soft labels are missing",
    )
    arguments = parser.parse_args()
    config = load_config(SweepConfig, find_config("spaces", arguments.config), arguments.overrides)
    # Torch and Ray take seconds to import, and --help or a wrong config needs neither.
    if arguments.dry_run:
        with quick_imports():
            from kdecs.sweep.progress import print_dry_run

        print_dry_run(config)
        return
    with quick_imports():
        from kdecs.sweep.driver import run_sweep

    stop = StopSignal()
    stop.install()
    run_sweep(config, stop=stop, build=arguments.build)


if __name__ == "__main__":
    run_entry(main)
