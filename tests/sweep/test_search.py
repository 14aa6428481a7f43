"""What a search has found is that of its settings: others are refused in one line, further seeds are not."""

import json

import pytest

from kdecs.artifact import write_json
from kdecs.errors import ArtifactError
from kdecs.sweep.progress import print_dry_run
from kdecs.sweep.search import Search, TpeSuggester, read_suggestions, write_suggestions
from kdecs.sweep.status import TrialNote

SPACE = {
    "distillation.alpha": {"uniform": [0.1, 0.9]},
    "distillation.temperature": {"choice": [1.0, 2.0]},
    "teacher": {"grid": ["t5-tiny"]},
    "optimization.seed": {"grid": [0, 1]},
}
TPE = {"method": "tpe", "num_trials": 4, "survivors": 1}


@pytest.fixture
def searched(make_config):
    """The config of a search whose first stage is over."""
    config = make_config(space=SPACE, search=TPE)
    config.output.mkdir(parents=True)
    point = {"distillation.alpha": 0.5, "distillation.temperature": 2.0, "teacher": "t5-tiny"}
    search = Search(config)
    write_suggestions(config.output, [{**point, "optimization.seed": 0}], search.points_digest)
    state = {"survivors": [point], "search_of": search.search_digest}
    write_json(config.output / "search.json", state)
    return config


def test_the_same_search_and_further_seeds_go_on(searched, make_config):
    Search(searched).refuse_other_search()
    wider = make_config(space={**SPACE, "optimization.seed": {"grid": [0, 1, 2]}}, search=TPE)
    Search(wider).refuse_other_search()
    assert len(Search(wider).stage().trials) == 3
    assert Search(wider).digest() != Search(searched).digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"space": {**SPACE, "distillation.alpha": {"uniform": [0.1, 0.8]}}},
        {"space": {key: SPACE[key] for key in SPACE if key != "distillation.temperature"}},
        {"space": {**SPACE, "distillation.temperature": {"choice": [4.0]}}},
        {"constraints": ["distillation.alpha < 0.4"]},
        {"search": {**TPE, "survivors": 2}},
        "student",
    ],
)
def test_a_search_over_other_settings_is_refused_in_one_line(searched, make_config, changes):
    if changes == "student":
        changes = {"student": {**searched.student, "optimization": {"epochs": 5}}}
    other = make_config(**{"space": SPACE, "search": TPE, **changes})
    with pytest.raises(ArtifactError, match="a search over other settings") as caught:
        Search(other).refuse_other_search()
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="a search over other settings"):
        print_dry_run(other)


def test_more_suggestions_may_be_asked_for(searched, make_config):
    (searched.output / "search.json").unlink()
    longer = make_config(space=SPACE, search={**TPE, "num_trials": 9})
    Search(longer).refuse_other_search()
    assert Search(longer).stage().num_suggestions == 9 and len(Search(longer).stage().trials) == 1


def test_a_changed_student_is_seen_where_a_constraint_refuses_the_lowest_point(make_config):
    def digest(epochs, constraint):
        student = {**make_config().student, "optimization": {"epochs": epochs}}
        config = make_config(space=SPACE, search=TPE, student=student, constraints=[constraint])
        return Search(config).points_digest

    for constraint in ("distillation.alpha > 0.1", "0.3 < distillation.alpha < 0.4"):
        assert digest(3, constraint) != digest(4, constraint)
        assert digest(3, constraint) == digest(3, constraint)


def test_the_example_is_admissible_where_one_is(make_config):
    config = make_config(space=SPACE, search=TPE, constraints=["distillation.temperature * 2 == 4"])
    assert Search(config).example.config.distillation.temperature == 2.0


def test_damaged_suggestions_are_refused_in_one_line(searched):
    path = searched.output / "suggestions.jsonl"
    path.write_text(json.dumps({"points": {}}) + "\n")
    with pytest.raises(ArtifactError, match="not a search's suggestions"):
        read_suggestions(searched.output)


def test_a_killed_search_goes_on_with_what_it_knew(make_config):
    """Values of trials that ended are replayed, a trial that did not end comes first, none is suggested twice."""
    pytest.importorskip("optuna")
    config = make_config(space=SPACE, search=TPE)
    search = Search(config)
    first = TpeSuggester(search, "macro_f1")
    ended, killed = first.suggest("a"), first.suggest("b")
    point = {"epoch": 1, "time": 1.0, "macro_f1": 61.0}
    (ended.directory / "metrics.jsonl").write_text(json.dumps(point) + "\n")
    TrialNote(status="complete", finished=1.0).write(ended.directory)
    written = read_suggestions(config.output)
    again = TpeSuggester(Search(config), "macro_f1")
    assert again.suggest("c").id == killed.id
    others = [again.suggest(key) for key in "de"]
    assert len({trial.id for trial in (ended, killed, *others)}) == 4
    assert again.suggest("f") is None, "four trials were asked for"
    assert read_suggestions(config.output)[:2] == written
    values = {trial.value for trial in again._study.get_trials(deepcopy=False)}
    assert 61.0 in values
