from pathlib import Path

import pytest

from kdecs.config import load_config
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import ArtifactError, ConfigError
from kdecs.sweep.config import SweepConfig
from kdecs.sweep.plan import print_plan
from kdecs.sweep.space import enumerate_trials, sweep_hash, with_absolute_paths

SPACES = sorted((Path(__file__).parents[2] / "tune" / "spaces").glob("*.yaml"))


def test_grid_is_named_and_identified(make_config):
    config = make_config()
    trials = enumerate_trials(config)
    assert [trial.label for trial in trials] == [
        f"{teacher} α{alpha} τ2 s{seed}"
        for teacher in ("llama-tiny", "t5-tiny")
        for alpha in (0.3, 0.6)
        for seed in (0, 1)
    ]
    assert len({trial.id for trial in trials}) == 8
    first = trials[0]
    assert first.id == first.config_hash[:12] and first.directory == config.output / "trials" / first.id
    assert first.config.name == "llama-tiny-a0.3-t2-s0"
    assert first.config.distillation.labels == config.teachers["llama-tiny"]
    assert first.config.cache == config.output / "cache" and first.config.threads == 1
    assert first.settings == {"teacher": "llama-tiny", "distillation.alpha": 0.3}


def test_same_settings_are_the_same_trial_in_another_sweep(make_config, tmp_path):
    some = enumerate_trials(make_config())
    other = enumerate_trials(
        make_config(
            name="other",
            output=str(tmp_path / "elsewhere"),
            cpus_per_trial=2,
            space={"optimization.seed": {"grid": [1, 0]}, "teacher": {"grid": ["t5-tiny"]}},
        )
    )
    assert {trial.id for trial in other} == {
        t.id for t in some if t.teacher == "t5-tiny" and "α0.6" in t.label
    }
    assert sweep_hash(some) == sweep_hash(list(reversed(some))) != sweep_hash(other)


def test_equal_settings_are_tried_once(make_config):
    space = {
        "teacher": {"grid": ["llama-tiny", "t5-tiny"]},
        "distillation.mode": {"grid": ["kd", "joint"]},
        "distillation.temperature": {"grid": [1.0, 2.0]},
        "optimization.seed": {"grid": [0]},
    }
    labels = [trial.label for trial in enumerate_trials(make_config(space=space))]
    assert labels == [
        "llama-tiny α0.6 τ1 s0",
        "llama-tiny α0.6 τ2 s0",
        "joint α0.6 s0",
        "t5-tiny α0.6 τ1 s0",
        "t5-tiny α0.6 τ2 s0",
    ]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"teacher": {"grid": ["gpt"]}}, "found 'gpt', expected a key of teachers"),
        ({"distillation.alpha": {"grid": [0.5]}}, "space has no key teacher"),
        (
            {"teacher": {"grid": ["t5-tiny"]}, "distillation.beta": {"grid": [1]}},
            "distillation.beta: unknown key",
        ),
        ({"teacher": {"grid": ["t5-tiny"]}, "distillation.alpha": {"grid": [2]}}, "distillation.alpha"),
    ],
)
def test_wrong_space_is_refused_in_one_line(make_config, space, message):
    with pytest.raises(ConfigError, match=message) as caught:
        enumerate_trials(make_config(space=space))
    assert "\n" not in str(caught.value)


def test_written_config_has_absolute_paths(make_config, monkeypatch, tmp_path):
    config = make_config()
    folder = bundled_sample("train").parent
    monkeypatch.chdir(folder)
    relative = {**config.student, "corpus": {"train": "train.json", "valid": "valid.json"}}
    config = config.model_copy(update={"student": relative})
    resolved = with_absolute_paths(config, enumerate_trials(config)).student
    assert resolved["corpus"] == {"train": str(folder / "train.json"), "valid": str(folder / "valid.json")}
    assert resolved["model"] == {"base": "roberta-tiny"} and resolved["optimization"] == {"epochs": 3}


def test_unfinished_labels_are_refused(make_config):
    config = make_config()
    (config.teachers["t5-tiny"] / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"t5-tiny: no manifest\.json"):
        enumerate_trials(config)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_spaces_parse_and_hold_only_known_keys(path, make_config):
    config = load_config(SweepConfig, path)
    labels = next(iter(make_config().teachers.values()))
    sample = make_config().student["corpus"]
    student = {
        **config.student,
        "corpus": sample,
        "model": {**config.student["model"], "base": "roberta-base"},
    }
    update = {"student": student, "teachers": dict.fromkeys(config.teachers, labels)}
    trials = enumerate_trials(config.model_copy(update=update))
    expected = {"demo": 4, "main": 60, "teacher_scale": 5}  # made-up labels are equal: teachers fall together
    assert len(trials) == expected[path.stem]


def test_dotted_keys_can_be_set():
    overrides = ["space.optimization.seed.grid=[7]", "space.batches.global_batch_pairs.grid=[8, 16]"]
    space = load_config(SweepConfig, SPACES[0], overrides).space
    assert space["optimization.seed"].grid == (7,)
    assert space["batches.global_batch_pairs"].grid == (8, 16)
    assert "optimization" not in space


def test_plan_says_what_is_there(make_config, capsys):
    print_plan(make_config())
    assert "8 trials, 0 complete, 8 to train" in capsys.readouterr().out
