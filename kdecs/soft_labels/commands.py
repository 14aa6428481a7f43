"""`kdecs soft-labels …`. Imports what is slow inside the functions."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Show, combine and import soft labels.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="print JSON, unrounded")]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="where joined label files lie or are kept; by default a scratch one"),
]


@app.command("show")
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a finished label directory")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            "--corpus",
            metavar="FILE",
            help="labelled corpus file to compare with; repeatable; by default those that were labelled, "
            "where they lie as config.json says, unchanged",
        ),
    ] = None,
    universe: Annotated[
        Literal["fold1", "fold1+neutral"],
        typer.Option(help="pairs compared; +neutral adds (i, i) of neutral targets"),
    ] = "fold1",
    output: Annotated[
        Path | None, typer.Option(metavar="PNG", help="also write the reliability plot (needs a corpus)")
    ] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Lineage, entropy by τ and answer words; beside a corpus: agreement with gold, calibration, reliability.

    Examples: kdecs soft-labels show runs/demo/labels/llama-tiny

    kdecs soft-labels show runs/labels/llama-7b --corpus data/dailydialog_valid.json --output reliability.png

    kdecs soft-labels show runs/labels/llama-7b --corpus data/dailydialog_train.json --json
    """
    from kdecs.soft_labels.inspect.display import print_labels, write_reliability
    from kdecs.soft_labels.inspect.show import describe

    found = describe(directory, corpus or [], universe=universe, cache_dir=cache)
    if output is not None and not found["gold"]:
        raise typer.BadParameter("the plot compares with gold: name --corpus FILE", param_hint="--output")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_labels(found)
    if output is not None:
        write_reliability(found["gold"], output)
        typer.echo(f"reliability plot: {output}", err=as_json)


@app.command("combine")
def combine(
    labels: Annotated[list[Path], typer.Argument(metavar="DIR DIR …", help="label directories, two or more")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="where the combined labels go")],
    rule: Annotated[
        Literal["mean-probability", "mean-logit", "most-confident", "gold-correct"],
        typer.Option(help="how the teachers' labels of a pair become one"),
    ] = ("mean-probability"),
    weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="one a directory, in their order; repeat it")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="training corpus: gold-correct needs its gold; others never see it"
        ),
    ] = None,
    cache: Cache = None,
) -> None:
    """Combine several teachers' labels of the same pairs into a directory that students take like any other.

    mean-probability: average of probabilities at τ = 1; mean-logit: their geometric mean; most-confident: the
    teacher of lowest entropy, pair by pair; gold-correct: on training pairs the average of the teachers that are
    right. Top logits (top_k) are not carried over.

    Examples: kdecs soft-labels combine runs/labels/llama runs/labels/t5 --output runs/labels/both

    kdecs soft-labels combine labels/a labels/b --rule gold-correct --train train.json --output labels/c
    """
    import tempfile

    from kdecs.config import parse_config
    from kdecs.soft_labels.derive.combine import combine as run
    from kdecs.soft_labels.derive.config import CombineConfig

    values = {"labels": labels, "weights": weight or [], "rule": rule, "train": train, "output": output}
    config = parse_config(CombineConfig, values, source="soft-labels combine")
    with tempfile.TemporaryDirectory(prefix="kdecs-combine-") as scratch:
        manifest = run(config, cache_dir=cache or Path(scratch))
    num_pairs = sum(manifest.details["num_pairs"].values())
    typer.echo(
        f"soft labels {output.name}: {num_pairs:,} pairs of {len(labels)} teachers by {rule}: {output}"
    )


@app.command("import")
def import_table(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parquet or JSON lines, one row a pair")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="where the label directory goes")],
    corpus: Annotated[
        list[str],
        typer.Option(
            "--corpus",
            metavar="[SPLIT=]FILE",
            help="labelled corpus file of train (where no split is named), valid= or test=; repeatable",
        ),
    ],
    scores: Annotated[
        Literal["logits", "probabilities"], typer.Option(help="what the table's scores are")
    ] = "logits",
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="leave out rows of pairs that no corpus has")
    ] = False,
) -> None:
    """Make a checked label directory of scores made elsewhere: all pairs covered, once, finite, hashes agreeing.

    Columns: pair_id; logits (a list) or because, as, since, thus, other; optional pair_hash, split, log_rest_mass.

    Examples: kdecs soft-labels import scores.parquet --corpus data/train.json --output runs/labels/mine

    kdecs soft-labels import p.jsonl --scores probabilities --corpus train.json --corpus valid=valid.json --output mine
    """
    from kdecs.config import parse_config
    from kdecs.soft_labels.derive.config import ImportConfig
    from kdecs.soft_labels.derive.importing import import_labels

    values: dict[str, object] = {"table": table, "output": output, "scores": scores}
    for item in corpus:
        name, _, file = (
            item.rpartition("=") if item.startswith(("train=", "valid=", "test=")) else ("", "", item)
        )
        if (split := name or "train") in values:
            raise typer.BadParameter(f"names {split} twice", param_hint="--corpus")
        values[split] = file
    config = parse_config(
        ImportConfig, values | {"ignore_unknown": ignore_unknown}, source="soft-labels import"
    )
    manifest = import_labels(config)
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest.details["num_pairs"].items())
    typer.echo(f"soft labels {output.name}: {counts} pairs, written to {output}")
