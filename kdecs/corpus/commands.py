"""The commands `kdecs corpus verify | stats | pairs | convert | fetch`. Slow imports stand inside the functions."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kdecs.errors import CorpusError, ModelError, printable
from kdecs.process import say

if TYPE_CHECKING:
    from kdecs.corpus.schema import Corpus, Fault
    from kdecs.corpus.statistics import CorpusStatistics

app = typer.Typer(
    no_args_is_help=True,
    help="Check, count, pair and convert corpus files of any of the formats that kdecs reads.",
)


Files = Annotated[
    list[Path], typer.Argument(metavar="FILE…", help="Corpus files, whose content tells their format.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Labels = Annotated[
    Literal["any", "coarse", "fine"],
    typer.Option("--labels", help="Known emotions: RECCON's (coarse), FG-RECCON's 16 (fine), or both (any)."),
]
Unlabelled = Annotated[
    bool, typer.Option("--unlabelled", help="Accept utterances without emotion and evidence.")
]
Part = Annotated[
    str | None,
    typer.Option(
        "--part",
        help="First word of the row ids; default: iemocap if the id says so, else dailydialog.",
    ),
]
Coarse = Annotated[bool, typer.Option("--coarse", help="Map fine emotions to coarse ones.")]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="FILE",
        help="Like --coarse, with a JSON object {fine: coarse} over the built-in table.",
    ),
]
OwnLabels = Annotated[
    Path | None,
    typer.Option(
        "--table", metavar="FILE", help="Accept labels of your own that this JSON object {label: label} maps."
    ),
]
DropCrossSplit = Annotated[
    bool,
    typer.Option(
        "--drop-cross-split",
        help="Count the first file (training) without the dialogues whose text is also in a later file.",
    ),
]
Plots = Annotated[
    Path | None, typer.Option("--plots", metavar="DIR", help="Also write figures (PNG) to this directory.")
]
TokenizerDirectory = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR",
        help="With --plots: count prompt lengths in the tokens of this model instead of words.",
    ),
]


@app.command(
    epilog="Examples:\n\nkdecs corpus verify train.json test.json\n\nkdecs corpus verify my.jsonl --labels fine"
)
def verify(
    files: Files,
    labels: Labels = "any",
    table: OwnLabels = None,
    unlabelled: Unlabelled = False,
    as_json: Json = False,
) -> None:
    """Check files against the schema and report every fault: file, dialogue, turn, field, found and expected."""
    from kdecs.corpus.reading import count_variants, read_table, scan_file
    from kdecs.corpus.schema import NO_TABLE
    from kdecs.corpus.splits import DuplicateFinder

    known = read_table(table) if table else NO_TABLE
    finder = DuplicateFinder()
    faults: list[Fault] = []
    for file in files:
        add = partial(finder.add, str(file))
        checked = scan_file(file, add, labelled=not unlabelled, label_set=labels, table=known)
        checked.warn_without_causes()
        faults += checked.faults
        if as_json:
            continue
        for line in (*checked.faults, *(f"warning: {warning}" for warning in checked.warnings)):
            print(printable(str(line)))
        if not checked.faults:
            print(f"{file}: valid, {checked.num_dialogues} dialogues")
            if checked.normalised:
                print(f"{file}: label variants replaced: {count_variants(checked.normalised)}")
    if as_json:
        print(json.dumps([asdict(fault) for fault in faults], indent=2))
    else:
        for duplicate in finder.duplicates:
            print(printable(f"warning: {duplicate}"))
    if faults:
        # Before the error on stderr, so that a terminal shows both in this order.
        sys.stdout.flush()
        if len(faults) == 1:
            raise CorpusError(str(faults[0]))
        num_faulty = len({fault.file for fault in faults})
        raise CorpusError(f"{len(faults)} faults in {num_faulty} of {len(files)} files, first: {faults[0]}")


@app.command(
    epilog="Examples:\n\nkdecs corpus stats train.json valid.json test.json\n\n"
    "kdecs corpus stats train.json test.json --drop-cross-split --plots plots/"
)
def stats(
    files: Files,
    labels: Labels = "any",
    coarse: Coarse = False,
    table: Table = None,
    drop_cross_split: DropCrossSplit = False,
    plots: Plots = None,
    tokenizer: TokenizerDirectory = None,
    as_json: Json = False,
) -> None:
    """Count dialogues, utterances, rows of fold 1, all pairs and emotions (the paper's Tables 1 and 2)."""
    from kdecs.corpus.reading import check_file, read_table
    from kdecs.corpus.schema import FINE_TO_COARSE, NO_TABLE, map_corpus
    from kdecs.corpus.statistics import PLOT_NAMES, statistics_of
    from kdecs.output import refuse_inputs

    if tokenizer and not plots:
        raise typer.BadParameter("--tokenizer has an effect on figures only; add --plots DIR")
    if drop_cross_split and len(files) < 2:
        raise typer.BadParameter(
            "--drop-cross-split needs at least two files: the training file first, then the other splits"
        )
    if plots:
        refuse_inputs(plots, [], is_directory=True)
        for name in PLOT_NAMES:
            refuse_inputs(plots / name, files)
    mapping = read_table(table) if table else FINE_TO_COARSE
    # The labels of the built-in table are known anyway; only a file of the user's can bring new ones.
    known = mapping if table else NO_TABLE
    checked = [check_file(file, label_set=labels, table=known) for file in files]
    corpora = [map_corpus(corpus, mapping) if coarse or table else corpus for corpus, _ in checked]
    if drop_cross_split:
        corpora[0] = _without_cross_split(corpora[0], corpora[1:])
    counted = [statistics_of(corpus, len(found)) for corpus, (_, found) in zip(corpora, checked, strict=True)]
    if as_json:
        print(json.dumps([file.as_dict() for file in counted], indent=2))
    else:
        print_statistics(counted)
    if plots:
        from kdecs.corpus.statistics import write_plots

        loaded = None
        if tokenizer:
            if not tokenizer.is_dir():  # Transformers would take the name for one of the hub
                raise ModelError(f"--tokenizer {tokenizer}: no such directory, expected a tokenizer's files")
            from kdecs.models import load_tokenizer

            loaded = load_tokenizer(tokenizer)
        for path in write_plots(corpora, plots, loaded):
            print(f"wrote {path}", file=sys.stderr)
    faults = [fault for _, found in checked for fault in found]
    if faults:
        sys.stdout.flush()
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise CorpusError(f"{faults[0]} ({count}; faulty dialogues are not counted)")


@app.command(
    epilog="Examples:\n\nkdecs corpus pairs test.json > pairs.jsonl\n\nkdecs corpus pairs test.json --universe all"
)
def pairs(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A corpus file, whose content tells its format.")
    ],
    universe: Annotated[
        Literal["fold1", "fold1+neutral", "all"],
        typer.Option(
            help="fold1: targets with annotated causes; fold1+neutral: also (i, i) of neutral targets."
        ),
    ] = "fold1",
    after: Annotated[
        int, typer.Option(min=0, help="Candidates reach up to this many turns past their target.")
    ] = 0,
    labels: Labels = "any",
    table: OwnLabels = None,
    part: Part = None,
) -> None:
    """Print a file's pairs as JSON lines: id, dialogue_id, target, candidate, label, spans (row_ids)."""
    from kdecs.corpus.pairs import pairs_of
    from kdecs.corpus.reading import read_corpus, read_table
    from kdecs.corpus.schema import NO_TABLE, map_corpus
    from kdecs.output import STANDARD_STREAM, refuse_inputs

    refuse_inputs(STANDARD_STREAM, [file, table])
    mapping = read_table(table) if table else NO_TABLE
    corpus = map_corpus(read_corpus(file, label_set=labels, part=part, table=mapping), mapping)
    for dialogue in corpus.dialogues:
        for pair in pairs_of(dialogue, universe, after):
            record: dict[str, object] = {
                "id": pair.id,
                "dialogue_id": dialogue.id,
                "target": pair.target,
                "candidate": pair.candidate,
                "label": int(pair.is_cause),
                "spans": list(pair.spans),
            }
            if universe == "fold1":
                record["row_ids"] = list(pair.row_ids)
            print(json.dumps(record, ensure_ascii=False))


@app.command(
    epilog="Examples:\n\nkdecs corpus convert Subtask_1_train.json --to reccon --output train.json\n\n"
    "kdecs corpus convert dialogues.csv --to jsonl --output dialogues.jsonl"
)
def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A corpus file, whose content tells its format.")
    ],
    to: Annotated[
        Literal["reccon", "jsonl", "semeval"],
        typer.Option(
            help="reccon: RECCON's JSON; jsonl: JSON lines; semeval: the JSON of SemEval-2024 Task 3."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the corpus; - writes to standard output.")
    ],
    id_prefix: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Text to put before the id of each dialogue, such as ecf_."),
    ] = "",
) -> None:
    """Write a corpus in another format; what that format cannot hold is named on standard error.

    Emotions and causes may be missing. Free keys of utterances are kept.
    """
    from dataclasses import replace

    from kdecs.corpus.checking import Checker
    from kdecs.corpus.formats.writing import DialogueWriter
    from kdecs.corpus.reading import iter_raw
    from kdecs.output import open_output, refuse_inputs

    refuse_inputs(output, [file])
    checker, writer = Checker(str(file), labelled=False), DialogueWriter(to)
    dialogues = ((replace(d, id=id_prefix + d.id), raw) for d, raw in iter_raw(file, checker))
    with open_output(output) as written:
        for text in writer.text(dialogues):
            written.write(text.encode())
    for loss in writer.losses:
        print(printable(f"{file}: {loss}"), file=sys.stderr)
    print(f"{output}: {checker.num_dialogues:,} dialogues", file=sys.stderr)


@app.command(epilog="Example: kdecs corpus fetch data/reccon && kdecs corpus verify data/reccon/*.json")
def fetch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for the three files.")],
    mirror: Annotated[
        str | None, typer.Option(help="URL of a folder with the same files; default: RECCON on GitHub.")
    ] = None,
) -> None:
    """Download RECCON's DailyDialog files (for research use: CC BY-NC-SA 4.0) and check their sha256."""
    from tqdm import tqdm

    from kdecs.corpus.fetch import RECCON_FILES, RECCON_URL
    from kdecs.corpus.fetch import fetch as fetch_file

    for file in RECCON_FILES:
        with tqdm(unit="B", unit_scale=True, desc=file.name, disable=None, leave=False) as bar:
            is_new = fetch_file(file, directory, base_url=mirror or RECCON_URL, on_bytes=bar.update)
        say(f"{directory / file.name}: {'downloaded' if is_new else 'already there'}, sha256 verified")


def _without_cross_split(train: "Corpus", others: "list[Corpus]") -> "Corpus":
    from kdecs.corpus.splits import drop_cross_split

    kept, dropped = drop_cross_split(train, others)
    for duplicate in dropped:
        print(printable(f"dropped: {duplicate}"), file=sys.stderr)
    num_texts = len({(duplicate.other_file, duplicate.other_dialogue) for duplicate in dropped})
    print(f"dropped {len(dropped)} dialogues ({num_texts} texts) of {train.path}", file=sys.stderr)
    return kept


def print_statistics(counted: "list[CorpusStatistics]") -> None:
    """Print the counts of files as the tables that `kdecs corpus stats` shows."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    from kdecs.corpus.reading import count_variants
    from kdecs.corpus.statistics import display_names
    from kdecs.tables import terminal

    console = terminal(soft_wrap=True)
    # Tight, as RECCON's three file names and the sum must fit into 80 characters.
    make_table = partial(RichTable, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    sizes = make_table("", title="Pairs and sizes (Table 2)")
    emotions = make_table("emotion", title="Emotions of utterances (Table 1)")
    has_total = len(counted) > 1
    for name in display_names([Path(file.file) for file in counted]) + ["all"] * has_total:
        for table in (sizes, emotions):
            table.add_column(Text(name), justify="right", overflow="fold")
    for name in ("positive_rows", "negative_rows", "pairs_all", "dialogues", "utterances", "faults"):
        counts = [getattr(file, name) for file in counted]
        counts += [sum(counts)] * has_total
        sizes.add_row(name.replace("_", " "), *(f"{count:,}" for count in counts))
    console.print(sizes, "")
    totals = [file.utterances for file in counted]
    totals += [sum(totals)] * has_total
    for emotion, number in sum((Counter(file.emotions) for file in counted), Counter()).most_common():
        counts = [file.emotions.get(emotion, 0) for file in counted] + [number] * has_total
        shares = (100 * count / max(1, total) for count, total in zip(counts, totals, strict=True))
        emotions.add_row(emotion, *(f"{n:,} ({s:.1f}%)" for n, s in zip(counts, shares, strict=True)))
    console.print(emotions, "")
    console.print("Rows are those of fold 1: one per gold span, and one per pair that is no cause.")
    for file in counted:
        if num_causes := sum(file.causes.values()):
            places = ", ".join(f"{count:,} {place}" for place, count in file.causes.items())
            console.print(Text(f"{file.file}: {num_causes:,} causes in the dialogue, by utterance: {places}"))
    for file in counted:
        for warning in file.warnings:
            console.print(Text(f"warning: {warning}"))
        if file.normalised:
            console.print(Text(f"{file.file}: label variants replaced: {count_variants(file.normalised)}"))
