"""The command `kdecs`. Heavy imports happen inside the commands: `kdecs --help` answers in under a second."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kdecs import __version__
from kdecs.corpus import commands as corpus_commands
from kdecs.entry import exit_code_of
from kdecs.evaluation import commands as evaluation_commands
from kdecs.student import commands as student_commands
from kdecs.sweep import commands as sweep_commands

app = typer.Typer(
    help="Emotion-cause extraction in dialogues by distillation (the method KD-ECS).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(corpus_commands.app, name="corpus")
app.command("evaluate")(evaluation_commands.evaluate)
app.command("compare")(evaluation_commands.compare)
app.command("predict")(student_commands.predict)
app.command("report")(sweep_commands.report)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kdecs {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Emotion-cause extraction in dialogues by distillation (the method KD-ECS)."""
    del version


@app.command("verify")
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Any artifact directory.")],
) -> None:
    """Check every file of an artifact directory against its manifest: presence, size, sha256.

    Example: kdecs verify runs/demo/labels/llama-tiny
    """
    from tqdm import tqdm

    from kdecs.artifact import FileEntry, read_manifest, verify_artifact
    from kdecs.errors import ArtifactError

    manifest = read_manifest(directory)
    total = sum(entry.bytes for entry in manifest.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:

        def advance(entry: FileEntry) -> None:
            bar.update(entry.bytes)

        faults = verify_artifact(directory, on_file=advance)
    for fault in faults[1:]:
        print(f"kdecs: error: {fault}", file=sys.stderr)
    if faults:
        more = f" ({len(faults)} faults in all)" if len(faults) > 1 else ""
        raise ArtifactError(f"{faults[0]}{more}")
    print(
        f"{directory}: {manifest.kind}, {len(manifest.files)} files, {total} bytes, all as the manifest says"
    )


def main() -> None:
    """Entry point: refusals are one line on stderr with exit code 1, usage errors exit with 2."""
    sys.exit(exit_code_of(lambda: app(standalone_mode=True)))


if __name__ == "__main__":
    main()
