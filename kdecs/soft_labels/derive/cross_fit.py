"""Cross-fitting: the label of a training pair comes from a teacher that did not train on its dialogue.

A teacher is overconfident about pairs that it was trained on, and labels of which it is certain teach a student little.
So K teachers are trained, each on all training dialogues except one fold's, and each labels the fold it did not see:

    WORK/fold-k/train.json      what teacher k is trained on         WORK/fold-k/teacher/   kind teacher
    WORK/fold-k/held-out.json   what it labels                       WORK/fold-k/labels/    kind soft-labels
    OUTPUT/                     the merged labels, kind soft-labels; details.folds holds, for each fold, the teacher,
                                the checksums of both files, and the shards with its pairs

No teacher trained on valid and test. Their labels are the mean probability of all K teachers (`evaluation_labels:
mean`), or the labels of one of them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kdecs.artifact import Manifest, atomic_path, content_checksum, read_manifest
from kdecs.config import files_of, input_checksums, names_of
from kdecs.corpus.checking import Checker
from kdecs.corpus.formats.recognise import format_of
from kdecs.corpus.formats.writing import DialogueWriter
from kdecs.corpus.pairs import EXPORT_UNIVERSE
from kdecs.corpus.reading import iter_dialogues, iter_raw
from kdecs.corpus.schema import NO_TABLE
from kdecs.corpus.splits import emotion_table, text_digest, training_split
from kdecs.errors import ArtifactError, CorpusError
from kdecs.soft_labels.derive.combine import combined_rows
from kdecs.soft_labels.derive.config import CrossFitConfig
from kdecs.soft_labels.derive.write import LabelDirectory, select_rows
from kdecs.soft_labels.format import ShardTable, iter_directory, reach_details
from kdecs.soft_labels.labels import SoftLabels


def fold_of_dialogues(config: CrossFitConfig) -> dict[str, int]:
    """The fold of each training dialogue by id, after `drop_cross_split` and `train_share`.

    Raises CorpusError for a faulty corpus, or for fewer texts than folds.
    """
    # Folds divide texts, not ids: two copies of a dialogue must never be trained on and held out at once.
    digests = {dialogue.id: text_digest(dialogue) for dialogue in training_split(config.corpus)}
    seed = str(config.fold_seed).encode()
    items = sorted(set(digests.values()), key=lambda digest: hashlib.blake2b(seed + b"\0" + digest).digest())
    if len(items) < config.num_folds:
        raise CorpusError(
            f"{names_of(config.corpus.train)}: {len(items)} dialogues for {config.num_folds} folds; lower num_folds"
        )
    # Sorted by hash, so that the order of the file decides nothing, and dealt in turn, so that folds are of equal size.
    rank = {digest: place for place, digest in enumerate(items)}
    return {name: rank[digest] % config.num_folds for name, digest in digests.items()}


def write_folds(config: CrossFitConfig) -> dict[int, int]:
    """Write each fold's `train` and `held-out` corpus files; returns the dialogues held out by fold.

    The same files, byte for byte, whenever it runs. Raises CorpusError as `fold_of_dialogues`.
    """
    folds = fold_of_dialogues(config)
    # A fold's file of RECCON's schema keeps the format of the source, and its dialogues the source's bytes or values:
    # nothing that the schema does not know is lost on the way. Other formats become JSON lines, which hold all of them,
    # and so do several files together.
    writers = {"jsonl": _write_lines, "reccon": _write_object}
    sources = files_of(config.corpus.train)
    write = writers.get(format_of(sources[0]).name) if len(sources) == 1 else None
    own_labels = emotion_table(config.corpus) or NO_TABLE
    for fold in tqdm(range(config.num_folds), desc="folds", unit="fold", disable=None, delay=1):
        for part in ("train", "held-out"):
            kept = {name for name, number in folds.items() if (number == fold) == (part == "held-out")}
            with atomic_path(config.fold_corpus(fold, part)) as temporary:
                if write:
                    write(sources[0], kept, temporary)
                else:
                    _write_converted(sources, kept, temporary, own_labels)
    return {fold: sum(number == fold for number in folds.values()) for fold in range(config.num_folds)}


def check_apart(train: Path, held_out: Path, table: Mapping[str, str] = NO_TABLE) -> int:
    """The number of dialogues in a held-out file. Raises ArtifactError if the training file has one, by id or text."""
    held = {dialogue.id: text_digest(dialogue) for dialogue in iter_dialogues(held_out, table=table)}
    texts = set(held.values())
    for dialogue in iter_dialogues(train, table=table):
        if dialogue.id in held or text_digest(dialogue) in texts:
            raise ArtifactError(
                f"{train}: the dialogue {dialogue.id} is also held out in {held_out}; "
                "remove the work directory and run the same command again"
            )
    return len(held)


def _write_lines(source: Path, kept: set[str], target: Path) -> None:
    with source.open("rb") as lines, target.open("wb") as file:
        for number, line in enumerate(lines):
            # A byte order mark in the middle of the new file would be a fault of its line.
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if text.strip() and json.loads(text)["id"] in kept:
                file.write(text.rstrip(b"\r\n") + b"\n")


def _write_object(source: Path, kept: set[str], target: Path) -> None:
    values: Mapping[str, Any] = json.loads(source.read_text(encoding="utf-8-sig"))
    part = {name: value for name, value in values.items() if name in kept}
    target.write_text(json.dumps(part, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_converted(
    sources: Sequence[Path], kept: set[str], target: Path, own_labels: Mapping[str, str]
) -> None:
    dialogues = (
        pair for source in sources for pair in iter_raw(source, Checker(str(source), own_labels=own_labels))
    )
    chosen = (pair for pair in dialogues if pair[0].id in kept)
    with target.open("w", encoding="utf-8") as file:
        file.writelines(DialogueWriter("jsonl").text(chosen))


def merge_folds(config: CrossFitConfig) -> Manifest:
    """Merge the exports of all folds into the output, after checking each fold's lineage.

    Raises ArtifactError where a fold's teacher was not trained on exactly its training file, or where its labels are
    not that teacher's labels of the held-out file; LabelError where the exports cover different evaluation pairs.
    """
    # All lineages are checked before the first shard is joined, which takes minutes for each fold.
    facts = [_checked_fold(config, fold) for fold in range(config.num_folds)]
    labels = [
        SoftLabels.open(config.fold_directory(fold) / "labels", config.work_directory / "joined")
        for fold in range(config.num_folds)
    ]
    for other in labels[1:]:
        other.require_answer_words(labels[0].answer_words)
    directory = LabelDirectory(config, config.output, labels[0].answer_words)
    for fact, fold_labels in zip(facts, labels, strict=True):
        # One `write` per fold, so that a shard holds pairs of one fold only and `details.folds` can name its shards.
        fact["shards"] = directory.write(_split_rows(fold_labels, is_train=True))
    evaluation_shards = directory.write(_evaluation_rows(config, labels))
    return directory.finish(
        inputs=input_checksums(
            corpus_train=config.corpus.train,
            corpus_valid=config.corpus.valid,
            corpus_test=config.corpus.test,
            **{
                f"teacher_{fold}": config.fold_directory(fold) / "teacher" for fold in range(config.num_folds)
            },
            **{f"labels_{fold}": config.fold_directory(fold) / "labels" for fold in range(config.num_folds)},
        ),
        details={
            "universe": EXPORT_UNIVERSE,
            **reach_details(config.teacher.candidates.after),
            "lineage": {
                "cross_fit": f"{config.num_folds} folds",
                "fold_seed": str(config.fold_seed),
                "evaluation_labels": str(config.evaluation_labels),
                **{f"teacher_{fold}": fact["teacher"] for fold, fact in enumerate(facts)},
            },
            "folds": facts,
            "evaluation_shards": evaluation_shards,
        },
    )


def _checked_fold(config: CrossFitConfig, fold: int) -> dict[str, Any]:
    """The lineage of a fold, after comparing it with the files. Raises ArtifactError."""
    directory = config.fold_directory(fold)
    train, held_out = config.fold_corpus(fold, "train"), config.fold_corpus(fold, "held-out")
    teacher = read_manifest(directory / "teacher", "teacher")
    labels = read_manifest(directory / "labels", "soft-labels")
    found = {"train": content_checksum(train), "held_out": content_checksum(held_out)}
    found["teacher"] = content_checksum(directory / "teacher")
    for path, inputs, name, expected in (
        (directory / "teacher", teacher.inputs, "corpus_train", found["train"]),
        (directory / "labels", labels.inputs, "corpus_train", found["held_out"]),
        (directory / "labels", labels.inputs, "teacher", found["teacher"]),
    ):
        if inputs.get(name) != expected:
            raise ArtifactError(
                f"{path}: made with another {name} ({str(inputs.get(name))[:12]}…, expected {expected[:12]}…); "
                f"remove {directory} and run the same command again"
            )
    num_dialogues = check_apart(train, held_out, emotion_table(config.corpus) or NO_TABLE)
    return {
        **found,
        "fold": fold,
        "labels": content_checksum(directory / "labels"),
        "dialogues": num_dialogues,
        "pairs": labels.details["num_pairs"].get("train", 0),
        "lineage": labels.details["lineage"],
    }


def _split_rows(labels: SoftLabels, *, is_train: bool) -> Iterator[ShardTable]:
    for table in iter_directory(labels.directory, labels.manifest):
        yield select_rows(table, [(split == "train") == is_train for split in table.splits])


def _evaluation_rows(config: CrossFitConfig, labels: list[SoftLabels]) -> Iterator[ShardTable]:
    """Rows of valid and test, in the order of the first fold's export, or of the chosen one."""
    chosen = 0 if config.evaluation_labels == "mean" else config.evaluation_labels
    for table in _split_rows(labels[chosen], is_train=False):
        if config.evaluation_labels == "mean" and len(table):
            yield combined_rows("mean-probability", table, labels, np.ones(len(labels)).tolist())
        else:
            yield table
