"""`kdecs report`, and what the driver shares with it."""

from pathlib import Path
from typing import Annotated

import typer

from kdecs.artifact import read_manifest
from kdecs.errors import ArtifactError, DependencyError
from kdecs.sweep.config import REPORT_FOLDER


def report(
    sweep_dir: Annotated[Path, typer.Argument(metavar="SWEEP_DIR", help="a finished sweep's directory")],
) -> None:
    """Write a sweep's report: a page that opens offline, with tables and figures (HTML + PNG)."""
    typer.echo(f"report: {write_report_of(sweep_dir.absolute())}")


def write_report_of(sweep: Path) -> Path:
    """Write a sweep's report and return its page. Raises DependencyError where a package for it is missing."""
    try:
        from kdecs.sweep.report.page import write_report
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{error.name} is not installed, which reports need; install it with: pip install 'kdecs[sweep]'"
        ) from None
    return write_report(sweep)


def is_report_of(sweep: Path, digest: str) -> bool:
    """Whether the sweep's directory holds a whole report of this state of it."""
    try:
        return read_manifest(sweep / REPORT_FOLDER, "report").inputs.get("sweep") == digest
    except ArtifactError:
        return False
