"""The command `kdecs`. Heavy imports happen inside the commands: `kdecs --help` answers in under a second."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdecs import __version__
from kdecs.annotate import commands as annotate_commands
from kdecs.baselines import commands as baseline_commands
from kdecs.baselines.generative import commands as generative_commands
from kdecs.corpus import commands as corpus_commands
from kdecs.errors import EXIT_STOPPED
from kdecs.evaluation import commands as evaluation_commands
from kdecs.process import exit_code_of, open_standard_streams
from kdecs.serve import commands as serve_commands
from kdecs.soft_labels import commands as soft_label_commands
from kdecs.student import commands as student_commands
from kdecs.sweep import commands as sweep_commands
from kdecs.teacher import commands as teacher_commands

app = typer.Typer(
    help="Emotion-cause extraction in dialogues by distillation (the method KD-ECS).",
    no_args_is_help=True,
    add_completion=False,
    # Typer's own tracebacks may show local variables, and with them what should not stand in a log.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(corpus_commands.app, name="corpus")
app.command("evaluate")(evaluation_commands.evaluate)
app.command("compare")(evaluation_commands.compare)
app.add_typer(annotate_commands.app, name="annotate")
app.add_typer(soft_label_commands.app, name="soft-labels")
app.add_typer(teacher_commands.app, name="teacher")
app.add_typer(student_commands.app, name="student")
app.command("predict")(student_commands.predict)
app.command("serve")(serve_commands.serve)
app.command("predict-mrc")(baseline_commands.predict)  # its older name
app.add_typer(baseline_commands.app, name="baseline")
baseline_commands.app.command("answer")(generative_commands.answer)
baseline_commands.app.command("prompt")(generative_commands.prompt)
app.add_typer(sweep_commands.app, name="sweep")
app.command("report")(sweep_commands.report)
app.command("plan", epilog=teacher_commands.EPILOG)(teacher_commands.plan)


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
    """Check every file of an artifact directory against its manifest: presence, size and sha256.

    Soft labels are also decoded: page checksums, columns, answer words, rows, splits and non-finite values.
    Nothing but the directory is needed.

    Example: kdecs verify runs/demo/labels/llama-tiny
    """
    from tqdm import tqdm

    from kdecs.artifact import read_manifest, verify_artifact
    from kdecs.errors import ArtifactError, printable

    manifest = read_manifest(directory)
    total = sum(entry.bytes for entry in manifest.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        faults = verify_artifact(directory, on_bytes=bar.update)
    if not faults and manifest.kind == "soft-labels":
        from kdecs.soft_labels.format import num_rows
        from kdecs.soft_labels.verify import content_faults

        with tqdm(total=num_rows(manifest), unit="pair", unit_scale=True, desc="decode", disable=None) as bar:
            faults = content_faults(directory, manifest, on_rows=bar.update)
    # The first fault is the error that ends the command, so the others come before it.
    for fault in faults[1:]:
        print(f"kdecs: error: {printable(fault)}", file=sys.stderr)
    if faults:
        more = f" ({len(faults)} faults in all)" if len(faults) > 1 else ""
        raise ArtifactError(f"{faults[0]}{more}")
    print(
        f"{directory}: {manifest.kind}, {len(manifest.files)} files, {total} bytes, all as the manifest says"
    )


@app.command("configs")
def configs(
    name: Annotated[
        str | None, typer.Argument(metavar="[STAGE[/NAME]]", help="A stage, or one config of a stage.")
    ] = None,
) -> None:
    """List the configs that come with kdecs, of all stages or of one, or print one of them for you to change.

    Every stage takes these names: --config NAME, or --config STAGE/NAME for a config of another stage.

    Example: kdecs configs student/kd > my-student.yaml
    """
    from kdecs.config import COMMITTED
    from kdecs.errors import ConfigError

    stages = sorted(path.name for path in COMMITTED.iterdir() if path.is_dir())
    stage, _, config = (name or "").partition("/")
    if stage and stage not in stages:
        raise ConfigError(f"{stage}: no such stage; kdecs has configs for: {', '.join(stages)}")
    if config:
        path = COMMITTED / stage / f"{config}.yaml"
        if not path.is_file():
            raise ConfigError(f"{name}: no such config; kdecs configs {stage} lists those that there are")
        print(path.read_text(encoding="utf-8"), end="")
        return
    for each in [stage] if stage else stages:
        for path in sorted((COMMITTED / each).glob("*.yaml")):
            print(f"{each}/{path.stem}")


def main() -> None:
    """Entry point. A refusal prints one line on stderr and exits with 1; a usage error exits with 2."""
    open_standard_streams(prints_result=True)
    # `timeout` and schedulers end a command like this, and its temporary files should go with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    sys.exit(exit_code_of(lambda: app(standalone_mode=True)))


if __name__ == "__main__":
    main()
