"""Cross-fitting's folds of the training dialogues: decided by their texts and a seed, written as corpus files.

Dialogues of one text (speakers and labels apart) are one item, so that no teacher sees under another id what it will
label. Items are ranked by blake2b(seed, text) and dealt round: fold = rank modulo K, folds of like size whatever the
file's order. A fold's files hold the dialogues as they stand in the corpus file, untouched.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdecs.artifact import atomic_path
from kdecs.corpus.cross_split import text_digest
from kdecs.corpus.reading import holds_lines
from kdecs.errors import ArtifactError, CorpusError
from kdecs.soft_labels.corpus_pairs import dialogues_of_file
from kdecs.soft_labels.cross_fit_config import CrossFitConfig
from kdecs.soft_labels.sources import open_sources


def fold_of_dialogues(config: CrossFitConfig) -> dict[str, int]:
    """The fold of each training dialogue by id, after `drop_cross_split` and `train_share`.

    Raises CorpusError for a faulty corpus, an id that stands twice, or fewer texts than folds.
    """
    digests: dict[str, bytes] = {}
    for _, dialogue in open_sources(config.corpus)["train"].scan():
        if dialogue.id in digests:
            raise CorpusError(
                f"{config.corpus.train}: dialogue {dialogue.id} stands twice, ids must be unique"
            )
        digests[dialogue.id] = text_digest(dialogue)
    seed = str(config.fold_seed).encode()
    items = sorted(set(digests.values()), key=lambda digest: hashlib.blake2b(seed + b"\0" + digest).digest())
    if len(items) < config.num_folds:
        raise CorpusError(
            f"{config.corpus.train}: {len(items)} dialogues for {config.num_folds} folds; lower num_folds"
        )
    rank = {digest: place for place, digest in enumerate(items)}
    return {name: rank[digest] % config.num_folds for name, digest in digests.items()}


def write_folds(config: CrossFitConfig) -> dict[int, int]:
    """Write each fold's `train` and `held-out` corpus files; returns the dialogues held out by fold.

    The same files, byte for byte, whenever it runs. Raises CorpusError as `fold_of_dialogues`.
    """
    folds = fold_of_dialogues(config)
    write = _write_lines if holds_lines(config.corpus.train) else _write_object
    for fold in tqdm(range(config.num_folds), desc="folds", unit="fold", disable=None, delay=1):
        for part in ("train", "held-out"):
            kept = {name for name, number in folds.items() if (number == fold) == (part == "held-out")}
            with atomic_path(config.fold_corpus(fold, part)) as temporary:
                write(config.corpus.train, kept, temporary)
    return {fold: sum(number == fold for number in folds.values()) for fold in range(config.num_folds)}


def check_apart(train: Path, held_out: Path) -> int:
    """The dialogues of a held-out file; raises ArtifactError where one stands, by id or text, in the training file."""
    held = {dialogue.id: text_digest(dialogue) for dialogue in dialogues_of_file(held_out)}
    texts = set(held.values())
    for dialogue in dialogues_of_file(train):
        if dialogue.id in held or text_digest(dialogue) in texts:
            raise ArtifactError(
                f"{train}: the dialogue {dialogue.id} is also held out in {held_out}; "
                "remove the work directory and run the same command again"
            )
    return len(held)


def _write_lines(source: Path, kept: set[str], target: Path) -> None:
    with source.open("rb") as lines, target.open("wb") as file:
        for number, line in enumerate(lines):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if text.strip() and json.loads(text)["id"] in kept:
                file.write(text.rstrip(b"\r\n") + b"\n")


def _write_object(source: Path, kept: set[str], target: Path) -> None:
    values: Mapping[str, Any] = json.loads(source.read_text(encoding="utf-8-sig"))
    part = {name: value for name, value in values.items() if name in kept}
    target.write_text(json.dumps(part, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
