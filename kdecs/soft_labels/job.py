"""What an export refuses before it begins: an output of other work, a teacher of another corpus.

Workers of one and the same export may share an output directory; `.work/job.json` tells whose it is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdecs.artifact import (
    MANIFEST_NAME,
    Kind,
    Manifest,
    content_checksum,
    file_lock,
    is_complete,
    read_manifest,
    write_json,
)
from kdecs.config import CONFIG_NAME, config_hash, write_config
from kdecs.errors import ArtifactError
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.format import WORK_DIRECTORY

KIND: Kind = "soft-labels"
JOB_NAME = "job.json"


def refuse_early(config: ExportConfig) -> None:
    """What can be refused before a model is loaded: wrong output, teacher, corpus (ArtifactError)."""
    check_output(config.output, config_hash(config))
    check_teacher_corpus(config, read_manifest(config.teacher, "teacher"))


def check_output(output: Path, work_hash: str) -> None:
    """Refuse a directory whose manifest is that of other work, or of another kind (ArtifactError)."""
    if not (output / MANIFEST_NAME).is_file():
        return
    found = read_manifest(output, KIND).config_hash
    if found != work_hash:
        raise ArtifactError(
            f"{output}: holds soft labels of another config (hash {found[:12]}…, this one is "
            f"{work_hash[:12]}…); remove the directory or choose another output"
        )


def check_teacher_corpus(config: ExportConfig, teacher: Manifest) -> None:
    """Refuse a teacher that was trained on another corpus, unless the config allows it (ArtifactError)."""
    if config.allow_other_corpus:
        return
    for name, path in (("corpus_train", config.corpus.train), ("corpus_valid", config.corpus.valid)):
        found, expected = teacher.inputs.get(name), content_checksum(path)
        if found != expected:
            was = f"sha256 {found[:12]}…" if found else "none on record"
            raise ArtifactError(
                f"{config.teacher}: this teacher was trained with another {name} ({was}) than {path} "
                f"(sha256 {expected[:12]}…); name its corpus, or set allow_other_corpus: true for this one"
            )


def open_job(
    config: ExportConfig, work_hash: str, *, lineage: Mapping[str, str], answer_words: Sequence[str]
) -> None:
    """Join the work on the output directory, or begin it: `.work/job.json` first, then `config.json`.

    A manifest whose shards are no longer all there is removed: the directory is unfinished again.
    Raises ArtifactError where unfinished shards of other work lie in the directory.
    """
    output = config.output
    job = {"config_hash": work_hash, "lineage": dict(lineage), "answer_words": list(answer_words)}
    path = output / WORK_DIRECTORY / JOB_NAME
    with file_lock(output / WORK_DIRECTORY / "job.lock"):
        if not path.is_file():
            if strangers := sorted(shard.name for shard in output.glob("shard-*.parquet")):
                raise ArtifactError(
                    f"{output}: holds {strangers[0]} but no record of who wrote it; "
                    "remove the directory or choose another output"
                )
            write_json(path, job)
        elif (found := _read_job(path)) != job:
            keys = [key for key in job if found.get(key) != job[key]]
            raise ArtifactError(
                f"{output}: holds unfinished soft labels of other work (another {' and '.join(keys)}); "
                "remove the directory or choose another output"
            )
        if not (output / CONFIG_NAME).is_file():
            write_config(config, output)
        with file_lock(output / WORK_DIRECTORY / "manifest.lock"):
            manifest = output / MANIFEST_NAME
            if manifest.is_file() and not is_complete(output, KIND, work_hash):
                manifest.unlink()


def _read_job(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: not a JSON object; remove the directory and export again")
    return found
