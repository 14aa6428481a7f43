"""The arguments and options that several modules of commands of `kdecs annotate` take."""

from pathlib import Path
from typing import Annotated

import typer

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the project.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
