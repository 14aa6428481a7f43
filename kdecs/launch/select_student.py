"""Choose the best student of a finished sweep on validation, score it on test once, and register it in MLflow.

A second call prints the record and does not open the test split again.
"""

import argparse
from pathlib import Path

from kdecs.process import run_entry

EXAMPLES = """examples:
  python -m kdecs.launch.select_student --sweep runs/sweep
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sweep", type=Path, required=True, metavar="DIR", help="a finished sweep's directory"
    )
    sweep = parser.parse_args().sweep.absolute()
    # Torch and MLflow take seconds to import, which --help need not wait for.
    from kdecs.sweep.selection.choose import print_selection, select_student

    print_selection(sweep, select_student(sweep))


if __name__ == "__main__":
    run_entry(main)
