"""Configs: one clear line for what is wrong, the same hash for the same work, every committed YAML parses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from kdecs import strict_yaml
from kdecs.artifact import content_checksum
from kdecs.baselines.config import BaselineConfig, MrcConfig, type_of_config
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.cli import app
from kdecs.config import (
    COMMITTED,
    Config,
    _hash_view,
    config_hash,
    find_config,
    input_checksums,
    load_config,
    outputs_and_inputs,
    parse_config,
    read_yaml,
    set_dotted,
    write_config,
)
from kdecs.demo.config import BaseModelConfig
from kdecs.errors import ConfigError
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.derive.config import CrossFitConfig
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig
from kdecs.teacher.config import TeacherConfig


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    for name in ("train.json", "valid.json"):
        (tmp_path / name).write_text(name)
    return {
        "name": "teacher",
        "output": str(tmp_path / "out"),
        "corpus": {"train": str(tmp_path / "train.json"), "valid": str(tmp_path / "valid.json")},
        "model": {"family": "causal", "base": "huggyllama/llama-7b"},
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimization.learning_rat", 1, "optimization.learning_rat: unknown key; known here: epochs"),
        ("model.bas", "x", "model.causal.bas: unknown key; known here: base, family"),
        ("zero.stage", 7, "zero.stage: found 7"),
        ("corpus.train_share", 2.0, "corpus.train_share: found 2.0"),
        ("lora.dropout", 0.1, "lora.dropout: found 0.1"),
        ("model.family", "gpt", "gpt"),
        ("optimization.learning_rate", float("nan"), "learning_rate"),
        ("zero.offload_parameters", True, "offload_parameters needs stage 3, found stage 2"),
    ],
)
def test_wrong_value_is_one_line_with_field_and_what_is_allowed(
    values: dict[str, Any], key: str, value: object, message: str
) -> None:
    set_dotted(values, key, value)
    with pytest.raises(ConfigError) as caught:
        parse_config(TeacherConfig, values, source="teacher.yaml")
    text = str(caught.value)
    assert text.startswith("teacher.yaml: ")
    assert message in text
    assert "\n" not in text


def test_missing_key_is_named(values: dict[str, Any]) -> None:
    del values["model"]
    with pytest.raises(ConfigError, match=r"model: Field required"):
        parse_config(TeacherConfig, values, source="x")


def test_set_overrides_the_file_and_paths_become_absolute(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values["corpus"]["train"] = "train.json"
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(TeacherConfig, path, ["optimization.epochs=7", "output=elsewhere"])
    assert config.optimization.epochs == 7
    assert config.output == tmp_path / "elsewhere"
    assert config.corpus.train == tmp_path / "train.json"


@pytest.mark.parametrize("key", ["output", "corpus.train", "model.base"])
@pytest.mark.parametrize("name", ["caf\udce9", "a\0b"])
def test_a_path_that_config_json_cannot_hold_is_refused(values: dict[str, Any], key: str, name: str) -> None:
    set_dotted(values, key, f"/tmp/{name}")
    with pytest.raises(ConfigError, match="the path is no UTF-8 text"):
        parse_config(TeacherConfig, values, source="x")


@pytest.mark.parametrize(
    "override",
    ["optimization.epochs", "=3", "lora.targets=[", "name.x=1", "optimization.epochs=2 # or 3", "output="],
)
def test_malformed_set_is_refused(values: dict[str, Any], tmp_path: Path, override: str) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError):
        load_config(TeacherConfig, path, [override])


@pytest.mark.parametrize(
    "text",
    [
        "/data/run #2/out",
        "it's: here",
        '"quoted"',
        "*starred",
        "&kept",
        "!important",
        "[",
        "{a: b}",
        "no",
        "null",
        "1.10",
        "1e-5",
        "0x1f",
        "2024-01-01",
        "a = b",
        "%TAG",
        " spaced ",
    ],
)
def test_set_takes_a_path_or_a_text_whole(values: dict[str, Any], tmp_path: Path, text: str) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(values))
    overrides = [
        f"output={text}",
        f"corpus.train={text}",
        f"model.base={text}",
        f"tracking.experiment={text}",
    ]
    config = load_config(TeacherConfig, path, overrides)
    assert config.output == config.corpus.train == Path.cwd() / text
    assert config.model.base == text
    assert config.tracking is not None and config.tracking.experiment == text


def test_several_training_files_are_a_list_and_a_list_of_one_is_that_file(
    values: dict[str, Any], tmp_path: Path
) -> None:
    train, valid = (str(tmp_path / f"{split}.json") for split in ("train", "valid"))
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(values))
    plain = load_config(TeacherConfig, path)

    def given(train_files: object) -> TeacherConfig:
        text = train_files if isinstance(train_files, str) else json.dumps(train_files)
        config = load_config(TeacherConfig, path, [f"corpus.train={text}"])
        in_file = {**values, "corpus": {**values["corpus"], "train": train_files}}
        assert parse_config(TeacherConfig, in_file, source="test") == config
        return config

    assert given([train]) == given(train) == plain
    several = given([train, valid])
    assert several.corpus.train == (Path(train), Path(valid))
    assert len({config_hash(config) for config in (plain, several, given([valid, train]))}) == 3
    assert outputs_and_inputs(several)[1] == [Path(train), Path(valid), Path(valid)]
    assert input_checksums(train=several.corpus.train, valid=several.corpus.valid) == {
        "train": content_checksum(Path(train)),
        "train_1": content_checksum(Path(valid)),
        "valid": content_checksum(Path(valid)),
    }
    write_config(several, tmp_path / "out")
    assert load_config(TeacherConfig, tmp_path / "out" / "config.json") == several
    for wrong, message in (
        ([], r"corpus.train: found \[\]: Tuple should have at least 1 item"),
        ([train, 5], "corpus.train.1: found 5: .*; in a file, put it in quotes"),
        (5, "corpus.train: found 5: .*; in a file, put it in quotes"),
        ([train, train], "train.json is named twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(
                TeacherConfig, {**values, "corpus": {**values["corpus"], "train": wrong}}, source="test"
            )


def test_set_takes_texts_of_a_sweep_whole_and_parses_the_rest() -> None:
    main = COMMITTED / "spaces/main.yaml"
    config = load_config(
        SweepConfig,
        main,
        [
            "output=/runs/a #1",
            "student.model.base=/models/b #2",
            "student.cache=/c: d",
            "variants.plain.distillation.mode=joint",
            "store=null",
            "student.optimization={warmup_share: 1e-1}",
            "space.distillation.alpha.grid=[0.5, 1e-1]",
            "reuse_students=no",
            "student.model.stand_ins={disapproval: no}",
            "teachers.llama-7b.export.set.output=/e #4",
        ],
    )
    assert config.output == Path("/runs/a #1") and config.store is None and not config.reuse_students
    assert config.student["model"] == {"base": "/models/b #2", "stand_ins": {"disapproval": "no"}}
    assert config.student["cache"] == "/c: d"
    assert config.student["optimization"] == {
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "epochs": 10,
        "warmup_share": 0.1,
    }
    assert config.variants == {"plain": {"distillation": {"mode": "joint"}}}
    assert config.space["distillation.alpha"].grid == (0.5, 0.1)
    export = config.teachers["llama-7b"].export
    assert export is not None and export.set["output"] == "/e #4"
    config = load_config(SweepConfig, main, ["teachers.llama-7b=/labels #3"])
    assert config.teachers["llama-7b"].labels == Path("/labels #3")


def test_set_parses_what_is_neither_text_nor_path(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(values))

    def targets(text: str) -> Any:
        config = load_config(TeacherConfig, path, [f"lora.targets={text}"])
        assert config.lora is not None
        return config.lora.targets

    assert targets("all-linear") == "all-linear" and targets("[q_proj, on]") == ("q_proj", "on")
    config = load_config(
        TeacherConfig, path, ["lora=null", "corpus.test=null", "optimization.learning_rate=1e-5"]
    )
    assert config.lora is None and config.corpus.test is None and config.optimization.learning_rate == 1e-5


STAGES = {
    "teacher/llama-7b": TeacherConfig,
    "export/llama-7b": ExportConfig,
    "student/kd": StudentConfig,
    "baseline/mrc-roberta-base": MrcConfig,
    "baseline/kec": BaselineConfig,
    "generative/llama-7b": GenerativeConfig,
    "cross_fit/tiny": CrossFitConfig,
    "spaces/main": SweepConfig,
}


@pytest.mark.parametrize("name", STAGES)
def test_a_group_given_in_part_keeps_the_defaults_of_its_stage(name: str) -> None:
    values, model = read_yaml(COMMITTED / f"{name}.yaml"), STAGES[name]
    groups = [key for key, field in model.model_fields.items() if isinstance(field.default, Config)]
    bare = {key: value for key, value in values.items() if key not in groups}
    expected = parse_config(model, bare, source="x")
    for group in groups:
        for key, value in getattr(expected, group).model_dump(mode="json").items():
            found = parse_config(model, bare | {group: {key: value}}, source="x")
            assert found == expected, f"{group}.{key}"


def test_a_seed_alone_changes_nothing_else(tmp_path: Path) -> None:
    values = read_yaml(COMMITTED / "student/kd.yaml")
    del values["optimization"]
    expected = StudentConfig.model_fields["optimization"].default.model_copy(update={"seed": 7})
    for name, text in (("a.yaml", yaml.safe_dump(values)), ("a.json", json.dumps(values))):
        (tmp_path / name).write_text(text)
        for override in ("optimization.seed=7", "optimization={seed: 7}"):
            assert load_config(StudentConfig, tmp_path / name, [override]).optimization == expected


def test_another_kind_of_a_group_starts_from_its_own_defaults() -> None:
    main = COMMITTED / "spaces/main.yaml"
    overrides = ["search={method: two-stage, num_samples: 1}", "search={method: tpe, num_trials: 5}"]
    assert load_config(SweepConfig, main, overrides).search.method == "tpe"
    assert load_config(SweepConfig, main, ["search.sample_seed=3"]).search.method == "grid"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b", "the key name is there twice, in line 1 and in line 2"),
        ("a:\n  b:\n    c: 1\n    'c': 1", "the key a.b.c is there twice, in line 3 and in line 4"),
        ('{"a": [1, {"b": 1,\n "b": 2}]}', "the key a.b is there twice, in line 1 and in line 2"),
        ("a.b: {c: 1}\na: {b.c: 2}", "the key a.b.c is there twice, in line 1 and in line 2"),
        ("x: &x {a: 1}\n<<: *x\n<<: *x", "the key << is there twice"),
        ("a: &a [*a]", "a in line 1 contains itself by an alias"),
        ("a: !!python/name:os.system", "the tag tag:yaml.org,2002:python/name:os.system in line 1"),
        ("a: " + "[" * 600, "nested too deeply"),
        ("a: " + "9" * 5000, "not YAML"),
        ("a: 1\0", "not YAML: unacceptable character"),
        (
            "a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)),
            "more than 4,194,304 characters with all aliases written out",
        ),
        ("# " + "x" * (1 << 20), "more than 1,048,576 bytes"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_loses_or_hides_something_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_json_is_read_as_yaml_would_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a faster reader, which leaves to YAML what it would read otherwise and what is refused."""
    texts = [
        *(
            "{}",
            '{"a": 1}\n',
            '{"a": 1} # a comment',
            '{"a": 1} x',
            "{a: 1}",
            "[1]",
            '{"a": 01}',
            '{"a": .5}',
        ),
        '{"a": -0, "b": 1E+3, "c": 1.50, "d": 12345678901234567890, "e": 1e400, "f": [null, true, {}], "": ""}',
        '{"a": "no", "b": "2024-01-01", "c": "1e-5", "<<": "a merge", "d": "\\u00e9 \\n \\/ né"}',
        *(
            '{"a": NaN}',
            '{"a": -Infinity}',
            f'{{"a": {"9" * 5000}}}',
            '{"a": ' + "[" * 3000 + "]" * 3000 + "}",
        ),
        *('{"a": "\x7f"}', '{"a": "\u2028 b"}', '{"a": "two\nlines"}', '{"a": "b \x85 c"}'),
        *('{"a": 1, "a": 2}', '{"x": {"a": 1, "a": 2}}', '{"<<": {"a": 1}, "a": 2}'),
        *(
            '{"a.b": 1, "a": {"b": 2}}',
            '{"x": {"a": {"b.c": 1}, "a.b": {"c": 2}}}',
            '{"a.b": 1, "a": {"c": 2}}',
        ),
    ]

    def read(text: str) -> str:
        try:
            return repr(strict_yaml.parse_yaml(text))
        except strict_yaml.Unreadable as error:
            return str(error)

    found = [read(text) for text in texts]
    with monkeypatch.context() as without:
        without.setattr(strict_yaml, "_json_mapping", lambda text: json.loads(""))
        assert found == [read(text) for text in texts]
    monkeypatch.setattr(strict_yaml, "_Loader", None)
    assert strict_yaml.parse_yaml('{"a": {"b.c": [1]}}') == ({"a": {"b.c": [1]}}, False)


def test_anchors_and_merge_keys_keep_working(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "base: &base {a: 1, b: 2}\nmine:\n  <<: *base\n  b: 3\nagain: {<<: [*base, {c: 4}]}\nyes: no"
    )
    assert read_yaml(path) == {
        "base": {"a": 1, "b": 2},
        "mine": {"a": 1, "b": 3},
        "again": {"a": 1, "b": 2, "c": 4},
        "yes": "no",
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 10**7, "num_layers: found 10000000"),
        ("hidden_size", 2**20, "parameters, expected at most 1,000,000,000"),
        ("vocabulary_size", 10**12, "parameters, expected at most 1,000,000,000"),
        ("seed", 10**40, "seed: found 1000"),
        ("threads", 10**9, "threads: found 1000000000"),
        ("batch_size", 10**9, "batch_size: found 1000000000"),
        ("optimization.epochs", 10**9, "optimization.epochs: found 1000000000"),
        ("lora.rank", 10**9, "lora.rank: found 1000000000"),
    ],
)
def test_sizes_that_no_machine_has_are_refused(key: str, value: int, message: str) -> None:
    name, model = ("teacher/llama-7b", TeacherConfig) if "." in key else ("demo/base_llama", BaseModelConfig)
    values = read_yaml(COMMITTED / f"{name}.yaml")
    set_dotted(values, key, value)
    with pytest.raises(ConfigError, match=message):
        parse_config(model, values, source="x")


def test_written_config_reads_back_equal(values: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(TeacherConfig, values, source="x")
    write_config(config, tmp_path)
    assert load_config(TeacherConfig, tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("kind", "name", "version"),
    [
        (StudentConfig, "joint", "TREE_BATCHES_VERSION"),
        (TeacherConfig, "roberta-base", "TREE_BATCHES_VERSION"),
        (TeacherConfig, "roberta-base", "TREE_PROMPTS_VERSION"),
    ],
)
def test_how_trees_are_dealt_and_cut_is_part_of_their_hash_alone(kind, name, version, tmp_path, monkeypatch):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.json").write_text(split)

    def hash_of(layout: str) -> str:
        places = [f"corpus.{split}={tmp_path / f'{split}.json'}" for split in ("train", "valid")]
        folder = "student" if kind is StudentConfig else "teacher"
        more = ["corpus.test=null"] if kind is StudentConfig else []
        path = COMMITTED / folder / f"{name}.yaml"
        return config_hash(load_config(kind, path, [*places, *more, f"model.layout={layout}"]))

    before = {layout: hash_of(layout) for layout in ("pair", "tree")}
    monkeypatch.setattr(f"{kind.__module__}.{version}", 3)
    assert hash_of("pair") == before["pair"] and hash_of("tree") != before["tree"]


def test_steps_stand_in_the_place_of_epochs(tmp_path):
    """Whoever sets the one leaves out the other, on top of a file, of a default and of an earlier setting."""

    def budget(*overrides: str) -> dict[str, int]:
        config = load_config(StudentConfig, find_config("student", "joint"), overrides)
        # What is written is read as the same.
        assert parse_config(StudentConfig, config.model_dump(mode="json"), source="x") == config
        return config.optimization.budget

    assert budget() == {"epochs": 10}
    assert budget("optimization.steps=500") == {"steps": 500}
    assert budget("optimization.steps=500", "optimization.epochs=2") == {"epochs": 2}
    assert budget("optimization={steps: 7, validate_every_steps: 3}") == {"steps": 7}
    assert budget("optimization.steps=null") == {"epochs": 10}
    values = {"output": "x", "corpus": {"train": "x", "valid": "x"}, "model": {"base": "x"}}
    mrc = parse_config(MrcConfig, {**values, "optimization": {"steps": 9}}, source="x").optimization
    assert mrc.budget == {"steps": 9} and mrc.learning_rate == 1e-5 and mrc.num_epochs == 9
    for given, found in (
        ({"steps": 5, "epochs": 2}, "found epochs 2 and steps 5"),
        ({"epochs": None}, "found neither"),
        ({"validate_every_steps": 5}, "validate_every_steps needs steps"),
    ):
        with pytest.raises(ConfigError, match=found):
            parse_config(MrcConfig, {**values, "optimization": given}, source="x")
    with pytest.raises(ConfigError, match=r"optimization\.steps: unknown key"):
        load_config(TeacherConfig, find_config("teacher", "t5-large"), ["optimization.steps=500"])


def test_a_budget_of_steps_is_part_of_the_hash_where_it_is_given(tmp_path):
    corpus = tmp_path / "corpus.json"
    corpus.write_text("{}")
    places = [f"corpus.train={corpus}", f"corpus.valid={corpus}", "corpus.test=null"]

    def hash_of(*overrides: str) -> str:
        return config_hash(load_config(StudentConfig, find_config("student", "joint"), [*places, *overrides]))

    views = {hash_of(f"optimization.steps={n}") for n in (500, 600)} | {hash_of()}
    views |= {hash_of("optimization.steps=500", "optimization.validate_every_steps=100")}
    assert len(views) == 4
    # That of the version that knew no steps.
    plain = load_config(StudentConfig, find_config("student", "joint"), places)
    assert set(_hash_view(plain)["optimization"]) == {
        *("learning_rate", "warmup_share", "weight_decay", "max_grad_norm", "epochs", "seed"),
    }


def test_what_joins_the_history_is_part_of_the_hash_of_t5_alone(tmp_path, monkeypatch):
    """Its prompts are others than those of earlier versions, which joined utterances by a newline that T5 drops."""
    corpus = tmp_path / "corpus.json"
    corpus.write_text("{}")
    places = [f"corpus.train={corpus}", f"corpus.valid={corpus}"]

    def hashes() -> list[str]:
        names = ("t5-large", "roberta-base", "llama-7b")
        return [
            config_hash(load_config(TeacherConfig, find_config("teacher", name), places)) for name in names
        ]

    before = hashes()
    monkeypatch.setattr("kdecs.teacher.config.SEPARATOR_VERSION", 9)
    assert [a == b for a, b in zip(hashes(), before, strict=True)] == [False, True, True]


def test_the_wording_of_hints_is_part_of_the_hash_with_hints_alone(values, monkeypatch):
    """A teacher without hints and without a loss over targets has the hash that it had before there were any."""

    def hashes() -> list[str]:
        given = [values, {**values, "gold_hint_share": 0.0}, {**values, "gold_hint_share": 0.1}]
        return [config_hash(parse_config(TeacherConfig, each, source="x")) for each in given]

    before = hashes()
    assert before[0] == before[1] != before[2]
    without = parse_config(TeacherConfig, {**values, "target_loss_weight": 0.0}, source="x")
    assert config_hash(without) == before[0]
    monkeypatch.setattr("kdecs.teacher.config.GOLD_HINT_VERSION", 9)
    assert [a == b for a, b in zip(hashes(), before, strict=True)] == [True, True, False]
    with pytest.raises(ConfigError, match=r"gold_hint_share: .*less than or equal to 1"):
        parse_config(TeacherConfig, {**values, "gold_hint_share": 1.5}, source="x")


def test_hash_follows_content_not_place(values: dict[str, Any], tmp_path: Path) -> None:
    reference = config_hash(parse_config(TeacherConfig, values, source="x"))
    moved = tmp_path / "moved.json"
    moved.write_text("train.json")
    same = {**values, "output": "/elsewhere", "name": "other", "threads_per_rank": 3}
    same["corpus"] = {**values["corpus"], "train": str(moved)}
    assert config_hash(parse_config(TeacherConfig, same, source="x")) == reference
    moved.write_text("changed")
    assert config_hash(parse_config(TeacherConfig, same, source="x")) != reference


@pytest.mark.parametrize(
    "key", ["optimization.seed", "batches.global_batch_pairs", "lora.rank", "target_loss_weight"]
)
def test_hash_follows_every_setting_of_the_work(values: dict[str, Any], key: str) -> None:
    reference = config_hash(parse_config(TeacherConfig, values, source="x"))
    set_dotted(values, key, 9)
    assert config_hash(parse_config(TeacherConfig, values, source="x")) != reference


def test_hash_of_what_is_written_is_that_of_what_was_read(values: dict[str, Any]) -> None:
    values["lora"] = {"rank": 8}  # alpha stays the default, an integer in the source
    config = parse_config(TeacherConfig, values, source="x")
    written = TeacherConfig.model_validate_json(config.model_dump_json())
    assert config_hash(written) == config_hash(config)


def test_a_base_with_more_than_one_slash_is_a_path_and_no_hub_name(values: dict[str, Any]) -> None:
    values["model"] = {"family": "causal", "base": "runs/demo/base/nothing"}
    with pytest.raises(ConfigError, match=r"/runs/demo/base/nothing: no such file .* names as model\.base$"):
        config_hash(parse_config(TeacherConfig, values, source="x"))


def test_hash_names_a_missing_input_and_its_key(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "valid.json").unlink()
    config = parse_config(TeacherConfig, values, source="x")
    with pytest.raises(ConfigError, match=r"valid\.json: no such file .* names as corpus\.valid$"):
        config_hash(config)
    values["corpus"]["valid"] = str(tmp_path / "dailydialog_valid.json")
    with pytest.raises(ConfigError, match=r"as corpus\.valid; RECCON's files .* kdecs corpus fetch"):
        config_hash(parse_config(TeacherConfig, values, source="x"))


def _model_of(path: Path) -> type[Config] | None:
    folder = path.parent.name
    if folder == "baseline":
        return type_of_config(path, [])
    if folder == "demo" and path.parent.parent.name == "configs":
        kinds = {"base": BaseModelConfig, "teacher": TeacherConfig, "export": ExportConfig}
        return kinds[path.stem.split("_")[0]]
    kinds = {
        "teacher": TeacherConfig,
        "export": ExportConfig,
        "student": StudentConfig,
        "spaces": SweepConfig,
        "generative": GenerativeConfig,
        "cross_fit": CrossFitConfig,
    }
    return kinds.get(folder)


def test_every_committed_config_parses() -> None:
    paths = sorted(COMMITTED.rglob("*.yaml"))
    assert len(paths) >= 40
    for path in paths:
        model = _model_of(path)
        assert model is not None, f"{path}: which config is it?"
        load_config(model, path)


def test_a_config_is_a_file_first_and_then_a_committed_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("student", "kd") == COMMITTED / "student" / "kd.yaml"
    assert find_config("teacher", "demo/teacher_llama") == COMMITTED / "demo" / "teacher_llama.yaml"
    (tmp_path / "kd").write_text("name: mine")
    assert find_config("student", "kd") == Path("kd")
    assert find_config("student", "missing.yaml") == Path("missing.yaml"), "reading it says what is wrong"
    with pytest.raises(
        ConfigError, match=r"nothing: .* no config of this name; .* for export: coarse-to-fine, llama-13b"
    ):
        find_config("export", "nothing")


def test_a_baselines_config_is_of_the_kind_that_its_system_says(tmp_path: Path, root: Path) -> None:
    path = find_config("baseline", "minilm", "mrc-")
    assert path == COMMITTED / "baseline" / "mrc-minilm.yaml"
    assert find_config("baseline", "kec", "mrc-") == COMMITTED / "baseline" / "kec.yaml"
    config = load_config(type_of_config(path, []), path)
    assert isinstance(config, MrcConfig) and config.system_name == "mrc"
    # A config from before the key `system` is the same work.
    old = tmp_path / "old.yaml"
    old.write_text(path.read_text().replace("system: mrc\n", ""))
    assert load_config(MrcConfig, old) == config
    place = f"corpus={{train: {path}, valid: {path}, test: null}}"
    assert "system" not in _hash_view(load_config(MrcConfig, path, [place, "model.base=roberta-base"]))
    assert type_of_config(old, []) is BaselineConfig
    for text in ("system=mrc", "system={name: mrc}"):
        assert load_config(type_of_config(old, [text]), old, [text]) == config
    assert type_of_config(path, ["system=kec"]) is BaselineConfig
    with pytest.raises(ConfigError, match=r"system: found 'mrk': expected .*'ueca-prompt' or 'mrc'"):
        load_config(type_of_config(old, ["system=mrk"]), old, ["system=mrk"])


def test_answers_in_validation_are_part_of_the_hash_where_they_are_given(tmp_path: Path) -> None:
    path = find_config("generative", "smollm2-135m")
    places = [f"corpus={{train: {path}, valid: {path}, test: null}}", "model.base=a-base"]

    def config_of(*overrides: str) -> GenerativeConfig:
        return load_config(GenerativeConfig, path, [*places, *overrides])

    # A config from before these keys is the same work.
    assert not {"system", "answered_share", "max_answer_tokens"} & set(_hash_view(config_of()))
    assert config_of().versions == config_of().method_versions
    plain, longer = (config_hash(config_of(f"max_answer_tokens={n}")) for n in (256, 128))
    assert plain == longer == config_hash(config_of("answered_share=0"))
    answered = {
        config_hash(config_of(f"answered_share={share}", f"max_answer_tokens={n}"))
        for share in (0.5, 1)
        for n in (256, 128)
    }
    assert len(answered | {plain}) == 5


def test_kdecs_configs_lists_and_prints(root: Path) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["configs", *arguments])

    assert "student/kd\n" in run().output
    assert set(run("cross_fit").output.split()) == {"cross_fit/llama-7b", "cross_fit/tiny"}
    assert {"baseline/kec", "baseline/mrc-minilm"} <= set(run("baseline").output.split())
    printed = run("baseline/mrc-minilm").output
    assert printed == (root / "kdecs/configs/baseline/mrc-minilm.yaml").read_text()
    for name in ("nothing", "baseline/nothing"):
        refusal = run(name).exception
        assert isinstance(refusal, ConfigError) and name in str(refusal)
