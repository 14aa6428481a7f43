"""The last step of an export: every shard is read once more, then the manifest is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from kdecs.artifact import FileEntry, Manifest, build_manifest, fsync, read_manifest, save_manifest
from kdecs.config import input_checksums
from kdecs.corpus.pairs import EXPORT_UNIVERSE
from kdecs.errors import ArtifactError
from kdecs.soft_labels.claims import KIND
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import Agreement, ShardRecord, is_as_recorded, shard_name
from kdecs.soft_labels.plan import Plan
from kdecs.soft_labels.scoring import Scorer, TopScorer

_REPRODUCIBLE = {
    "cpu": "the same bytes on CPUs of one kind with the same libraries, dtype and threads_per_worker",
    "other": "equal up to rounding: a GPU's sums may differ in their last bits from one kind of device to another",
}


def complete_export(
    config: ExportConfig,
    work_hash: str,
    scorer: Scorer,
    plan: Plan,
    records: Mapping[int, ShardRecord],
) -> Manifest | list[int]:
    """The manifest, written or found as it should be; or the shards that are not (any more) as recorded.

    Harmless when several do it at once: they write the same bytes. Raises ArtifactError where the shards do not hold
    the plan's pairs.
    """
    output = config.output
    _require_all_pairs(output, plan, records)
    manifest = _manifest(config, work_hash, scorer, plan, records)
    if _found(output) == manifest:  # its writer has read every shard
        return manifest
    damaged = [
        index for index, record in records.items() if not is_as_recorded(output / shard_name(index), record)
    ]
    if damaged:
        return sorted(damaged)
    for index in records:  # a writer of before may have died between rename and the directory's own sync
        fsync(output / shard_name(index))
    try:
        save_manifest(output, manifest)
    except FileNotFoundError:  # another worker, who was quicker, took our temporary file for a dead one's
        if _found(output) != manifest:
            raise
    return manifest


def _require_all_pairs(output: Path, plan: Plan, records: Mapping[int, ShardRecord]) -> None:
    for shard, num_pairs in enumerate(plan.record.pairs):
        found = records[shard].rows if shard in records else 0
        if shard not in records or found != num_pairs:
            raise ArtifactError(
                f"{output / shard_name(shard)}: {found} rows, its plan has {num_pairs} pairs; "
                "run the same command again"
            )


def _manifest(
    config: ExportConfig, work_hash: str, scorer: Scorer, plan: Plan, records: Mapping[int, ShardRecord]
) -> Manifest:
    return build_manifest(
        KIND,
        config_hash=work_hash,
        inputs=_inputs(config),
        files=[
            FileEntry(path=shard_name(index), bytes=record.bytes, sha256=record.sha256, rows=record.rows)
            for index, record in records.items()
        ],
        details=_details(config, scorer, plan, records),
    )


def _found(output: Path) -> Manifest | None:
    """The manifest that stands, or None where there is none that can be read."""
    try:
        return read_manifest(output, KIND)
    except ArtifactError:
        return None


def _inputs(config: ExportConfig) -> dict[str, str]:
    return input_checksums(
        teacher=config.teacher,
        corpus_train=config.corpus.train,
        corpus_valid=config.corpus.valid,
        corpus_test=config.corpus.test,
    )


def _details(
    config: ExportConfig, scorer: Scorer, plan: Plan, records: Mapping[int, ShardRecord]
) -> dict[str, Any]:
    """Facts of the directory, gathered from the plan and the shards' records."""
    devices = sorted({record.device for record in records.values()})
    details = {
        "answer_words": list(scorer.answer_words),
        "temperature": 1,
        "universe": EXPORT_UNIVERSE,
        "num_pairs": plan.record.pairs_by_split,
        "lineage": dict(scorer.lineage),
        "engine": config.engine,
        "dtype": config.dtype,
        "threads_per_worker": config.threads_per_worker,
        "agreement": _agreement(records),
        "devices": devices,
        "reproducible": _REPRODUCIBLE["cpu" if devices == ["cpu"] else "other"],
    }
    if config.top_k:
        details["top_k"] = config.top_k
        details["tokenizer_sha256"] = cast(TopScorer, scorer).tokenizer_sha256
    return details


def _agreement(records: Mapping[int, ShardRecord]) -> dict[str, dict[str, float]]:
    """Utterance-level scores (percent) of the labels against gold over the fold1 pairs of a split."""
    totals: dict[str, Agreement] = {"valid": Agreement()}
    for record in records.values():
        for split, counts in record.agreement.items():
            totals[split] = totals.get(split, Agreement()) + counts
    return {split: scores_of(counts) if counts.num_pairs else {} for split, counts in sorted(totals.items())}


def scores_of(counts: Agreement) -> dict[str, float]:
    """F1 of the causal pairs, of the others, and their mean, in percent; 0 / 0 counts as 0."""
    wrong = counts.false_positive + counts.false_negative
    positive = _f1(counts.true_positive, wrong)
    negative = _f1(counts.true_negative, wrong)
    return {"positive_f1": positive, "negative_f1": negative, "macro_f1": (positive + negative) / 2}


def _f1(right: int, wrong: int) -> float:
    return 100.0 * 2 * right / (2 * right + wrong) if right + wrong else 0.0
