"""`kdecs report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    sweep_dir: Annotated[Path, typer.Argument(metavar="SWEEP_DIR", help="a finished sweep's directory")],
) -> None:
    """Write a sweep's report: a page that opens offline, with tables and figures (HTML + PNG)."""
    from kdecs.errors import DependencyError

    try:
        from kdecs.sweep.report import write_report
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{error.name} is not installed, which reports need; install it with: pip install 'kdecs[sweep]'"
        ) from None
    typer.echo(f"report: {write_report(sweep_dir.absolute())}")
