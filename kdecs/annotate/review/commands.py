"""The commands `kdecs annotate review …`. Slow imports stand inside the functions."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from kdecs.annotate.options import Directory

app = typer.Typer(
    no_args_is_help=True, help="Have people label dialogues on a page, and take in what they saved."
)


@app.command("export")
def review_export(
    directory: Directory,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the page.")] = None,
    label_studio: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write tasks for Label Studio: a name that ends in .json. Their labelling configuration is "
            "written beside it, in .xml.",
        ),
    ] = None,
    dialogues: Annotated[
        Path | None,
        typer.Option("--list", metavar="FILE", help="A list of kdecs annotate sample or next; default: all."),
    ] = None,
    annotator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The one whose page or tasks these are, with the dialogues that the list gives them.",
        ),
    ] = None,
    suggest: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Run whose labels are shown as suggestions; repeatable for Label Studio. Default: none are shown.",
        ),
    ] = None,
) -> None:
    """Write dialogues for people to label: a page for their browser, by keyboard alone and without a network, or tasks
    for Label Studio.

    Examples:

    kdecs annotate review export mine --html review.html

    kdecs annotate review export mine --html ann.html --list first.jsonl --annotator ann --suggest gpt-4o-mini

    kdecs annotate review export mine --label-studio tasks.json --list first.jsonl --suggest gpt-4o-mini
    """
    from kdecs.annotate.project import Project
    from kdecs.annotate.review.label_studio import label_studio_tasks, labelling_configuration
    from kdecs.annotate.review.page import review_page
    from kdecs.annotate.running import read_annotations
    from kdecs.annotate.sampling import listed_dialogues
    from kdecs.output import open_output, refuse_inputs
    from kdecs.process import say

    if html is None and label_studio is None:
        raise typer.BadParameter("name what to write: --html FILE or --label-studio FILE")
    if html is not None and len(suggest or ()) > 1:
        raise typer.BadParameter("--suggest: the page shows the suggestions of one run; give it once")
    if label_studio is not None and label_studio.suffix != ".json":
        raise typer.BadParameter(
            f"--label-studio {label_studio}: expected a name that ends in .json, by which Label Studio reads it"
        )
    project = Project.open(directory)
    configuration = label_studio.with_suffix(".xml") if label_studio else None
    for output in (html, label_studio, configuration):
        if output is not None:
            refuse_inputs(output, [*project.files, dialogues])
    names = list(project.dialogues) if dialogues is None else listed_dialogues(dialogues, project, annotator)
    found = {each.name: each for each in read_annotations(project, suggest)} if suggest else {}
    suggestions = [found[name] for name in dict.fromkeys(suggest or ())]
    chosen = [project.dialogues[name] for name in names]
    if html is not None:
        reviewers = [annotator] if annotator else project.config.annotators
        page = review_page(project, chosen, reviewers, suggestions[0] if suggestions else None)
        with open_output(html) as written:
            written.write(page.encode())
        say(f"{html}: {len(chosen):,} dialogues")
    if label_studio is not None and configuration is not None:
        tasks = label_studio_tasks(project, chosen, suggestions)
        with open_output(configuration) as settings, open_output(label_studio) as written:
            settings.write(labelling_configuration(project.config.labels).encode())
            written.write(f"{json.dumps(tasks, ensure_ascii=False, indent=1)}\n".encode())
        say(
            f"{label_studio}: {len(chosen):,} dialogues; labelling configuration of the project: {configuration}"
        )


@app.command("import")
def review_import(
    directory: Directory,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            help="Files that the page saved, Label Studio's exports as JSON, or labelled corpora.",
        ),
    ],
    annotator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[USER=]NAME",
            help="The annotator whose labels these are: needed for a corpus; replaces the name in a saved file. With "
            "USER=, the name of a user of Label Studio, given by number or e-mail address; repeatable.",
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON object {label: label} for labels of a corpus that the project does not have.",
        ),
    ] = None,
) -> None:
    """Take the decisions of people into the project. All files are checked first; a file may be imported twice.

    Examples:

    kdecs annotate review import mine review-ann.json review-ben.json

    kdecs annotate review import mine project-1.json --annotator 1=ann --annotator 2=ben
    """
    from kdecs.annotate.labels import add_reviews
    from kdecs.annotate.project import NAME_PATTERN, Project
    from kdecs.annotate.review.importing import read_review
    from kdecs.annotate.running import now
    from kdecs.corpus.reading import read_table
    from kdecs.corpus.schema import NO_TABLE
    from kdecs.errors import ConfigError
    from kdecs.process import say

    users = dict(name.rsplit("=", 1) for name in annotator or () if "=" in name)
    names = [name for name in annotator or () if "=" not in name]
    if len(names) + bool(users) > 1:
        raise typer.BadParameter(
            "--annotator: expected one NAME, or a USER=NAME for each user of Label Studio"
        )
    project = Project.open(directory)
    mapping = read_table(table) if table else NO_TABLE
    whose = names[0] if names else None
    read = [
        (path, found) for path in files for found in read_review(path, project, whose, now(), mapping, users)
    ]
    for path, found in read:
        if not re.fullmatch(NAME_PATTERN, found.annotator):
            raise ConfigError(
                f"{path}: the annotator {found.annotator!r}, expected letters, digits, dots, dashes and underscores"
            )
        if found.annotator in project.run_names or found.annotator in project.config.models:
            raise ConfigError(
                f"{path}: {found.annotator} is the name of a run; give the annotator another one, with --annotator"
            )
    for path, found in read:
        num_new = add_reviews(project.review_file(found.annotator), found.lines)
        say(f"{path}: {num_new:,} new of {len(found.lines):,} decisions of {found.annotator}{found.note}")
