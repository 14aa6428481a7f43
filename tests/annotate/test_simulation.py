"""Simulated annotation: what each round labels, resuming, what is refused, the result, and a small study for real."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from support import made_once, run_forked, save_tiny_encoder
from typer.testing import CliRunner

from kdecs.annotate.sampling import Strategy
from kdecs.annotate.simulation import study as simulation_study
from kdecs.annotate.simulation.study import Round, Simulation, Study, result_of
from kdecs.artifact import verify_artifact
from kdecs.cli import app
from kdecs.corpus.pairs import pairs_of, random_order
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import AnnotationError, ConfigError, OutputError, Stopped
from kdecs.evaluation.baselines import RULES
from kdecs.evaluation.predictions import Prediction, write_predictions
from kdecs.process import StopSignal

SIZES = (3, 5, 8)


class FakeStages:
    """In the place of trainings and predictions: what was asked for, and an answer that is known beforehand.

    A student that has seen `enough` dialogues with an even position finds all causes at a distance of up to one, a
    student that has not finds none. It is unsure about dialogues with an even position alone.
    """

    def __init__(self, corpus: Path, enough: int) -> None:
        self.places = {dialogue.id: n for n, dialogue in enumerate(read_corpus(corpus).dialogues)}
        self.enough = enough
        self.calls: list[str] = []
        self.fails_at: int | None = None

    def __call__(self, command: list[str], stop: StopSignal, *, log: Path) -> int:
        self.calls.append(command[2])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        if len(self.calls) == self.fails_at:
            log.write_text("$ command\nkdecs: error: out of memory\n")
            return 1
        options = dict(pairwise(command))
        if command[2] == "kdecs.cli":
            self.predict(Path(options["--input"]), Path(options["--output"]))
        else:
            self.train([value for name, value in pairwise(command) if name == "--set"])
        return 0

    def train(self, overrides: list[str]) -> None:
        values: Mapping[str, str] = dict(override.split("=", 1) for override in overrides)
        labelled = read_corpus(Path(values["corpus.train"])).dialogues
        seen = sum(self.places[dialogue.id] % 2 == 0 for dialogue in labelled)
        rule = RULES["j >= i-1" if seen >= self.enough else "all negative"]
        student = Path(values["output"])
        student.mkdir(parents=True)
        found = []
        for dialogue in read_corpus(Path(values["corpus.valid"])).dialogues:
            for pair in pairs_of(dialogue):
                is_cause = rule(pair.target, pair.candidate)
                span = dialogue.utterances[pair.candidate - 1].text if is_cause else ""
                found.append(
                    Prediction(dialogue.id, pair.target, pair.candidate, pair.emotion, is_cause, span)
                )
        write_predictions(student / "valid-predictions.jsonl", found)

    def predict(self, source: Path, target: Path) -> None:
        same = {"target": 1, "candidate": 1, "emotion": "hope", "is_cause": False, "span": ""}
        lines = [
            {"dialogue_id": d.id, **same, "score": 0.5 if self.places[d.id] % 2 == 0 else 0.0}
            for d in read_corpus(source).dialogues
        ]
        target.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of 14 short dialogues to label, and three to score."""
    folder = tmp_path_factory.mktemp("simulated")
    found = {}
    for split, count in (("train", 14), ("valid", 3)):
        raw = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        found[split] = folder / f"{split}.json"
        found[split].write_text(json.dumps({key: [raw[key][0][:6]] for key in list(raw)[:count]}))
    return found


@pytest.fixture
def study_of(files: dict[str, Path], tmp_path: Path) -> Callable[..., Study]:
    def make(**values: Any) -> Study:
        values = {"student": "tiny", "sizes": SIZES, "num_seeds": 2} | values
        return Study(tmp_path / "study", files["train"], files["valid"], **values)

    return make


@pytest.fixture
def stages(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages(files["train"], enough=6)
    monkeypatch.setattr(simulation_study, "run_child", fake)
    return fake


def run(study: Study) -> tuple[Simulation, list[str]]:
    said: list[str] = []
    simulation = Simulation(study)
    simulation.run(StopSignal(), said.append)
    return simulation, said


def labelled_in(study: Study) -> dict[tuple[int, Strategy | None, int], list[str]]:
    records = {(each.seed, each.strategy, each.size): each.record() for each in study.rounds()}
    return {key: record.labelled for key, record in records.items() if record is not None}


def test_each_round_adds_what_its_strategy_chooses(
    study_of: Callable[..., Study], stages: FakeStages, files: dict[str, Path]
) -> None:
    study = study_of()
    simulation, said = run(study)
    found = labelled_in(study)
    assert len(found) == 2 * (1 + 2 * 3) and said[-1].startswith(
        "round 14 of 14: seed 1, 8 dialogues, uncertainty: "
    )
    # The strategies share the first student and its predictions: random choice asks for none.
    assert (stages.calls.count("kdecs.launch.train_student"), stages.calls.count("kdecs.cli")) == (14, 2 * 3)
    names = list(stages.places)
    for seed in (0, 1):
        order = [names[place] for place in random_order(names, seed)]
        assert found[seed, None, 3] == order[:3] and found[seed, "random", 8] == order[:8]
        for strategy in ("disagreement", "uncertainty"):
            assert found[seed, strategy, 5][:3] == order[:3]
            assert found[seed, strategy, 8][:5] == found[seed, strategy, 5]
            assert len(set(found[seed, strategy, 8])) == 8
        chosen = found[seed, "uncertainty", 8][3:]
        assert sum(stages.places[name] % 2 == 0 for name in chosen) == min(
            5, 7 - sum(stages.places[n] % 2 == 0 for n in order[:3])
        )
    folder = Round(study, 0, "uncertainty", 2).folder
    assert [d.id for d in read_corpus(folder / "dialogues.jsonl").dialogues] == found[0, "uncertainty", 8]
    # The result by hand: who has seen six dialogues with an even position has the scores of the rule, by pair and turn.
    result = result_of(simulation)
    for row in result.rows:
        name = (row["seed"], None if row["strategy"] == "all" else row["strategy"], row["size"])
        is_good = sum(stages.places[each] % 2 == 0 for each in found[name]) >= 6
        assert (row["utterance_macro_f1"] == pytest.approx(result.rule["utterance_macro_f1"])) == is_good
    assert any(row["strategy"] == "uncertainty" and row["size"] == 8 for row in result.comparisons)
    for row in result.comparisons:
        scores = {
            (each["strategy"], each["seed"]): each[row["score"]]
            for each in result.rows
            if each["size"] == row["size"]
        }
        differences = [scores[row["strategy"], seed] - scores["random", seed] for seed in (0, 1)]
        assert row["difference"] == pytest.approx(sum(differences) / 2)


def test_a_study_goes_on_where_it_stopped_and_may_grow(
    study_of: Callable[..., Study], stages: FakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(strategies=("random",), num_seeds=1)
    stages.fails_at = 2
    with pytest.raises(
        AnnotationError, match=r"random-5: .*out of memory.* \(log: .*run the same command again"
    ):
        run(study)
    assert len(labelled_in(study)) == 1
    run(study)
    assert len(stages.calls) == 4 and len(labelled_in(study)) == 3
    # Finished rounds are read, not run; more strategies and seeds add rounds, and ask the first student after all.
    grown = study_of(strategies=("random", "uncertainty"), num_seeds=2)
    run(grown)
    assert len(labelled_in(grown)) == 2 * 5
    before = len(stages.calls)
    shutil.rmtree(Round(grown, 0, None, 0).folder / "student")
    _, said = run(grown)
    assert len(stages.calls) == before and len(said) == 10

    def stopped(command: list[str], stop: StopSignal, *, log: Path) -> int:
        stop.requested = True
        return 3

    monkeypatch.setattr(simulation_study, "run_child", stopped)
    with pytest.raises(Stopped, match="run the same command again to resume"):
        run(study_of(strategies=("random", "uncertainty"), num_seeds=3))


def test_rounds_of_one_size_may_run_at_the_same_time(
    study_of: Callable[..., Study], stages: FakeStages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = study_of(num_seeds=1)
    run(study)
    alone, calls = labelled_in(study), sorted(stages.calls)
    study.output.rename(tmp_path / "alone")
    stages.calls.clear()
    both = Barrier(2, timeout=60)

    def together(command: list[str], stop: StopSignal, *, log: Path) -> int:
        name = log.parent.name
        if command[2] == "kdecs.launch.train_student" and name in ("random-5", "disagreement-5"):
            both.wait()  # raises unless both are trained at the same time
        return stages(command, stop, log=log)

    monkeypatch.setattr(simulation_study, "run_child", together)
    Simulation(study).run(StopSignal(), lambda line: None, concurrency=2)
    assert labelled_in(study) == alone
    assert sorted(stages.calls) == calls, "the predictions of a round are made once"

    # The first error ends the study; what runs beside it is kept.
    shutil.rmtree(study.output)
    stages.calls.clear()

    def failing(command: list[str], stop: StopSignal, *, log: Path) -> int:
        code = together(command, stop, log=log)
        return 1 if "random-5" in log.parent.name else code

    monkeypatch.setattr(simulation_study, "run_child", failing)
    with pytest.raises(AnnotationError, match="random-5"):
        Simulation(study).run(StopSignal(), lambda line: None, concurrency=2)
    done = labelled_in(study)
    assert (0, "disagreement", 5) in done and (0, "random", 5) not in done
    assert all(size < 8 for _, _, size in done)


def test_candidates_bound_what_is_predicted(study_of: Callable[..., Study], stages: FakeStages) -> None:
    study = study_of(candidates=4, strategies=("uncertainty",), num_seeds=1)
    run(study)
    found = labelled_in(study)
    candidates = read_corpus(Round(study, 0, None, 0).folder / "candidates.jsonl").dialogues
    assert len(candidates) == 4 and set(found[0, "uncertainty", 5][3:]) < {d.id for d in candidates}
    assert result_of(Simulation(study)).comparisons == []  # nothing to compare with


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": (5, 5)}, "--size 5 --size 5: expected each number to be above the one before"),
        ({"sizes": (5, 15)}, "--size 15: .* holds 14 dialogues"),
        ({"candidates": 2}, "--candidates 2: expected at least 3"),
        (
            {"overrides": ("corpus.train=other.json",)},
            "the simulation sets corpus.train of each student itself",
        ),
        ({"student": "nobody"}, "nobody: found no such file and no config of this name"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_round(
    values: dict[str, Any], message: str, study_of: Callable[..., Study], stages: FakeStages
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(study_of(**values))
    assert not stages.calls


def test_a_directory_holds_one_study(
    study_of: Callable[..., Study], stages: FakeStages, files: dict[str, Path]
) -> None:
    run(study_of(strategies=("random",), num_seeds=1, sizes=(3, 5)))
    before = len(stages.calls)
    # Sizes may be added and left out at the end.
    for sizes in ((3,), (3, 5, 8), (3, 5)):
        run(study_of(strategies=("random",), num_seeds=1, sizes=sizes))
    assert len(stages.calls) == before + 1
    with pytest.raises(ConfigError, match="a simulation with other values of --set, --size; choose another"):
        run(study_of(overrides=("optimization.steps=9",), sizes=(3, 6)))
    with pytest.raises(OutputError, match="expected a directory"):
        run(Study(files["train"], files["train"], files["valid"], "tiny"))


@pytest.mark.slow
def test_a_small_study_for_real(
    files: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Students are trained and asked by the commands themselves, in forked processes."""
    base = made_once(tmp_path_factory, "student-base", save_tiny_encoder)
    scripts = {"kdecs.launch.train_student": "launch/train_student.py", "kdecs.cli": "kdecs/cli.py"}
    calls = []

    def forked(command: list[str], stop: StopSignal, *, log: Path) -> int:
        ended = run_forked(scripts[command[2]], *command[3:])
        log.write_text(f"$ command\n{ended.stdout}{ended.stderr}")
        calls.append(command[2])
        return ended.returncode

    monkeypatch.setattr(simulation_study, "run_child", forked)
    words = [
        "annotate",
        "simulate",
        tmp_path / "study",
        "--corpus",
        files["train"],
        "--valid",
        files["valid"],
    ]
    words += ["--student", "tiny", "--size", 4, "--size", 6, "--seeds", 1]
    for setting in (f"model.base={base}", "optimization.steps=2", "model.layout=tree", "model.branch=short"):
        words += ["--set", setting]
    ended = CliRunner().invoke(app, list(map(str, words)))
    assert ended.exit_code == 0, ended.output
    assert sorted(calls) == ["kdecs.cli"] + ["kdecs.launch.train_student"] * 4
    with (tmp_path / "study" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["strategy"], row["size"]) for row in rows] == [
        ("all", "4"), ("random", "6"), ("disagreement", "6"), ("uncertainty", "6"),
    ]  # fmt: skip
    assert (tmp_path / "study" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert verify_artifact(tmp_path / "study" / "seed-0" / "uncertainty-6" / "student") == []
    again = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert len(calls) == 5 and json.loads(again.stdout)["scores"][0]["strategy"] == "all"
