"""`kdecs soft-labels …`. Slow imports are inside the functions, so that `--help` answers at once."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kdecs.process import say

if TYPE_CHECKING:
    from kdecs.artifact import Manifest

app = typer.Typer(
    help="Show, combine, calibrate and import soft labels, write them as predictions, and make controls.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, unrounded.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where joined label files are kept for the next command; default: not kept.",
    ),
]


# The configs state the same choices, but importing them for `--help` would take pydantic along.
Rule = Literal["mean-probability", "mean-logit", "most-confident", "gold-correct"]
ScoresKind = Literal["logits", "probabilities"]
GoldUniverse = Literal["fold1", "fold1+neutral"]
Control = Literal["oracle", "rule", "random"]

Corpora = Annotated[
    list[str],
    typer.Option(
        "--corpus",
        metavar="[SPLIT=]FILE",
        help="Corpus file whose pairs are labelled; its split is train, unless it is given as valid=FILE or "
        "test=FILE; repeatable, and train for several files.",
    ),
]
After = Annotated[
    int,
    typer.Option(min=0, help="Label candidates up to this many turns past their target, too."),
]


@app.command("show")
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A finished label directory.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            "--corpus",
            metavar="FILE",
            help="Gold corpus file to compare with; repeatable; default: the files that were labelled, "
            "if they are still where config.json says and unchanged.",
        ),
    ] = None,
    universe: Annotated[
        GoldUniverse,
        typer.Option(help="Pairs to compare; +neutral adds the pair (i, i) of each neutral target."),
    ] = "fold1",
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON object {label: label} that maps labels of your own in the gold corpus."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Also write the reliability plot here (needs a corpus)."),
    ] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Show a directory's lineage, entropy by τ and answer words; with a corpus, compare the labels with gold.

    Examples:

    kdecs soft-labels show runs/demo/labels/llama-tiny

    kdecs soft-labels show runs/labels/llama-7b --corpus data/dailydialog_valid.json --output reliability.png

    kdecs soft-labels show runs/labels/llama-7b --corpus data/dailydialog_train.json --json
    """
    import contextlib

    from kdecs.corpus.reading import read_table
    from kdecs.corpus.schema import NO_TABLE
    from kdecs.output import is_standard_output, open_output, refuse_inputs
    from kdecs.soft_labels.inspect.display import print_labels, write_reliability
    from kdecs.soft_labels.inspect.show import describe

    if output is not None:
        refuse_inputs(output, [directory, *(corpus or [])])
    with open_output(output) if output else contextlib.nullcontext() as plot:
        mapping = read_table(table) if table else NO_TABLE
        found = describe(directory, corpus or [], universe=universe, cache_dir=cache, table=mapping)
        if plot is not None:
            if not found["gold"]:
                raise typer.BadParameter(
                    "the plot compares labels with gold: pass --corpus FILE", param_hint="--output"
                )
            write_reliability(found["gold"], plot)
    if is_standard_output(output):
        return
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_labels(found)
    if output is not None:
        typer.echo(f"reliability plot: {output}", err=as_json)


@app.command("predict")
def predict(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A finished label directory.")],
    input: Annotated[
        Path,
        typer.Option(
            "--input", metavar="FILE", help="Dialogues that were labelled; they need no gold labels."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="FILE", help="Where to write the predictions; - is standard output."
        ),
    ],
    cache: Cache = None,
) -> None:
    """Write what the labels decide as predictions, with p(cause) as their score: a teacher beside other systems.

    Pairs are found by id and texts. Labels hold neither emotions nor spans: the predictions have none.

    Examples:

    kdecs soft-labels predict runs/labels/llama-7b --input mine/dialogues.jsonl --output teacher.jsonl

    kdecs soft-labels predict runs/labels/llama-7b --input data/dailydialog_valid.json --output teacher.jsonl
    """
    from kdecs.output import is_standard_output, open_output, refuse_inputs
    from kdecs.soft_labels.inspect.decisions import write_decisions

    refuse_inputs(output, [directory, input])
    with open_output(output) as file:
        counts = write_decisions(directory, input, file, cache_dir=cache)
    missing = f"; {counts.missing:,} dialogues have no label, the first is {counts.first_missing}"
    typer.echo(
        f"{output}: {counts.pairs:,} pairs of {counts.dialogues:,} dialogues, {counts.causes:,} causes"
        f"{missing if counts.missing else ''}",
        err=is_standard_output(output),
    )


@app.command("combine")
def combine(
    labels: Annotated[list[Path], typer.Argument(metavar="DIR DIR …", help="Two or more label directories.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the combined labels.")],
    rule: Annotated[Rule, typer.Option(help="How the teachers' labels of a pair become one.")] = (
        "mean-probability"
    ),
    weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W", help="Weight of a teacher; repeat the option once per directory, in their order."
        ),
    ] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Training corpus with gold labels; gold-correct needs it, no other rule takes it. Repeatable.",
        ),
    ] = None,
    cache: Cache = None,
) -> None:
    """Combine several teachers' labels of the same pairs into one directory that students use like any other.

    mean-probability averages the probabilities at τ = 1, mean-logit the logits. most-confident takes, for each pair,
    the teacher with the lowest entropy. gold-correct averages, for each training pair, the teachers that are right.
    Top logits (top_k) are not carried over.

    Examples:

    kdecs soft-labels combine runs/labels/llama runs/labels/t5 --output runs/labels/both

    kdecs soft-labels combine labels/a labels/b --rule gold-correct --train train.json --output labels/c
    """
    from kdecs.artifact import scratch_folder
    from kdecs.config import parse_config
    from kdecs.soft_labels.derive.combine import combine as run
    from kdecs.soft_labels.derive.config import CombineConfig

    if len(labels) < 2:
        raise typer.BadParameter(
            "found one label directory, expected two or more to combine", param_hint="DIR DIR …"
        )
    values = {
        "labels": labels,
        "weights": weight or [],
        "rule": rule,
        "train": train or None,
        "output": output,
    }
    config = parse_config(CombineConfig, values, source="soft-labels combine")
    with scratch_folder("labels") as scratch:
        manifest = run(config, cache_dir=cache or scratch)
    num_pairs = sum(manifest.details["num_pairs"].values())
    say(f"soft labels {output.name}: {num_pairs:,} pairs of {len(labels)} teachers by {rule}: {output}")


@app.command("calibrate")
def calibrate(
    labels: Annotated[Path, typer.Argument(metavar="DIR", help="A label directory.")],
    corpus: Corpora,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the calibrated labels.")],
    cache: Cache = None,
) -> None:
    """Correct a teacher that favours some distances, against the gold labels of one split.

    A teacher can understand what is said and still be biased, for example towards a target's own utterance and against
    the one before it. A scale and one shift per distance are fitted, and correct the labels of all splits. Use the
    validation split: a teacher knows the pairs that it was trained on too well for a fit to them to hold elsewhere.

    Example: kdecs soft-labels calibrate runs/soft_labels/minilm-l6 --corpus valid=data/dailydialog_valid.json
    --output runs/soft_labels/minilm-l6-calibrated
    """
    from kdecs.artifact import scratch_folder
    from kdecs.config import parse_config
    from kdecs.soft_labels.derive.calibrate import calibrate as run
    from kdecs.soft_labels.derive.config import CalibrateConfig

    files = {split: value for split, value in _by_split(corpus).items() if value is not None}
    config = parse_config(
        CalibrateConfig, {**files, "labels": labels, "output": output}, source="soft-labels calibrate"
    )
    with scratch_folder("labels") as scratch:
        manifest = run(config, cache_dir=cache or scratch)
    found = manifest.details["calibration"]
    say(
        f"soft labels {output.name}: {_counts(manifest)} pairs, log loss on {found['pairs']:,} pairs of "
        f"{found['split']} {found['log_loss_before']:.4f} before, {found['log_loss']:.4f} after: {output}"
    )


@app.command("import")
def import_table(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parquet or JSON lines, one row per pair.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the label directory.")],
    corpus: Corpora,
    scores: Annotated[ScoresKind, typer.Option(help="What the table's scores are.")] = "logits",
    after: After = 0,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Leave out rows whose pair is in no corpus.")
    ] = False,
) -> None:
    """Import scores from elsewhere as a label directory, after checking that every pair has one finite row.

    Columns: pair_id; logits (a list) or because, as, since, thus, other; optional pair_hash, split, log_rest_mass.

    Examples:

    kdecs soft-labels import scores.parquet --corpus data/train.json --output runs/labels/mine

    kdecs soft-labels import p.jsonl --scores probabilities --corpus train.json --corpus valid=valid.json --output mine
    """
    from kdecs.config import parse_config
    from kdecs.soft_labels.derive.config import ImportConfig
    from kdecs.soft_labels.derive.importing import import_labels

    values = _by_split(corpus) | {
        "table": table,
        "output": output,
        "scores": scores,
        "candidates": {"after": after},
        "ignore_unknown": ignore_unknown,
    }
    config = parse_config(ImportConfig, values, source="soft-labels import")
    manifest = import_labels(config)
    say(f"soft labels {output.name}: {_counts(manifest)} pairs, written to {output}")


@app.command("control")
def control(
    kind: Annotated[
        Control,
        typer.Argument(
            metavar="oracle|rule|random", help="Gold, the rule j >= i - 1, or p(cause) drawn at random."
        ),
    ],
    corpus: Corpora,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the label directory.")],
    smoothing: Annotated[
        float, typer.Option(metavar="S", help="Probability that is left for the other decision.")
    ] = 0.1,
    wrong: Annotated[
        float, typer.Option(metavar="W", help="Share of the pairs that the oracle decides wrongly.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    after: After = 0,
) -> None:
    """Make labels that no model made, as controls of a study: from gold, from the distance rule, or at random.

    A student that gains from the oracle but not from a teacher has too weak a teacher; one that gains from neither is
    limited by itself or by the task. The labels of the oracle hold gold labels: never score them.

    Examples:

    kdecs soft-labels control oracle --corpus data/train.json --output runs/labels/oracle

    kdecs soft-labels control oracle --wrong 0.2 --corpus data/train.json --output runs/labels/oracle-80

    kdecs soft-labels control rule --corpus data/train.json --output runs/labels/rule
    """
    from kdecs.config import parse_config
    from kdecs.soft_labels.derive.config import ControlConfig
    from kdecs.soft_labels.derive.control import write_control

    values = _by_split(corpus) | {
        "control": kind,
        "output": output,
        "smoothing": smoothing,
        "wrong_share": wrong,
        "seed": seed,
        "candidates": {"after": after},
    }
    manifest = write_control(parse_config(ControlConfig, values, source="soft-labels control"))
    say(f"soft labels {output.name}: {_counts(manifest)} pairs, written to {output}")


def _by_split(corpus: list[str]) -> dict[str, object]:
    """The files of `--corpus [SPLIT=]FILE` by split; those of train are a list, or None."""
    values: dict[str, object] = {}
    train: list[str] = []
    # A = alone does not tell a split, since a file's own name may hold one.
    for item in corpus:
        name, _, file = (
            item.partition("=") if item.startswith(("train=", "valid=", "test=")) else ("", "", item)
        )
        if (split := name or "train") == "train":
            train.append(file)
        elif split in values:
            raise typer.BadParameter(f"{split} is given twice", param_hint="--corpus")
        else:
            values[split] = file
    return values | {"train": train or None}


def _counts(manifest: "Manifest") -> str:
    return ", ".join(f"{split} {count:,}" for split, count in manifest.details["num_pairs"].items())
