"""The commands `kdecs annotate …`. Slow imports stand inside the functions."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kdecs.annotate.options import Directory, Json
from kdecs.annotate.review import commands as review_commands
from kdecs.annotate.simulation import commands as simulation_commands
from kdecs.endpoint.options import (
    Attempts,
    Concurrency,
    KeyVariable,
    Options,
    PerMinute,
    Timeout,
    request_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdecs.annotate.labels import Annotation, TurnKey
    from kdecs.annotate.planning import StepPlan
    from kdecs.annotate.project import ModelConfig, Project
    from kdecs.annotate.sampling import Scored

app = typer.Typer(
    no_args_is_help=True,
    help="Label your own dialogues as the paper did: by language models, people and rules, in one project directory.",
)
app.add_typer(review_commands.app, name="review")

_MOST_CONFLICTS = 20
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
Annotators = Annotated[
    list[str] | None,
    typer.Option(
        "--annotator", metavar="NAME", help="A person or a run; repeatable. Default: all who have labelled."
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


@app.command()
def agreement(
    directory: Directory,
    annotator: Annotators = None,
    only: Annotated[
        Literal["all", "people", "models"],
        typer.Option(help="Whose labels to compare, if --annotator names none."),
    ] = "all",
    as_json: Json = False,
) -> None:
    """Show how far annotators agree about emotions and spans: kappa, alpha, PABAK, confusions, and change over time.

    Example: kdecs annotate agreement mine --only people
    """
    from kdecs.annotate.agreement import agreement_of
    from kdecs.annotate.project import Project
    from kdecs.annotate.running import read_annotations
    from kdecs.errors import ConfigError

    project = Project.open(directory)
    kinds = {"all": ("person", "model"), "people": ("person",), "models": ("model",)}[only]
    found = [each for each in read_annotations(project, annotator or ()) if annotator or each.kind in kinds]
    if len(found) < 2:
        names = ", ".join(each.name for each in found) or "nobody"
        raise ConfigError(f"{directory}: found the labels of {names}, expected two annotators to compare")
    config = project.config
    result = agreement_of(found, project.dialogues, len(config.labels), config.causes_after)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
        return
    from kdecs.tables import figures_table, terminal

    console = terminal()
    table = figures_table("Annotators", "annotator", "turns", "open", "mean kappa", "as the others' majority")
    for row in result.annotators:
        table.add_row(
            row["annotator"], f"{row['turns']:,}", f"{row['open']:,}", _figure(row["mean_kappa"]),
            _figure(row["against_the_others"]),
        )  # fmt: skip
    console.print(table)
    table = figures_table("Emotions", "pair", "turns", "agreement", "Cohen's kappa", "PABAK")
    for row in result.emotion_pairs:
        figures = (_figure(row[key]) for key in ("agreement", "kappa", "pabak"))
        table.add_row(f"{row['first']}, {row['second']}", f"{row['turns']:,}", *figures)
    console.print(table)
    console.print(
        f"Fleiss' kappa {_figure(result.fleiss_kappa)} ({result.fleiss_turns:,} turns that all of them labelled); "
        f"Krippendorff's alpha {_figure(result.alpha)} ({result.alpha_turns:,} turns that two or more labelled)"
    )
    table = figures_table(
        "Causes", "pair", "emotional turns", "cause turn F1", "spans", "exact", "token F1", "alpha_U"
    )
    for row in result.span_pairs:
        figures = (_figure(row[key]) for key in ("exact", "token_f1", "alpha_u"))
        table.add_row(
            f"{row['first']}, {row['second']}", f"{row['targets']:,}", _figure(row["cause_turn_f1"]),
            f"{row['spans']:,}", *figures,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"Krippendorff's alpha of {result.words:,} words, in a span or not: {_figure(result.word_alpha)}"
    )
    if result.confusions:
        table = figures_table("Labels of the same turn that differ most often", "labels", "count")
        for row in result.confusions:
            table.add_row(f"{row['first']}, {row['second']}", f"{row['count']:,}")
        console.print(table)
    table = figures_table("Over time (UTC)", "annotator", "from", "to", "turns", "as majority", tight=True)
    for row in result.over_time:
        share = _figure(row["against_the_others"])
        first, last = (row[key][:16].replace("T", " ") for key in ("from", "to"))
        table.add_row(row["annotator"], first, last, f"{row['turns']:,}", share)
    console.print(table)


@app.command()
def merge(
    directory: Directory,
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Corpus to write: JSON lines if the name ends in .jsonl, else RECCON's JSON."
        ),
    ],
    annotator: Annotators = None,
    allow_open: Annotated[
        bool,
        typer.Option(
            "--allow-open", help="Leave out dialogues with open emotions, and causes that are open."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge the labels into a corpus, by vote and by the paper's rule for spans, with where each label comes from.

    Where people labelled a turn their votes count, elsewhere those of the models. What stays open is listed, and the
    command ends with exit code 1 unless --allow-open leaves it out.

    Example: kdecs annotate merge mine --output mine.json
    """
    from dataclasses import asdict

    from kdecs.annotate.merging import accuracies, merged_dialogues, provenance
    from kdecs.annotate.merging import merge as merge_labels
    from kdecs.annotate.project import Project
    from kdecs.annotate.running import read_annotations
    from kdecs.corpus.commands import print_statistics
    from kdecs.corpus.formats.writing import DialogueWriter
    from kdecs.corpus.schema import Corpus
    from kdecs.corpus.statistics import statistics_of
    from kdecs.errors import AnnotationError, printable
    from kdecs.output import STANDARD_STREAM, open_output, refuse_inputs
    from kdecs.process import say
    from kdecs.tables import figures_table, terminal

    project = Project.open(directory)
    if output == STANDARD_STREAM:
        raise typer.BadParameter("--output: name a file; where each label comes from is written beside it")
    refuse_inputs(output, project.files)
    found = read_annotations(project, annotator or ())
    decisions = merge_labels(found, project.dialogues)
    conflicts = [conflict for decision in decisions.values() for conflict in decision.conflicts]
    if as_json and conflicts and not allow_open:
        print(json.dumps({"conflicts": [asdict(conflict) for conflict in conflicts]}, indent=2))
    if not as_json:
        for conflict in conflicts[:_MOST_CONFLICTS]:
            say(printable(f"open: {conflict}"))
        if len(conflicts) > _MOST_CONFLICTS:
            say(
                f"open: and {len(conflicts) - _MOST_CONFLICTS:,} more; kdecs annotate sample lists them for review"
            )
    merged = list(merged_dialogues(decisions, project.dialogues))
    if conflicts and not allow_open:
        raise AnnotationError(
            f"{directory}: {len(conflicts):,} decisions are open, so nothing was written; have the turns reviewed, or "
            "add --allow-open to leave them out"
        )
    if not merged:
        raise AnnotationError(
            f"{directory}: every dialogue has an open emotion, so there is no corpus to write"
        )
    sidecar = output.with_name(f"{output.name}.provenance.jsonl")
    kept = {dialogue.id for dialogue, _ in merged}
    # Both appear when both are complete.
    with open_output(sidecar) as lines, open_output(output) as written:
        for line in provenance(decisions):
            if line["dialogue_id"] in kept:
                lines.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        for text in DialogueWriter("jsonl" if output.suffix == ".jsonl" else "reccon").text(merged):
            written.write(text.encode())
    corpus = Corpus(output, tuple(dialogue for dialogue, _ in merged), Counter(), ())
    statistics, rows = statistics_of(corpus), accuracies(found, decisions)
    if as_json:
        result = {
            "conflicts": [asdict(conflict) for conflict in conflicts],
            "annotators": rows,
            "statistics": statistics.as_dict(),
            "provenance": str(sidecar),
        }
        print(json.dumps(result, indent=2))
        return
    table = figures_table(
        "Against the merged labels", "annotator", "turns", "votes", "emotions", "cause turn F1", "exact spans",
        "token F1",
    )  # fmt: skip
    for row in rows:
        keys = ("emotion_accuracy", "cause_turn_f1", "exact", "token_f1")
        table.add_row(
            row["annotator"], f"{row['turns']:,}", f"{row['voted']:,}", *(_percent(row[key]) for key in keys)
        )
    terminal().print(table)
    print_statistics([statistics])
    left_out = len(project.dialogues) - len(merged)
    num_single = sum(len(decision.voters) == 1 for decision in decisions.values())
    say(
        f"{output}: {len(merged):,} dialogues ({left_out:,} left out); {num_single:,} of {len(decisions):,} emotions "
        f"rest on one vote; where each label comes from: {sidecar}"
    )


@app.command()
def sample(
    directory: Directory,
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Where to write the list: JSON lines, the first dialogue first."),
    ],
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="REASON",
            help="disagreement, causes, open, rare, rule or confidence; repeatable, all count alike. Default: the "
            "first four.",
        ),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Predictions of a student, which count as one more annotator; repeatable."
        ),
    ] = None,
    number: Annotated[int | None, typer.Option(min=1, help="Most dialogues of the list.")] = None,
    each: Annotated[
        int | None, typer.Option(min=1, help="Annotators per dialogue; default: all of project.yaml.")
    ] = None,
) -> None:
    """List the dialogues that people should review, the most instructive first, and who should review each.

    Reasons: disagreement of runs and predictions about emotions or causes, open labels, rare labels, causes that differ
    from the rule (the turn itself and the one before), and predictions of low confidence.

    Example: kdecs annotate sample mine --output first.jsonl --number 100 --each 3
    """
    from kdecs.annotate.project import Project
    from kdecs.annotate.sampling import REASONS, ranked
    from kdecs.output import refuse_inputs

    project = Project.open(directory)
    refuse_inputs(output, [*project.files, *(predictions or [])])
    if unknown := [reason for reason in by or () if reason not in REASONS]:
        raise typer.BadParameter(f"--by {unknown[0]}: expected one of {', '.join(REASONS)}")
    chosen = [reason for reason in REASONS if reason in (by or REASONS[:4])]
    if "confidence" in chosen and not predictions:
        raise typer.BadParameter("--by confidence: needs the scores of --predictions FILE")
    annotations, unsure = _sources(project, predictions or [], has_scores="confidence" in chosen)
    _write_list(
        output, project, ranked(annotations, project.dialogues, chosen, unsure), _reviewed(project, annotations),
        number=number, each=each, by=", ".join(chosen),
    )  # fmt: skip


@app.command("next")
def next_command(
    directory: Directory,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many dialogues.")] = 20,
    by: Annotated[
        Literal["disagreement", "uncertainty", "random"],
        typer.Option(
            help="disagreement of runs, predictions and the distance rule; uncertainty of a student about causes; or "
            "random."
        ),
    ] = "disagreement",
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Predictions of a student, of its teacher or of any other system; repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides random, and between dialogues that are equal.")] = 0,
    each: Annotated[
        int | None, typer.Option(min=1, help="Annotators per dialogue; default: all of project.yaml.")
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the list; - is standard output.")
    ] = Path("-"),
) -> None:
    """Choose the dialogues that people should label next, among those that nobody has labelled yet.

    Train a student on what is labelled, have it predict all dialogues, and give its predictions: dialogues about which
    it is unsure, or differs from other systems, come first. kdecs soft-labels predict writes a teacher's soft labels as
    predictions. kdecs annotate review export takes the list.

    Examples:

    kdecs annotate next mine -n 20 --predictions student.jsonl --output next.jsonl

    kdecs annotate next mine -n 20 --predictions student.jsonl --predictions teacher.jsonl --output next.jsonl

    kdecs annotate next mine -n 20 --by uncertainty --predictions student.jsonl --output next.jsonl
    """
    from kdecs.annotate.project import Project
    from kdecs.annotate.sampling import STRATEGIES, ranked_by
    from kdecs.output import refuse_inputs

    project = Project.open(directory)
    refuse_inputs(output, [*project.files, *(predictions or [])])
    has_scores = "confidence" in STRATEGIES[by]
    if has_scores and not predictions:
        raise typer.BadParameter("--by uncertainty: needs the scores of a student; add --predictions FILE")
    # Chance needs nobody's labels.
    annotations, unsure = _sources(
        project, predictions or [], has_scores=has_scores, may_be_none=by == "random"
    )
    reviewed = _reviewed(project, annotations)
    labelled: set[str] = set().union(*reviewed.values())
    left = {name: dialogue for name, dialogue in project.dialogues.items() if name not in labelled}
    _write_list(
        output, project, ranked_by(by, annotations, left, unsure, seed), reviewed, number=number, each=each, by=by
    )  # fmt: skip


def _sources(
    project: "Project", predictions: "Sequence[Path]", *, has_scores: bool, may_be_none: bool = False
) -> "tuple[list[Annotation], dict[TurnKey, float]]":
    """The labels of all people, runs and prediction files, and how unsure the latter are of each turn's causes.

    Raises PredictionError if scores are needed and there are none, ConfigError if nobody has labelled anything.
    """
    from kdecs.annotate.running import read_annotations
    from kdecs.annotate.sampling import annotation_of_predictions
    from kdecs.errors import PredictionError

    names = [*project.reviewers, *project.run_names]
    annotations = read_annotations(project) if names or not (predictions or may_be_none) else []
    unsure: dict[TurnKey, float] = {}
    for path in predictions:
        annotation, found = annotation_of_predictions(path, project.dialogues, project.config.labels)
        annotations.append(annotation)
        unsure |= {key: max(value, unsure.get(key, 0.0)) for key, value in found.items()}
    if has_scores and not unsure:
        raise PredictionError(
            f"{', '.join(map(str, predictions))}: found no line with a score, expected the predictions of a student "
            "with scores; write them with kdecs predict --offsets"
        )
    return annotations, unsure


def _reviewed(project: "Project", annotations: "Sequence[Annotation]") -> dict[str, set[str]]:
    """For each person of the project the dialogues of which they labelled every turn."""
    people = {each.name: each for each in annotations if each.kind == "person"}
    reviewed = {}
    for name in dict.fromkeys((*project.config.annotators, *project.reviewers)):
        done = people[name].labels.keys() if name in people else set()
        reviewed[name] = {
            dialogue.id
            for dialogue in project.dialogues.values()
            if all((dialogue.id, u.turn) in done for u in dialogue.utterances)
        }
    return reviewed


def _write_list(
    output: Path,
    project: "Project",
    scored: "Sequence[Scored]",
    reviewed: dict[str, set[str]],
    *,
    number: int | None,
    each: int | None,
    by: str,
) -> None:
    from kdecs.annotate.sampling import work_list
    from kdecs.output import is_standard_output, open_output
    from kdecs.process import say

    lines = list(work_list(scored, reviewed, number=number, each=each))
    with open_output(output) as written:
        for line in lines:
            written.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
    if not is_standard_output(output):
        say(f"{output}: {len(lines):,} of {len(project.dialogues):,} dialogues, by {by}")


# Last, since --help lists the commands in the order in which they are added.
app.command()(simulation_commands.simulate)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _chosen_model(project: "Project", model: str, run: str | None, **given: Any) -> "tuple[str, ModelConfig]":
    """The name of a run and its settings: those of project.yaml, under what the command line gives."""
    from kdecs.annotate.project import NAME_PATTERN, ModelConfig
    from kdecs.config import parse_config
    from kdecs.errors import ConfigError

    known = project.config.models.get(model, ModelConfig())
    # A model's name may hold slashes and colons, which a folder's name should not.
    name = run or re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    if not re.fullmatch(NAME_PATTERN, name):
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
