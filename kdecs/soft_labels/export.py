"""The export of soft labels: workers take shards off a shared directory until all are there.

No process group: each worker holds the lock of the shard it labels, and the kernel frees the lock of a worker
that dies, so that another takes its shard over. Workers may be ranks of one launch, or jobs started on their
own on one directory (a file system with working flock). A shard is scored in chunks that depend on the shard
alone: the same bytes whatever the number of workers, their order, or how often they were stopped.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdecs.artifact import Manifest, file_lock, is_complete, sha256_of_file
from kdecs.config import config_hash
from kdecs.corpus.pairs import Pair
from kdecs.errors import LabelError
from kdecs.soft_labels.completion import complete_export
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import (
    QUARANTINE_DIRECTORY,
    WORK_DIRECTORY,
    ShardRecord,
    ShardTable,
    is_as_recorded,
    read_record,
    shard_name,
    write_shard,
)
from kdecs.soft_labels.interfaces import Scorer, Stop, Worker
from kdecs.soft_labels.job import KIND, check_output, check_teacher_corpus, open_job
from kdecs.soft_labels.plan import Shard, plan_shards, read_splits

PAIRS_A_CHUNK = 256
"""Pairs scored between two looks at the stop signal; part of what fixes a shard's batches."""


@dataclass(frozen=True)
class Progress:
    """What a worker reports: pairs that are labelled and safe (by any worker) or scored by this one."""

    pairs_done: int
    pairs_total: int
    line: str | None


@dataclass(frozen=True)
class ExportResult:
    """The finished directory's manifest, and the pairs labelled by all workers while this one ran."""

    manifest: Manifest
    num_new_pairs: int
    seconds: float

    @property
    def pairs_per_second(self) -> float:
        """Of all workers together."""
        return self.num_new_pairs / self.seconds if self.seconds else 0.0


def is_finished(config: ExportConfig) -> bool:
    """Whether the output holds this very export, complete (kind, config hash, sizes); needs no torch."""
    return is_complete(config.output, KIND, config_hash(config))


def export_shards(
    config: ExportConfig,
    scorer: Scorer,
    worker: Worker,
    stop: Stop,
    *,
    report: Callable[[Progress], None] = lambda _: None,
    poll_s: float = 0.5,
) -> ExportResult:
    """Label shards until the directory is complete; returns when the manifest stands, written by any worker.

    Raises LabelError for a label that is not finite, ArtifactError for an output of other work or a teacher
    of another corpus, Stopped between chunks after a stop signal, OSError for a full disk. Every shard
    finished before is kept; the same call goes on.
    """
    started = time.monotonic()
    work_hash = config_hash(config)
    check_output(config.output, work_hash)
    check_teacher_corpus(config, scorer.manifest)
    splits = read_splits(config.corpus)
    shards = plan_shards(splits, config.num_shards)
    open_job(config, work_hash, lineage=scorer.lineage, answer_words=scorer.answer_words)
    export = _Export(config, scorer, worker, stop, report, shards)
    first_look = export.take_stock()
    while not export.is_done():
        if not export.label_what_is_free() and not export.is_done():
            stop.raise_if_requested(export.stop_message())
            time.sleep(poll_s)
    manifest = complete_export(config, work_hash, scorer, shards, export.records, splits["valid"])
    return ExportResult(manifest, export.pairs_total - first_look, time.monotonic() - started)


class _Export:
    """One worker's view of the directory: which shards it has seen finished."""

    def __init__(
        self,
        config: ExportConfig,
        scorer: Scorer,
        worker: Worker,
        stop: Stop,
        report: Callable[[Progress], None],
        shards: Sequence[Shard],
    ) -> None:
        self.config, self.scorer, self.worker, self.stop, self.report = config, scorer, worker, stop, report
        first = worker.rank * len(shards) // max(1, worker.world_size) % len(shards)
        self.shards = [*shards[first:], *shards[:first]]
        self.records: dict[int, ShardRecord] = {}
        self.pairs_total = sum(shard.num_pairs for shard in shards)

    def is_done(self) -> bool:
        return len(self.records) == len(self.shards)

    def path(self, shard: Shard) -> Path:
        return self.config.output / shard_name(shard.index)

    def stop_message(self) -> str:
        finished = sum(read_record(self.path(shard)) is not None for shard in self.shards)
        return (
            f"{self.config.output}: stopped with {finished} of {len(self.shards)} shards finished; "
            "run the same command again to go on"
        )

    def take_stock(self) -> int:
        """Pairs in shards that are finished and whole; damaged ones are left to whoever locks them."""
        for shard in self.shards:
            record = read_record(self.path(shard))
            if record and is_as_recorded(self.path(shard), record):
                self.records[shard.index] = record
        done = self._pairs_done()
        self._tell(0, f"{len(self.records)} of {len(self.shards)} shards are there" if done else None)
        return done

    def label_what_is_free(self) -> bool:
        """Label every shard that is not finished and that no other worker holds; whether anything changed."""
        before = len(self.records)
        for shard in self.shards:
            if shard.index in self.records:
                continue
            self.stop.raise_if_requested(self.stop_message())
            lock = self.config.output / WORK_DIRECTORY / f"{shard_name(shard.index)}.lock"
            with file_lock(lock, blocking=False) as held:
                if held:
                    self.records[shard.index] = self._finished(shard) or self._label(shard)
        return len(self.records) > before

    def _finished(self, shard: Shard) -> ShardRecord | None:
        """The record of a shard that another worker finished meanwhile; a damaged file is put aside."""
        path = self.path(shard)
        record = read_record(path)
        if record is None or not path.is_file():
            return None
        if is_as_recorded(path, record):
            self._tell(0, None)
            return record
        found = sha256_of_file(path)
        aside = self.config.output / QUARANTINE_DIRECTORY / f"{path.stem}.{found[:12]}{path.suffix}"
        aside.parent.mkdir(exist_ok=True)
        os.replace(path, aside)
        self._tell(
            0,
            f"{path}: damaged (sha256 {found[:12]}…, written as {record.sha256[:12]}…), moved to {aside}; "
            "labelling it again",
        )
        return None

    def _label(self, shard: Shard) -> ShardRecord:
        path = self.path(shard)
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a worker that was killed
            leftover.unlink(missing_ok=True)
        started = time.monotonic()
        table = self._score(shard)
        device = str(getattr(self.worker.device, "type", self.worker.device))
        record = write_shard(path, table, self.scorer.answer_words, device=device)
        rate = shard.num_pairs / max(time.monotonic() - started, 1e-9)
        count = f"{len(self.records) + 1} of {len(self.shards)} shards"
        self._tell(
            shard.num_pairs,
            f"{path.name}: {shard.num_pairs:,} pairs, {rate:,.1f} pairs a second; {count}",
        )
        return record

    def _score(self, shard: Shard) -> ShardTable:
        pair_ids: list[str] = []
        pair_hashes: list[str] = []
        splits: list[str] = []
        num_words = len(self.scorer.answer_words)
        logits = [np.empty((0, num_words), np.float32)]
        log_rest_mass = [np.empty(0, np.float32)]
        for chunk in shard.chunks(PAIRS_A_CHUNK):
            self.stop.raise_if_requested(self.stop_message())
            pairs = [pair for planned in chunk for pair in planned.pairs()]
            logits_nA, log_rest_mass_n = self.scorer.score(pairs)
            assert logits_nA.shape == (len(pairs), num_words)
            assert log_rest_mass_n.shape == (len(pairs),)
            _check_finite(pairs, logits_nA, log_rest_mass_n)
            logits.append(logits_nA)
            log_rest_mass.append(log_rest_mass_n)
            pair_ids += [pair.id for pair in pairs]
            pair_hashes += [pair.hash for pair in pairs]
            splits += [planned.split for planned in chunk for _ in range(planned.num_pairs)]
            self._tell(len(pair_ids), None)
        return ShardTable(
            pair_ids, pair_hashes, splits, np.concatenate(logits), np.concatenate(log_rest_mass)
        )

    def _pairs_done(self) -> int:
        return sum(shard.num_pairs for shard in self.shards if shard.index in self.records)

    def _tell(self, pairs_in_hand: int, line: str | None) -> None:
        self.report(Progress(self._pairs_done() + pairs_in_hand, self.pairs_total, line))


def _check_finite(pairs: Sequence[Pair], logits_nA: np.ndarray, log_rest_mass_n: np.ndarray) -> None:
    is_bad_n = ~(np.isfinite(logits_nA).all(axis=1) & np.isfinite(log_rest_mass_n))
    if is_bad_n.any():
        first = int(np.flatnonzero(is_bad_n)[0])
        raise LabelError(
            f"pair {pairs[first].id}: logits {logits_nA[first].tolist()} and log rest mass "
            f"{float(log_rest_mass_n[first])} are not all finite ({int(is_bad_n.sum())} such pairs in this "
            "chunk); check the teacher, or export in float32"
        )
