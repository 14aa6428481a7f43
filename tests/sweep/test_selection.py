import dataclasses
import json

import pytest
from support import change_json, flip_bit, free_port, rewrite_manifest

from kdecs.artifact import content_checksum
from kdecs.config import load_config
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.splits import read_split
from kdecs.errors import ArtifactError, ConfigError, TrackingError
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.metrics import evaluate
from kdecs.student.config import StudentConfig
from kdecs.student.predict.predictor import Student
from kdecs.sweep import status
from kdecs.sweep.report.page import write_report
from kdecs.sweep.selection.choose import COMPARED, print_selection, scores_of_student, select_student
from kdecs.sweep.selection.model_card import model_card
from kdecs.sweep.selection.on_test import print_settings_on_test, score_settings
from kdecs.sweep.selection.pick import Pick, pick_from_mlflow, picked_student
from kdecs.sweep.selection.record import SelectionRecord, rank_settings, read_selection
from kdecs.sweep.status import read_results, trial_directory


def test_settings_are_ranked_by_mean_over_seeds(finished):
    ranked = rank_settings(read_results(finished))
    assert [setting.label for setting in ranked] == [
        "llama-tiny α0.6 τ2",
        "llama-tiny α0.3 τ2",
        "t5-tiny α0.6 τ2",
        "t5-tiny α0.3 τ2",
    ]
    assert ranked[0].num_seeds == 2
    assert ranked[0].mean == pytest.approx(68.15)


def test_winner_is_scored_on_test_once(finished, asked):
    record = select_student(finished)
    assert record.winner.label == "llama-tiny α0.6 τ2 s1"
    corpus = read_corpus(bundled_sample("test"))
    rule = trivial_predictions(corpus, "fold1")["j >= i-1"]
    assert record.test == json.loads(json.dumps(evaluate(corpus, rule).as_dict()))
    assert record.test_baselines["j >= i-1"]["macro_f1"] == record.test["macro_f1"]
    assert "macro_f1" not in record.test_baselines["majority emotion"]
    assert (finished / "test-predictions.jsonl").is_file()
    assert record.registered == "kdecs-student version 1"
    test = record.runner_up.tests["macro_f1"]
    assert record.runner_up.label == "llama-tiny α0.3 τ2"
    assert (test.difference, test.low, test.high, test.p) == (0.0, 0.0, 0.0, 1.0), "equal predictions"
    above = record.test_above_rule["macro_f1"]
    assert (above.difference, above.low, above.high) == (0.0, 0.0, 0.0), "the winner predicts by this rule"
    low, high = record.test_intervals["macro_f1"]
    assert low < record.test["macro_f1"] < high
    card = (finished / "model-card.md").read_text()
    assert f"| macro F1 | {record.test['macro_f1']:.2f} | {low:.2f} to {high:.2f} |" in card
    assert all(
        part in card
        for part in (
            "train.json",
            "llama-tiny",
            "## Limits",
            "runner-up",
            "On test it is 0.00 points of macro F1 above",
        )
    )
    assert str(finished) not in card
    assert "It was tested on test.json alone" in card and "English" not in card, (
        "any corpus may be trained on"
    )
    assert select_student(finished) == record
    assert asked == ["valid"] * 4 + ["test"], "two settings of two seeds, then the winner on test"


def test_emotions_that_were_given_are_no_score(selected, capsys):
    record = read_selection(selected)
    config = load_config(StudentConfig, selected / record.winner.directory / "config.json")
    given = config.model_copy(update={"model": config.model.model_copy(update={"given_emotions": "fine"})})
    assert scores_of_student(record.test, config) == record.test
    scores = scores_of_student(record.test, given)
    assert scores.keys() >= {"macro_f1", "exact_match", "baselines"}
    assert not [key for key in scores if key.startswith(("emotion_accuracy", "strict_"))]
    record = record.model_copy(update={"test": scores})
    print_selection(selected, record)
    shown = capsys.readouterr().out
    assert "emotion accuracy" not in shown and " rows): macro F1 " in shown and ", EM " in shown
    # Cause utterances have no spans to score.
    print_selection(selected, record.model_copy(update={"metric": "utterance_macro_f1"}))
    shown = capsys.readouterr().out
    assert " rows): utterance macro F1 " in shown and ", EM " not in shown
    card = model_card(selected, record, given)
    assert "| emotion accuracy |" not in card and "| macro F1 |" in card


def test_emotions_that_were_given_are_not_compared(finish, make_labels, runs):
    names = ["predicted", "given fine", "joint"]
    sweep = finish(
        teachers={"llama-tiny": str(make_labels(runs / "other" / "llama-tiny"))},
        variants={
            "predicted": {},
            "given fine": {"model.given_emotions": "fine"},
            "joint": {"distillation.mode": "joint"},
        },
        space={"variant": {"grid": names}, "optimization.seed": {"grid": [0, 1]}},
    )
    record = select_student(sweep)
    tests = {row.variant: row.tests.keys() for row in record.variants}
    assert tests["joint"] == {*COMPARED}, "both predict them"
    assert tests["given fine"] == {*COMPARED} - {"emotion_accuracy"}
    assert "given fine" in record.runner_up.label + record.runner_up.against
    assert record.runner_up.tests.keys() == tests["given fine"]


def test_a_student_that_cannot_be_loaded_leaves_test_unopened(finished, asked, monkeypatch):
    select = Student.from_pretrained

    def damaged_at_last(directory, device):
        if len(asked) == 4:  # validation is compared, test comes next
            raise ArtifactError(f"{directory}: damaged")
        return select(directory, device)

    monkeypatch.setattr(Student, "from_pretrained", damaged_at_last)
    with pytest.raises(ArtifactError, match="damaged"):
        select_student(finished)
    assert not (finished / "selection.json").exists() and "test" not in asked


def test_a_store_that_mlflow_has_retired_leaves_test_unopened(finished, asked):
    path = finished / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tracking": {"uri": "file:///data/mlruns"}}))
    rewrite_manifest(finished)
    with pytest.raises(ConfigError, match="retired"):
        select_student(finished)
    assert asked == [] and not (finished / "selection.json").exists()


def test_a_kill_while_test_is_read_leaves_it_open(finished, monkeypatch):
    def killed(config, path):
        if path == config.test:
            raise KeyboardInterrupt
        return read_split(config, path)

    with monkeypatch.context() as kill:
        kill.setattr("kdecs.sweep.selection.choose.read_split", killed)
        with pytest.raises(KeyboardInterrupt):
            select_student(finished)
    left = SelectionRecord.model_validate_json((finished / "selection.json").read_bytes())
    assert left.test is None and left.test_opened_at
    assert select_student(finished).test_opened_at == left.test_opened_at


def test_a_record_is_read_and_written_byte_for_byte(selected):
    score_settings(selected)
    text = (selected / "selection.json").read_text()
    record = SelectionRecord.model_validate_json(text)
    assert json.dumps(record.as_json(), indent=2, sort_keys=True) + "\n" == text
    assert list(json.loads(text)) == sorted(SelectionRecord.model_fields)


def test_a_record_of_an_earlier_version_gets_its_comparisons(selected):
    record = read_selection(selected)
    earlier = {key: value for key, value in record.as_json().items() if key not in ("runner_up", "variants")}
    (selected / "selection.json").write_text(json.dumps({**earlier, "registered": None}))
    assert select_student(selected) == record


@pytest.mark.parametrize("text", ["{", "[]", '{"test": null}'])
def test_a_damaged_record_is_refused_in_one_line(finished, text):
    (finished / "selection.json").write_text(text)
    with pytest.raises(ArtifactError, match="the test split may have been opened") as caught:
        select_student(finished)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("test_opened_at", None),
        ("metric", "unknown"),
        ("test", {"macro_f1": "sixty"}),
        ("test_baselines", {}),
        ("runner_up", {"label": "a", "against": "b", "tests": {}}),
    ],
)
def test_a_record_that_says_half_is_refused_in_one_line(selected, key, value):
    path = selected / "selection.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ArtifactError, match="the test split may have been opened") as caught:
        read_selection(selected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metrics", {}),
        ("metrics", {"macro_f1": float("nan")}),
        ("seconds", float("inf")),
        ("settings", {"distillation.alpha": "high"}),
        ("settings", {"distillation.temperature": [1]}),
    ],
)
def test_results_that_cannot_be_ranked_or_drawn_are_refused(finished, monkeypatch, key, value):
    monkeypatch.setattr(status, "read_verified_manifest", lambda *arguments: None)  # whoever forges adapts it
    path = finished / "trials.json"
    first, *others = json.loads(path.read_text())
    path.write_text(json.dumps([{**first, key: value}, *others]))
    with pytest.raises(ArtifactError, match=r"trials.json: .*run the sweep again$") as caught:
        read_results(finished)
    assert "\n" not in str(caught.value)


def test_test_opened_for_another_state_is_refused(selected):
    path = selected / "selection.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "sweep": "0" * 64}))
    with pytest.raises(ArtifactError, match="the test split was opened on"):
        select_student(selected)


def test_unfinished_sweep_is_refused(finished):
    (finished / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        select_student(finished)


def test_a_changed_byte_of_a_sweep_is_refused(finished):
    """By whatever reads it: the results, a report's curves, a selection's settings and its winner."""
    winner = trial_directory(finished, max(read_results(finished), key=lambda result: result.score))
    files = [finished / name for name in ("trials.json", "baselines.json", "config.json")]
    files += [winner / "manifest.json", winner / "metrics.jsonl", winner / "config.json"]
    for path in files:
        before = flip_bit(path)
        readers = [write_report] if path.name == "metrics.jsonl" else [select_student]
        readers += [write_report] if path.parent == finished else []
        for read in readers:
            with pytest.raises(ArtifactError, match=r"sha256 .* damaged; ") as caught:
                read(finished)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        path.write_bytes(before)
    assert not (finished / "selection.json").exists() and not [*(finished / "report").glob("*")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "../../elsewhere"}, "is no trial's id"),
        ({"metrics": {"macro_f1": "high"}}, r"0\.metrics\.macro_f1"),
        ({"seed": None}, r"0\.seed"),
        ({"settings": []}, r"0\.settings"),
    ],
)
def test_forged_results_are_refused_in_one_line(finished, change, message):
    path = finished / "trials.json"
    first, *others = json.loads(path.read_text())
    path.write_text(json.dumps([first | change, *others]))
    rewrite_manifest(finished)
    with pytest.raises(ArtifactError, match=message) as caught:
        select_student(finished)
    assert "\n" not in str(caught.value)


def test_a_winner_of_no_trial_is_refused(selected):
    record = read_selection(selected).as_json()
    record["winner"]["id"] = "../../elsewhere"
    (selected / "selection.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"winner .* is no trial of this sweep"):
        select_student(selected)


def test_a_table_scores_the_chosen_seed_of_each_setting_once(finished, asked, monkeypatch, capsys):
    with pytest.raises(ArtifactError, match=r"no student is selected yet.*without --table first$"):
        score_settings(finished)
    assert asked == [] and not (finished / "selection.json").exists()
    chosen = select_student(finished)
    asked.clear()

    def killed(config, path):
        if asked:  # the second setting after the winner's
            raise KeyboardInterrupt
        return read_split(config, path)

    with monkeypatch.context() as kill:
        kill.setattr("kdecs.sweep.selection.choose.read_split", killed)
        with pytest.raises(KeyboardInterrupt):
            score_settings(finished)
    left = SelectionRecord.model_validate_json((finished / "selection.json").read_bytes())
    assert [row.scores is not None for row in left.table] == [True, True, False]
    assert left.table[2].opened_at, "the kill does not hide that test was opened"
    record = score_settings(finished)
    assert asked == ["test"] * 3, "three settings beside the winner's, each once"
    assert [row.label for row in record.table] == [setting.label for setting in record.settings]
    assert all(row.above_rule["positive_f1"].difference == 0 for row in record.table)
    assert {row.seed for row in record.table} == {1}, "the best seed on validation"
    assert record.table[0].scores == record.test and record.table[2].opened_at == left.table[2].opened_at
    assert record.model_copy(update={"table": []}) == chosen.model_copy(update={"table": []})
    scored = sorted(path.stem for path in (finished / "test-predictions").iterdir())
    assert scored == sorted(row.id for row in record.table[1:])
    assert score_settings(finished) == record and select_student(finished) == record
    assert asked == ["test"] * 3
    print_settings_on_test(record)
    out = capsys.readouterr().out
    assert "t5-tiny α0.3 τ2" in out and "rule: j >= i-1" in out and "Emo Acc" in out
    change_json(finished / "selection.json", sweep="0" * 64)
    with pytest.raises(ArtifactError, match="in another state of this sweep"):
        score_settings(finished)


PICKED = "t5-tiny α0.3 τ2"


@pytest.fixture
def tracked(finish, uri):
    """A finished sweep of two settings with two seeds, its MLflow, and the id of each run by what it is."""
    from mlflow import MlflowClient

    space = {"distillation.alpha": {"grid": [0.3, 0.6]}, "teacher": {"grid": ["t5-tiny"]}}
    sweep = finish(space={**space, "optimization.seed": {"grid": [0, 1]}})
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("kdecs").experiment_id
    found = {}
    for run in client.search_runs([experiment]):
        tags = run.data.tags
        found["sweep" if tags["kdecs.kind"] == "sweep" else tags["mlflow.runName"]] = run.info.run_id
    return sweep, client, found


def test_a_pick_leads_to_one_student_or_is_refused_in_one_line(
    tracked, finished, asked, uri, tmp_path, monkeypatch, capsys
):
    """First what leads nowhere, then each way to one student, which is scored on test once."""
    sweep, client, found = tracked
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(TrackingError, match=r"runs/mlflow\.db: no such database"):
        pick_from_mlflow(PICKED, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    plain = client.create_run("0").info.run_id
    cases = [
        ("0" * 32, None, "has no such run"),
        ("α9", None, "no sweep has such a setting in MLflow at"),
        ("α9", sweep, "this sweep compares no such setting; it has t5-tiny α0.6 τ2;"),
        (found["sweep"], None, "this is the run of a sweep; expected"),
        (plain, sweep, "this is no run of a sweep"),
        (found[PICKED], finished, "belongs to another sweep"),
    ]
    for name, place, message in cases:
        with pytest.raises(ArtifactError, match=message) as caught:
            select_student(*pick_from_mlflow(name, place))
        assert "\n" not in str(caught.value)
    client.set_tag(found["sweep"], "kdecs.directory", str(tmp_path / "gone"))
    with pytest.raises(
        ArtifactError, match=r"its sweep is at .*gone, which is not on this machine; give --sweep"
    ):
        pick_from_mlflow(PICKED, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'absent.db'}")
    with pytest.raises(TrackingError, match=r"absent\.db: no such database"):
        pick_from_mlflow(PICKED, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError, match="does not answer") as caught:
        pick_from_mlflow(PICKED, None)
    assert "\n" not in str(caught.value) and not (sweep / "selection.json").exists()

    client.set_tag(found["sweep"], "kdecs.directory", str(sweep))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    best, results = f"{PICKED} s1", read_results(sweep)
    names = [PICKED, found[PICKED], found[best]]
    for name in names:
        pick = pick_from_mlflow(name, sweep)[1]
        assert picked_student(results, rank_settings(results), pick).label == best
    assert [pick_from_mlflow(name, None)[0] for name in names] == 3 * [sweep]
    record = select_student(*pick_from_mlflow(found[best], None))
    assert record.winner.label == best and record.picked == f"run {found[best]}"
    assert [setting.label for setting in record.settings].index(record.setting.label) == 1
    assert (record.runner_up.against, record.runner_up.label) == (PICKED, "t5-tiny α0.6 τ2")
    print_selection(sweep, record)
    assert f"{best} was picked by a person: run {found[best]}" in capsys.readouterr().out
    card = (sweep / "model-card.md").read_text()
    assert "A person picked it among the students of 2 settings. Its setting is number 2" in card
    assert "| teacher | t5-tiny |" in card
    assert "Picked by a person" in write_report(sweep).read_text()
    number = len(asked)
    assert asked.count("test") == 1
    table = score_settings(sweep)
    assert [(row.label, row.seed) for row in table.table] == [("t5-tiny α0.6 τ2", 1), (PICKED, 1)]
    runs = {found[f"{row.label} s1"]: row for row in table.table}
    tagged = {name: client.get_run(name).data for name in runs if runs[name].label != PICKED}
    for name, data in tagged.items():
        assert data.metrics["test_macro_f1"] == pytest.approx(runs[name].scores["macro_f1"])
        assert data.tags["kdecs.test_opened_at"] == runs[name].opened_at
        assert data.tags["kdecs.test_opened_for"] == "a table"
    record, number = table, len(asked)
    assert asked.count("test") == 2
    assert select_student(sweep) == select_student(sweep, Pick("again", setting=PICKED)) == record
    with pytest.raises(
        ArtifactError, match=f"was opened on .* for {best}, so t5-tiny α0.6 τ2 s1 cannot"
    ) as caught:
        select_student(sweep, Pick("other", setting="t5-tiny α0.6 τ2"))
    assert "\n" not in str(caught.value) and len(asked) == number


def test_what_was_not_compared_cannot_be_picked(finished):
    results = read_results(finished)
    changes = [{"status": "dropped"}, {"status": "complete", "stage": "search"}]
    for change, words in zip(changes, ("is dropped", "part of the search alone"), strict=True):
        changed = [dataclasses.replace(results[0], **change), *results[1:]]
        with pytest.raises(ArtifactError, match=words):
            picked_student(changed, rank_settings(changed), Pick("run a", trial=results[0].id))
    with pytest.raises(ArtifactError, match="no trial of this sweep"):
        picked_student(results, rank_settings(results), Pick("run a", trial="gone"))


def test_a_registered_student_names_where_it_comes_from(finished, monkeypatch):
    told = {}
    monkeypatch.setattr(
        "kdecs.sweep.selection.choose.register_student", lambda *a, **k: told.update(k) or "version 1"
    )
    winner = trial_directory(finished, max(read_results(finished), key=lambda result: result.score))
    parts = [
        {"inputs": {"teacher": letter * 64}, "soft_labels_hash": letter * 8, "details": {}, "weight": 0.5}
        for letter in "ab"
    ]
    change_json(winner / "manifest.json", details={"teacher": {**parts[0], "teachers": parts}})
    rewrite_manifest(finished)
    select_student(finished)
    lineage = told["lineage"]
    assert lineage["kdecs.teacher_sha256"] == f"{'a' * 64} {'b' * 64}"
    assert lineage["kdecs.soft_labels_hash"] == "aaaaaaaa bbbbbbbb"
    assert lineage["kdecs.trial"] == winner.name and lineage["kdecs.sweep_name"] == "small"
    assert lineage["kdecs.student_sha256"] == content_checksum(winner)
    assert json.loads(lineage["kdecs.setting"])["teacher"] == lineage["kdecs.teacher"] == "llama-tiny"
