from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_trainer import train

from kdecs.baselines.config import BaselineConfig, MrcConfig
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.config import BudgetedOptimization, Optimization, has_key, load_config, write_config
from kdecs.corpus.reading import bundled_sample
from kdecs.errors import ArtifactError, ConfigError
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import (
    Dimension,
    GridSearch,
    SweepConfig,
    TeacherSource,
    load_trial_config,
    num_epochs,
)
from kdecs.sweep.driver import run_sweep
from kdecs.sweep.progress import estimate_left, print_dry_run
from kdecs.sweep.search import Search
from kdecs.sweep.space import Space, drawn_value, holds, sweep_hash, with_absolute_paths

SPACES = sorted((Path(__file__).parents[2] / "tune" / "spaces").glob("*.yaml"))


def test_grid_is_named_and_identified(make_config):
    config = make_config()
    trials = Space(config).trials()
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
    assert first.config.distillation.labels == config.teachers["llama-tiny"].labels
    assert first.config.cache == config.output / "cache" and first.config.threads == 1
    assert first.settings == {"teacher": "llama-tiny", "distillation.alpha": 0.3}


def test_same_settings_are_the_same_trial_in_another_sweep(make_config, tmp_path):
    some = Space(make_config()).trials()
    other = Space(
        make_config(
            name="other",
            output=str(tmp_path / "elsewhere"),
            cpus_per_trial=2,
            space={"optimization.seed": {"grid": [1, 0]}, "teacher": {"grid": ["t5-tiny"]}},
        )
    ).trials()
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
    labels = [trial.label for trial in Space(make_config(space=space)).trials()]
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
        Space(make_config(space=space)).trials()
    assert "\n" not in str(caught.value)


def test_written_config_has_absolute_paths(make_config, monkeypatch, tmp_path):
    config = make_config()
    folder = bundled_sample("train").parent
    monkeypatch.chdir(folder)
    relative = {**config.student, "corpus": {"train": "train.json", "valid": "valid.json"}}
    config = config.model_copy(update={"student": relative})
    resolved = with_absolute_paths(config, Space(config).trials()).student
    assert resolved["corpus"] == {"train": str(folder / "train.json"), "valid": str(folder / "valid.json")}
    assert resolved["model"] == {"base": "roberta-tiny"} and resolved["optimization"] == {"epochs": 3}


def test_unfinished_labels_are_refused(make_config):
    config = make_config()
    (config.teachers["t5-tiny"].labels / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"t5-tiny: has no manifest\.json"):
        Space(config).trials()


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_spaces_parse_and_hold_only_known_keys(path, make_config, make_labels, runs):
    config = load_config(SweepConfig, path)
    sample = make_config().student["corpus"]
    student = {
        **config.student,
        "corpus": sample,
        "model": {**config.student["model"], "base": "roberta-base"},
    }
    teachers = {name: TeacherSource(labels=make_labels(runs / "space" / name)) for name in config.teachers}
    trials = Search(config.model_copy(update={"student": student, "teachers": teachers})).stage().trials
    expected = {
        "demo": 8,
        "main": 4 * 3 * 5,
        "ecpe": 5,
        "coarse_to_fine": 2 * 5,
        "ablation": 4 * 5,
        "data_share": ((6 + 5 + 6) + (5 + 5)) * 5,
        "data_share_minilm": ((3 + 2 + 3) + (2 + 2)) * 3,
        "teacher_scale": 5 * 5,
        "given_emotions": 4 * 5,
        "search": 3 * 4 * 3 * 2,
        "minilm": 4 * 3,
        "low_gold": (5 + 2) * 3,
        "table4": 4 * 5,
        "table4_minilm": 5 * 3,
        "table4_ecpe": 5 * 5,
    }
    assert len(trials) == expected[path.stem]
    assert len({trial.label for trial in trials}) == len(trials), "labels tell trials apart"


def test_studies_set_what_they_compare(make_config):
    def trials_of(name):
        config = load_config(SweepConfig, SPACES[0].parent / f"{name}.yaml")
        student = {**config.student, "corpus": make_config().student["corpus"]}
        return Space(config.model_copy(update={"student": student}), planned=True).trials()

    modes = {t.settings["variant"]: t.config.distillation.mode for t in trials_of("ablation")}
    assert modes == {
        "KD-ECS": "kd",
        "w/o KD": "joint",
        "w/o connectives": "cls",
        "w/o mask_cau": "span_only",
    }
    given = {
        t.settings["variant"]: t.config.model.given_emotions
        for t in trials_of("given_emotions")
        if t.config.kind == "student"
    }
    assert given == {"predicted": "none", "given fine": "fine", "given coarse": "coarse"}
    trials = trials_of("data_share")
    shares = {(t.settings["variant"], t.config.distillation.hard_share) for t in trials}
    budgets = {tuple(t.config.optimization.budget.items()) for t in trials}
    assert budgets == {(("epochs", 10),), (("steps", 19580),)}
    assert {"steps=19580" in t.label for t in trials} == {True, False} and "None" not in trials[0].label
    assert ("KD", 1.0) in shares and ("KD on the share", 1.0) not in shares
    assert all((variant, 0.1) in shares for variant in ("KD", "KD on the share", "joint"))


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_spaces_name_configs_that_are_there(path):
    for teacher in load_config(SweepConfig, path).teachers.values():
        for command in (teacher.train, teacher.export):
            assert command is None or command.config.is_file()


def test_draws_are_shared_by_seeds_and_stay_the_same(make_config):
    space = {
        "optimization.learning_rate": {"loguniform": [1e-6, 1e-3]},
        "distillation.alpha": {"uniform": [0.2, 0.8]},
        "distillation.temperature": {"choice": [1.0, 4.0]},
        "optimization.seed": {"grid": [0, 1]},
        "teacher": {"grid": ["t5-tiny"]},
    }
    config = make_config(space=space, search={"method": "grid", "num_samples": 5})
    trials = Space(config).trials()
    assert len(trials) == 10
    by_seed = [[t.settings for t in trials if t.seed == seed] for seed in (0, 1)]
    assert by_seed[0] == by_seed[1]
    for trial in trials:
        assert 1e-6 <= trial.config.optimization.learning_rate <= 1e-3
        assert 0.2 <= trial.config.distillation.alpha <= 0.8
        assert trial.config.distillation.temperature in (1.0, 4.0)
    assert [t.id for t in Space(config).trials()] == [t.id for t in trials]
    other = config.model_copy(update={"search": GridSearch(num_samples=5, sample_seed=1)})
    assert {t.id for t in Space(other).trials()}.isdisjoint(t.id for t in trials)


def test_log_uniform_draws_are_uniform_in_the_logarithm():
    generator = np.random.default_rng(0)
    dimension = Dimension(loguniform=(1e-6, 1e-2))
    logs = np.log10([drawn_value(dimension, generator) for _ in range(2000)])
    assert np.histogram(logs, bins=4, range=(-6, -2))[0] == pytest.approx([500] * 4, rel=0.15)


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (
            {"grid": [1], "choice": [2]},
            "exactly one of grid, choice, uniform, loguniform, found grid, choice",
        ),
        ({"uniform": [2, 1]}, "expected low < high"),
        ({"loguniform": [0, 1]}, "expected two above 0"),
        ({}, "space.distillation.alpha"),
    ],
)
def test_wrong_dimensions_are_refused(make_config, dimension, message):
    with pytest.raises(ConfigError, match=message):
        make_config(space={"distillation.alpha": dimension, "teacher": {"grid": ["t5-tiny"]}})


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ("distillation.alpha < 0.5", 4),
        ("teacher == 'llama-tiny' and not distillation.alpha == 0.6", 2),
        ("teacher in ['t5-tiny'] or distillation.alpha * 2 - 1 > 0", 6),
        ("0.1 < distillation.alpha <= 0.3", 4),
        ("distillation.nothing == -1 or optimization.seed != 0", 4),
        ("teacher is not None and distillation.nothing is None", 8),
        ("teacher is 't5-tiny'", 4),
        ("optimization.learning_rate < 1 and batches.global_batch_pairs == 16", 8),
    ],
)
def test_constraints_leave_what_they_say(make_config, constraint, expected):
    assert len(Space(make_config(constraints=[constraint])).trials()) == expected


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("distillation.alpha <", "is not an expression"),
        ("__import__('os').system('true')", "is not supported here"),
        ("teacher < 3", "not supported"),
        ("distillation.alpha > 1", "leave no trial"),
        ("distillation.alfa > 1", r"distillation\.alfa: None for this trial"),
        ("distillation.alpha / 0 > 1", "division by zero"),
        ("", "is not an expression"),
    ],
)
def test_wrong_constraints_are_refused_in_one_line(make_config, constraint, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Space(make_config(constraints=[constraint])).trials()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimization", [None, {}, {"epochs": 3}])
def test_a_seed_of_the_space_keeps_the_students_own_defaults(make_config, optimization):
    config = make_config(space={"teacher": {"grid": ["t5-tiny"]}, "optimization.seed": {"grid": [5]}})
    student = {key: value for key, value in config.student.items() if key != "optimization"}
    if optimization is not None:
        student["optimization"] = optimization
    [trial] = Space(config.model_copy(update={"student": student})).trials()
    default = StudentConfig.model_fields["optimization"].default
    assert trial.config.optimization == default.model_copy(update={**(optimization or {}), "seed": 5})


def test_a_group_of_a_variant_or_a_grid_keeps_the_rest_of_the_group(make_config):
    variants = {"nested": {"optimization": {"seed": 7}, "model": {"span_head": "pointer"}}}
    space = {
        "variant": {"grid": ["nested"]},
        "teacher": {"grid": ["t5-tiny"]},
        "optimization.seed": {"grid": [0, 1]},
        "distillation": {"grid": [{"temperature": 4.0}]},
    }
    student = {**make_config().student, "distillation": {"alpha": 0.2}, "optimization": {"epochs": 9}}
    [trial] = Space(make_config(variants=variants, space=space, student=student)).trials()
    assert (trial.config.optimization.epochs, trial.config.optimization.seed) == (9, 7)
    assert (trial.config.distillation.alpha, trial.config.distillation.temperature) == (0.2, 4.0)
    assert trial.config.model.base == "roberta-tiny" and trial.config.model.span_head == "pointer"


def test_a_space_of_too_many_points_is_refused(make_config):
    grids = {f"optimization.{key}": {"grid": list(range(1, 101))} for key in ("seed", "epochs")}
    config = make_config(
        space={"teacher": {"grid": ["t5-tiny"]}, **grids, "patience_epochs": {"grid": [*range(99)]}}
    )
    with pytest.raises(ConfigError, match=r"990,000 points, expected at most 100,000; shorten a grid"):
        Space(config).trials()


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("(" * 400 + "1" + ")" * 400, "is not an expression|nested too deeply"),
        ("not " * 20_000 + "1", "nested too deeply"),
        ("1" + " + 1" * 20_000, "nested too deeply"),
        ("teacher * 9999999999 == 'a'", "arithmetic needs numbers"),
        ("[1] * 9999999999 == 1", "arithmetic needs numbers"),
    ],
    ids=lambda text: text[:12],
)
def test_a_constraint_cannot_fill_the_memory_or_the_stack(constraint, message):
    with pytest.raises(ConfigError, match=message):
        holds(constraint, {"teacher": "t5"})


def test_a_long_constraint_is_refused_with_its_beginning_alone(make_config):
    with pytest.raises(
        ConfigError, match=r"constraints\.0: found '1 < 2 .{0,200}…: String should have at most 1000"
    ):
        make_config(constraints=["1 < 2 and " * 200 + "1"])


def test_constraints_see_defaults_and_missing_teachers(make_config):
    space = {
        "teacher": {"grid": ["t5-tiny"]},
        "distillation.mode": {"grid": ["kd", "joint"]},
        "optimization.seed": {"grid": [0]},
    }

    def modes(constraint):
        trials = Space(make_config(space=space, constraints=[constraint])).trials()
        return [trial.config.distillation.mode for trial in trials]

    assert modes("distillation.alpha < 0.9") == ["kd", "joint"], "alpha is left at its default"
    assert modes("teacher is None") == modes("distillation.temperature is None") == ["joint"]
    assert modes("teacher is not None") == ["kd"]


def test_what_a_constraint_keeps_out_need_not_be_valid(make_config):
    space = {
        "distillation.mode": {"grid": ["joint", "span_only"]},
        "task": {"grid": ["ecspe", "ecpe"]},
    }
    keep_out = "task != 'ecpe' or distillation.mode != 'span_only'"
    trials = Space(make_config(teachers={}, space=space, constraints=[keep_out])).trials()
    assert len(trials) == 3
    with pytest.raises(ConfigError, match="task ecpe has no span loss"):
        Space(make_config(teachers={}, space=space)).trials()


def test_trials_do_not_track_themselves(make_config):
    config = make_config()
    student = {**config.student, "tracking": {"experiment": "mine"}}
    with pytest.raises(
        ConfigError, match=r"student.tracking of sweep small: .* set the sweep's own tracking"
    ):
        Space(make_config(student=student)).trials()


def test_labels_tell_variants_and_modes_apart(make_config):
    config = make_config(
        variants={"short": {"optimization.epochs": 2}, "long": {"optimization.epochs": 4}},
        space={
            "variant": {"grid": ["short", "long"]},
            "teacher": {"grid": ["t5-tiny"]},
            "distillation.mode": {"grid": ["kd", "joint", "cls"]},
            "optimization.seed": {"grid": [0, 1]},
        },
    )
    labels = [trial.label for trial in Space(config).trials()]
    assert len(set(labels)) == len(labels) == 12
    assert "short joint α0.6 s0" in labels and "short t5-tiny α0.6 τ2 s0" in labels


def test_labels_that_would_be_equal_get_digits_shared_by_seeds(make_config):
    config = make_config(
        space={
            "teacher": {"grid": ["t5-tiny"]},
            "distillation.alpha": {"grid": [0.3000001, 0.3000002, 0.5]},
            "optimization.seed": {"grid": [0, 1]},
        }
    )
    trials = Space(config).trials()
    assert len({trial.label for trial in trials}) == len({trial.config.name for trial in trials}) == 6
    assert len({trial.setting_label for trial in trials}) == 3
    assert trials[4].label == "t5-tiny α0.5 τ2 s0", "the others keep their names"


def test_teachers_that_are_not_tried_are_not_looked_at(make_config, runs):
    config = make_config(space={"teacher": {"grid": ["t5-tiny"]}})
    more = {**config.teachers, "absent": TeacherSource(labels=runs / "absent")}
    for search in ({"method": "grid"}, {"method": "two-stage"}):
        with_absent = make_config(space={"teacher": {"grid": ["t5-tiny"]}}, search=search)
        assert (
            Search(with_absent).digest() == Search(with_absent.model_copy(update={"teachers": more})).digest()
        )


def test_several_teachers_are_mixed(make_config):
    space = {"teacher": {"grid": ["llama-tiny+t5-tiny", "t5-tiny"]}}
    mixed, single = Space(make_config(space=space)).trials()
    config = make_config()
    assert [teacher.labels for teacher in mixed.config.distillation.used_teachers] == [
        config.teachers[name].labels for name in ("llama-tiny", "t5-tiny")
    ]
    assert mixed.label == "llama-tiny+t5-tiny α0.6 τ2 s0" and single.config.distillation.teachers == ()


def test_dotted_keys_can_be_set():
    overrides = ["space.optimization.seed.grid=[7]", "space.batches.global_batch_pairs.grid=[8, 16]"]
    space = load_config(SweepConfig, SPACES[0], overrides).space
    assert space["optimization.seed"].grid == (7,)
    assert space["batches.global_batch_pairs"].grid == (8, 16)
    assert "optimization" not in space


def test_plan_says_what_is_there(make_config, in_process, capsys):
    config = make_config()
    print_dry_run(config)
    printed = capsys.readouterr().out
    assert "8 trials, 0 complete, 8 to train" in printed and "CPU hours (arithmetic" in printed
    run_sweep(config, trainer=train, runner=in_process)
    wider = make_config(
        name="wider",
        output=str(config.output.parent / "wider"),
        space={"teacher": {"grid": ["llama-tiny"]}, "optimization.seed": {"grid": [0, 1, 2]}},
    )
    capsys.readouterr()
    print_dry_run(wider)
    printed = capsys.readouterr().out
    assert "3 trials, 0 complete, 1 to train, 2 in the store" in printed
    assert "CPU hours (measured: 2 trials" in printed


def test_plan_counts_the_pairs_that_each_training_reads(make_config, capsys):
    """KD passes over all pairs, whatever the share, joint over the share alone. Equal steps cost the same.

    Repeats of gold pairs make an epoch longer, and trees make it shorter.
    """
    variants = {"KD": {}, "KD on the share": {"distillation.outside_share": "drop"}}
    variants["joint"] = {"distillation.mode": "joint"}

    def estimated(variant: str, share: float, **student) -> float:
        space = {"variant": {"grid": [variant]}, "distillation.hard_share": {"grid": [share]}}
        teachers = dict(list(make_config().teachers.items())[:1])
        config = make_config(variants=variants, space=space, teachers=teachers, effective_tflops=1e-6)
        config = config.model_copy(update={"student": {**config.student, **student}})
        trials = Space(config).trials()
        return estimate_left(config, trials, trials).seconds

    whole = estimated("KD", 1.0)
    assert estimated("KD", 0.25) == whole == estimated("joint", 1.0)
    part = estimated("joint", 0.25)
    assert part == estimated("KD on the share", 0.25) and 0.05 * whole < part < 0.6 * whole
    variants["KD, repeated"] = {"distillation.gold_repeats": 3}
    assert estimated("KD, repeated", 1.0) == pytest.approx(3 * whole)
    assert estimated("KD, repeated", 0.25) == pytest.approx(whole + 2 * part)
    trees = make_config().student["model"] | {"layout": "tree"}
    assert 0.3 * whole < estimated("KD", 1.0, model=trees) < 0.8 * whole
    steps = {"optimization": {"steps": 30}}
    assert estimated("KD", 0.25, **steps) == estimated("KD", 1.0, **steps)
    assert estimated("joint", 0.25, **steps) == pytest.approx(estimated("joint", 1.0, **steps), rel=0.4)
    assert estimated("joint", 1.0, optimization={"steps": 60}) == 2 * estimated("joint", 1.0, **steps)


def test_plan_of_a_new_search_estimates_from_one_trial(make_config, capsys):
    space = {"distillation.alpha": {"uniform": [0.1, 0.9]}, "teacher": {"grid": ["t5-tiny"]}}
    search = {"method": "tpe", "num_trials": 400, "survivors": 1}
    config = make_config(space=space, search=search, effective_tflops=1e-6)
    print_dry_run(config)
    printed = capsys.readouterr().out
    assert "400 trials, 0 complete, 400 to train" in printed and "400 of them become known" in printed
    hours = float(printed.partition(" CPU hours")[0].split()[-1])
    print_dry_run(make_config(space={**space, "distillation.alpha": {"grid": [0.1]}}, effective_tflops=1e-6))
    one = float(capsys.readouterr().out.partition(" CPU hours")[0].split()[-1])
    assert hours == pytest.approx(400 * one, rel=0.01) and one > 0


def test_plan_names_missing_teachers_and_how_to_get_them(make_config, make_labels, runs, capsys):
    student = make_config().student
    teachers = {
        "ready": str(make_labels(runs / "ready")),
        "bare": str(runs / "none"),
        "built": {
            "labels": str(runs / "labels-7b"),
            "export": {"config": "launch/configs/export/llama-7b.yaml"},
        },
    }
    space = {"teacher": {"grid": ["ready", "bare", "built"]}}
    config = make_config(teachers=teachers, space=space, student=student)
    print_dry_run(config)
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 trials, 0 complete, 3 to train" in printed and printed.count("no labels") == 2
    assert f"teacher bare: no soft labels at {runs / 'none'}; export them first" in printed
    assert f"--set output={runs / 'labels-7b'}" in printed
    with pytest.raises(ArtifactError, match="soft labels of 2 teachers are missing: bare"):
        run_sweep(config, trainer=train)


BASELINES = {"KEC": {"system": "kec", "optimization.epochs": 4}, "MGSAG": {"system": {"name": "mgsag"}}}


def test_a_baseline_is_a_variant_beside_the_students(make_config):
    config = make_config(
        variants={"KD": {}},
        baselines=BASELINES,
        space={
            "variant": {"grid": ["KD", "KEC", "MGSAG"]},
            "teacher": {"grid": ["llama-tiny", "t5-tiny"]},
            "distillation.alpha": {"grid": [0.3, 0.6]},
            "optimization.seed": {"grid": [0, 1]},
        },
    )
    trials = Space(config).trials()
    labels = [trial.label for trial in trials if trial.settings["variant"] != "KD"]
    assert labels == ["KEC s0", "KEC s1", "MGSAG s0", "MGSAG s1"], (
        "neither teacher nor alpha varies a baseline"
    )
    assert len(trials) == 8 + 4
    kec = next(trial for trial in trials if trial.label == "KEC s1")
    assert kec.config.system.layers == 5 and kec.config.optimization.epochs == 4 and kec.seed == 1
    assert (
        kec.config.optimization.learning_rate
        == BaselineConfig.model_fields["optimization"].default.learning_rate
    )
    assert kec.config.corpus.train == trials[0].config.corpus.train
    assert kec.config.model.base == trials[0].config.model.base
    assert kec.teacher is None and kec.settings == {"teacher": None, "variant": "KEC"}
    assert kec.directory.name == kec.id == kec.config_hash[:12]
    assert make_config(variants={"KD": {}}).model_dump()["baselines"] == {}


def test_every_kind_of_trial_says_what_a_sweep_asks_of_all(make_config):
    config = make_config(
        variants={
            "KD": {"batches.global_batch_pairs": 4},
            "given": {"model.given_emotions": "fine", "candidates.after": 1},
        },
        baselines={
            "ECPE-2D": {"system": "ecpe-2d", "candidates.after": 2, "batches.global_batch_dialogues": 3},
            "MRC": {"system": "mrc", "batches.global_batch_pairs": 8},
            "LLaMA": {
                "system": "generative",
                "model.base": "llama",
                "batches.global_batch_pairs": 2,
                "validate_per_epoch": 4,
            },
        },
        space={
            "variant": {"grid": ["KD", "given", "ECPE-2D", "MRC", "LLaMA"]},
            "teacher": {"grid": ["t5-tiny"]},
            "optimization.seed": {"grid": [0]},
        },
    )
    said = [
        (each.kind, each.is_given_emotions, each.candidates_after, each.batches.size, num_epochs(each))
        for each in (trial.config for trial in Space(config).trials())
    ]
    assert said == [
        ("student", False, 0, {"global_batch_pairs": 4}, 3),
        ("student", True, 1, {"global_batch_pairs": 16}, 3),
        ("baseline", False, 2, {"global_batch_dialogues": 3}, 15),
        ("mrc", True, 0, {"global_batch_pairs": 8}, 12),
        ("generative", False, 0, {"global_batch_pairs": 2}, 12),
    ]


def test_mrc_takes_what_it_has_of_the_students_and_says_that_emotions_are_given(make_config):
    config = make_config(
        baselines={"MRC": {"system": "mrc", "negative_share": 0.5}},
        space={
            "variant": {"grid": ["MRC"]},
            "teacher": {"grid": ["t5-tiny"]},
            "optimization.seed": {"grid": [0, 1]},
        },
    )
    trials = Space(config).trials()
    assert [trial.label for trial in trials] == ["MRC (gold emotions) s0", "MRC (gold emotions) s1"]
    assert trials[0].setting_label == "MRC (gold emotions)"
    first = trials[0].config
    assert isinstance(first, MrcConfig) and first.negative_share == 0.5 and first.optimization.epochs == 12
    assert str(first.corpus.train) == config.student["corpus"]["train"]
    assert first.model.base == config.student["model"]["base"] and first.kind == "mrc"
    trials[0].directory.mkdir(parents=True)
    write_config(first, trials[0].directory)
    assert load_trial_config(trials[0].directory / "config.json") == first
    # Of its two budgets: half the epochs are half the work.
    shorter = [
        replace(
            trial, config=trial.config.model_copy(update={"optimization": BudgetedOptimization(epochs=6)})
        )
        for trial in trials
    ]
    whole, half = (estimate_left(config, some, some).seconds for some in (trials, shorter))
    assert 0 < half == pytest.approx(whole / 2)
    name = "baselines.MRC.negative_share"
    assert has_key(SweepConfig, name) and not has_key(SweepConfig, "baselines.MRC.nothing")
    without_spans = config.model_copy(update={"student": {**config.student, "task": "ecpe"}})
    with pytest.raises(ConfigError, match="its task is ecspe and that of the students is ecpe"):
        Space(without_spans).trials()


def test_a_generative_baseline_has_a_decoder_of_its_own_and_answers_about_all_dialogues(make_config):
    student = {**make_config().student, "precision": "bfloat16"}
    config = make_config(
        student=student,
        teachers={},
        baselines={"LLaMA": {"system": "generative", "model": {"base": "llama"}, "zero.stage": 0}},
        space={"variant": {"grid": ["LLaMA"]}, "optimization.seed": {"grid": [0, 1]}},
        cpus_per_trial=2,
    )
    trials = Space(config).trials()
    assert [trial.label for trial in trials] == ["LLaMA s0", "LLaMA s1"]
    first = trials[0].config
    assert isinstance(first, GenerativeConfig) and first.model.base == "llama"
    assert (first.answered_share, first.zero.dtype, first.zero.stage) == (1, "bfloat16", 0)
    assert (first.threads, trials[1].config.optimization.seed, first.tracking) == (2, 1, None)
    assert str(first.corpus.train) == student["corpus"]["train"]
    trials[0].directory.mkdir(parents=True)
    write_config(first, trials[0].directory)
    assert load_trial_config(trials[0].directory / "config.json") == first
    shorter = [
        replace(trial, config=trial.config.model_copy(update={"optimization": Optimization(epochs=1)}))
        for trial in trials
    ]
    whole, third = (estimate_left(config, some, some).seconds for some in (trials, shorter))
    assert 0 < third == pytest.approx(whole / 3)
    without_spans = config.model_copy(update={"student": {**student, "task": "ecpe"}})
    with pytest.raises(ConfigError, match="its task is ecspe and that of the students is ecpe"):
        Space(without_spans).trials()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": {"U": {"system": "generative"}}}, r"baselines\.U of sweep small: model\.base: "),
        (
            {"baselines": {"U": {"system": "generative", "model.base": "x", "answered_share": 0.5}}},
            r"baselines\.U\.answered_share of sweep small: found 0\.5, expected 1",
        ),
        (
            {"baselines": {"U": {"system": "ueca-prompt", "task": "ecpe"}}},
            "its task is ecpe and that of the students",
        ),
        ({"baselines": {"U": {"system": "kecs"}}}, "baselines.U of sweep small: system"),
        ({"baselines": {"U": {"system": "kec", "tracking": {}}}}, "baselines.U.tracking"),
        ({"baselines": {}}, "variant: found 'U', expected a key of variants"),
    ],
)
def test_a_wrong_baseline_is_refused_in_one_line(make_config, changes, message):
    space = {"variant": {"grid": ["U"]}, "optimization.seed": {"grid": [0]}, "teacher": {"grid": ["t5-tiny"]}}
    with pytest.raises(ConfigError, match=message) as caught:
        Space(make_config(space=space, **changes)).trials()
    assert "\n" not in str(caught.value)


def test_a_baseline_and_a_variant_may_not_share_a_name(make_config):
    with pytest.raises(ConfigError, match=r"baselines\.KD: variants has this name"):
        make_config(variants={"KD": {}}, baselines={"KD": {"system": "kec"}})
