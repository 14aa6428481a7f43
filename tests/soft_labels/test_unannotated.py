"""Dialogues without gold labels: exported with another system's emotions, and what the labels decide as predictions."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_teacher import FakeScorer, files_of, make_config, worker
from label_directories import make_labels, make_table, read_shard
from real_teacher import CORPUS, make_real_teacher, start_export, write_config
from support import StopAfter, made_once
from typer.testing import CliRunner

from kdecs.annotate.project import create_project
from kdecs.artifact import read_manifest
from kdecs.cli import app
from kdecs.config import config_hash
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import FINE_TO_COARSE, Dialogue
from kdecs.errors import ArtifactError, CorpusError, LabelError, OutputError, PredictionError, Stopped
from kdecs.evaluation.counts import PairCounts
from kdecs.evaluation.predictions import Prediction, read_predictions, write_predictions
from kdecs.process import StopSignal
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.export import export_shards, is_finished

EMOTIONS = ("neutral", "worry", "gratitude")


def emotion_of(dialogue: Dialogue, turn: int) -> str:
    """What the student says of a turn."""
    return EMOTIONS[(len(dialogue.id) + len(dialogue.utterances) + turn) % 3]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dialogues of a split without their labels, as a project has them, and a student's predictions of them."""
    folder = tmp_path_factory.mktemp("raw")
    project = create_project(folder / "project", [bundled_sample("test")])
    predictions = folder / "student.jsonl"
    write_predictions(
        predictions,
        [
            Prediction(dialogue.id, u.turn, u.turn, emotion_of(dialogue, u.turn), False, "")
            for dialogue in project.dialogues.values()
            for u in dialogue.utterances
        ],
    )
    return {"dialogues": folder / "project" / "dialogues.jsonl", "emotions": predictions}


def raw_config(files: dict[str, Path], teacher: Path, output: Path, **changes: Any) -> ExportConfig:
    corpus = {"train": files["dialogues"], "valid": bundled_sample("valid")} | changes.pop("corpus", {})
    return make_config(teacher, output, corpus=corpus, emotions=files["emotions"], **changes)


class Listening(FakeScorer):
    """Remembers the emotion that each target is shown with."""

    def score(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        self.shown = getattr(self, "shown", {}) | {(p.dialogue.id, p.target): p.emotion for p in pairs}
        return super().score(pairs)


@pytest.fixture(scope="module")
def labels(files: dict[str, Path], teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    output = tmp_path_factory.mktemp("unannotated") / "labels"
    export_shards(raw_config(files, teacher, output), FakeScorer(teacher), worker(), StopSignal())
    return output


def rows_of(directory: Path) -> dict[tuple[str, str], list[float]]:
    """The logits of a directory by split and pair id."""
    return {
        (split, name): [float(logit) for logit in logits]
        for shard in sorted(directory.glob("shard-*.parquet"))
        for table in [read_shard(shard)]
        for split, name, logits in zip(table.splits, table.pair_ids, table.logits, strict=True)
    }


def raw_dialogues(files: dict[str, Path]) -> tuple[Dialogue, ...]:
    return read_corpus(files["dialogues"], labelled=False).dialogues


def expected_pairs(dialogue: Dialogue) -> Iterator[str]:
    for i in range(1, len(dialogue.utterances) + 1):
        is_neutral = emotion_of(dialogue, i) == "neutral"
        yield from (f"{dialogue.id}/{i}/{j}" for j in ([i] if is_neutral else range(1, i + 1)))


def test_targets_that_are_predicted_emotional_have_all_candidates(
    files: dict[str, Path], labels: Path, teacher: Path, tmp_path: Path
) -> None:
    found = rows_of(labels)
    dialogues = raw_dialogues(files)
    expected = {("train", name) for dialogue in dialogues for name in expected_pairs(dialogue)}
    assert {key for key in found if key[0] == "train"} == expected
    # Where there is gold, the same pairs as ever.
    gold = [
        pair for d in read_corpus(bundled_sample("valid")).dialogues for pair in pairs_of(d, "fold1+neutral")
    ]
    assert {name for split, name in found if split == "valid"} == {pair.id for pair in gold}
    manifest = read_manifest(labels, "soft-labels")
    assert manifest.details["universe"] == "emotional+neutral" and "emotions" in manifest.inputs
    agreement = manifest.details["agreement"]
    assert not agreement["train"] and agreement["valid"]["macro_f1"] > 80
    scorer = Listening(teacher)
    config = raw_config(files, teacher, tmp_path / "coarse", corpus={"emotions": "coarse"})
    export_shards(config, scorer, worker(), StopSignal())
    shown = {(d.id, u.turn): FINE_TO_COARSE[emotion_of(d, u.turn)] for d in dialogues for u in d.utterances}
    assert shown.items() <= scorer.shown.items()


def test_an_export_of_raw_dialogues_goes_on_after_a_stop(
    files: dict[str, Path], labels: Path, teacher: Path, tmp_path: Path
) -> None:
    config = raw_config(files, teacher, tmp_path / "labels")
    with pytest.raises(Stopped):
        export_shards(config, FakeScorer(teacher), worker(), StopAfter(3))
    export_shards(config, FakeScorer(teacher), worker(), StopSignal())
    assert files_of(tmp_path / "labels") == files_of(labels) and is_finished(config)


def test_the_emotions_are_a_part_of_the_work(files: dict[str, Path], teacher: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    shutil.copy(files["emotions"], copy)
    other.write_text(copy.read_text().replace("worry", "hope"))
    configs = (
        raw_config(files | {"emotions": path}, teacher, tmp_path / "o")
        for path in (files["emotions"], copy, other)
    )
    same, moved, changed = map(config_hash, configs)
    assert same == moved != changed


def test_what_does_not_fit_is_refused_in_one_line(
    files: dict[str, Path], teacher: Path, tmp_path: Path
) -> None:
    def refusal(kind: type[Exception], **changes: Any) -> str:
        config = raw_config(files | changes.pop("files", {}), teacher, tmp_path / "out", **changes)
        with pytest.raises(kind) as error:
            export_shards(config, FakeScorer(teacher), worker(), StopSignal())
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return str(error.value)

    lines = files["emotions"].read_text().splitlines(keepends=True)
    last, few = json.loads(lines[-1]), tmp_path / "few.jsonl"
    few.write_text("".join(lines[:-1]))
    said = refusal(CorpusError, files={"emotions": few})
    assert f"dialogue {last['dialogue_id']}, turn {last['target']}: found no emotion in the corpus" in said
    few.write_text(json.dumps(last | {"emotion": None}))
    assert "holds no emotion" in refusal(PredictionError, files={"emotions": few})
    other = {"valid": bundled_sample("test")}
    assert "was trained with another corpus_valid" in refusal(ArtifactError, corpus=other)
    export_shards(
        raw_config(files, teacher, tmp_path / "out", corpus=other, allow_other_corpus=True),
        FakeScorer(teacher), worker(), StopSignal(),
    )  # fmt: skip


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_show_describes_labels_of_dialogues_without_gold(labels: Path) -> None:
    shown = run("soft-labels", "show", labels, "--json")
    assert shown.exit_code == 0, shown.exception
    assert list(json.loads(shown.stdout)["gold"]) == [str(bundled_sample("valid"))]


def test_decisions_are_those_of_a_loop(files: dict[str, Path], labels: Path, tmp_path: Path) -> None:
    output = tmp_path / "teacher.jsonl"
    done = run("soft-labels", "predict", labels, "--input", files["dialogues"], "--output", output)
    assert done.exit_code == 0, done.exception
    expected = []
    for (split, name), logits in rows_of(labels).items():
        if split == "train":
            dialogue, target, candidate = name.rsplit("/", 2)
            powers = [math.exp(logit) for logit in logits]
            p = sum(powers[:4]) / sum(powers)
            expected.append(((dialogue, int(target), int(candidate)), p > 0.5, pytest.approx(p, abs=1e-6)))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = [((x["dialogue_id"], x["target"], x["candidate"]), x["is_cause"], x["score"]) for x in lines]
    by_pair = {key: (is_cause, score) for key, is_cause, score in expected}
    assert len(found) == len(by_pair) == len(expected)
    assert {key: (is_cause, score) for key, is_cause, score in found} == by_pair
    assert all((x["emotion"], x["span"]) == (None, "") for x in lines)
    # In the order of the dialogues, as other systems write them.
    names = [dialogue.id for dialogue in raw_dialogues(files)]
    assert [key for key, _, _ in found] == sorted(by_pair, key=lambda key: (names.index(key[0]), *key[1:]))
    num_causes = sum(is_cause for _, is_cause, _ in expected)
    assert f"{len(found):,} pairs of {len(names)} dialogues, {num_causes:,} causes\n" in done.stdout
    printed = run("soft-labels", "predict", labels, "--input", files["dialogues"], "--output", "-")
    assert printed.stdout == output.read_text() and "causes" in printed.stderr


def test_decisions_agree_with_gold_as_the_labels_do(finished: Path, tmp_path: Path) -> None:
    """What an export of labelled dialogues counts, counted again from the file of predictions."""
    output, corpus = tmp_path / "teacher.jsonl", read_corpus(bundled_sample("valid"))
    assert run("soft-labels", "predict", finished, "--input", corpus.path, "--output", output).exit_code == 0
    predictions = read_predictions(output, corpus)
    pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue)]
    decided = [predictions[pair.dialogue.id, pair.target, pair.candidate].is_cause for pair in pairs]
    counts = PairCounts.of([pair.is_cause for pair in pairs], decided)
    assert counts.scores() == read_manifest(finished).details["agreement"]["valid"]
    scored = run("evaluate", "--corpus", corpus.path, "--predictions", output, "--json")
    assert scored.exit_code == 0 and json.loads(scored.stdout)["missing"] == 0


def test_dialogues_without_a_label_are_counted_and_foreign_labels_refused(
    files: dict[str, Path], labels: Path, tmp_path: Path
) -> None:
    output, more = tmp_path / "teacher.jsonl", tmp_path / "more.jsonl"
    lines = files["dialogues"].read_text().splitlines(keepends=True)
    new = [{"id": name, "utterances": json.loads(lines[0])["utterances"]} for name in ("new_1", "new_2")]
    more.write_text("".join([*(json.dumps(dialogue) + "\n" for dialogue in new), *lines]))

    def predict(directory: Path, corpus: Path, place: Path = output) -> Any:
        return run("soft-labels", "predict", directory, "--input", corpus, "--output", place)

    assert "; 2 dialogues have no label, the first is new_1\n" in predict(labels, more).stdout
    before = output.read_bytes()
    changed = json.loads(lines[0])
    changed["utterances"][-1]["utterance"] += " Indeed ."
    more.write_text("".join([json.dumps(changed) + "\n", *lines[1:]]))
    num_turns = len(changed["utterances"])
    refused = {
        "changed": (predict(labels, more), LabelError, f"candidates of turn {num_turns} of the dialogue"),
        "foreign": (
            predict(make_labels(tmp_path / "other", make_table(["nobody/1/1"])), files["dialogues"]),
            LabelError,
            "labels no pair of",
        ),
        "words": (
            predict(
                make_labels(tmp_path / "two", make_table(["d/1/1"]), words=("a", "b", "c", "d", "d")), more
            ),
            LabelError,
            "which of them mean a cause is not known",
        ),
        "kind": (predict(tmp_path / "nothing", more), ArtifactError, "no such directory"),
        "place": (predict(labels, more, more), OutputError, "is the input"),
    }
    for found, kind, message in refused.values():
        assert isinstance(found.exception, kind) and message in str(found.exception), found.exception
        assert "\n" not in str(found.exception)
    assert output.read_bytes() == before


def test_a_later_text_that_changed_is_noticed(tmp_path: Path, teacher: Path) -> None:
    """A later candidate's hash covers its text, an earlier target's does not."""
    valid = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    export_shards(
        make_config(teacher, tmp_path / "labels", candidates={"after": 1}), FakeScorer(teacher), worker(), StopSignal()
    )  # fmt: skip
    emotional = next(
        name for name, nested in valid.items() if "expanded emotion cause evidence" in nested[0][-2]
    )
    valid[emotional][0][-1]["utterance"] += " Indeed ."
    for utterance in valid[emotional][0]:
        utterance.pop("expanded emotion cause evidence", None)
        utterance.pop("expanded emotion cause span", None)
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({emotional: valid[emotional]}))
    words = ("--input", changed, "--output", tmp_path / "teacher.jsonl")
    assert "its texts are others" in str(run("soft-labels", "predict", tmp_path / "labels", *words).exception)


def test_labels_of_gold_may_leave_out_targets(tmp_path: Path, teacher: Path) -> None:
    """An emotional target without annotated causes has no label in an export of labelled dialogues."""
    value = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    for nested in value.values():
        for key in ("expanded emotion cause evidence", "expanded emotion cause span"):
            nested[0][-1].pop(key, None)
    corpus, output = tmp_path / "valid.json", tmp_path / "teacher.jsonl"
    corpus.write_text(json.dumps(value))
    config = make_config(
        teacher, tmp_path / "labels", corpus={"train": corpus, "valid": corpus}, allow_other_corpus=True
    )
    export_shards(config, FakeScorer(teacher), worker(), StopSignal())
    dialogues = read_corpus(corpus).dialogues
    labelled = {(p.dialogue.id, p.target) for d in dialogues for p in pairs_of(d, "fold1+neutral")}
    assert any((d.id, u.turn) not in labelled for d in dialogues for u in d.utterances)
    words = ("--input", corpus, "--output", output)
    assert run("soft-labels", "predict", tmp_path / "labels", *words).exit_code == 0
    found = {(x["dialogue_id"], x["target"]) for x in map(json.loads, output.read_text().splitlines())}
    assert found == labelled


@pytest.mark.slow
def test_a_real_teacher_helps_to_choose_what_to_label_next(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From raw dialogues and a student's predictions to a list, with the commands that a user runs."""
    teacher = made_once(tmp_path_factory, "real-teacher", make_real_teacher) / "teacher"
    project = create_project(tmp_path / "mine", [bundled_sample("unlabelled")], annotators=["ann"])
    dialogues, student = list(project.dialogues.values()), tmp_path / "student.jsonl"
    # Sure of its emotions, and that everything is caused by its own turn.
    write_predictions(
        student,
        [
            Prediction(d.id, i, j, emotion_of(d, i), i == j and emotion_of(d, i) != "neutral", "")
            for d in dialogues
            for i in range(1, len(d.utterances) + 1)
            for j in range(1, i + 1)
        ],
    )
    corpus = {"train": str(project.root / "dialogues.jsonl"), "valid": str(CORPUS["valid"])}
    config = write_config(
        tmp_path / "export.yaml", teacher, tmp_path / "labels", corpus=corpus, emotions=str(student)
    )
    process = start_export(config)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    words = ("--input", project.root / "dialogues.jsonl", "--output", tmp_path / "teacher.jsonl")
    assert run("soft-labels", "predict", tmp_path / "labels", *words).exit_code == 0
    files = ("--predictions", student, "--predictions", tmp_path / "teacher.jsonl")
    listed = run("annotate", "next", project.root, "-n", 5, *files)
    assert listed.exit_code == 0, listed.exception
    found = {line["dialogue_id"]: line["score"] for line in map(json.loads, listed.stdout.splitlines())}
    decided: dict[tuple[str, int], set[int]] = {}
    for line in map(json.loads, (tmp_path / "teacher.jsonl").read_text().splitlines()):
        turns = decided.setdefault((line["dialogue_id"], line["target"]), set())
        turns |= {line["candidate"]} if line["is_cause"] else set()
    expected = {}
    for dialogue in dialogues:
        total = 0.0
        for i in range(1, len(dialogue.utterances) + 1):
            if emotion_of(dialogue, i) == "neutral":
                continue
            theirs, rule = decided[dialogue.id, i], {turn for turn in (i - 1, i) if turn}
            causes = 1 - 2 * len(theirs & {i}) / (len(theirs) + 1)
            differing = ({i} != rule) + (theirs != rule)
            # Nobody disagrees about emotions, which is a third of the score.
            total += (causes + differing / 2) / 3
        expected[dialogue.id] = pytest.approx(total / len(dialogue.utterances), abs=1e-6)
    assert found == expected and list(found.values()) == sorted(found.values(), reverse=True)
    unsure = run("annotate", "next", project.root, "--by", "uncertainty", *files[2:])
    assert unsure.exit_code == 0 and len(unsure.stdout.splitlines()) == len(dialogues)
