"""The commands `kdecs annotate …`. Slow imports stand inside the functions."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kdecs.endpoint.commands import (
    Attempts,
    Concurrency,
    KeyVariable,
    Options,
    PerMinute,
    Timeout,
    request_options,
)

if TYPE_CHECKING:
    from kdecs.annotate.planning import StepPlan
    from kdecs.annotate.project import ModelConfig, Project

app = typer.Typer(
    no_args_is_help=True,
    help="Label your own dialogues as the paper did: by language models, people and rules, in one project directory.",
)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the project.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
InputPrice = Annotated[
    float | None,
    typer.Option("--input-price", min=0, help="Dollars per million prompt tokens, if project.yaml has none."),
]
OutputPrice = Annotated[
    float | None,
    typer.Option(
        "--output-price", min=0, help="Dollars per million answer tokens, if project.yaml has none."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="A model of project.yaml, or any name that the server knows."
    ),
]
RunName = Annotated[
    str | None,
    typer.Option(
        "--run", metavar="NAME", help="Name of the run, to have several of one model; default: the model's."
    ),
]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make the project in.")],
    input: Annotated[
        list[Path],
        typer.Option("--input", metavar="FILE", help="Dialogues in any format that kdecs reads; repeatable."),
    ],
    labels: Annotated[
        str,
        typer.Option(
            metavar="coarse|fine|FILE",
            help="Emotions: RECCON's (coarse), FG-RECCON's 16 (fine), or a file with one label per line.",
        ),
    ] = "coarse",
    annotator: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A person who will review; repeatable.")
    ] = None,
    causes_after: Annotated[
        int, typer.Option(min=0, help="How many turns after the emotional one a cause may lie.")
    ] = 0,
) -> None:
    """Make an annotation project of dialogues. Their labels, if they have any, are left out.

    Example: kdecs annotate init mine --input chats.csv --labels fine --annotator ann --annotator ben --annotator cem
    """
    from kdecs.annotate.project import PROJECT_NAME, create_project
    from kdecs.process import say

    project = create_project(
        directory, input, labels=labels, annotators=annotator or [], causes_after=causes_after
    )
    num_turns = sum(len(dialogue.utterances) for dialogue in project.dialogues.values())
    say(
        f"{directory}: {len(project.dialogues):,} dialogues, {num_turns:,} turns, {len(project.config.labels)} labels; "
        f"name your models and their prices in {directory / PROJECT_NAME}"
    )


@app.command()
def plan(
    directory: Directory,
    model: Model = None,
    run: RunName = None,
    input_price: InputPrice = None,
    output_price: OutputPrice = None,
    as_json: Json = False,
) -> None:
    """Count the calls that are still to be made, their tokens and price. Asks nothing.

    Without --model it plans all models of project.yaml. What depends on answers to come is estimated.

    Example: kdecs annotate plan mine --model gpt-4o-mini --input-price 0.15 --output-price 0.6
    """
    from kdecs.annotate.planning import plan_run
    from kdecs.annotate.project import Project
    from kdecs.errors import ConfigError

    project = Project.open(directory)
    names = [model] if model else list(project.config.models)
    if not names:
        raise ConfigError(
            f"{directory}: project.yaml names no model; add one there, or name one with --model"
        )
    if run and not model:
        raise typer.BadParameter("--run: names the run of a model; add --model NAME")
    planned = []
    for each in names:
        name, chosen = _chosen_model(project, each, run, input_price=input_price, output_price=output_price)
        planned += plan_run(project, name, chosen.settings(name), chosen.prices)
    if as_json:
        print(json.dumps([row.as_dict() for row in planned], indent=2))
    else:
        _print_plan(planned)


@app.command("run")
def run_command(
    directory: Directory,
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help="A model of project.yaml, or any name that the server knows."),
    ],
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server, up to the path before /chat/completions, such as https://api.openai.com/v1; default: that "
            "of project.yaml.",
        ),
    ] = None,
    run: RunName = None,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="How often to ask again after a faulty answer; default: 2.")
    ] = None,
    answers: Annotated[
        Literal["schema", "text"] | None,
        typer.Option(
            help="schema (default): ask for JSON by its schema, without it if the server refuses; text: never by it."
        ),
    ] = None,
    max_answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; default: 2048.")
    ] = None,
    option: Options = None,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    concurrency: Concurrency = 4,
    per_minute: PerMinute = 0,
    timeout: Timeout = 120,
    attempts: Attempts = 6,
    input_price: InputPrice = None,
    output_price: OutputPrice = None,
) -> None:
    """Have a model label all dialogues: one call per dialogue for emotions, one for causes, more for faulty answers.

    Every answer is recorded at once. The same command goes on after any stop and repeats no call that was answered.
    Labels that the model cannot give stay open. The key is read from an environment variable and written nowhere.

    Example: kdecs annotate run mine --model gpt-4o-mini --base-url https://api.openai.com/v1
    """
    from kdecs.annotate.planning import plan_run
    from kdecs.annotate.project import Project
    from kdecs.annotate.running import Run, Summary, run_model
    from kdecs.endpoint.client import check_url
    from kdecs.process import StopSignal, endpoint_key, say

    project = Project.open(directory)
    given: dict[str, Any] = {
        "base_url": base_url,
        "repeats": repeats,
        "answers": answers,
        "max_answer_tokens": max_answer_tokens,
        "options": request_options(option) or None,
        "input_price": input_price,
        "output_price": output_price,
    }
    name, chosen = _chosen_model(project, model, run, **given)
    if chosen.base_url is None:
        raise typer.BadParameter(
            "--base-url: missing; give the URL of a server here, or as base_url of the model in project.yaml"
        )
    url = check_url(chosen.base_url)
    settings = chosen.settings(name).model_copy(update={"base_url": url})
    key = endpoint_key(key_variable)
    _print_plan(plan_run(project, name, settings, chosen.prices))
    begun = Run.start(project, name, settings)
    endpoint = begun.endpoint(
        key=key, timeout_s=timeout, attempts=attempts, per_minute=per_minute, concurrency=concurrency
    )
    stop = StopSignal()
    stop.install()
    labelled = run_model(begun, endpoint, stop, prices=chosen.prices)
    summary = Summary.of(begun, labelled)
    cost = "" if chosen.prices is None else f", ${summary.usage.price(chosen.prices):.4f}"
    say(f"{summary}{cost}")


def _chosen_model(project: "Project", model: str, run: str | None, **given: Any) -> "tuple[str, ModelConfig]":
    """The name of a run and its settings: those of project.yaml, under what the command line gives."""
    from kdecs.annotate.project import ModelConfig
    from kdecs.config import parse_config
    from kdecs.errors import ConfigError

    known = project.config.models.get(model, ModelConfig())
    # A model's name may hold slashes and colons, which a folder's name should not.
    name = run or re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--run {name}: expected letters, digits, dots, dashes and underscores")
    if name in project.reviewers or name in project.config.annotators:
        raise ConfigError(f"{name}: is the name of an annotator; give the run another name, with --run NAME")
    values = known.model_dump() | {"model": known.model or model}
    options = {**known.options, **(given.pop("options", None) or {})}
    values |= {key: value for key, value in given.items() if value is not None} | {"options": options}
    return name, parse_config(ModelConfig, values, source="kdecs annotate")


def _print_plan(planned: "list[StepPlan]") -> None:
    from kdecs.endpoint.client import CHARACTERS_PER_TOKEN
    from kdecs.tables import figures_table, terminal

    table = figures_table(
        "Calls to make", "run", "step", "calls", "prompt tokens", "answer tokens", "dollars"
    )
    for row in planned:
        price = "?" if row.price is None else f"{row.price:,.4f}"
        number = f"{'≤ ' if row.num_estimated else ''}{row.num_calls:,}"
        table.add_row(row.run, row.step, number, f"{row.prompt_tokens:,}", f"{row.answer_tokens:,}", price)
    is_priced = all(row.price is not None for row in planned)
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{'≤ ' if any(row.num_estimated for row in planned) else ''}{sum(row.num_calls for row in planned):,}",
        f"{sum(row.prompt_tokens for row in planned):,}",
        f"{sum(row.answer_tokens for row in planned):,}",
        f"{sum(row.price or 0.0 for row in planned):,.4f}" if is_priced else "?",
    )
    console = terminal()
    console.print(table)
    console.print(
        f"Tokens are estimated at {CHARACTERS_PER_TOKEN} characters each. Calls marked ≤ depend on answers to come: "
        "they are counted as if every turn were emotional. Questions that are asked again after a faulty answer are "
        "not counted."
    )
