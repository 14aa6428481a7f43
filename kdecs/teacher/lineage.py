"""What soft labels depend on beside the corpus, as checksums: part of their manifest, and so of its seal.

teacher           sha256 of the teacher's manifest (which lists every file of it by sha256)
adapter           sha256 over the names and checksums of the trained weights and their config
tokenizer         sha256 over those of the tokenizer's files
base              checksum of the base model
prompt_template   sha256 of a fixed dialogue's prompt with its separator and suffix: any change of wording shows
prompt_version    the number of the template
answer_words      sha256 of the answer words with their token ids
emotions_shown    coarse or fine
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdecs.artifact import MANIFEST_NAME, FileEntry, Manifest, sha256_of_file
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION, teacher_prompt
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import Family

_WEIGHT_SUFFIXES = (".safetensors",)
_WEIGHT_FILES = ("adapter_config.json", "model.safetensors.index.json")
_OTHER_FILES = ("config.json", "generation_config.json", "metrics.jsonl", "README.md")


def lineage_of(
    directory: Path, manifest: Manifest, config: TeacherConfig, family: Family, *, dtype: str
) -> dict[str, str]:
    """The lineage of labels that this teacher makes (module's head)."""
    weights = [entry for entry in manifest.files if _is_weight(entry)]
    tokenizer = [e for e in manifest.files if not _is_weight(e) and Path(e.path).name not in _OTHER_FILES]
    return {
        "teacher": sha256_of_file(directory / MANIFEST_NAME),
        "adapter": _digest([entry.path, entry.sha256] for entry in weights),
        "tokenizer": _digest([entry.path, entry.sha256] for entry in tokenizer),
        "base": manifest.inputs["base"],
        "prompt_template": template_digest(family),
        "prompt_version": str(PROMPT_VERSION),
        "answer_words": _digest(zip(CONNECTIVES, family.answer_ids, strict=True)),
        "emotions_shown": config.emotions_shown,
        "name": config.name,
        "dtype": dtype,
    }


def template_digest(family: Family) -> str:
    """Checksum of what a family's prompt looks like: of a dialogue of two turns, target 2, candidates 1 and 2."""
    turns = tuple(Utterance(n, speaker, f"text {n}", "neutral", ()) for n, speaker in ((1, "A"), (2, "B")))
    dialogue = Dialogue("template", turns)
    texts = [
        teacher_prompt(dialogue, 2, candidate, emotion="joy", separator=family.separator).text
        for candidate in (1, 2)
    ]
    return _digest([family.name, family.answer_suffix, *texts])


def _is_weight(entry: FileEntry) -> bool:
    name = Path(entry.path).name
    return name.endswith(_WEIGHT_SUFFIXES) or name in _WEIGHT_FILES


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()
