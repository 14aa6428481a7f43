"""The tokenised cache of one corpus file: built once per node, memory-mapped, shared by all trials.

Several training files have one cache, in which their dialogues follow one another. The cache is an artifact directory
of kind corpus-cache, `<cache>/corpus-<key>/`. Its key covers the files' content, the tokenizer, the template's version
and the maximum length. `pairs.arrow` is one uncompressed Arrow IPC file whose
rows are the pairs of the universe fold1+neutral by dialogue, target and candidate:

    pair_id, pair_hash     string (kdecs.corpus.pairs)
    dialogue, target, candidate   int32; `dialogue` is the index in the file, or in all files together
    emotion                int32, index into the manifest's details["emotions"]
    is_cause               int32, 0 or 1
    token_ids              list<int32>
    emotion_mask, connective_mask, start_mask, end_mask, candidate_first   int32, positions in token_ids
    span_start, span_end   int32, 1-based within u_j's copy; 0 none, -1 truncated away
    candidate_offsets      list<int32>: start, end, start, end, … characters in u_j's text, two per token
    trunk_ids              list<int32>, in the layout tree alone: the trunk of a target, in its first row only

In the layout tree `token_ids` are those of the branch, and all positions count from the trunk's begin.

Building reads the corpus on demand and writes 16,384 rows at a time, so its memory does not depend on the size of the
corpus. Token lists stay in the mapped file, whose pages all processes share. The integer columns are copied if the
file has several batches: about 60 bytes per pair and process (0.06 GiB per million pairs).
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdecs.artifact import (
    atomic_path,
    check_sizes,
    file_lock,
    is_complete,
    read_manifest,
    sha256_of_file,
    verify_artifact,
    write_manifest,
)
from kdecs.config import files_of, input_checksums, names_of
from kdecs.corpus.encoding import EncodedPair, Layout, PairEncoder
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import open_dialogues
from kdecs.corpus.schema import COARSE_EMOTIONS, FINE_EMOTIONS, NEUTRAL, NO_TABLE
from kdecs.corpus.splits import Split
from kdecs.errors import ArtifactError

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
_FILE = "pairs.arrow"
# Bounds the memory of a build; fewer rows would make more batches to look up a row in.
_ROWS_PER_BATCH = 16_384
# Enough for the tokenizer to use all cores.
_ENCODED_AT_ONCE = 256
_INTEGERS = (
    "dialogue",
    "target",
    "candidate",
    "emotion",
    "is_cause",
    "emotion_mask",
    "connective_mask",
    "start_mask",
    "end_mask",
    "candidate_first",
    "span_start",
    "span_end",
)
_LISTS = ("token_ids", "candidate_offsets")
_TEXTS = ("pair_id", "pair_hash")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [(name, pa.int32()) for name in _INTEGERS]
    + [(name, pa.list_(pa.int32())) for name in _LISTS]
)
_TRUNK = "trunk_ids"
_SCHEMAS: dict[Layout, pa.Schema] = {
    "pair": _SCHEMA,
    "tree": _SCHEMA.append(pa.field(_TRUNK, pa.list_(pa.int32()))),
}


class CorpusCache:
    """The rows of a cache file. Integer columns are int32 arrays (P,); lists are read row by row.

    `num_tokens` (P,) is the length of `token_ids`. In the layout tree `trunk_row` (P,) is the first row of each row's
    target, which holds its trunk, and `num_trunk_tokens` (P,) the length of that trunk.
    """

    def __init__(self, directory: Path, *, emotions: Sequence[str]) -> None:
        self.directory = directory
        self.emotions = tuple(emotions)
        self._map = pa.memory_map(str(directory / _FILE), "r")
        reader = pa.ipc.open_file(self._map)
        # The columns tell the layout, which no manifest states.
        layouts = [layout for layout, schema in _SCHEMAS.items() if reader.schema == schema]
        if not layouts:
            raise ArtifactError(
                f"{directory / _FILE}: found the columns of another version; remove {directory}, and it is built again"
            )
        self.layout: Layout = layouts[0]
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._integers = {name: _joined([b.column(name).to_numpy() for b in batches]) for name in _INTEGERS}
        # Views: offsets and values stay in the mapped file.
        self._lists = {
            name: [(c.offsets.to_numpy(), c.values.to_numpy()) for c in (b.column(name) for b in batches)]
            for name in (*_LISTS, *([_TRUNK] if self.layout == "tree" else []))
        }
        self.num_tokens = self._list_lengths("token_ids")
        self.num_candidate_tokens = self._list_lengths("candidate_offsets") // 2
        if self.layout == "tree":
            lengths = self._list_lengths(_TRUNK)
            # Only the first row of a target holds its trunk, so a row's trunk is that of the last row that has one.
            self.trunk_row = np.maximum.accumulate(np.where(lengths > 0, np.arange(len(lengths)), 0))
            self.num_trunk_tokens = lengths[self.trunk_row]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> npt.NDArray[np.int32]:
        """An integer column (P,), read-only."""
        return self._integers[name]

    def list_at(self, name: str, row: int) -> npt.NDArray[np.int32]:
        """One row of a list column, a view into the mapped file."""
        # `right`, so that the first row of a batch is found in that batch and not in the one before.
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, values = self._lists[name][batch]
        local = row - int(self._starts[batch])
        return values[offsets[local] : offsets[local + 1]]

    def offsets_at(self, row: int) -> npt.NDArray[np.int32]:
        """Characters [start, end) in u_j's text of each token of its copy: (M, 2)."""
        return self.list_at("candidate_offsets", row).reshape(-1, 2)

    def _list_lengths(self, name: str) -> npt.NDArray[np.int32]:
        return _joined([np.diff(offsets) for offsets, _ in self._lists[name]])

    def identities(self, rows: npt.ArrayLike) -> tuple[list[str], list[str]]:
        """Pair ids and pair hashes of rows: some 170 bytes each in memory, so ask for a million at most."""
        rows = np.asarray(rows, dtype=np.int64)
        batch_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        ids: list[str] = []
        hashes: list[str] = []
        # Runs of rows of one batch, so that each batch is asked once per run and not once per row.
        for some in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(batch_of_row)) + 1):
            if len(some):
                batch = int(batch_of_row[some[0]])
                local = pa.array(rows[some] - self._starts[batch])
                ids += self._batches[batch].column("pair_id").take(local).to_pylist()
                hashes += self._batches[batch].column("pair_hash").take(local).to_pylist()
        return ids, hashes


def open_cache(
    corpus: Path | tuple[Path, ...],
    encoder: PairEncoder,
    cache: Path,
    emotion_table: Mapping[str, str] | None = None,
) -> CorpusCache:
    """The tokenised cache of a corpus file, or of several together.

    If it is missing, one process builds it and the others wait.

    `emotion_table` maps the emotions (kdecs.corpus.splits.emotion_table); None keeps them.

    Raises CorpusError for a faulty corpus, ModelError if the template does not fit into the maximum length.
    """
    key = cache_key(corpus, encoder, emotion_table)
    directory = cache / f"corpus-{key[:16]}"
    # One process builds, the others wait here and find it complete.
    with file_lock(cache / f".corpus-{key[:16]}.lock"):
        # Looked up under the lock, since another process may have built it in the meantime.
        if not is_complete(directory, "corpus-cache", key):
            _build(corpus, encoder, directory, key, emotion_table)
    manifest = read_manifest(directory, "corpus-cache")
    # Sizes only: all trials of a node start here, and hashing the file would cost each of them a pass over it.
    check_sizes(directory, manifest)
    return CorpusCache(directory, emotions=manifest.details["emotions"])


def cache_key(
    corpus: Path | tuple[Path, ...], encoder: PairEncoder, emotion_table: Mapping[str, str] | None = None
) -> str:
    """Hex sha256 over corpus content, tokenizer, template version, maximum length and format version."""
    # The table changes the column `emotion`, so each table has its own cache.
    emotions = json.dumps(emotion_table, sort_keys=True)
    content = "+".join(sha256_of_file(path) for path in files_of(corpus))
    parts = (content, encoder.fingerprint, emotions, str(CACHE_VERSION))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def ordered_emotions(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in canonical order: neutral, the coarse ones, the fine ones, then any other by name."""
    canonical = list(dict.fromkeys((NEUTRAL, *COARSE_EMOTIONS, *FINE_EMOTIONS)))
    rank = {label: index for index, label in enumerate(canonical)}
    return tuple(sorted(set(labels), key=lambda label: (rank.get(label, len(rank)), label)))


def _build(
    corpus: Path | tuple[Path, ...],
    encoder: PairEncoder,
    directory: Path,
    key: str,
    emotion_table: Mapping[str, str] | None,
) -> None:
    # Two passes over a file that is read on demand: the first one checks it and finds the emotions.
    dialogues = Split(open_dialogues(corpus, emotion_table or NO_TABLE), table=emotion_table)
    emotions = ordered_emotions(u.emotion for d in dialogues for u in d.utterances if u.emotion)
    indexed = (
        (index, pair)
        for index, d in enumerate(dialogues)
        for pair in pairs_of(d, "fold1+neutral", encoder.variant.candidates_after)
    )
    num_pairs = num_truncated = 0
    schema = _SCHEMAS[encoder.layout]
    with (
        atomic_path(directory / _FILE) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for rows in _chunks(_encoded_rows(indexed, encoder, emotions), _ROWS_PER_BATCH):
            num_pairs += len(rows)
            num_truncated += sum(row.pop("num_truncated") > 0 for row in rows)
            # Batch by batch, never a table: a corpus of any size passes through 16,384 rows of memory.
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    if num_truncated:
        logger.warning(
            "%s: %d of %d prompts are longer than %d tokens even without history; ends of their utterances were cut",
            names_of(corpus),
            num_truncated,
            num_pairs,
            encoder.max_tokens,
        )
    write_manifest(
        directory,
        "corpus-cache",
        config_hash=key,
        inputs=input_checksums(corpus=corpus),
        files=[_FILE],
        rows={_FILE: num_pairs},
        details={"emotions": emotions, "num_truncated": num_truncated},
    )
    # Read back once here, so that the trials which map the file need no checksum of their own.
    if faults := verify_artifact(directory):
        raise ArtifactError(f"{faults[0]}; check the disk and run the same command again")


def _encoded_rows(
    indexed: Iterable[tuple[int, Pair]], encoder: PairEncoder, emotions: Sequence[str]
) -> Iterator[dict[str, Any]]:
    emotion_index = {label: index for index, label in enumerate(emotions)}
    last: tuple[int, int] | None = None
    for chunk in _chunks(indexed, _ENCODED_AT_ONCE):
        for (dialogue, pair), encoded in zip(chunk, encoder.encode([pair for _, pair in chunk]), strict=True):
            row = _row(dialogue, pair, encoded, emotion_index)
            if encoder.layout == "tree":
                # Once per target: its rows follow one another.
                row[_TRUNK] = encoded.trunk_ids if (dialogue, pair.target) != last else []
                last = (dialogue, pair.target)
            yield row


def _row(dialogue: int, pair: Pair, encoded: EncodedPair, emotion_index: dict[str, int]) -> dict[str, Any]:
    assert pair.emotion is not None  # fold1+neutral holds labelled targets only
    return {
        "pair_id": pair.id,
        "pair_hash": pair.hash,
        "dialogue": dialogue,
        "target": pair.target,
        "candidate": pair.candidate,
        "emotion": emotion_index[pair.emotion],
        "is_cause": int(pair.is_cause),
        "token_ids": encoded.token_ids,
        "emotion_mask": encoded.emotion_mask,
        "connective_mask": encoded.connective_mask,
        "start_mask": encoded.start_mask,
        "end_mask": encoded.end_mask,
        "candidate_first": encoded.candidate_first,
        "span_start": encoded.span_start,
        "span_end": encoded.span_end,
        "candidate_offsets": [place for offset in encoded.candidate_offsets for place in offset],
        "num_truncated": encoded.num_truncated,
    }


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _joined(parts: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """One array of all batches: the mapped one if there is a single batch, otherwise a copy."""
    if not parts:
        return np.empty(0, dtype=np.int32)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
