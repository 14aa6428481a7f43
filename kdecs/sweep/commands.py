"""`kdecs report`, and the two functions that the driver shares with it. Drawing is imported when it is needed."""

from pathlib import Path
from typing import Annotated

import typer

from kdecs.artifact import check_sizes, read_manifest
from kdecs.errors import ArtifactError, DependencyError
from kdecs.process import say
from kdecs.sweep.config import REPORT_FOLDER


def report(
    sweep_dir: Annotated[Path, typer.Argument(metavar="SWEEP_DIR", help="A finished sweep's directory.")],
) -> None:
    """Write a sweep's report: a page that opens offline, with tables and figures (HTML + PNG)."""
    say(f"report: {write_report_of(sweep_dir.absolute())}")


def write_report_of(sweep: Path) -> Path:
    """Write a sweep's report and return its page. Raises DependencyError if a package for it is missing."""
    try:
        from kdecs.sweep.report.page import write_report
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"a report needs {error.name}, which is not installed; install it with: pip install 'kdecs[sweep]'"
        ) from None
    return write_report(sweep)


def is_report_of(sweep: Path, digest: str) -> bool:
    """Whether the sweep's directory holds a complete report of its present state."""
    try:
        manifest = read_manifest(sweep / REPORT_FOLDER, "report")
        check_sizes(sweep / REPORT_FOLDER, manifest)
        return manifest.inputs.get("sweep") == digest
    # A damaged report counts as none, so that it is written again.
    except ArtifactError:
        return False
