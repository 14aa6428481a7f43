"""What an export refuses before it begins: an output of other work, a teacher of another corpus.

Workers of one and the same export may share an output directory; `.work/job.json` tells whose it is.
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdecs.artifact import MANIFEST_NAME, Kind, Manifest, atomic_path, content_checksum, read_manifest
from kdecs.config import CONFIG_NAME, config_hash, write_config
from kdecs.errors import ArtifactError
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.records import WORK_DIRECTORY

KIND: Kind = "soft-labels"
JOB_NAME = "job.json"


def refuse_early(config: ExportConfig) -> None:
    """What can be refused before a model is loaded: wrong output, teacher, corpus (ArtifactError)."""
    check_output(config.output, config_hash(config))
    check_teacher_corpus(config, read_manifest(config.teacher, "teacher"))


def check_output(output: Path, work_hash: str) -> None:
    """Refuse a directory that holds other work, finished or not, or another kind (ArtifactError)."""
    # Looked at once: other workers may begin the very same work at any moment.
    job = _read_job(output / WORK_DIRECTORY / JOB_NAME)
    if job is not None and job.get("config_hash") == work_hash:
        return  # a manifest that says otherwise is a damaged one, and is written again
    if (output / MANIFEST_NAME).is_file():
        found = read_manifest(output, KIND).config_hash
        if job is None and found == work_hash:
            return  # finished here or elsewhere and copied without its working files
        if found != work_hash:
            raise ArtifactError(
                f"{output}: holds soft labels of another config (hash {found[:12]}…, this one is "
                f"{work_hash[:12]}…); remove the directory or choose another output"
            )
    if job is not None:
        raise _other_work(output, ["config_hash"])
    strangers = sorted(shard.name for shard in output.glob("shard-*.parquet"))
    if strangers and _read_job(output / WORK_DIRECTORY / JOB_NAME) is None:
        raise ArtifactError(
            f"{output}: holds {strangers[0]} but no record of who wrote it; "
            "remove the directory or choose another output"
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

    Raises ArtifactError where unfinished shards of other work lie in the directory.
    """
    output = config.output
    job = {"config_hash": work_hash, "lineage": dict(lineage), "answer_words": list(answer_words)}
    path = output / WORK_DIRECTORY / JOB_NAME
    if not path.is_file():
        _write_once(path, json.dumps(job, indent=2, sort_keys=True) + "\n")
    if (found := _read_job(path) or {}) != job:
        raise _other_work(output, [key for key in job if found.get(key) != job[key]])
    if not (output / CONFIG_NAME).is_file():
        write_config(config, output)


def _write_once(path: Path, text: str) -> None:
    """Write a file that the first of several writers makes, whole when it appears; later ones change nothing."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}.own")
    with atomic_path(own) as temporary:
        temporary.write_text(text, encoding="utf-8")
    try:
        os.link(own, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links: the last writer wins, and the others see that it did
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _other_work(output: Path, keys: Sequence[str]) -> ArtifactError:
    return ArtifactError(
        f"{output}: holds unfinished soft labels of other work (another {' and '.join(keys)}); "
        "remove the directory or choose another output"
    )


def _read_job(path: Path) -> dict[str, object] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: not a JSON object; remove the directory and export again")
    return found
