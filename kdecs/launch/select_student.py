"""Choose the best student of a finished sweep on validation, or take one that you picked in MLflow; score it on test
once, and register it in MLflow.

A second call prints the record and does not open the test split again. With --table, the chosen seed of every setting
is then scored on test as well, once, for tables; the choice stays as it is.
"""

import argparse
from pathlib import Path

from kdecs.process import quick_imports, run_entry

EXAMPLES = """examples:
  python -m kdecs.launch.select_student --sweep runs/sweep
  python -m kdecs.launch.select_student --sweep runs/sweep --from-mlflow 'llama-7b α0.6 τ2'
  python -m kdecs.launch.select_student --sweep runs/sweep --table
  python -m kdecs.launch.select_student --from-mlflow 3f0c2d5b8a914e6f9b7d1a2c3e4f5061
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="a finished sweep's directory")
    parser.add_argument(
        "--from-mlflow",
        metavar="RUN|SETTING",
        help="take what you picked in MLflow instead of the best: the id of a trial's or a setting's run, or the name "
        "of a setting, whose best seed is taken; without --sweep, the server of MLFLOW_TRACKING_URI or runs/mlflow.db "
        "knows the sweep",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="after the choice, score the chosen seed of every setting on test, for tables; refused before the choice",
    )
    arguments = parser.parse_args()
    sweep: Path | None = arguments.sweep.absolute() if arguments.sweep else None
    if sweep is None and arguments.from_mlflow is None:
        parser.error("expected --sweep DIR, --from-mlflow RUN|SETTING, or both")
    if arguments.table and (sweep is None or arguments.from_mlflow is not None):
        parser.error("--table: expected --sweep DIR and no --from-mlflow; the choice is on record already")
    # Torch and MLflow take seconds to import, which --help need not wait for.
    with quick_imports():
        from kdecs.sweep.selection.choose import print_selection, select_student
        from kdecs.sweep.selection.on_test import print_settings_on_test, score_settings
        from kdecs.sweep.selection.pick import pick_from_mlflow

    if arguments.table:
        assert sweep is not None
        print_settings_on_test(score_settings(sweep))
        return
    pick = None
    if arguments.from_mlflow is not None:
        sweep, pick = pick_from_mlflow(arguments.from_mlflow, sweep)
    assert sweep is not None
    print_selection(sweep, select_student(sweep, pick))


if __name__ == "__main__":
    run_entry(main)
