"""From coarse to fine: a teacher of coarse labels labels a fine corpus, and a fine student learns from it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import run_forked

from kdecs.artifact import read_manifest, verify_artifact
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS, FINE_EMOTIONS, FINE_TO_COARSE
from kdecs.teacher.families import Family


def write_coarse(split: str, target: Path) -> Path:
    """A split of the sample as RECCON would have it: the same dialogues under coarse labels."""
    dialogues = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
    for (utterances,) in dialogues.values():
        for utterance in utterances:
            utterance["emotion"] = FINE_TO_COARSE[utterance["emotion"]]
    target.write_text(json.dumps(dialogues), encoding="utf-8")
    return target


def test_a_coarse_teacher_reads_fine_targets_as_coarse_ones(
    families: Callable[[str], Family], tmp_path: Path
) -> None:
    """Oracle: its prompts for the same dialogues under coarse labels."""
    fine = read_corpus(bundled_sample("valid"))
    coarse = read_corpus(write_coarse("valid", tmp_path / "coarse.json"))
    assert {u.emotion for d in coarse.dialogues for u in d.utterances} <= set(COARSE_EMOTIONS)
    family, num_changed = families("causal"), 0
    for fine_dialogue, coarse_dialogue in zip(fine.dialogues, coarse.dialogues, strict=True):
        of_coarse = {pair.id: pair for pair in pairs_of(coarse_dialogue, "fold1+neutral")}
        for pair in pairs_of(fine_dialogue, "fold1+neutral"):
            found, expected = family.encode(pair), family.encode(of_coarse[pair.id])
            assert np.array_equal(found.tokens, expected.tokens), f"{pair.id}: {pair.emotion}"
            num_changed += pair.emotion != of_coarse[pair.id].emotion
    assert num_changed > 20


@pytest.mark.slow
def test_a_fine_student_learns_from_a_coarse_teacher(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The three stages by their committed configs; only sizes, bases and places are set."""
    coarse = {split: write_coarse(split, tmp_path / f"{split}.json") for split in ("train", "valid")}
    fine = [f"corpus.{split}={bundled_sample(split)}" for split in ("valid", "test")]
    fine.append(f"corpus.train={bundled_sample('valid')}")

    def run(stage: str, config: str, *values: object) -> None:
        settings = [part for value in (*values, "tracking=null") for part in ("--set", value)]
        done = run_forked(f"launch/{stage}.py", "--config", config, *settings, timeout_s=200)
        assert done.returncode == 0, done.stderr[-2000:]

    teacher, labels, student = (tmp_path / name for name in ("teacher", "labels", "student"))
    run(
        "train_teacher", "llama-7b", f"output={teacher}", f"model.base={bases('causal')}",
        f"corpus.train={coarse['valid']}", f"corpus.valid={coarse['valid']}", "optimization.epochs=1",
        "optimization.learning_rate=0.01", "zero={stage: 0, dtype: float32}", "batches.max_prompt_tokens=400",
    )  # fmt: skip
    run(
        "export_soft_labels", "coarse-to-fine", f"teacher={teacher}", f"output={labels}", *fine,
        "num_shards=2", "dtype=float32",
    )  # fmt: skip
    run(
        "train_student", "coarse-to-fine", f"output={student}", f"cache={tmp_path / 'cache'}", *fine,
        f"distillation.labels={labels}", f"model.base={bases('masked')}", "model.max_prompt_tokens=128",
        "model.span_head=pointer", "optimization.epochs=1",
    )  # fmt: skip
    assert verify_artifact(student) == []
    details = read_manifest(student, "student").details
    assert set(details["emotions"]) - set(COARSE_EMOTIONS) and set(details["emotions"]) <= set(FINE_EMOTIONS)
    assert details["teacher"]["details"]["lineage"]["emotions_shown"] == "coarse"
    learnt = read_manifest(teacher, "teacher").inputs["corpus_train"]
    labelled = read_manifest(labels, "soft-labels").inputs["corpus_train"]
    assert learnt != labelled, "the teacher never saw the fine corpus"
