"""Labels made elsewhere: a table of pair ids and scores becomes a checked label directory.

The table is Parquet or JSON lines, one row a pair:

    pair_id         dialogue/target/candidate
    scores          `logits`, a list of one number an answer word (because, as, since, thus, other); or a column (key)
                    of its own for each answer word
    pair_hash       optional: 32 hex characters, `Pair.hash`; where it is given it must agree
    split           optional: train, valid or test; needed where an id stands in two of the corpora
    log_rest_mass   optional: log probability mass outside the answer words; NO_REST_MASS where it is not given

Scores are raw logits, or probabilities above 0 (stored as their logs). Every pair that an export labels must be there,
once. The table is streamed: rows are joined to a mapped scratch file and looked up by the pairs of the corpora.
Shapes: n rows of a batch, A answer words.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from kdecs.artifact import Manifest, write_manifest
from kdecs.config import config_hash, input_checksums
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.checking import is_unicode, shorten
from kdecs.corpus.pairs import EXPORT_UNIVERSE
from kdecs.corpus.reading import iter_dialogues
from kdecs.errors import CorpusError, LabelError
from kdecs.soft_labels.corpora import batches_of, pairs_of_file
from kdecs.soft_labels.derive.config import ImportConfig
from kdecs.soft_labels.derive.write import begin_directory, claim_output, finish_directory, write_rows
from kdecs.soft_labels.format import SPLITS, ShardTable
from kdecs.soft_labels.labels import SoftLabels, iter_directory
from kdecs.soft_labels.verify import whole_labels

NO_REST_MASS = -100.0
"""Log of no mass at all, finite as the format wants it."""

ANY_SPLIT = "train"
"""Where rows of a table without splits are kept while they are looked up."""

_ROWS_A_BATCH = 8192
_WORD_COLUMNS = set(CONNECTIVES)


def import_labels(config: ImportConfig) -> Manifest:
    """Write the label directory of a table; does nothing where it is whole.

    Raises LabelError, one line, for a table that cannot be read, a row without what it needs, a score that is not
    finite, a pair that stands twice, that the corpora do not have (unless left out) or that the table lacks;
    CorpusError, ArtifactError.
    """
    work_hash = config_hash(config)
    _refuse_own_table(config)
    if finished := whole_labels(config.output, work_hash, show_progress=True):
        return finished
    claim_output(config, config.output)
    corpora = {split: path for split in SPLITS if (path := getattr(config, split)) is not None}
    with tempfile.TemporaryDirectory(prefix="kdecs-import-") as scratch:
        facts = _stage(config, Path(scratch) / "table")
        try:
            labels = SoftLabels.open(Path(scratch) / "table", Path(scratch) / "joined")
        except LabelError as error:  # of the scratch directory, whose name says nothing
            raise LabelError(str(error).replace(str(Path(scratch) / "table"), str(config.table))) from None
        seen_N = np.zeros(len(labels), dtype=bool)
        if not facts["split"]:
            _refuse_shared_ids(corpora, config.table)
        work_hash = begin_directory(config, config.output)
        tables = _matched(config.table, labels, corpora, facts, seen_N)
        rows, by_split = write_rows(config.output, tables, CONNECTIVES)
        num_unknown = int((~seen_N).sum())
        if num_unknown and not config.ignore_unknown:
            raise _unknown(config.table, labels, facts, seen_N, num_unknown)
    return finish_directory(
        config.output,
        work_hash,
        rows,
        by_split,
        CONNECTIVES,
        inputs=input_checksums(
            table=config.table, **{f"corpus_{split}": path for split, path in corpora.items()}
        ),
        details={
            "universe": EXPORT_UNIVERSE,
            "lineage": {"imported": input_checksums(table=config.table)["table"], "scores": config.scores},
            "hashes": "of the table, equal to the corpus'"
            if facts["pair_hash"]
            else "computed of the corpus",
            "rest_mass": "of the table" if facts["log_rest_mass"] else "not known",
            "left_out": num_unknown,
        },
    )


def _refuse_own_table(config: ImportConfig) -> None:
    """Refuse an output whose files would replace the table (LabelError)."""
    table, output = config.table.resolve(), config.output.resolve()
    if table.parent == output and table.match("shard-*.parquet"):
        raise LabelError(f"{config.table}: lies in the output {config.output}; choose another output")


def _stage(config: ImportConfig, directory: Path) -> dict[str, bool]:
    """The table's rows as a scratch label directory, which finds twins; returns which optional columns there are."""
    directory.mkdir()
    facts: dict[str, bool] = {}
    with tqdm(desc="read table", unit="row", unit_scale=True, disable=None, delay=1) as bar:

        def tables() -> Iterator[ShardTable]:
            for first_row, batch in _batches(config.table):
                found = {name: name in batch for name in ("pair_hash", "split", "log_rest_mass")}
                if facts and found != facts:
                    raise LabelError(
                        f"{config.table}: the rows from {first_row} on have other columns than those before"
                    )
                facts.update(found)
                yield _table_of(config, batch, first_row)
                bar.update(len(batch["pair_id"]))

        rows, _ = write_rows(directory, tables(), CONNECTIVES)
    if not facts:
        raise LabelError(f"{config.table}: holds no row, expected one a pair")
    details = {"answer_words": list(CONNECTIVES)}
    write_manifest(
        directory, "soft-labels", config_hash="0", inputs={}, files=rows, rows=rows, details=details
    )
    return facts


def _batches(path: Path) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(number of its first row, columns) of each batch of the table."""
    if not path.is_file():
        raise LabelError(f"{path}: no such file, expected a Parquet or JSON-lines table")
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    yield from _parquet_batches(path) if is_parquet else _line_batches(path)


def _parquet_batches(path: Path) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    known = {"pair_id", "pair_hash", "split", "logits", "log_rest_mass", *_WORD_COLUMNS}
    row = 1
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = [name for name in file.schema_arrow.names if name in known]
            for batch in file.iter_batches(_ROWS_A_BATCH, columns=columns, use_threads=False):
                yield row, batch.to_pydict()
                row += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LabelError(f"{path}: not a readable Parquet table ({' '.join(str(error).split())})") from None


def _line_batches(path: Path) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    rows: list[dict[str, Any]] = []
    first = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # no JSON, or nested too deeply to read
                row = None
            if not isinstance(row, dict):
                raise LabelError(f"{path}: line {number}: not a JSON object, expected one pair a line")
            if rows and row.keys() != rows[0].keys():
                raise LabelError(f"{path}: line {number}: other keys than the line before")
            rows.append(row)
            if len(rows) == _ROWS_A_BATCH:
                yield first, _columns(rows)
                rows, first = [], number + 1
    if rows:
        yield first, _columns(rows)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _table_of(config: ImportConfig, batch: Mapping[str, list[Any]], first_row: int) -> ShardTable:
    """A batch of rows as labels of the scratch directory. Raises LabelError naming the row."""

    def refuse(place: int, message: str) -> LabelError:
        return LabelError(f"{config.table}: row {first_row + place}: {message}")

    if "pair_id" not in batch:
        raise LabelError(f"{config.table}: no column pair_id; there are {_names(batch)}")
    for name in ("pair_id", "pair_hash", "split"):
        for place, value in enumerate(batch.get(name, ())):
            if not isinstance(value, str) or not value or not is_unicode(value):
                raise refuse(place, f"{name} is {shorten(value)}, expected text")
    for place, split in enumerate(batch.get("split", ())):
        if split not in SPLITS:
            raise refuse(place, f"split is {shorten(split)}, expected one of {', '.join(SPLITS)}")
    num_rows = len(batch["pair_id"])
    scores_nA = np.array([_scores(config, batch, place, refuse) for place in range(num_rows)])
    rest = batch.get("log_rest_mass") or [NO_REST_MASS] * num_rows
    for place, value in enumerate(rest):
        if not _is_finite(value) or value > 0:
            raise refuse(place, f"log_rest_mass is {shorten(value)}, expected the log of a probability")
    return ShardTable(
        batch["pair_id"],
        batch.get("pair_hash") or [""] * num_rows,
        batch.get("split") or [ANY_SPLIT] * num_rows,
        scores_nA.astype(np.float32),
        np.array(rest, dtype=np.float32),
    )


def _scores(config: ImportConfig, batch: Mapping[str, list[Any]], place: int, refuse: Any) -> list[float]:
    pair_id = batch["pair_id"][place]
    if "logits" in batch:
        values = batch["logits"][place]
    elif batch.keys() >= _WORD_COLUMNS:
        values = [batch[word][place] for word in CONNECTIVES]
    else:
        raise LabelError(
            f"{config.table}: no scores: expected a column logits, or the columns {', '.join(CONNECTIVES)}; "
            f"there are {_names(batch)}"
        )
    if not isinstance(values, list) or len(values) != len(CONNECTIVES):
        raise refuse(place, f"the pair {pair_id} has {shorten(values)}, expected {len(CONNECTIVES)} scores")
    for value in values:
        if not _is_finite(value):
            raise refuse(
                place, f"the pair {pair_id} has the score {shorten(value)}, expected a finite number"
            )
        if config.scores == "probabilities" and not 0 < value <= 1:
            raise refuse(
                place, f"the pair {pair_id} has the probability {value!r}, expected above 0 and up to 1"
            )
    return (
        [float(np.log(v)) for v in values] if config.scores == "probabilities" else [float(v) for v in values]
    )


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float32 can hold, however many digits it is written with."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= float(np.finfo(np.float32).max)


def _names(batch: Mapping[str, list[Any]]) -> str:
    """The columns for a message; a stranger's may be no text that can be printed."""
    return ", ".join(name if is_unicode(name) else shorten(name) for name in batch)


def _matched(
    table: Path,
    labels: SoftLabels,
    corpora: Mapping[str, Path],
    facts: Mapping[str, bool],
    seen_N: np.ndarray,
) -> Iterator[ShardTable]:
    """The corpora's pairs in their order with the table's scores; marks what was taken in `seen_N`."""
    for split, path in corpora.items():
        taken_N = np.zeros_like(seen_N)
        with tqdm(desc=f"import {split}", unit="pair", unit_scale=True, disable=None, delay=1) as bar:
            for batch in batches_of(pairs_of_file(path, EXPORT_UNIVERSE)):
                ids, hashes = [pair.id for pair in batch], [pair.hash for pair in batch]
                asked = hashes if facts["pair_hash"] else [""] * len(ids)
                rows_n = labels.find(ids, asked, split=split if facts["split"] else ANY_SPLIT)
                missing = np.flatnonzero(rows_n < 0)
                if len(missing):
                    first = int(missing[0])
                    with_hash = f" with the hash {hashes[first]}" if facts["pair_hash"] else ""
                    raise LabelError(
                        f"{table}: lacks the pair {ids[first]}{with_hash} of {path}, and {len(missing) - 1} more of "
                        f"{len(ids)} looked at; expected a row for each pair of the universe {EXPORT_UNIVERSE} "
                        f"(kdecs corpus pairs {path} --universe {EXPORT_UNIVERSE} lists them)"
                    )
                _refuse_second(path, ids, rows_n, taken_N)
                yield ShardTable(
                    ids, hashes, [split] * len(ids), labels.logits(rows_n), labels.log_rest_mass(rows_n)
                )
                bar.update(len(batch))
        seen_N |= taken_N


def _refuse_second(path: Path, ids: Sequence[str], rows_n: np.ndarray, taken_N: np.ndarray) -> None:
    """Mark rows as taken. Raises CorpusError for a pair whose row was taken before: its dialogue stands twice."""
    for pair_id, row in zip(ids, rows_n.tolist(), strict=True):
        if taken_N[row]:
            raise CorpusError(
                f"{path}: dialogue {pair_id.rsplit('/', 2)[0]}: stands twice, ids must be unique"
            )
        taken_N[row] = True


def _refuse_shared_ids(corpora: Mapping[str, Path], table: Path) -> None:
    """An id of two splits would get one row for both. Raises LabelError naming it."""
    place_of: dict[str, str] = {}
    for split, path in corpora.items() if len(corpora) > 1 else ():
        for dialogue in iter_dialogues(path):
            first = place_of.setdefault(dialogue.id, split)
            if first != split:
                raise LabelError(
                    f"{table}: has no column split, and the dialogue {dialogue.id} stands in {first} and "
                    f"{split}; give the column"
                )


def _unknown(
    table: Path, labels: SoftLabels, facts: Mapping[str, bool], seen_N: np.ndarray, num_unknown: int
) -> LabelError:
    """The refusal of rows that no corpus has, naming the first of the table."""
    for part in iter_directory(labels.directory, labels.manifest):
        for pair_id, pair_hash, split in zip(part.pair_ids, part.pair_hashes, part.splits, strict=True):
            if not seen_N[labels.find([pair_id], [pair_hash], split=split)[0]]:
                where = f" of the split {split}" if facts["split"] else ""
                return LabelError(
                    f"{table}: the pair {pair_id}{where} is none that the corpora have, {num_unknown} such rows; "
                    "name their corpus, or leave them out with --ignore-unknown"
                )
    raise AssertionError("every row was seen")
