"""The export of soft labels: workers take shards from a shared directory until all are published.

A worker claims a shard that no other worker holds, scores it, publishes it and takes the next one. The worker that
finds all shards published writes the manifest (the protocol is in kdecs.soft_labels.claims). Workers may be ranks of
one launch or jobs on one host or several, and they need no process group. A shard is scored in chunks that depend on
the shard alone, so its bytes are the same whatever the number of workers, their order, or how often they were stopped.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdecs.artifact import (
    FileEntry,
    Manifest,
    build_manifest,
    fsync,
    read_manifest,
    save_manifest,
    sha256_of_file,
    temporary_path,
)
from kdecs.config import config_hash, input_checksums
from kdecs.corpus.schema import NO_TABLE
from kdecs.corpus.splits import GivenEmotions, emotion_table, open_splits
from kdecs.errors import ArtifactError, Stopped
from kdecs.evaluation.counts import PairCounts
from kdecs.evaluation.predictions import read_emotions
from kdecs.process import StopSignal
from kdecs.soft_labels.claims import (
    KIND,
    LEASES_DIRECTORY,
    Claim,
    Claims,
    check_export_output,
    check_teacher_corpus,
    open_job,
    publish,
    remove_temporaries,
)
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import (
    QUARANTINE_DIRECTORY,
    WORK_DIRECTORY,
    ShardRecord,
    published_record,
    reach_details,
    shard_name,
    shard_writer,
    write_record,
)
from kdecs.soft_labels.plan import PLAN_DIRECTORY, Plan, PlanKind, batching_of, make_plan, open_plan
from kdecs.soft_labels.scoring import Scorer, ShardScoring, SleepingWait, WaitPolicy
from kdecs.soft_labels.verify import verified_labels

if TYPE_CHECKING:
    from kdecs.runtime import Runtime  # imports torch, which a finished export does not need

# A stopped worker loses its current shard, and the last worker of an export keeps the others waiting for one: about ten
# minutes per shard is a small loss, an hour is worth a warning.
LONG_SHARD_S = 3600.0
WANTED_SHARD_S = 600.0
MEASURED_AFTER_S = 60.0
"""A shard's rate is believed after this time: the first batches on a device are slow."""
MAX_SHARDS = 100_000

_REPRODUCIBLE = {
    "cpu": "the same bytes on CPUs of one kind with the same libraries, dtype and threads_per_worker",
    "other": "equal up to rounding: a GPU's sums may differ in their last bits from one kind of device to another",
}


@dataclass(frozen=True)
class Progress:
    """The pairs that are published (by any worker) or scored by this one, and a line for the user if there is news."""

    pairs_done: int
    pairs_total: int
    line: str | None


@dataclass(frozen=True)
class ExportResult:
    """The finished directory's manifest, and the pairs that all workers labelled while this one ran."""

    manifest: Manifest
    num_new_pairs: int
    seconds: float

    @property
    def pairs_per_second(self) -> float:
        """The rate of all workers together."""
        return self.num_new_pairs / self.seconds if self.seconds else 0.0


def is_finished(config: ExportConfig, *, show_progress: bool = False) -> bool:
    """True if the output holds this very export and every byte of it agrees with the manifest; needs no torch."""
    return verified_labels(config.output, config_hash(config), show_progress=show_progress) is not None


def export_shards(
    config: ExportConfig,
    scorer: Scorer,
    runtime: "Runtime",
    stop: StopSignal,
    *,
    waiting: WaitPolicy | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    poll_s: float = 0.5,
) -> ExportResult:
    """Label shards until the directory is complete; returns once the manifest is written, by this worker or another.

    Collective where `waiting` is that of a launch whose ranks compute in step (`engine: zero3`).
    Raises LabelError for a label that is not finite, ArtifactError for an output of other work or a teacher of another
    corpus, Stopped between chunks after a stop signal, and OSError for a full disk. Published shards are kept, and the
    same call resumes.
    """
    started = time.monotonic()
    waiting = waiting or SleepingWait()
    work_hash = config_hash(config)
    check_teacher_corpus(config, scorer.manifest)
    check_export_output(config.output, work_hash)
    splits = open_splits(config.corpus, _given_emotions(config))
    # The job comes before all other files: a plan of other work would replace that of a worker already here.
    open_job(config, work_hash, lineage=scorer.lineage, answer_words=scorer.answer_words)
    claims = Claims(config.output / WORK_DIRECTORY / LEASES_DIRECTORY, lease_s=config.lease_s)

    plan_directory = config.output / WORK_DIRECTORY / PLAN_DIRECTORY
    kind = PlanKind(
        work_hash, config.num_shards, batching_of(scorer.manifest), config.candidates.after, config.universe
    )
    while (plan := open_plan(plan_directory, kind, splits)) is None:
        # One worker plans, since a plan is a pass over the whole corpus, and the others look for its result.
        with claims.holding("plan") as claim:
            if claim:
                plan = open_plan(plan_directory, kind, splits) or make_plan(plan_directory, kind, splits)
                break
        stop.raise_if_requested(f"{config.output}: stopped before its shards were planned")
        time.sleep(poll_s)

    worker = _Worker(config, work_hash, plan, claims, scorer, runtime, stop, report)
    pairs_before = worker.find_published()
    manifest: Manifest | None = None
    while manifest is None:
        has_progressed = worker.label_free_shards()
        if worker.has_all_shards():
            # A rank in step with others leaves the manifest to rank 0, and runs along with its forwards in `finish`.
            if not waiting.may_complete:
                break
            manifest = worker.complete()
        if manifest is None and not has_progressed:
            worker.raise_if_stopped()
            waiting.wait(poll_s)
    waiting.finish()
    remove_temporaries(config.output, config.lease_s, claims)
    manifest = manifest or read_manifest(config.output, KIND)
    return ExportResult(manifest, plan.num_pairs - pairs_before, time.monotonic() - started)


def _given_emotions(config: ExportConfig) -> GivenEmotions | None:
    """The emotions of utterances that have none. Raises PredictionError for a file that holds no predictions."""
    if config.emotions is None:
        return None
    table = emotion_table(config.corpus)
    return GivenEmotions(config.emotions, read_emotions(config.emotions, table or NO_TABLE))


class _ClaimLost(Exception):
    """Another worker took over the shard that this one labels."""


class _Worker:
    """One worker's part of an export; `records` has the record of each shard that it has seen published."""

    def __init__(
        self,
        config: ExportConfig,
        work_hash: str,
        plan: Plan,
        claims: Claims,
        scorer: Scorer,
        runtime: "Runtime",
        stop: StopSignal,
        report: Callable[[Progress], None],
    ) -> None:
        self.config, self.work_hash, self.plan, self.claims = config, work_hash, plan, claims
        self.scorer, self.runtime, self.stop, self.report = scorer, runtime, stop, report
        self.output = config.output
        # Ranks begin at shards far apart, so that they seldom want the same one.
        first = runtime.rank * plan.num_shards // max(1, runtime.world_size) % plan.num_shards
        self.order = [*range(first, plan.num_shards), *range(first)]
        self.records: dict[int, ShardRecord] = {}
        self.may_warn = runtime.rank == 0  # one rank speaks for the launch

    def has_all_shards(self) -> bool:
        return len(self.records) == self.plan.num_shards

    def path(self, shard: int) -> Path:
        return self.output / shard_name(shard)

    def raise_if_stopped(self) -> None:
        if self.stop.requested:
            finished = sum(self._published(shard, read_bytes=False) is not None for shard in self.order)
            raise Stopped(
                f"{self.output}: stopped with {finished} of {self.plan.num_shards} shards finished; "
                "run the same command again to resume"
            )

    def find_published(self) -> int:
        """Note the shards that are published, and return their pairs; damaged ones are left for `label_free_shards`.

        The ranks of a launch share the reading: each checks the bytes of its share, and the sizes of the others.
        """
        for shard in self.order:
            is_mine = shard % max(1, self.runtime.world_size) == self.runtime.rank
            if record := self._published(shard, read_bytes=is_mine):
                self.records[shard] = record
        done = self._pairs_done()
        self._tell(
            0, f"{len(self.records)} of {self.plan.num_shards} shards are already published" if done else None
        )
        return done

    def label_free_shards(self) -> bool:
        """Label every shard that is neither published nor claimed by another worker; True if any was added."""
        before = len(self.records)
        for shard in self.order:
            if shard in self.records:
                continue
            self.raise_if_stopped()
            with self.claims.holding(self.path(shard).stem) as claim:
                if claim is None:
                    continue
                # Only now, under the claim: its last holder may have published the shard a moment ago.
                record = self._published(shard)
                if record:
                    self._tell(0, None)
                else:
                    self._quarantine(shard)
                    record = self._label(shard, claim)
                if record:
                    self.records[shard] = record
        return len(self.records) > before

    def complete(self) -> Manifest | None:
        """Read every shard once more and write the manifest.

        None while another worker does so, or where shards are damaged: `label_free_shards` labels these again.
        Workers that do it at the same time write the same bytes.
        """
        with self.claims.holding("manifest") as claim:
            if claim is None:
                return None
            manifest = self._manifest()
            if _found_manifest(self.output) == manifest:  # its writer has read every shard
                return manifest
            # Hours may lie between a shard's publication and this moment, and the manifest vouches for every byte.
            damaged = [shard for shard, record in self.records.items() if self._published(shard) != record]
            for shard in damaged:
                del self.records[shard]
            if damaged:
                return None
            for shard in self.records:  # its worker may have died between the link and the directory's sync
                fsync(self.path(shard))
            fsync(self.output)
            try:
                save_manifest(self.output, manifest)
            except FileNotFoundError:  # a faster worker has completed the export and removed temporary files
                if _found_manifest(self.output) != manifest:
                    raise
            return manifest

    def _published(self, shard: int, *, read_bytes: bool = True) -> ShardRecord | None:
        """The record of a published, undamaged shard of this very plan."""
        record, plan = published_record(self.path(shard), read_bytes=read_bytes), self.plan.record
        is_planned = record and (record.plan, record.rows) == (plan.entries_sha256, plan.pairs[shard])
        return record if is_planned else None

    def _quarantine(self, shard: int) -> None:
        """Move whatever has a shard's name, and is not that shard, out of the way of its publication."""
        path = self.path(shard)
        # Not `exists`: a link that leads nowhere takes the name as well.
        if not os.path.lexists(path):
            return
        found = sha256_of_file(path)[:12] if path.is_file() else "no-file"
        # Kept, since nobody knows whose bytes these are; the checksum in the name keeps several apart.
        aside = self.output / QUARANTINE_DIRECTORY / f"{path.stem}.{found}{path.suffix}"
        aside.parent.mkdir(exist_ok=True)
        os.replace(path, aside)
        self._tell(
            0,
            f"{path}: damaged (found sha256 {found}…, which no worker has on record), moved to {aside}; "
            "labelling it again",
        )

    def _label(self, shard: int, claim: Claim) -> ShardRecord | None:
        """Score and publish a shard; None if another worker took it over and has published it or will do so."""
        path, num_pairs = self.path(shard), self.plan.record.pairs[shard]
        started = time.monotonic()
        scoring = ShardScoring(
            self.plan,
            shard,
            self.scorer,
            top_k=self.config.top_k,
            on_chunk=lambda n: self._between_chunks(n, claim, num_pairs, time.monotonic() - started),
        )
        temporary = temporary_path(path)
        try:
            with shard_writer(temporary, self.scorer.answer_words, self.config.top_k) as writer:
                for table in scoring.tables():
                    writer.append(table)
            assert writer.rows == num_pairs
            record = ShardRecord(
                bytes=writer.bytes,
                sha256=writer.sha256,
                rows=writer.rows,
                plan=self.plan.record.entries_sha256,
                # The kind alone ("cuda", not "cuda:3"), so that the manifest does not depend on the number of workers.
                device=str(getattr(self.runtime.device, "type", self.runtime.device)),
                agreement=scoring.agreement,
            )
            try:
                # Before the shard: a shard that could be seen without its record would be labelled again.
                write_record(path, record)
                is_first = publish(temporary, path)
            except FileNotFoundError:
                # Others have completed the export meanwhile and removed all temporary files, also this worker's.
                if not path.exists():
                    raise
                is_first = False
        except _ClaimLost:
            is_first = False
        finally:
            temporary.unlink(missing_ok=True)
        if not is_first:
            self._tell(0, f"{path.name}: another worker took it over while this one was silent")
            return None
        rate = num_pairs / max(time.monotonic() - started, 1e-9)
        # `records` does not hold this shard yet: the caller adds it.
        count = f"{len(self.records) + 1} of {self.plan.num_shards} shards"
        self._tell(num_pairs, f"{path.name}: {num_pairs:,} pairs, {rate:,.1f} pairs per second; {count}")
        return record

    def _between_chunks(self, num_scored: int, claim: Claim, num_pairs: int, seconds: float) -> None:
        """Look at the stop signal and the claim, and report; `seconds` were spent on `num_scored` of `num_pairs`."""
        self.raise_if_stopped()
        if not claim.is_held:
            raise _ClaimLost
        warning = long_shard_warning(
            self.plan.num_shards, num_pairs=num_pairs, num_scored=num_scored, seconds=seconds
        )
        self._tell(num_scored, warning if self.may_warn else None)
        self.may_warn = self.may_warn and warning is None

    def _manifest(self) -> Manifest:
        """The manifest of all shards, from the plan and the shards' records."""
        config, devices = self.config, sorted({record.device for record in self.records.values()})
        # Present without any pair, too: readers of the manifest look for valid, whose corpus may have no gold.
        totals: dict[str, PairCounts] = {"valid": PairCounts()}
        for record in self.records.values():
            for split, counts in record.agreement.items():
                totals[split] = totals.get(split, PairCounts()) + counts
        details: dict[str, Any] = {
            "answer_words": list(self.scorer.answer_words),
            "temperature": 1,
            "universe": config.universe,
            **reach_details(config.candidates.after),
            "num_pairs": self.plan.record.pairs_by_split,
            "lineage": dict(self.scorer.lineage),
            "engine": config.engine,
            "dtype": config.dtype,
            "threads_per_worker": config.threads_per_worker,
            "agreement": {
                split: counts.scores() if counts.num_pairs else {} for split, counts in sorted(totals.items())
            },
            "devices": devices,
            "reproducible": _REPRODUCIBLE["cpu" if devices == ["cpu"] else "other"],
        }
        if config.top_k:
            details["top_k"] = config.top_k
            details["tokenizer_sha256"] = self.scorer.tokenizer_sha256
        return build_manifest(
            KIND,
            config_hash=self.work_hash,
            inputs=input_checksums(
                teacher=config.teacher,
                corpus_train=config.corpus.train,
                corpus_valid=config.corpus.valid,
                corpus_test=config.corpus.test,
                emotions=config.emotions,
            ),
            files=[
                FileEntry(path=shard_name(shard), bytes=record.bytes, sha256=record.sha256, rows=record.rows)
                for shard, record in self.records.items()
            ],
            details=details,
        )

    def _pairs_done(self) -> int:
        return sum(self.plan.record.pairs[shard] for shard in self.records)

    def _tell(self, pairs_in_hand: int, line: str | None) -> None:
        self.report(Progress(self._pairs_done() + pairs_in_hand, self.plan.num_pairs, line))


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
        f"warning: at {num_scored / seconds:,.1f} pairs per second a shard takes {shard_s / 3600:.1f} hours, and a "
        f"worker that is stopped loses its current shard; with num_shards: {wanted} (in another output) a shard takes "
        f"{WANTED_SHARD_S / 60:.0f} minutes"
    )


def _found_manifest(output: Path) -> Manifest | None:
    """The manifest in a directory; None if it is missing or cannot be read."""
    try:
        return read_manifest(output, KIND)
    except ArtifactError:
        return None
