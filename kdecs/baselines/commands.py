"""`kdecs baseline`."""

import typer

app = typer.Typer(no_args_is_help=True, help="Predict with the systems that a student is compared with.")
