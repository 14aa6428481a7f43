"""How much labelling a strategy saves, tried on a corpus whose labels are known: they stand in for the people.

For each seed all strategies begin with the same random dialogues. Then, round by round, a student is trained on what is
labelled so far, it predicts dialogues that are not labelled, and each strategy chooses by these predictions which ones
are labelled next (`kdecs.annotate.sampling`). Students are trained and asked by the commands that a user would run,
each in a process.

    simulation.json                          which study this is: the directory is refused to another one
    seed-0/start-25/                         the round that all strategies share, and its student
    seed-0/disagreement-50/dialogues.jsonl   what is labelled in this round
                           student/          the student that was trained on it
                           valid-predictions.jsonl           its predictions of the validation dialogues
                           candidates.jsonl, predictions.jsonl   the dialogues to choose from, as it predicts them
                           round.json        the ids that are labelled, and the scores, written last
                           log.txt           what training and prediction printed
    scores.csv, comparison.csv, curves.png   the result

A round with a round.json is finished. Its student is needed until the rounds that follow have its predictions.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from kdecs.annotate.sampling import Strategy, annotation_of_predictions, ranked_by
from kdecs.artifact import atomic_path, file_lock, read_record, sha256_of_file, write_text
from kdecs.config import find_config, read_yaml
from kdecs.corpus.checking import Checker
from kdecs.corpus.formats.writing import DialogueWriter
from kdecs.corpus.pairs import random_order
from kdecs.corpus.reading import iter_raw, read_corpus
from kdecs.corpus.schema import Corpus, Dialogue
from kdecs.errors import AnnotationError, ConfigError, DependencyError
from kdecs.output import refuse_inputs
from kdecs.process import StopSignal, last_error, module_command, run_child

if TYPE_CHECKING:
    from kdecs.evaluation.metrics import Scores
    from kdecs.evaluation.significance import SeedSummary

RANDOM: Strategy = "random"
SHOWN = {"macro_f1": "macro F1", "utterance_macro_f1": "utterance macro F1"}
"""The scores that are compared, and their names."""
_STUDY_NAME, _ROUND_NAME = "simulation.json", "round.json"
_VALID_NAME = "valid-predictions.jsonl"  # the student's directory has it under this name, too
_OWN_KEYS = (
    "name", "output", "cache", "corpus.train", "corpus.valid", "corpus.test", "corpus.train_share",
    "optimization.seed",
)  # fmt: skip
_COLOURS: dict[Strategy, str] = {"random": "#9aa3b2", "disagreement": "#2457c5", "uncertainty": "#c2571a"}
_RULE_COLOUR = "#1c8a5a"


class StudyRecord(BaseModel):
    """simulation.json: what the rounds depend on. More seeds, strategies and larger sizes only add rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    corpus: str
    valid: str
    student: str
    settings: tuple[str, ...]
    sizes: tuple[int, ...]
    candidates: int | None
    predictions: tuple[str, ...]


class RoundRecord(BaseModel):
    """round.json: the ids that are labelled, in the order in which they were chosen, and the student's scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    labelled: list[str]
    scores: dict[str, float]


@dataclass(frozen=True)
class Study:
    """What is tried. `student` names a config of student trainings, which `overrides` change as `--set` does."""

    output: Path
    corpus: Path
    valid: Path
    student: str
    overrides: tuple[str, ...] = ()
    strategies: tuple[Strategy, ...] = ("random", "disagreement", "uncertainty")
    sizes: tuple[int, ...] = (25, 50, 100)
    num_seeds: int = 3
    candidates: int | None = None
    predictions: tuple[Path, ...] = ()

    def check(self) -> None:
        """Raise ConfigError for values that do not fit together, OutputError if an input lies in the directory."""
        refuse_inputs(self.output, [self.corpus, self.valid, *self.predictions], is_directory=True)
        if any(first >= second for first, second in pairwise(self.sizes)):
            raise ConfigError(
                f"--size {' --size '.join(map(str, self.sizes))}: expected each number to be above the one before it"
            )
        steps = [second - first for first, second in pairwise(self.sizes)]
        if self.candidates is not None and self.candidates < max(steps, default=0):
            raise ConfigError(
                f"--candidates {self.candidates}: expected at least {max(steps)}, as many as one round labels"
            )
        for override in self.overrides:
            if (key := override.partition("=")[0].strip()) in _OWN_KEYS:
                raise ConfigError(f"--set {override}: the simulation sets {key} of each student itself")

    def record(self) -> StudyRecord:
        """What says whether a directory holds this study, with the files by their content."""
        config = find_config("student", self.student)
        read_yaml(config)  # refuses what is no config before the first round
        return StudyRecord(
            corpus=sha256_of_file(self.corpus),
            valid=sha256_of_file(self.valid),
            student=sha256_of_file(config),
            settings=self.overrides,
            sizes=self.sizes,
            candidates=self.candidates,
            predictions=tuple(sha256_of_file(path) for path in self.predictions),
        )

    def rounds(self) -> "Iterator[Round]":
        """All rounds, each size for all seeds before the next: the first sizes can be compared after a stop."""
        for place in range(len(self.sizes)):
            for seed in range(self.num_seeds):
                for strategy in self.strategies if place else (None,):
                    yield Round(self, seed, strategy, place)


@dataclass(frozen=True)
class Round:
    """The `place`-th size of one seed's dialogues, as a strategy chose them; None for the first, which all share."""

    study: Study = field(repr=False)
    seed: int
    strategy: Strategy | None
    place: int

    @property
    def size(self) -> int:
        """How many dialogues are labelled."""
        return self.study.sizes[self.place]

    @property
    def folder(self) -> Path:
        """Where the round keeps its files."""
        return self.study.output / f"seed-{self.seed}" / f"{self.strategy or 'start'}-{self.size}"

    @property
    def previous(self) -> "Round | None":
        """The round whose student chooses the new dialogues of this one."""
        if self.strategy is None:
            return None
        return Round(self.study, self.seed, self.strategy if self.place > 1 else None, self.place - 1)

    def record(self) -> RoundRecord | None:
        """The finished round's ids and scores, or None. Raises ArtifactError if the file is damaged."""
        path = self.folder / _ROUND_NAME
        remedy = "remove it, and the same command will finish the round again"
        return read_record(RoundRecord, path, remedy) if path.is_file() else None

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.size} dialogues, {self.strategy or 'all strategies'}"


class Simulation:
    """A study with its dialogues read. Raises CorpusError or PredictionError for a file with a fault."""

    def __init__(self, study: Study) -> None:
        study.check()
        self.study = study
        self.raw = {
            dialogue.id: (dialogue, raw)
            for dialogue, raw in iter_raw(study.corpus, Checker(str(study.corpus)))
        }
        if len(self.raw) < study.sizes[-1]:
            raise ConfigError(
                f"--size {study.sizes[-1]}: {study.corpus} holds {len(self.raw):,} dialogues, expected at least as many"
            )
        self.valid: Corpus = read_corpus(study.valid, log=False)
        self.others = [
            annotation_of_predictions(path, {name: d for name, (d, _) in self.raw.items()}, ())[0]
            for path in study.predictions
        ]
        self.record = study.record()
        self._predicting: dict[Path, Lock] = {}

    def run(self, stop: StopSignal, say: Callable[[str], object], concurrency: int = 1) -> None:
        """Run all rounds that are not finished, at most `concurrency` of one size at the same time.

        Raises Stopped; the same command goes on. After an error, the rounds that run are finished, and no other begins.
        """
        study = self.study
        with file_lock(study.output / ".lock", blocking=False) as held:
            if not held:
                raise AnnotationError(
                    f"{study.output}: another simulation uses this directory; wait until it has ended"
                )
            self._claim()
            rounds = list(enumerate(study.rounds(), start=1))

            def run_round(numbered: tuple[int, Round]) -> None:
                number, each = numbered
                title = f"round {number} of {len(rounds)}: {each}"
                record = each.record()
                if record is None:
                    stop.raise_if_requested(f"{each.folder}: stopped; run the same command again to resume")
                    say(f"{title}: …")
                    record = self._finish(each, stop)
                scores = ", ".join(f"{name} {record.scores[key]:.2f}" for key, name in SHOWN.items())
                say(f"{title}: {scores}")

            if concurrency == 1:  # without a pool, so that each child is this thread's
                for numbered in rounds:
                    run_round(numbered)
                return
            with ThreadPoolExecutor(concurrency) as pool:
                # Size by size: what a round labels depends on the student of the size before.
                for _, of_size in groupby(rounds, key=lambda numbered: numbered[1].place):
                    tasks = [pool.submit(run_round, numbered) for numbered in of_size]
                    try:
                        for task in tasks:
                            task.result()
                    finally:
                        for task in tasks:
                            task.cancel()

    def _claim(self) -> None:
        """Write down which study the directory holds. Raises ConfigError if it holds another one."""
        path = self.study.output / _STUDY_NAME
        if not path.is_file():
            write_text(path, self.record.model_dump_json(indent=2) + "\n")
            return
        found, known = read_record(StudyRecord, path, "choose another directory"), self.record
        longer = max(found.sizes, known.sizes, key=len)
        if longer[: len(found.sizes)] == found.sizes and longer[: len(known.sizes)] == known.sizes:
            known = known.model_copy(update={"sizes": found.sizes})
        options = {"settings": "set", "sizes": "size"}
        changed = [f"--{options.get(key, key)}" for key, value in known if getattr(found, key) != value]
        if changed:
            raise ConfigError(
                f"{self.study.output}: holds a simulation with other values of {', '.join(changed)}; choose another "
                "directory, or remove this one"
            )
        if longer != found.sizes:
            write_text(path, self.record.model_dump_json(indent=2) + "\n")

    def _finish(self, each: Round, stop: StopSignal) -> RoundRecord:
        study, folder = self.study, each.folder
        labelled = self._labelled(each, stop)
        self._write(folder / "dialogues.jsonl", labelled)
        student = folder / "student"
        settings = {
            "name": f"{each.strategy or 'start'}-{each.size}-seed-{each.seed}",
            "output": student.absolute(),
            "cache": (study.output / "cache").absolute(),
            "corpus.train": (folder / "dialogues.jsonl").absolute(),
            "corpus.valid": study.valid.absolute(),
            "corpus.test": "null",
            "corpus.train_share": 1,
            "optimization.seed": each.seed,
        }
        # Dozens of students would fill the runs of MLflow; a setting of the user's comes later and wins.
        values = ["tracking=null", *study.overrides, *(f"{key}={value}" for key, value in settings.items())]
        command = [*module_command([], "kdecs.launch.train_student"), "--config", study.student]
        for value in values:
            command += ["--set", value]
        _run(command, folder, stop)
        write_text(folder / _VALID_NAME, (student / _VALID_NAME).read_text(encoding="utf-8"))
        record = RoundRecord(labelled=labelled, scores=self.scores_of(each).known)
        write_text(folder / _ROUND_NAME, record.model_dump_json() + "\n")
        return record

    def _labelled(self, each: Round, stop: StopSignal) -> list[str]:
        """The ids of the dialogues that are labelled in a round, in the order in which they were chosen."""
        previous = each.previous
        if previous is None:
            return self._order(each.seed)[: each.size]
        record = previous.record()
        assert record is not None  # rounds are finished in their order
        labelled = record.labelled
        num_new = each.size - len(labelled)
        if each.strategy == RANDOM:
            return labelled + self._left(each.seed, labelled, is_limited=False)[:num_new]
        assert each.strategy is not None
        left = {name: self.raw[name][0] for name in self._left(each.seed, labelled)}
        predictions, candidates = (
            previous.folder / f"{name}.jsonl" for name in ("predictions", "candidates")
        )
        with self._predicting.setdefault(previous.folder, Lock()):
            if not predictions.is_file():  # strategies share those of the first round
                self._write(candidates, list(left))
                command = [*module_command([], "kdecs.cli"), "predict", "--offsets", "--no-example"]
                command += ["--student", str(previous.folder / "student"), "--input", str(candidates)]
                _run([*command, "--output", str(predictions)], previous.folder, stop)
        student, unsure = annotation_of_predictions(predictions, left, ())
        best = ranked_by(each.strategy, [student, *self.others], left, unsure, each.seed)
        return labelled + [item.dialogue.id for item in best[:num_new]]

    def _order(self, seed: int) -> list[str]:
        names = list(self.raw)
        return [names[place] for place in random_order(names, seed)]

    def _left(self, seed: int, labelled: Sequence[str], *, is_limited: bool = True) -> list[str]:
        """The dialogues to choose from, at random as many as `candidates` allows."""
        done = set(labelled)
        left = [name for name in self._order(seed) if name not in done]
        return left[: self.study.candidates] if is_limited else left

    def _write(self, path: Path, names: Sequence[str]) -> None:
        chosen: Iterator[tuple[Dialogue, Any]] = (self.raw[name] for name in names)
        write_text(path, "".join(DialogueWriter("jsonl").text(chosen)))

    def scores_of(self, each: Round) -> "Scores":
        """The scores of a round's student on the validation dialogues."""
        from kdecs.evaluation.metrics import evaluate
        from kdecs.evaluation.predictions import read_predictions

        return evaluate(self.valid, read_predictions(each.folder / _VALID_NAME, self.valid))


def _run(command: Sequence[str], folder: Path, stop: StopSignal) -> None:
    log = folder / "log.txt"
    code = run_child(command, stop, log=log)
    stop.raise_if_requested(f"{folder}: stopped; run the same command again to resume")
    if code != 0:
        raise AnnotationError(
            f"{folder}: {last_error(log)} (log: {log}); run the same command again once that is solved"
        )


@dataclass(frozen=True)
class Result:
    """The scores of all rounds on validation, and how far each strategy is from random choice."""

    rows: list[dict[str, Any]]
    summaries: "dict[tuple[Strategy, int, str], SeedSummary]"
    comparisons: list[dict[str, Any]]
    rule: dict[str, float]


def result_of(simulation: Simulation) -> Result:
    """The result of a finished simulation.

    A strategy is compared with random choice at each size in two ways: by the differences of its seeds (mean and t
    interval), and paired by validation dialogue with the seeds' counts added up (bootstrap interval and permutation p).
    """
    import numpy as np

    from kdecs.evaluation.metrics import metrics_of
    from kdecs.evaluation.significance import compare_systems, summarise_seeds

    study = simulation.study
    found = {(each.seed, each.strategy, each.size): simulation.scores_of(each) for each in study.rounds()}
    rows = [
        {"strategy": strategy or "all", "size": size, "seed": seed, **scores.known}
        for (seed, strategy, size), scores in found.items()
    ]
    seeds = range(study.num_seeds)
    summaries: dict[tuple[Strategy, int, str], SeedSummary] = {}
    comparisons = []
    for place, size in enumerate(study.sizes):
        of = {
            strategy: [found[seed, strategy if place else None, size] for seed in seeds]
            for strategy in study.strategies
        }
        for strategy, runs in of.items():
            for key in SHOWN:
                summaries[strategy, size, key] = summarise_seeds([scores[key] for scores in runs])
            if place == 0 or strategy == RANDOM or RANDOM not in of:
                continue
            pooled = compare_systems(
                np.sum([scores.sums_by_dialogue for scores in runs], axis=0),
                np.sum([scores.sums_by_dialogue for scores in of[RANDOM]], axis=0),
                keys=list(SHOWN),
            )
            for key in SHOWN:
                differences = [ours[key] - chance[key] for ours, chance in zip(runs, of[RANDOM], strict=True)]
                by_seed = summarise_seeds(differences)
                row: dict[str, Any] = {
                    "strategy": strategy,
                    "size": size,
                    "score": key,
                    "difference": by_seed.mean,
                }
                row |= {"seeds_low": by_seed.low, "seeds_high": by_seed.high}
                row |= {
                    f"dialogues_{name}": asdict(pooled[key])[name]
                    for name in ("difference", "low", "high", "p")
                }
                comparisons.append(row)
    rule = metrics_of(next(iter(found.values())).rule_sums().sum(axis=0))
    return Result(rows, summaries, comparisons, {key: float(rule[key]) for key in SHOWN})


def write_result(study: Study, result: Result) -> list[Path]:
    """Write the scores and the comparison as CSV and the learning curves as PNG; returns their paths.

    Raises DependencyError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(
            'the figure needs matplotlib, which is not installed; run: pip install "kdecs[sweep]"'
        ) from None
    paths = [study.output / name for name in ("scores.csv", "comparison.csv", "curves.png")]
    _write_csv(paths[0], result.rows)
    _write_csv(paths[1], result.comparisons)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, name) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        for number, strategy in enumerate(study.strategies):
            points = [result.summaries[strategy, size, key] for size in study.sizes]
            # Beside each other, so that no interval hides another one.
            shift = 1 + 0.03 * (number - (len(study.strategies) - 1) / 2)
            places = [size * shift for size in study.sizes]
            halves = [0.0 if point.high is None else point.high - point.mean for point in points]
            means = [point.mean for point in points]
            colour = _COLOURS[strategy]
            axes.errorbar(places, means, halves, marker="o", ms=4, capsize=2, color=colour, label=strategy)
        axes.axhline(result.rule[key], color=_RULE_COLOUR, ls="--", lw=1, label="rule j >= i-1")
        axes.set_xscale("log")
        axes.set_xticks(study.sizes, list(map(str, study.sizes)), minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("labelled dialogues")
        axes.set_ylabel(f"{name} on validation, percent")
        axes.grid(axis="y", color="#e6e9ef")
    figure.axes[0].legend(frameon=False, fontsize=8.5)
    with atomic_path(paths[2]) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return paths


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
