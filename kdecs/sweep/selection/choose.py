"""Selection: settings are ranked on validation, the best seed of the best setting is scored on test, once.

SWEEP/selection.json           the record of it (SelectionRecord)
SWEEP/valid-predictions/       predictions that settings were compared by, if their trainings kept none
SWEEP/test-predictions.jsonl   what was scored on test
SWEEP/model-card.md            what the registry says about the winner
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from kdecs.artifact import (
    MANIFEST_NAME,
    content_checksum,
    file_lock,
    read_manifest,
    read_verified_manifest,
    scratch_folder,
    sha256_of_file,
    temporary_folder,
    write_json,
    write_text,
)
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.config import CONFIG_NAME, config_hash, load_config
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import read_split
from kdecs.errors import ArtifactError, ConfigError
from kdecs.evaluation.metrics import evaluate, rule_scores
from kdecs.evaluation.predictions import PairKey, Prediction, read_predictions, write_predictions
from kdecs.evaluation.significance import (
    Comparison,
    Distance,
    bootstrap_intervals,
    compare_systems,
    distance_from_rule,
)
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import TRIAL_KINDS, SweepConfig, TrialConfig, load_trial_config
from kdecs.sweep.selection.model_card import CARD_NAME, above_rule, model_card
from kdecs.sweep.selection.pick import Pick, best_seed, picked_student
from kdecs.sweep.selection.record import (
    SELECTION_NAME,
    SelectionRecord,
    SettingComparison,
    SettingScore,
    VariantComparison,
    Winner,
    is_selection_outdated,
    load_selection,
    rank_settings,
)
from kdecs.sweep.space import VARIANT_KEY, Trial, settings_key
from kdecs.sweep.status import (
    SELECTION_METRIC,
    TrialResult,
    metric_title,
    read_results,
    student_file,
    trial_directory,
)
from kdecs.sweep.tracking import TRIAL_TAG, sweep_record, sweep_records, trial_record
from kdecs.tables import terminal
from kdecs.tracking.mlflow import Tracker, tracking_uri
from kdecs.tracking.record import RunRecord, directory_identity
from kdecs.tracking.registry import register_student

TEST_PREDICTIONS_NAME = "test-predictions.jsonl"
VALID_PREDICTIONS_FOLDER = "valid-predictions"
_EMOTIONS, _STRICT = "emotion_accuracy", "strict_"
COMPARED = ("macro_f1", "positive_f1", "negative_f1", "exact_match", _EMOTIONS, "utterance_macro_f1")


def select_student(sweep: Path, pick: Pick | None = None) -> SelectionRecord:
    """Choose on validation, score the winner on test once, register it. Returns the record; a second call reads it.

    With `pick`, a person has chosen the student or the setting.
    Raises ArtifactError if the sweep is unfinished, or if the test split was opened for an earlier state of it or for
    another student than the picked one, and ConfigError if the config names no test split.
    """
    results = read_results(sweep)
    # Before the test split is opened, since the winner could not be registered.
    tracking_uri(load_config(SweepConfig, sweep / CONFIG_NAME).tracking, sweep)
    with file_lock(sweep / ".selection-lock"):
        record = load_selection(sweep)
        ranked = rank_settings(results)
        chosen = (
            picked_student(results, ranked, pick)
            if pick
            else best_seed(results, _best_student(sweep, ranked))
        )
        if chosen.settings.get(VARIANT_KEY) in load_config(SweepConfig, sweep / CONFIG_NAME).baselines:
            raise ConfigError(
                f"{chosen.label}: is a baseline, and selection chooses and registers a student; pick a student (kdecs "
                f"report {sweep} shows the baselines' scores)"
            )
        if record is None:
            record = SelectionRecord(
                sweep=read_manifest(sweep, "sweep").config_hash,
                metric=chosen.metric,
                universe="fold1",
                protocol="reccon",
                settings=ranked,
                winner=Winner(
                    id=chosen.id,
                    label=chosen.label,
                    seed=chosen.seed,
                    directory=chosen.directory,
                    valid=chosen.metrics,
                ),
                picked=pick.origin if pick else None,
                test_opened_at=None,
                test=None,
                registered=None,
            )
        elif is_selection_outdated(sweep):
            raise ArtifactError(
                f"{sweep / SELECTION_NAME}: the test split was opened on {record.test_opened_at} for another state of "
                "this sweep; remove the file only if you want to look at test a second time"
            )
        elif pick is not None and chosen.id != record.winner.id:
            raise ArtifactError(
                f"{sweep / SELECTION_NAME}: the test split was opened on {record.test_opened_at} for "
                f"{record.winner.label}, so {chosen.label} cannot be scored on it as well; remove the file only if you "
                "want to look at test a second time"
            )
        winner = next((result for result in results if result.id == record.winner.id), None)
        if winner is None:
            raise ArtifactError(
                f"{sweep / SELECTION_NAME}: its winner {record.winner.id!r} is no trial of this sweep; "
                "restore the file from a backup"
            )
        if "runner_up" not in record.model_fields_set:
            record = record.model_copy(update=_comparisons(sweep, results, record))
        if record.test is None:
            record = _score_winner(sweep, winner, record)
            # Written after each step, so that a call after a kill goes on from there and scores test only once.
            write_json(sweep / SELECTION_NAME, record.as_json())
        if record.registered is None:
            registered = _register(sweep, results, winner, record)
            record = record.model_copy(update={"registered": registered})
            write_json(sweep / SELECTION_NAME, record.as_json())
    return record


def _comparisons(sweep: Path, results: list[TrialResult], record: SelectionRecord) -> dict[str, Any]:
    """Paired tests on validation: the winner's setting against the best other one, variants against the first one."""
    ranked = rank_settings(results)
    by_id = {result.id: result for result in results}
    groups = {setting.key: [by_id[identity] for identity in setting.trials] for setting in ranked}

    def tests(first: SettingScore, second: SettingScore) -> dict[str, Comparison]:
        return compare_settings((sweep, groups[first.key]), (sweep, groups[second.key]))

    runner_up = None
    if len(ranked) > 1:
        first = next(setting for setting in ranked if record.winner.id in setting.trials)
        second = next(setting for setting in ranked if setting is not first)
        runner_up = SettingComparison(label=second.label, against=first.label, tests=tests(first, second))
    # Settings come by falling mean, so the first one of a variant is its best.
    best: dict[str, SettingScore] = {}
    for setting in ranked:
        if VARIANT_KEY in setting.settings:
            best.setdefault(str(setting.settings[VARIANT_KEY]), setting)
    config = load_config(SweepConfig, sweep / CONFIG_NAME)
    names = [name for name in (*config.variants, *config.baselines) if name in best]
    variants = [
        VariantComparison(
            variant=name,
            label=best[name].label,
            against=best[names[0]].label,
            tests=tests(best[name], best[names[0]]),
        )
        for name in names[1:]
    ]
    return {"runner_up": runner_up, "variants": variants}


def compare_settings(
    first: tuple[Path, Sequence[TrialResult]], second: tuple[Path, Sequence[TrialResult]]
) -> dict[str, Comparison]:
    """By score: first minus second in points, its 95% bootstrap interval and the paired permutation p.

    Each is a setting's trials with the directory of their sweep; both have the same validation file. If one of the two
    was given the emotions, their accuracy is left out: it would be that of the gold.
    """
    # Sums over different numbers of students could not be compared.
    seeds = {result.seed for result in first[1]} & {result.seed for result in second[1]}
    configs = [
        load_trial_config(student_file(trial_directory(sweep, group[0]), CONFIG_NAME))
        for sweep, group in (first, second)
    ]
    corpus = read_split(configs[0].corpus, configs[0].corpus.valid)
    are_given = any(config.is_given_emotions for config in configs)
    keys = [key for key in COMPARED if not (are_given and key == _EMOTIONS)]
    # The same rows for both: who looks less far ahead finds no cause there.
    reach = max(config.candidates_after for config in configs)

    def sums(sweep: Path, group: Sequence[TrialResult]) -> NDArray[np.float64]:
        """(D, K) contributions of the students' predictions, summed over seeds (kdecs.evaluation.rows)."""
        scores = [
            evaluate(
                corpus,
                validation_predictions(sweep, result, corpus),
                candidates_after=reach,
            )
            for result in group
            if result.seed in seeds
        ]
        return np.sum([score.sums_by_dialogue for score in scores], axis=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of degenerate samples, which equal systems are
        return compare_systems(sums(*first), sums(*second), keys=keys)


def validation_predictions(sweep: Path, result: TrialResult, corpus: Corpus) -> dict[PairKey, Prediction]:
    """A student's predictions for the validation pairs, from a file of the sweep or the trial if there is one.

    Raises ArtifactError for a student that is damaged.
    """
    directory = trial_directory(sweep, result)
    # The student's checksum in the name: what was predicted before a trial was trained anew is never found again.
    folder, stem = sweep / VALID_PREDICTIONS_FOLDER, f"{result.id}-{content_checksum(directory)[:8]}"
    if not (path := next(folder.glob(f"{stem}-*.jsonl"), None)):
        if (kept := _kept_predictions(directory, corpus)) is not None:
            return kept
        student = _predictor(directory)
        folder.mkdir(exist_ok=True)
        # No manifest covers these files, so each carries the checksum of its content in its name.
        with temporary_folder(folder / stem) as temporary:
            written = temporary / stem
            write_predictions(written, student.predict_pairs(corpus).values())
            path = written.replace(folder / f"{stem}-{sha256_of_file(written)[:16]}.jsonl")
    if sha256_of_file(path)[:16] != path.stem.rpartition("-")[2]:
        raise ArtifactError(f"{path}: changed since it was written, as its name shows; remove it")
    return read_predictions(path, corpus)


def _kept_predictions(directory: Path, corpus: Corpus) -> dict[PairKey, Prediction] | None:
    """What the training kept beside the weights, or None if it kept nothing or an input has changed since."""
    from kdecs.student.config import VALIDATION_NAME

    manifest = read_verified_manifest(directory, *TRIAL_KINDS)
    if VALIDATION_NAME not in {entry.path for entry in manifest.files}:
        return None
    try:
        is_same_work = config_hash(load_trial_config(directory / CONFIG_NAME)) == manifest.config_hash
    except ConfigError:  # an input is gone, but predicting may do without it
        return None
    return read_predictions(directory / VALIDATION_NAME, corpus) if is_same_work else None


def _score_winner(sweep: Path, winner: TrialResult, record: SelectionRecord) -> SelectionRecord:
    """Open the test split, score the winner and the trivial rules on it, and return the record with the scores."""
    opened = record.test_opened_at or now()
    record = record.model_copy(update={"test_opened_at": opened})
    found = score_on_test(
        sweep,
        winner,
        sweep / TEST_PREDICTIONS_NAME,
        lambda: write_json(sweep / SELECTION_NAME, record.as_json()),
    )
    scored = {
        "test": found.scores,
        "test_intervals": found.intervals,
        "test_baselines": rule_scores(found.corpus, found.candidates_after),
        "test_above_rule": found.above_rule,
    }
    return record.model_copy(update=scored)


def now() -> str:
    """This moment in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class OnTest:
    """The test split and a student's scores on it, with 95% intervals of each and of its distance from the rule."""

    corpus: Corpus
    scores: dict[str, Any]
    intervals: dict[str, tuple[float, float]]
    above_rule: dict[str, Distance]
    candidates_after: int = 0


def score_on_test(sweep: Path, result: TrialResult, target: Path, note_opened: Callable[[], None]) -> OnTest:
    """Predict the test split by a student into `target`, and score the predictions.

    `note_opened` writes down that test is open. Raises ConfigError if the student's config names no test split, and
    ArtifactError for a student that is damaged.
    """
    directory = trial_directory(sweep, result)
    config = load_trial_config(student_file(directory, CONFIG_NAME))
    if config.corpus.test is None:
        raise ConfigError(
            f"{directory / CONFIG_NAME}: corpus.test is missing, and selection scores the winner on it"
        )
    student = _predictor(directory)
    # Before the split is read: a kill in between must not hide that it was opened.
    note_opened()
    corpus = read_split(config.corpus, config.corpus.test)
    predictions = student.predict_pairs(corpus)
    write_predictions(target, predictions.values())
    scores = evaluate(corpus, predictions, candidates_after=config.candidates_after)
    return OnTest(
        corpus,
        scores_of_student(scores.as_dict() | scores.values, config),
        bootstrap_intervals(scores.sums_by_dialogue),
        # Without emotions, which the rule does not predict.
        distance_from_rule(
            scores.sums_by_dialogue, scores.rule_sums(), [key for key in COMPARED if key != _EMOTIONS]
        ),
        config.candidates_after,
    )


def _predictor(directory: Path) -> Any:
    """The student or baseline of a trial's directory, which predicts the pairs of a corpus (`predict_pairs`)."""
    from kdecs.baselines.config import Kec
    from kdecs.baselines.prediction import open_baseline
    from kdecs.runtime import start_runtime
    from kdecs.student.predict.predictor import Student

    config, runtime = load_trial_config(student_file(directory, CONFIG_NAME)), start_runtime()
    device = runtime.device
    if isinstance(config, StudentConfig):
        return Student.from_pretrained(directory, device=device)
    if isinstance(config, GenerativeConfig):
        from kdecs.baselines.generative.prediction import GenerativeBaseline

        # In the precision that it was validated in.
        return GenerativeBaseline.load(directory, runtime=runtime, dtype=config.zero.dtype)
    # The phrases of training and validation are one file, which may hold those of test as well.
    knowledge = config.system.knowledge if isinstance(config.system, Kec) else None
    return open_baseline(directory, device=device, knowledge=knowledge)


def _best_student(sweep: Path, ranked: Sequence[SettingScore]) -> SettingScore:
    """The best setting that is no baseline, which are there to be compared with. Raises ConfigError without one."""
    baselines = load_config(SweepConfig, sweep / CONFIG_NAME).baselines
    found = next((each for each in ranked if each.settings.get(VARIANT_KEY) not in baselines), None)
    if found is None:
        raise ConfigError(
            f"{sweep}: trained baselines alone, and selection chooses a student; add a variant of the student to "
            f"space.variant, or see the scores with kdecs report {sweep}"
        )
    return found


def scores_of_student(scores: dict[str, Any], config: TrialConfig) -> dict[str, Any]:
    """The scores, without those of emotions if the student was given them, which would be those of the gold."""
    if not config.is_given_emotions:
        return scores
    return {key: value for key, value in scores.items() if key != _EMOTIONS and not key.startswith(_STRICT)}


def _register(
    sweep: Path, results: list[TrialResult], winner: TrialResult, record: SelectionRecord
) -> str | None:
    """Register the winner in MLflow. Returns None if MLflow does not answer; the next call tries again."""
    config, tracker, records = finished_records(sweep, results)
    if not tracker.sync(records, now=True):
        return None
    directory = trial_directory(sweep, winner)
    names = [entry.path for entry in read_verified_manifest(directory, "student").files]
    student = load_config(StudentConfig, directory / CONFIG_NAME)
    card = model_card(sweep, record, student)
    write_text(sweep / CARD_NAME, card)
    assert record.test is not None and record.test_opened_at is not None
    run = with_test_scores(records, winner.id, record.test, record.test_opened_at, opened_for="the choice")
    run.results = [sweep / SELECTION_NAME, sweep / TEST_PREDICTIONS_NAME, sweep / CARD_NAME]
    with scratch_folder("registered") as temporary:
        # Only the files of the manifest are registered, neither checkpoints nor logs.
        copy = temporary / "student"
        for name in [*names, MANIFEST_NAME]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / name, copy / name)
        return register_student(
            tracker,
            run,
            copy,
            score=winner.score,
            corpus_checksum=content_checksum(student.corpus.valid),
            metric=winner.metric,
            card=card,
            lineage=_lineage(sweep, config, winner, record),
            reads_emotions=student.is_given_emotions,
        )


def finished_records(
    sweep: Path, results: Sequence[TrialResult]
) -> tuple[SweepConfig, Tracker, list[RunRecord]]:
    """The config of a finished sweep, its MLflow, and the records of all its runs, each after its parent."""
    # The sweep may have been moved since it was trained; the default database lies beside it, wherever it is now.
    config = load_config(SweepConfig, sweep / CONFIG_NAME).model_copy(update={"output": sweep.absolute()})
    parent = sweep_record(config, len(results), list(results), "FINISHED")
    trials = [(_as_trial(sweep, result), result) for result in results if result.started]
    children = [trial_record(trial, result, parent) for trial, result in trials]
    return config, Tracker(config.tracking, config.output), sweep_records(parent, trials, children)


def with_test_scores(
    records: Sequence[RunRecord], trial: str, scores: Mapping[str, Any], opened_at: str, *, opened_for: str
) -> RunRecord:
    """The record of a trial with its scores on test added, and tags that say when and what for test was opened."""
    run = next(record for record in records if record.identity.get(TRIAL_TAG) == trial)
    run.scores = {f"test_{key}": value for key, value in scores.items() if isinstance(value, float)}
    run.tags |= {"kdecs.test_opened_at": opened_at, "kdecs.test_opened_for": opened_for}
    return run


def _lineage(
    sweep: Path, config: SweepConfig, winner: TrialResult, record: SelectionRecord
) -> dict[str, str]:
    """Where a student comes from, as tags of its version: its sweep, setting, teachers, soft labels and corpora."""
    directory = trial_directory(sweep, winner)
    manifest = read_manifest(directory, "student")
    inputs = {f"kdecs.{name}_sha256": checksum for name, checksum in manifest.inputs.items()}
    first = manifest.details.get("teacher") or {}
    teachers = first.get("teachers") or ([first] if first else [])
    return {
        **inputs,
        "kdecs.sweep": directory_identity(sweep),
        "kdecs.sweep_name": config.name,
        "kdecs.trial": winner.id,
        "kdecs.setting": settings_key(winner.settings),
        "kdecs.picked": record.picked or "best seed of the best setting on validation",
        "kdecs.config_hash": winner.config_hash,
        "kdecs.student_sha256": content_checksum(directory),
        "kdecs.teacher": winner.teacher or "none",
        # Of a sum of teachers one after the other, in the order of their names.
        **_joined("kdecs.teacher_sha256", [teacher["inputs"].get("teacher") for teacher in teachers]),
        **_joined("kdecs.soft_labels_hash", [teacher["soft_labels_hash"] for teacher in teachers]),
    }


def _joined(tag: str, values: list[str | None]) -> dict[str, str]:
    """One tag for several values, none where a value is unknown: imported labels may have no teacher."""
    known = [value for value in values if value]
    return {tag: " ".join(known)} if known and len(known) == len(values) else {}


def _as_trial(sweep: Path, result: TrialResult) -> Trial:
    directory = trial_directory(sweep, result)
    # A trial that the search has pruned has no manifest.
    path = student_file(directory, CONFIG_NAME) if result.status == "complete" else directory / CONFIG_NAME
    config = load_trial_config(path)
    return Trial(
        id=result.id,
        label=result.label,
        config=config.model_copy(update={"output": directory}),
        config_hash=result.config_hash,
        teacher=result.teacher,
        settings=result.settings,
        seed=result.seed,
    )


def print_selection(sweep: Path, record: SelectionRecord) -> None:
    """Print the ranked settings, then the winner's test scores beside those of the trivial rules."""
    assert record.test is not None
    console = terminal(highlight=False)
    ranked_by = metric_title(record.metric)
    table = Table("setting", "seeds", ranked_by, "sd", "95% interval", title="validation, fold1, percent")
    for setting in record.settings:
        table.add_row(
            setting.label,
            str(setting.num_seeds),
            f"{setting.mean:.2f}",
            f"{setting.sd:.2f}" if setting.sd is not None else "one seed",
            f"{setting.interval[0]:.2f} to {setting.interval[1]:.2f}" if setting.interval else "",
        )
    console.print(table)
    if record.picked is not None:
        console.print(f"{record.winner.label} was picked by a person: {record.picked}", soft_wrap=True)
    line = "one setting, so there is no runner-up to test against"
    if record.runner_up:
        test = record.runner_up.tests[record.metric]
        line = (
            f"{record.runner_up.against} against {record.runner_up.label} on validation: {test.difference:+.2f} points "
            f"(95% {test.low:+.2f} to {test.high:+.2f}, paired permutation p {test.p:.3f})"
        )
    console.print(line, soft_wrap=True)
    scores = record.test
    rule, rule_values = max(scores["baselines"].items(), key=lambda item: item[1]["utterance_macro_f1"])
    emotions = f"emotion accuracy {scores[_EMOTIONS]:.2f}, " if scores.get(_EMOTIONS) is not None else ""
    # Where students find cause utterances alone, these would count each cause as a span that was missed.
    has_spans = record.metric == SELECTION_METRIC
    spans = f"macro F1 {scores['macro_f1']:.2f}, EM {scores['exact_match']:.2f}, " if has_spans else ""
    console.print(
        f"winner {record.winner.label} on test ({scores['num_positive']} positive, {scores['num_negative']} negative "
        f"rows): {spans}{emotions}"
        f"utterance macro F1 {scores['utterance_macro_f1']:.2f} "
        f'(best trivial rule "{rule}": {rule_values["utterance_macro_f1"]:.2f})',
        soft_wrap=True,
    )
    if above := above_rule(record):
        console.print(f"on test {record.winner.label} is {above}", soft_wrap=True)
    registered = record.registered or "not registered yet, because MLflow did not answer; run this again"
    console.print(
        f"test opened {record.test_opened_at}; {registered}; student: {sweep / record.winner.directory}",
        soft_wrap=True,
    )
