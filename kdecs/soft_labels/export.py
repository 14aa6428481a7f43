"""The export of soft labels: workers take shards off a shared directory until all are there.

No process group: each worker takes the lease of a shard that nobody holds (kdecs.soft_labels.claims) and labels it;
the shard of a worker that died is taken over. Workers may be ranks of one launch, or jobs started on their own on one
directory, on one host or several. A shard is scored in chunks that depend on the shard alone: the same bytes
whatever the number of workers, their order, or how often they were stopped. Two workers that label one shard do no
harm for the same reason; on GPUs, where last bits may differ, the first that finishes it wins.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdecs.artifact import Manifest, read_manifest, sha256_of_file
from kdecs.config import config_hash
from kdecs.corpus.splits import Split, open_splits
from kdecs.errors import ArtifactError
from kdecs.soft_labels.claims import (
    KIND,
    Lease,
    Leases,
    check_teacher_corpus,
    claim_output,
    open_job,
    remove_litter,
)
from kdecs.soft_labels.completion import complete_export
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import (
    QUARANTINE_DIRECTORY,
    WORK_DIRECTORY,
    ShardRecord,
    has_recorded_size,
    is_as_recorded,
    read_record,
    record_path,
    shard_name,
    write_shard,
)
from kdecs.soft_labels.plan import PLAN_DIRECTORY, Plan, PlanKind, batching_of, make_plan, open_plan
from kdecs.soft_labels.scoring import Company, Independent, LeaseLost, Scorer, ShardScoring, Stop, Worker
from kdecs.soft_labels.verify import whole_labels

LONG_SHARD_S = 3600.0
WANTED_SHARD_S = 600.0
MEASURED_AFTER_S = 60.0
"""A rate is believed once a shard was worked on for so long: a device's first batches are slow."""

MAX_SHARDS = 100_000


def long_shard_warning(num_shards: int, *, num_pairs: int, num_scored: int, seconds: float) -> str | None:
    """One line where a shard of `num_pairs` takes longer than LONG_SHARD_S at the rate measured so far, else None.

    `num_shards` is the config's; the line names a number with which a shard takes WANTED_SHARD_S.
    """
    if not num_scored or seconds < MEASURED_AFTER_S:
        return None
    shard_s = seconds / num_scored * num_pairs
    if shard_s <= LONG_SHARD_S:
        return None
    wanted = min(MAX_SHARDS, math.ceil(num_shards * shard_s / WANTED_SHARD_S))
    return (
        f"warning: at {num_scored / seconds:,.1f} pairs a second a shard takes {shard_s / 3600:.1f} hours, and a "
        f"worker that is stopped loses the shard in hand; with num_shards: {wanted} (in another output) it is "
        f"{WANTED_SHARD_S / 60:.0f} minutes"
    )


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


def is_finished(config: ExportConfig, *, show_progress: bool = False) -> bool:
    """True if the output holds this very export and every byte of it agrees with the manifest; needs no torch."""
    return whole_labels(config.output, config_hash(config), show_progress=show_progress) is not None


def export_shards(
    config: ExportConfig,
    scorer: Scorer,
    worker: Worker,
    stop: Stop,
    *,
    company: Company | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    poll_s: float = 0.5,
) -> ExportResult:
    """Label shards until the directory is complete; returns when the manifest stands, written by any worker.

    Collective where `company` is a launch that computes in step (`engine: zero3`).
    Raises LabelError for a label that is not finite, ArtifactError for an output of other work or a teacher
    of another corpus, Stopped between chunks after a stop signal, OSError for a full disk. Every shard
    finished before is kept; the same call goes on.
    """
    started = time.monotonic()
    company = company or Independent()
    work_hash = config_hash(config)
    claim_output(config.output, work_hash)
    check_teacher_corpus(config, scorer.manifest)
    splits = open_splits(config.corpus)
    # Claimed before anything else is written: a plan of other work would replace that of whoever works here.
    open_job(config, work_hash, lineage=scorer.lineage, answer_words=scorer.answer_words)
    leases = Leases(config.output / WORK_DIRECTORY / "leases", lease_s=config.lease_s)
    kind = PlanKind(work_hash, config.num_shards, batching_of(scorer.manifest))
    plan = _plan(config.output, kind, splits, leases, stop, poll_s)
    export = _Export(config, plan, leases, scorer, worker, stop, report)
    first_look = export.take_stock()
    manifest: Manifest | None = None
    while manifest is None:
        progressed = export.label_what_is_free()
        if export.is_done():
            if not company.may_complete:
                break
            manifest = export.complete(work_hash)
        if manifest is None and not progressed:
            stop.raise_if_requested(export.stop_message())
            company.wait(poll_s)
    company.finish()
    manifest = manifest or read_manifest(config.output, KIND)
    return ExportResult(manifest, plan.num_pairs - first_look, time.monotonic() - started)


def _plan(
    output: Path,
    kind: PlanKind,
    splits: Mapping[str, Split],
    leases: Leases,
    stop: Stop,
    poll_s: float,
) -> Plan:
    """The plan on disk, made by one worker while the others wait."""
    directory = output / WORK_DIRECTORY / PLAN_DIRECTORY
    while True:
        if plan := open_plan(directory, kind, splits):
            return plan
        with leases.holding("plan") as lease:
            if lease:
                return open_plan(directory, kind, splits) or make_plan(directory, kind, splits)
        stop.raise_if_requested(f"{output}: stopped before its shards were planned")
        time.sleep(poll_s)


class _Export:
    """One worker's view of the directory: which shards it has seen finished."""

    def __init__(
        self,
        config: ExportConfig,
        plan: Plan,
        leases: Leases,
        scorer: Scorer,
        worker: Worker,
        stop: Stop,
        report: Callable[[Progress], None],
    ) -> None:
        self.output, self.plan, self.leases, self.scorer = config.output, plan, leases, scorer
        self.config, self.worker, self.stop, self.report = config, worker, stop, report
        first = worker.rank * plan.num_shards // max(1, worker.world_size) % plan.num_shards
        self.order = [*range(first, plan.num_shards), *range(first)]
        self.records: dict[int, ShardRecord] = {}
        self.is_warned = worker.rank != 0  # one of a launch speaks for all

    def is_done(self) -> bool:
        return len(self.records) == self.plan.num_shards

    def path(self, shard: int) -> Path:
        return self.output / shard_name(shard)

    def stop_message(self) -> str:
        finished = sum(read_record(self.path(shard)) is not None for shard in self.order)
        return (
            f"{self.output}: stopped with {finished} of {self.plan.num_shards} shards finished; "
            "run the same command again to go on"
        )

    def take_stock(self) -> int:
        """Pairs in shards that are finished; damaged ones are left to whoever takes their lease.

        Workers of a launch share the reading of the bytes; what another checks is believed by its size.
        """
        for shard in self.order:
            if record := self._record(shard):
                is_mine = shard % max(1, self.worker.world_size) == self.worker.rank
                if (is_as_recorded if is_mine else has_recorded_size)(self.path(shard), record):
                    self.records[shard] = record
        done = self._pairs_done()
        self._tell(0, f"{len(self.records)} of {self.plan.num_shards} shards are there" if done else None)
        return done

    def label_what_is_free(self) -> bool:
        """Label every shard that is not finished and that no other worker holds; whether anything changed."""
        before = len(self.records)
        for shard in self.order:
            if shard in self.records:
                continue
            self.stop.raise_if_requested(self.stop_message())
            with self.leases.holding(self.path(shard).stem) as lease:
                if lease and (record := self._finished(shard) or self._label(shard, lease)):
                    self.records[shard] = record
        return len(self.records) > before

    def complete(self, work_hash: str) -> Manifest | None:
        """The manifest; None while another worker writes it, or where shards are damaged and to be labelled again."""
        with self.leases.holding("manifest") as lease:
            if lease is None:
                return None
            found = complete_export(self.config, work_hash, self.scorer, self.plan, self.records)
            if isinstance(found, Manifest):
                remove_litter(self.output, self.leases)
                return found
        for shard in found:
            del self.records[shard]
        return None

    def _record(self, shard: int) -> ShardRecord | None:
        """The record of a shard, where it is of this very plan."""
        record, plan = read_record(self.path(shard)), self.plan.record
        is_planned = record and (record.plan, record.rows) == (plan.entries_sha256, plan.pairs[shard])
        return record if is_planned else None

    def _finished(self, shard: int) -> ShardRecord | None:
        """The record of a shard that another worker finished meanwhile; a damaged file is put aside."""
        path = self.path(shard)
        record = self._record(shard)
        if record is None or not path.is_file():
            return None
        if is_as_recorded(path, record):
            self._tell(0, None)
            return record
        found = sha256_of_file(path)
        aside = self.output / QUARANTINE_DIRECTORY / f"{path.stem}.{found[:12]}{path.suffix}"
        aside.parent.mkdir(exist_ok=True)
        os.replace(path, aside)
        self._tell(
            0,
            f"{path}: damaged (sha256 {found[:12]}…, written as {record.sha256[:12]}…), moved to {aside}; "
            "labelling it again",
        )
        return None

    def _label(self, shard: int, lease: Lease) -> ShardRecord | None:
        """Label a shard; None where its lease was lost to another worker on the way."""
        path, num_pairs = self.path(shard), self.plan.record.pairs[shard]
        _remove_leftovers(self.output, path.name)
        if not lease.confirm():
            return None
        record_path(path).unlink(missing_ok=True)  # of a shard that is gone or damaged: see _before_rename
        started = time.monotonic()
        scoring = ShardScoring(
            self.plan,
            shard,
            self.scorer,
            top_k=self.config.top_k,
            on_chunk=lambda n: self._between(n, lease, num_pairs, time.monotonic() - started),
        )
        device = str(getattr(self.worker.device, "type", self.worker.device))
        try:
            record = write_shard(
                path,
                scoring.tables(),
                self.scorer.answer_words,
                device=device,
                plan=self.plan.record.entries_sha256,
                top_k=self.config.top_k,
                agreement=scoring.agreement,
                before_rename=lambda rows: self._before_rename(shard, rows, lease),
            )
        except LeaseLost:
            self._tell(0, f"{path.name}: another worker took it over, after a silence of this one")
            return None
        except FileNotFoundError as error:
            own = (f".{path.name}.", f".{record_path(path).name}.")
            if not Path(str(error.filename)).name.startswith(own):
                raise
            self._tell(
                0, f"{path.name}: another worker took this one for dead and removed its unfinished file"
            )
            return None
        rate = num_pairs / max(time.monotonic() - started, 1e-9)
        count = f"{len(self.records) + 1} of {self.plan.num_shards} shards"
        self._tell(num_pairs, f"{path.name}: {num_pairs:,} pairs, {rate:,.1f} pairs a second; {count}")
        return record

    def _between(self, num_scored: int, lease: Lease, num_pairs: int, seconds: float) -> None:
        """Between two chunks of a shard of so many pairs, on which so many seconds were spent."""
        self.stop.raise_if_requested(self.stop_message())
        if not lease.is_held:
            raise LeaseLost
        warning = long_shard_warning(
            self.plan.num_shards, num_pairs=num_pairs, num_scored=num_scored, seconds=seconds
        )
        self._tell(num_scored, None if self.is_warned else warning)
        self.is_warned = self.is_warned or warning is not None

    def _before_rename(self, shard: int, rows: int, lease: Lease) -> None:
        """The last look before a shard is put in place: it is whole, and nobody else finished it meanwhile.

        A worker that was suspended for longer than its lease would put its bytes, on a GPU others in their last bits,
        in the place of those that the manifest lists.
        """
        path, expected = self.path(shard), self.plan.record.pairs[shard]
        if rows != expected:
            raise ArtifactError(
                f"{path}: {rows} pairs were labelled, its plan has {expected}: the plan changed meanwhile; "
                "run the same command again"
            )
        if not lease.confirm() or read_record(path) is not None:
            raise LeaseLost

    def _pairs_done(self) -> int:
        return sum(self.plan.record.pairs[shard] for shard in self.records)

    def _tell(self, pairs_in_hand: int, line: str | None) -> None:
        self.report(Progress(self._pairs_done() + pairs_in_hand, self.plan.num_pairs, line))


def _remove_leftovers(output: Path, name: str) -> None:
    """Remove the temporary files that killed workers left of a file."""
    for leftover in output.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)
