"""The last step of an export: the manifest, once, by whichever worker comes first."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdecs.artifact import MANIFEST_NAME, Manifest, file_lock, is_complete, read_manifest, write_manifest
from kdecs.config import input_checksums
from kdecs.corpus.schema import Dialogue
from kdecs.errors import ArtifactError
from kdecs.soft_labels.agreement import agreement_with_gold
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import WORK_DIRECTORY, ShardRecord, read_shard, shard_name
from kdecs.soft_labels.interfaces import Scorer
from kdecs.soft_labels.job import KIND
from kdecs.soft_labels.plan import EXPORT_UNIVERSE, Shard


def complete_export(
    config: ExportConfig,
    work_hash: str,
    scorer: Scorer,
    shards: Sequence[Shard],
    records: Mapping[int, ShardRecord],
    valid: Sequence[Dialogue],
) -> Manifest:
    """Write the manifest of finished shards, or read the one that another worker wrote first.

    Raises ArtifactError where a shard is no longer what its record says.
    """
    output = config.output
    names = {shard_name(index): record for index, record in records.items()}
    with file_lock(output / WORK_DIRECTORY / "manifest.lock"):
        if is_complete(output, KIND, work_hash):
            manifest = read_manifest(output, KIND)
            if all(names[entry.path].sha256 == entry.sha256 for entry in manifest.files):
                return manifest
        details = _details(config, scorer, shards, valid)
        manifest = write_manifest(
            output,
            KIND,
            config_hash=work_hash,
            inputs=input_checksums(
                teacher=config.teacher,
                corpus_train=config.corpus.train,
                corpus_valid=config.corpus.valid,
                corpus_test=config.corpus.test,
            ),
            files=names,
            rows={name: record.rows for name, record in names.items()},
            details=details | {"devices": sorted({record.device for record in records.values()})},
        )
        for entry in manifest.files:
            if entry.sha256 != names[entry.path].sha256:
                (output / MANIFEST_NAME).unlink()
                raise ArtifactError(
                    f"{output / entry.path}: changed after it was finished; run the same command again"
                )
        return manifest


def _details(
    config: ExportConfig, scorer: Scorer, shards: Sequence[Shard], valid: Sequence[Dialogue]
) -> dict[str, Any]:
    """Facts of the directory, gathered from the plan and the shards."""
    num_pairs: dict[str, int] = {}
    valid_logits: dict[str, np.ndarray] = {}
    for shard in shards:
        for planned in shard.dialogues:
            num_pairs[planned.split] = num_pairs.get(planned.split, 0) + planned.num_pairs
        if any(planned.split == "valid" for planned in shard.dialogues):
            table = read_shard(config.output / shard_name(shard.index), scorer.answer_words)
            rows = zip(table.pair_ids, table.splits, table.logits, strict=True)
            valid_logits |= {pair_id: logits_A for pair_id, split, logits_A in rows if split == "valid"}
    return {
        "answer_words": list(scorer.answer_words),
        "temperature": 1,
        "universe": EXPORT_UNIVERSE,
        "num_pairs": num_pairs,
        "lineage": dict(scorer.lineage),
        "dtype": config.dtype,
        "threads_per_worker": config.threads_per_worker,
        "agreement": {"valid": agreement_with_gold(valid, valid_logits)},
        "reproducible": "byte for byte on CPUs in float32; on GPUs equal up to rounding",
    }
