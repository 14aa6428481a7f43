"""What a sweep's trials have reached, read from their directories: the driver, selection and report use this."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdecs.artifact import read_manifest, write_json
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import CorpusConfig, read_split
from kdecs.errors import ArtifactError
from kdecs.evaluation.baselines import MAJORITY_EMOTION, trivial_predictions
from kdecs.evaluation.metrics import evaluate
from kdecs.student.config import StudentConfig
from kdecs.sweep.space import Trial, settings_key, trials_directory
from kdecs.sweep.trial import DIED, LOG_NAME, read_status
from kdecs.tracking.record import METRICS_NAME, read_points

_EMOTION_KEY = "emotion_accuracy"


def trivial_scores(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Scores (fold1, protocol reccon, percent) by rule.

    A rule about causes has no emotion accuracy, and the majority emotion has nothing else.
    """
    found = {}
    for name, predictions in trivial_predictions(corpus, "fold1").items():
        values = evaluate(corpus, predictions).values
        is_emotion = name == MAJORITY_EMOTION
        found[name] = {key: value for key, value in values.items() if (key == _EMOTION_KEY) == is_emotion}
    return found


def trivial_scores_on_validation(config: CorpusConfig) -> dict[str, dict[str, float]]:
    """The same on the validation split that a config names."""
    return trivial_scores(read_split(config, config.valid))


TRIALS_NAME = "trials.json"
BASELINES_NAME = "baselines.json"
SELECTION_METRIC = "macro_f1"


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial and where it stands; `metrics` are those of its best epoch on validation, in percent.

    `directory` and `log` are relative to the sweep's directory. `stage` is grid, search (one seed, may be pruned) or
    seeds (a survivor's); `reused_from` names the directory of another sweep that trained it. `epoch` of `epochs` is
    done; `metric` is what students of this task are chosen by.
    """

    id: str
    label: str
    teacher: str | None
    seed: int
    settings: dict[str, Any]
    config_hash: str
    directory: str
    log: str
    status: str
    attempts: int
    seconds: float
    started: float | None
    finished: float | None
    best_epoch: int | None
    metrics: dict[str, float]
    error: str | None
    stage: str = "grid"
    reused_from: str | None = None
    epoch: int = 0
    epochs: int = 0
    metric: str = SELECTION_METRIC

    @property
    def score(self) -> float:
        """What trials are ranked by, on validation. KeyError where no epoch has ended."""
        return self.metrics[self.metric]

    @property
    def has_score(self) -> bool:
        """Whether an epoch has ended."""
        return self.metric in self.metrics

    @property
    def is_settled(self) -> bool:
        """Whether it is complete and its files say so to the end: nothing of it will change any more."""
        return self.status == "complete" and self.finished is not None

    @property
    def is_compared(self) -> bool:
        """Whether it counts in the comparison of settings: a whole student, and no mere search's."""
        return self.status == "complete" and self.stage != "search"


def selection_metric(config: StudentConfig) -> str:
    """What students are chosen by on validation: macro F1 with spans, or of utterances where there are none."""
    return "utterance_macro_f1" if config.task == "ecpe" else SELECTION_METRIC


def best_point(points: list[dict[str, Any]], metric: str = SELECTION_METRIC) -> dict[str, Any] | None:
    """The epoch whose model a training keeps: the first with the highest score on validation."""
    scored = [point for point in points if metric in point]
    return max(scored, key=lambda point: point[metric]) if scored else None


def trial_result(trial: Trial, *, complete: bool, living: bool, stage: str = "grid") -> TrialResult:
    """Read a trial's files. `living`: a process may be training it, so that `running` is believed.

    A student whose files are all there (`complete`) is so called once its process has noted its end, too: what that
    writes last belongs to it.
    """
    status = read_status(trial.directory)
    found = status.status if status else "waiting"
    error = status.error if status else None
    if complete and living and found == "running":
        pass
    elif complete:
        found, error = "complete", None
    elif found == "complete":  # its files were removed since
        found = "waiting"
    elif found == "running" and not living:
        found, error = "failed", DIED
    points = read_points(trial.directory / METRICS_NAME)
    metric = selection_metric(trial.config)
    point = best_point(points, metric)
    metrics = {
        key: float(value)
        for key, value in (point or {}).items()
        if key not in ("epoch", "step", "time") and isinstance(value, int | float)
    }
    sweep = trial.directory.parent.parent
    return TrialResult(
        id=trial.id,
        label=trial.label,
        teacher=trial.teacher,
        seed=trial.seed,
        settings=trial.settings,
        config_hash=trial.config_hash,
        directory=trial.directory.relative_to(sweep).as_posix(),
        log=(trial.directory / LOG_NAME).relative_to(sweep).as_posix(),
        status=found,
        attempts=status.attempts if status else 0,
        seconds=status.seconds if status else 0.0,
        started=status.started if status else None,
        finished=status.finished if status else None,
        best_epoch=int(point["epoch"]) if point else None,
        metrics=metrics,
        error=error,
        stage=stage,
        reused_from=status.reused_from if status else None,
        epoch=int(points[-1]["epoch"]) if points else 0,
        epochs=trial.config.optimization.epochs,
        metric=metric,
    )


def write_results(sweep: Path, results: list[TrialResult]) -> None:
    """Replace the sweep's `trials.json`."""
    write_json(sweep / TRIALS_NAME, [asdict(result) for result in results])


def read_results(sweep: Path) -> list[TrialResult]:
    """The trials of a finished sweep. Raises ArtifactError where it is unfinished or damaged."""
    read_manifest(sweep, "sweep")
    path = sweep / TRIALS_NAME
    try:
        results = [TrialResult(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: not a sweep's trials ({error}); run the sweep again") from None
    if not results:
        raise ArtifactError(f"{path}: no trials, expected at least one")
    return results


def by_settings(results: list[TrialResult]) -> dict[str, list[TrialResult]]:
    """Compared trials that differ by their seed alone, under a key of their settings."""
    groups: dict[str, list[TrialResult]] = {}
    for result in (result for result in results if result.is_compared):
        groups.setdefault(settings_key(result.settings), []).append(result)
    return groups


def trial_directory(sweep: Path, result: TrialResult) -> Path:
    """The directory of a trial, whatever place the sweep was moved to."""
    return trials_directory(sweep) / result.id
