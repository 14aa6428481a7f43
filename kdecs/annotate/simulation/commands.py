"""The command `kdecs annotate simulate`. Slow imports stand inside the function."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kdecs.annotate.options import Json


def simulate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to keep the rounds and the result.")
    ],
    corpus: Annotated[
        Path, typer.Option(metavar="FILE", help="Labelled dialogues, whose labels stand in for people.")
    ],
    valid: Annotated[
        Path, typer.Option(metavar="FILE", help="Other labelled dialogues, on which students are scored.")
    ],
    student: Annotated[
        str,
        typer.Option(
            metavar="CONFIG", help="Config of the students: a file, or a name of kdecs configs student."
        ),
    ] = "minilm-joint",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one dotted key of the config; repeatable."),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="STRATEGY",
            help="random, disagreement or uncertainty; repeatable. Default: all three.",
        ),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="How many dialogues are labelled in a round; repeatable. Default: 25, 50, 100 and 200.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often all of it is done.")] = 3,
    candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most dialogues that a student predicts to choose from, drawn at random; default: all.",
        ),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Predictions of another system for the corpus, for disagreement; repeatable."
        ),
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most rounds at the same time. More than one: set threads=1 and the like, or they share all CPUs.",
        ),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Try how much labelling each strategy of kdecs annotate next saves, on a corpus that is labelled already.

    All strategies begin with the same random dialogues. Round by round a student is trained on what is labelled so far,
    and its predictions say what is labelled next. The same command goes on after any stop. It ends with a table, CSV
    files and a figure of the scores by the number of labelled dialogues.

    Example: kdecs annotate simulate runs/simulation --corpus data/dailydialog_train.json
    --valid data/dailydialog_valid.json --set optimization.steps=200
    """
    from kdecs.annotate.sampling import STRATEGIES
    from kdecs.annotate.simulation.study import SHOWN, Simulation, Study, result_of, write_result
    from kdecs.process import StopSignal, say

    if unknown := [each for each in by or () if each not in STRATEGIES]:
        raise typer.BadParameter(f"--by {unknown[0]}: expected one of {', '.join(STRATEGIES)}")
    study = Study(
        directory,
        corpus,
        valid,
        student,
        tuple(overrides or ()),
        tuple(each for each in STRATEGIES if each in (by or STRATEGIES)),
        tuple(size or (25, 50, 100, 200)),
        seeds,
        candidates,
        tuple(predictions or ()),
    )
    simulation = Simulation(study)
    stop = StopSignal()
    stop.install()
    simulation.run(stop, (lambda line: typer.echo(line, err=True)) if as_json else say, concurrency)
    result = result_of(simulation)
    paths = write_result(study, result)
    if as_json:
        print(
            json.dumps(
                {"scores": result.rows, "comparisons": result.comparisons, "rule": result.rule}, indent=2
            )
        )
        return
    from kdecs.tables import figures_table, terminal

    console = terminal()
    for key, name in SHOWN.items():
        table = figures_table(
            f"{name} on validation: mean (standard deviation) over seeds", "dialogues", *study.strategies
        )
        for number in study.sizes:
            found = [result.summaries[strategy, number, key] for strategy in study.strategies]
            cells = [
                f"{each.mean:.2f}" + ("" if each.std is None else f" ({each.std:.2f})") for each in found
            ]
            table.add_row(str(number), *cells)
        table.add_section()
        table.add_row("rule j >= i-1", *[f"{result.rule[key]:.2f}"] * len(study.strategies))
        console.print(table)
    for key, name in SHOWN.items():
        table = figures_table(
            f"{name}: minus random choice, paired (95% intervals)", "strategy, dialogues", "difference",
            "over seeds", "over dialogues", "p", tight=True,
        )  # fmt: skip
        for row in result.comparisons:
            if row["score"] != key:
                continue
            seeds_range = (
                "–" if row["seeds_low"] is None else f"{row['seeds_low']:+.2f} to {row['seeds_high']:+.2f}"
            )
            table.add_row(
                f"{row['strategy']}, {row['size']}", f"{row['difference']:+.2f}", seeds_range,
                f"{row['dialogues_low']:+.2f} to {row['dialogues_high']:+.2f}", f"{row['dialogues_p']:.3f}",
            )  # fmt: skip
        if table.row_count:
            console.print(table)
    say(f"written: {', '.join(map(str, paths))}")
