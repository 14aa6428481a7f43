"""Scores on test for tables: the chosen seed of every setting, once, after the choice has been made on validation.

SWEEP/selection.json                  its key `table` (SettingOnTest), written before and after each setting is scored
SWEEP/test-predictions/TRIAL.jsonl    what was scored
"""

from pathlib import Path

from kdecs.artifact import file_lock, write_json
from kdecs.errors import ArtifactError
from kdecs.process import say
from kdecs.sweep.selection.choose import finished_records, now, score_on_test, with_test_scores
from kdecs.sweep.selection.pick import best_seed
from kdecs.sweep.selection.record import (
    SELECTION_NAME,
    SelectionRecord,
    SettingOnTest,
    SettingScore,
    is_selection_outdated,
    load_selection,
)
from kdecs.sweep.status import TrialResult, read_results
from kdecs.tables import figures_table, terminal

TEST_PREDICTIONS_FOLDER = "test-predictions"
COLUMNS = (
    ("exact_match", "EM"),
    ("positive_f1", "Pos F1"),
    ("negative_f1", "Neg F1"),
    ("macro_f1", "macro F1"),
    ("emotion_accuracy", "Emo Acc"),
)


def score_settings(sweep: Path) -> SelectionRecord:
    """Score the chosen seed of every setting on test, for tables, and return the record with them.

    A second call scores only what is missing. Raises ArtifactError if no student is selected yet, because settings must
    not be chosen by these scores, and if the sweep has changed since the selection.
    """
    results = read_results(sweep)
    with file_lock(sweep / ".selection-lock"):
        record = load_selection(sweep)
        if record is None or record.test is None:
            raise ArtifactError(
                f"{sweep}: no student is selected yet, and the choice must be on record before other settings are "
                "scored on test; run the same command without --table first"
            )
        if is_selection_outdated(sweep):
            raise ArtifactError(
                f"{sweep / SELECTION_NAME}: the student was selected in another state of this sweep; "
                "a table would mix the two"
            )
        for setting in record.settings:
            record = _score_setting(sweep, record, setting, results)
    _upload(sweep, record, results)
    return record


def chosen_seed(
    record: SelectionRecord, setting: SettingScore, results: list[TrialResult]
) -> TrialResult | None:
    """The student that stands for a setting: the winner in its own setting, the best seed on validation elsewhere."""
    if record.winner.id in setting.trials:
        return next((result for result in results if result.id == record.winner.id), None)
    known = [result for result in results if result.id in setting.trials]
    return best_seed(known, setting) if known else None


def _score_setting(
    sweep: Path, record: SelectionRecord, setting: SettingScore, results: list[TrialResult]
) -> SelectionRecord:
    """Score one setting on test unless that is done. The winner's scores are those of the choice."""
    chosen = chosen_seed(record, setting, results)
    if chosen is None:
        raise ArtifactError(
            f"{sweep / SELECTION_NAME}: setting {setting.label} has no trial in this sweep; restore the file from a "
            "backup"
        )
    row = next((row for row in record.table if row.id == chosen.id), None)
    if row is not None and row.scores is not None:
        return record
    if chosen.id == record.winner.id:
        assert record.test_opened_at is not None
        row = SettingOnTest(
            id=chosen.id,
            label=setting.label,
            seed=chosen.seed,
            opened_at=record.test_opened_at,
            scores=record.test,
            intervals=record.test_intervals,
            above_rule=record.test_above_rule,
        )
    else:
        opened = row or SettingOnTest(id=chosen.id, label=setting.label, seed=chosen.seed, opened_at=now())
        target = sweep / TEST_PREDICTIONS_FOLDER / f"{chosen.id}.jsonl"
        target.parent.mkdir(exist_ok=True)
        found = score_on_test(sweep, chosen, target, lambda: _write(sweep, _with_row(record, opened)))
        row = opened.model_copy(
            update={"scores": found.scores, "intervals": found.intervals, "above_rule": found.above_rule}
        )
    record = _with_row(record, row)
    _write(sweep, record)
    return record


def _with_row(record: SelectionRecord, row: SettingOnTest) -> SelectionRecord:
    others = [other for other in record.table if other.id != row.id]
    return record.model_copy(update={"table": [*others, row]})


def _write(sweep: Path, record: SelectionRecord) -> None:
    write_json(sweep / SELECTION_NAME, record.as_json())


def _upload(sweep: Path, record: SelectionRecord, results: list[TrialResult]) -> None:
    """Add the scores and when test was opened to the trials' runs in MLflow, or say that it does not answer."""
    _, tracker, records = finished_records(sweep, results)
    for row in record.table:
        if row.id != record.winner.id and row.scores is not None:
            with_test_scores(records, row.id, row.scores, row.opened_at, opened_for="a table")
    if not tracker.sync(records, now=True):
        say(
            f"MLflow at {tracker.shown_uri} lacks the scores of the table; run the same command again to send them"
        )


def print_settings_on_test(record: SelectionRecord) -> None:
    """Print the chosen seed of every setting on test, with the trivial rules, under the numbers of rows."""
    assert record.test is not None
    prefix = "" if record.metric == "macro_f1" else "utterance_"
    columns = [
        (key if key == "emotion_accuracy" else prefix + key, title)
        for key, title in COLUMNS
        if not (prefix and key == "exact_match")
    ]
    title = (
        f"test, {record.universe}, protocol {record.protocol}, {record.test['num_positive']} positive and "
        f"{record.test['num_negative']} negative rows, percent"
    )
    table = figures_table(title, "setting", "seed", *(name for _, name in columns), tight=True)
    scored = {row.id: row for row in record.table}
    rows = [(row.label, str(row.seed), row.scores or {}) for row in scored.values()]
    rows += [(f"rule: {name}", "", dict(scores)) for name, scores in record.test_baselines.items()]
    for label, seed, scores in rows:
        found = [scores.get(key) for key, _ in columns]
        table.add_row(label, seed, *("–" if value is None else f"{value:.2f}" for value in found))
    terminal(highlight=False).print(table)
