"""Labels made elsewhere: a table of pair ids and scores becomes a checked label directory.

The table is Parquet or JSON lines, one row per pair:

    pair_id         dialogue/target/candidate
    scores          `logits`, a list of one number per answer word (because, as, since, thus, other), or one column
                    (key) for each answer word
    pair_hash       optional: 32 hex characters, `Pair.hash`; where it is given it must agree with the corpus
    split           optional: train, valid or test; needed where an id occurs in two of the corpora
    log_rest_mass   optional: log probability mass outside the answer words. Where it is not given, it is what is left
                    of 1 beside probabilities, and not known beside logits (UNKNOWN_REST_MASS)

Scores are raw logits, or probabilities above 0 that add up to at most 1 (stored as their logs). The table must have
every pair that an export labels, once. It is held in memory, about 100 bytes per row, while the corpora are read
dialogue by dialogue.

Shapes: n rows of a batch, N rows of the table, A answer words.
"""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from kdecs.artifact import Manifest, kind_of
from kdecs.config import config_hash, files_of, input_checksums, names_of
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.checking import RepeatedKeys, is_unicode, shorten
from kdecs.corpus.pairs import EXPORT_UNIVERSE
from kdecs.corpus.reading import iter_dialogues
from kdecs.errors import LabelError
from kdecs.output import refuse_overlaps
from kdecs.soft_labels.corpora import pair_batches
from kdecs.soft_labels.derive.config import ImportConfig
from kdecs.soft_labels.derive.write import LabelDirectory, check_label_output
from kdecs.soft_labels.format import (
    MAX_ROWS_PER_BYTE,
    NO_REST_MASS,
    SPLITS,
    UNKNOWN_REST_MASS,
    ShardTable,
    reach_details,
)
from kdecs.soft_labels.labels import KeyIndex, bounds_of, pair_keys, sort_by_key, split_numbers
from kdecs.soft_labels.verify import verified_labels

_MAX_SUM = 1.001  # of probabilities, which float16 rounds
# A file of a few bytes could stand for billions of values otherwise. Pair ids of an export differ and have at most 500
# characters, and a row has five scores.
_MAX_TEXT_BYTES = 4096
_MAX_VALUES_PER_ROW = 16

_ANY_SPLIT = "train"  # the split under which the rows of a table without splits are kept and looked up
_BATCH_ROWS = 8192
_WORD_COLUMNS = set(CONNECTIVES)
_TEXT_COLUMNS = ("pair_id", "pair_hash", "split")
_KNOWN_COLUMNS = {*_TEXT_COLUMNS, "logits", "log_rest_mass", *_WORD_COLUMNS}


def import_labels(config: ImportConfig) -> Manifest:
    """Write the label directory of a table, or return its manifest where it is complete and undamaged.

    Raises LabelError, one line, for a table that cannot be read, a row without what it needs, a score that is not
    finite, a pair that occurs twice, that no corpus has (unless such rows are left out) or that the table lacks;
    CorpusError, ArtifactError.
    """
    refuse_overlaps(config)
    if finished := verified_labels(config.output, config_hash(config), show_progress=True):
        return finished
    # Refused now rather than after the table was read; the directory itself is begun only when all rows are checked.
    check_label_output(config, config.output)
    corpora = {split: files_of(path) for split in SPLITS if (path := getattr(config, split)) is not None}
    table = _ScoreTable.read(config)
    if not table.has["split"]:
        _refuse_shared_ids(corpora, config.table)
    directory = LabelDirectory(config, config.output, CONNECTIVES)
    directory.write(table.matched(corpora, config.candidates.after))
    # Only now is it known which rows no corpus has. A refusal leaves shards without a manifest, and the next run
    # replaces them.
    num_unknown = table.refuse_unknown(allow=config.ignore_unknown)
    return directory.finish(
        inputs=input_checksums(
            table=config.table, **{f"corpus_{split}": path for split, path in corpora.items()}
        ),
        details={
            "universe": EXPORT_UNIVERSE,
            **reach_details(config.candidates.after),
            "lineage": {"imported": input_checksums(table=config.table)["table"], "scores": config.scores},
            "hashes": "of the table, equal to the corpus'"
            if table.has["pair_hash"]
            else "computed of the corpus",
            "rest_mass": _origin_of_rest_mass(config, table.has["log_rest_mass"]),
            "left_out": num_unknown,
        },
    )


class _ScoreTable:
    """The rows of a table in memory, sorted by split and key.

    `has` tells which optional columns the table has, and `rows_N` is the row of the table that each sorted row was.
    """

    def __init__(self, path: Path, has: Mapping[str, bool], parts: list[ShardTable]) -> None:
        self.path, self.has = path, has
        self.ids = pa.chunked_array([pa.array(part.pair_ids, pa.string()) for part in parts])
        splits_N = np.concatenate([split_numbers(part.splits) for part in parts])
        keys_N = np.concatenate([pair_keys(part.pair_ids, part.pair_hashes) for part in parts])
        self.rows_N, repeated = sort_by_key(keys_N, splits_N)
        if repeated is not None:
            raise LabelError(
                f"{path}: row {repeated + 1}: the pair {self.ids[repeated].as_py()} occurs twice in one split; "
                "expected one row per pair"
            )
        self.index = KeyIndex(keys_N[self.rows_N], bounds_of(splits_N))
        self.logits_NA = np.concatenate([part.logits for part in parts])[self.rows_N]
        self.log_rest_mass_N = np.concatenate([part.log_rest_mass for part in parts])[self.rows_N]
        self.is_matched_N = np.zeros(len(keys_N), dtype=bool)

    @classmethod
    def read(cls, config: ImportConfig) -> "_ScoreTable":
        """Read and check every row of the config's table. Raises LabelError naming the row."""
        has: dict[str, bool] = {}
        parts = []
        with tqdm(desc="read table", unit="row", unit_scale=True, disable=None, delay=1) as bar:
            for first_row, batch in _batches(config.table):
                found = {name: name in batch for name in ("pair_hash", "split", "log_rest_mass")}
                if has and found != has:
                    raise LabelError(
                        f"{config.table}: the rows from {first_row} on have other columns than those before"
                    )
                has = found
                parts.append(_checked_rows(config, batch, first_row))
                bar.update(len(parts[-1]))
        if not parts:
            raise LabelError(f"{config.table}: holds no row, expected one per pair")
        return cls(config.table, has, parts)

    def matched(self, corpora: Mapping[str, tuple[Path, ...]], candidates_after: int) -> Iterator[ShardTable]:
        """The corpora's pairs in their order with the table's scores. Raises LabelError for a pair without a row."""
        for split, files in corpora.items():
            with tqdm(desc=f"import {split}", unit="pair", unit_scale=True, disable=None, delay=1) as bar:
                for batch in pair_batches(files, EXPORT_UNIVERSE, candidates_after):
                    ids, hashes = [pair.id for pair in batch], [pair.hash for pair in batch]
                    # Rows without a hash are kept under the empty one: the id alone must then identify the pair.
                    asked = hashes if self.has["pair_hash"] else [""] * len(ids)
                    rows_n = self.index.find(ids, asked, split=split if self.has["split"] else _ANY_SPLIT)
                    missing = np.flatnonzero(rows_n < 0)
                    if len(missing):
                        first = int(missing[0])
                        with_hash = f" with the hash {hashes[first]}" if self.has["pair_hash"] else ""
                        after = f" --after {candidates_after}" if candidates_after else ""
                        raise LabelError(
                            f"{self.path}: lacks the pair {ids[first]}{with_hash} of {names_of(files)}, and "
                            f"{len(missing) - 1} more of the {len(ids)} pairs just read; expected a row "
                            f"for each pair of the universe {EXPORT_UNIVERSE} "
                            f"(kdecs corpus pairs {files[0]} --universe {EXPORT_UNIVERSE}{after} lists them)"
                        )
                    self.is_matched_N[rows_n] = True
                    yield ShardTable(
                        ids, hashes, [split] * len(ids), self.logits_NA[rows_n], self.log_rest_mass_N[rows_n]
                    )
                    bar.update(len(batch))

    def refuse_unknown(self, *, allow: bool) -> int:
        """The number of rows that no corpus matched. Raises LabelError, naming the first, unless they are allowed."""
        unknown = self.rows_N[~self.is_matched_N]
        if len(unknown) and not allow:
            raise LabelError(
                f"{self.path}: {len(unknown)} rows refer to pairs that are in none of the given corpora (first: row "
                f"{unknown.min() + 1}, {self.ids[int(unknown.min())].as_py()}); add the missing corpus, or pass "
                "--ignore-unknown"
            )
        return len(unknown)


def _refuse_shared_ids(corpora: Mapping[str, tuple[Path, ...]], table: Path) -> None:
    """Without a split column an id of two corpora would get one row for both. Raises LabelError naming it."""
    split_of: dict[str, str] = {}
    named = [(split, path) for split, files in corpora.items() for path in files]
    for split, path in named if len(corpora) > 1 else ():
        for dialogue in iter_dialogues(path):
            first = split_of.setdefault(dialogue.id, split)
            if first != split:
                raise LabelError(
                    f"{table}: has no column split, but the dialogue {dialogue.id} is in {first} and in {split}; "
                    "add the column"
                )


def _origin_of_rest_mass(config: ImportConfig, is_given: bool) -> str:
    if is_given:
        return "of the table"
    return "what the answer words leave of 1" if config.scores == "probabilities" else "not known"


def _batches(path: Path) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """(number of its first row, known columns) of each batch of the table."""
    if not path.is_file():
        found = f"is {kind_of(path)}" if path.exists() else "no such file"
        raise LabelError(f"{path}: {found}, expected a Parquet or JSON-lines table")
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"  # by its first bytes, since a file may have any suffix
    yield from _parquet_batches(path) if is_parquet else _line_batches(path)


def _parquet_batches(path: Path) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    row = 1
    try:
        footer = pq.read_metadata(path)
        names = footer.schema.to_arrow_schema().names
        _check_columns(path, names)
        _check_sizes(path, footer)
        # Dictionaries are left as they are: a long text that a small file repeats would be written out for each row.
        texts = [name for name in _TEXT_COLUMNS if name in names]
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=texts) as file:
            columns = [name for name in names if name in _KNOWN_COLUMNS]
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    if isinstance(column, pa.DictionaryArray):
                        _check_lengths(path, name, column.dictionary)
                yield row, batch.to_pydict()
                row += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LabelError(f"{path}: not a readable Parquet table ({' '.join(str(error).split())})") from None


def _check_sizes(path: Path, footer: pq.FileMetaData) -> None:
    """Hold the sizes that a table's footer states to what one row per pair can have. Decodes no row."""
    size = path.stat().st_size
    if footer.num_rows > MAX_ROWS_PER_BYTE * size:
        raise LabelError(
            f"{path}: {footer.num_rows:,} rows in {size:,} bytes, more than different pair ids fit into; expected one "
            "row per pair"
        )
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for index in range(group.num_columns):
            column = group.column(index)
            name = column.path_in_schema.partition(".")[0]
            if name in _KNOWN_COLUMNS and (
                column.num_values > _MAX_VALUES_PER_ROW * group.num_rows
                or column.total_uncompressed_size > _MAX_TEXT_BYTES * (group.num_rows + 1)
            ):
                raise LabelError(
                    f"{path}: the column {name} has {column.num_values:,} values and "
                    f"{column.total_uncompressed_size:,} bytes in {group.num_rows:,} rows, far more than one pair per "
                    "row has"
                )


def _check_lengths(path: Path, name: str, texts: pa.Array) -> None:
    longest = pc.max(pc.binary_length(texts)).as_py() if pa.types.is_string(texts.type) and len(texts) else 0
    if longest > _MAX_TEXT_BYTES:
        raise LabelError(f"{path}: the column {name} has a text of {longest:,} bytes, expected short names")


def _line_batches(path: Path) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    rows: list[dict[str, Any]] = []
    first = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError):  # no JSON, or nested too deeply to read
                row = None
            if not isinstance(row, dict):
                raise LabelError(f"{path}: line {number}: not a JSON object, expected one pair per line")
            if isinstance(row, RepeatedKeys):
                key = shorten(row.repeated()[0])
                raise LabelError(
                    f"{path}: line {number}: has the key {key} more than once, expected each once"
                )
            # A key that appears only in some rows would be an optional column with holes.
            if rows and row.keys() != rows[0].keys():
                raise LabelError(
                    f"{path}: line {number}: has other keys than the line before, expected the same in all"
                )
            rows.append(row)
            if len(rows) == _BATCH_ROWS:
                yield first, _columns(path, rows)
                rows, first = [], number + 1
    if rows:
        yield first, _columns(path, rows)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else RepeatedKeys(pairs)


def _columns(path: Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    _check_columns(path, list(rows[0]))
    return {name: [row[name] for row in rows] for name in rows[0] if name in _KNOWN_COLUMNS}


def _check_columns(path: Path, names: list[str]) -> None:
    # Those of a file from elsewhere may hold text that cannot be printed.
    shown = ", ".join(name if is_unicode(name) else shorten(name) for name in names)
    if repeated := [name for name in _KNOWN_COLUMNS if names.count(name) > 1]:
        raise LabelError(f"{path}: has the column {repeated[0]} more than once; its columns are {shown}")
    if "pair_id" not in names:
        raise LabelError(f"{path}: has no column pair_id; its columns are {shown}")
    if "logits" not in names and not set(names) >= _WORD_COLUMNS:
        raise LabelError(
            f"{path}: has no scores, expected a column logits or the columns {', '.join(CONNECTIVES)}; "
            f"its columns are {shown}"
        )


def _checked_rows(config: ImportConfig, batch: Mapping[str, list[Any]], first_row: int) -> ShardTable:
    """A batch of rows as labels, with an empty hash where the table has none. Raises LabelError naming the row."""

    def refuse(place: int, message: str) -> LabelError:
        return LabelError(f"{config.table}: row {first_row + place}: {message}")

    for name in _TEXT_COLUMNS:
        for place, value in enumerate(batch.get(name, ())):
            if not isinstance(value, str) or not value or not is_unicode(value):
                raise refuse(place, f"{name} is {shorten(value)}, expected text")
    for place, split in enumerate(batch.get("split", ())):
        if split not in SPLITS:
            raise refuse(place, f"split is {shorten(split)}, expected one of {', '.join(SPLITS)}")
    num_rows = len(batch["pair_id"])
    scores_nA = np.array([_scores(config, batch, place, refuse) for place in range(num_rows)])
    rest = batch.get("log_rest_mass")
    for place, value in enumerate(rest or ()):
        if not _is_finite(value) or value > 0:
            raise refuse(place, f"log_rest_mass is {shorten(value)}, expected the log of a probability")
    if rest is not None:
        log_rest_n = np.array([float(value) for value in rest], dtype=np.float32)
    elif config.scores == "probabilities":
        # Rounded probabilities may add up to a little more than 1, which leaves less than nothing.
        left_n = 1 - np.exp(scores_nA).sum(axis=1)
        log_rest_n = np.log(np.maximum(left_n, np.exp(NO_REST_MASS))).astype(np.float32)
    else:
        log_rest_n = np.full(num_rows, UNKNOWN_REST_MASS, dtype=np.float32)
    return ShardTable(
        batch["pair_id"],
        batch.get("pair_hash") or [""] * num_rows,
        batch.get("split") or [_ANY_SPLIT] * num_rows,
        scores_nA.astype(np.float32),
        log_rest_n,
    )


def _scores(config: ImportConfig, batch: Mapping[str, list[Any]], place: int, refuse: Any) -> list[float]:
    pair_id = batch["pair_id"][place]
    has_list = "logits" in batch
    values = batch["logits"][place] if has_list else [batch[word][place] for word in CONNECTIVES]
    if not isinstance(values, list) or len(values) != len(CONNECTIVES):
        raise refuse(place, f"the pair {pair_id} has {shorten(values)}, expected {len(CONNECTIVES)} scores")
    for value in values:
        if not _is_finite(value):
            raise refuse(
                place, f"the pair {pair_id} has the score {shorten(value)}, expected a finite number"
            )
        if config.scores == "probabilities" and not 0 < float(value) <= 1:
            raise refuse(
                place,
                f"the pair {pair_id} has the probability {shorten(value)}, expected above 0 and up to 1",
            )
    numbers = [float(value) for value in values]
    if config.scores == "logits":
        return numbers
    if (total := sum(numbers)) > _MAX_SUM:
        raise refuse(
            place,
            f"the probabilities of the pair {pair_id} add up to {total:.4g}, expected at most 1; unnormalised scores "
            "are --scores logits",
        )
    return [math.log(number) for number in numbers]


def _is_finite(value: Any) -> bool:
    """True if a value is a number that a float32 can hold, however many digits it is written with."""
    # Parquet's decimal columns come as Decimal, which Python does not count among the real numbers.
    is_number = isinstance(value, Real | Decimal) and not isinstance(value, bool)
    # NaN fails the comparison, too. Python compares integers of any length without converting them.
    return is_number and abs(value) <= float(np.finfo(np.float32).max)
