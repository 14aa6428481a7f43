"""A project is made once of whole dialogues and a known label set, and a plan counts every call before the first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer
from typer.testing import CliRunner

from kdecs.annotate.planning import plan_run
from kdecs.annotate.project import Project, RunSettings, create_project, label_set
from kdecs.annotate.prompts import emotions_prompt
from kdecs.annotate.running import Run, run_model
from kdecs.cli import app
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS, FINE_EMOTIONS, Dialogue
from kdecs.errors import ConfigError, CorpusError, OutputError
from kdecs.process import StopSignal


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["annotate", *map(str, arguments)])


def test_a_project_holds_the_texts_of_any_format_and_none_of_their_labels(
    corpus: Path, gold: list[Dialogue], tmp_path: Path
) -> None:
    inputs = ["--input", corpus]
    for name in ("chat", "other"):
        (tmp_path / f"{name}.txt").write_text(f"Anna: We won the {name} !\nBen: Good for you .\n")
        inputs += ["--input", tmp_path / f"{name}.txt"]
    made = run("init", tmp_path / "p", *inputs, "--labels", "fine", "--annotator", "ann")
    assert made.exit_code == 0 and "5 dialogues" in made.output, made.output
    project = Project.open(tmp_path / "p")
    assert project.config.labels == FINE_EMOTIONS and project.config.annotators == ("ann",)
    for dialogue in gold:
        kept = project.dialogues[dialogue.id]
        assert [(u.speaker, u.text) for u in kept.utterances] == [
            (u.speaker, u.text) for u in dialogue.utterances
        ]
        assert all(u.emotion is None and u.evidence is None for u in kept.utterances)
        assert kept.context_hashes == dialogue.context_hashes
    assert list(project.dialogues) == [*(d.id for d in gold), "1", "other_1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{made}", "--input", "{corpus}"], "holds a project already"),
        (["{new}", "--input", "{corpus}", "--input", "{corpus}"], "is also in"),
        (["{new}", "--input", "{nowhere}"], "No such file"),
        (["{corpus}", "--input", "{corpus}"], "is a file, expected a directory"),
        (["{folder}", "--input", "{folder}/dialogues.jsonl"], "is the input"),
        (["{new}", "--input", "{corpus}", "--labels", "finer"], "expected coarse, fine or a file of labels"),
        (["{new}", "--input", "{corpus}", "--annotator", "a b"], "annotators.0"),
        (["{new}", "--input", "{corpus}", "--annotator", "a", "--annotator", "a"], "expected each name once"),
    ],
)
def test_init_refuses_in_one_line_and_writes_nothing(
    arguments: list[str], message: str, project: Project, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "dialogues.jsonl").write_text('{"id": "d", "utterances": []}')
    places = {"made": project.root, "new": tmp_path / "new", "corpus": corpus, "nowhere": tmp_path / "none"}
    places["folder"] = folder
    result = run("init", *(argument.format(**places) for argument in arguments))
    assert isinstance(result.exception, ConfigError | CorpusError | OutputError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "new" / "project.yaml").exists()


def test_a_label_set_is_named_or_comes_from_a_file(tmp_path: Path) -> None:
    assert label_set("coarse") == (COARSE_EMOTIONS, {})
    lines, table, wrong = (tmp_path / name for name in ("lines.txt", "table.json", "wrong.txt"))
    lines.write_text("fear\n\nneutral\n")
    assert label_set(str(lines)) == (("fear", "neutral"), {})
    table.write_text('{"joy": "happiness", "fear": "fear", "neutral": "neutral"}')
    assert label_set(str(table)) == (("joy", "fear", "neutral"), {"joy": "happiness"})
    for text in ("joy\nneutral\n", '{"joy": "glee"}'):
        wrong.write_text(text)
        with pytest.raises(
            (ConfigError, CorpusError), match=r"joy.*(label_table|JSON object|expected one of)"
        ):
            label_set(str(wrong))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: [happiness, joy]", "joy: no labels of kdecs"),
        ("labels: [fear, Fear]", "each label once"),
        ('labels: [fear, "a\\nb"]', "expected words on one line"),
        ("labels: [fear, neutral]\nmodels: {m: {input_price: 1}}", "both input_price and output_price"),
        ("labels: [fear, neutral]\nmodels: {m: {options: {n: 2}}}", "n cannot stand here: kdecs sets it"),
        ("labels: [fear, neutral]\nmodels: {m: {options: {max_tokens: 2}}}", "set max_answer_tokens"),
        ("labels: [fear, neutral]\nannotators: [m]\nmodels: {m: {}}", "both an annotator and a run"),
        ("labels: [fear, neutral]\nprice: 1", "unknown key"),
    ],
)
def test_settings_are_strict(text: str, message: str, project: Project) -> None:
    (project.root / "project.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        Project.open(project.root)


def test_a_directory_without_settings_is_no_project(tmp_path: Path) -> None:
    for command in ("plan", "run --model m --base-url http://h"):
        name, *options = command.split()
        assert "is no annotation project" in str(run(name, tmp_path, *options).exception)


def test_a_plan_counts_known_calls_exactly_and_says_which_are_estimated(
    project: Project, server: ChatServer, gold: list[Dialogue], tmp_path: Path
) -> None:
    settings, prices = RunSettings(model="m"), (1e6, 0.0)
    emotions, causes = plan_run(project, "m", settings, prices)
    texts = [emotions_prompt(dialogue, FINE_EMOTIONS) for dialogue in gold]
    assert (emotions.num_calls, emotions.num_estimated) == (len(gold), 0)
    assert emotions.prompt_tokens == sum(-(-len(text) // 4) for text in texts) == emotions.price
    assert (causes.num_calls, causes.num_estimated) == (len(gold), len(gold))
    begun = Run.start(project, "m", settings)
    run_model(begun, replace(begun.endpoint(), base_url=server.url), StopSignal(), prices=None)
    # Every call is made by now, and the estimate was an upper bound.
    assert [row.num_calls for row in plan_run(project, "m", settings, prices)] == [0, 0]
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert sum(-(-len(text) // 4) for text in asked if text not in texts) <= causes.prompt_tokens


def test_the_plan_of_a_project_lists_its_models_with_their_prices(project: Project) -> None:
    assert "project.yaml names no model" in str(run("plan", project.root).exception)
    settings = "models: {cheap: {input_price: 1, output_price: 2}, dear: {model: x, base_url: 'http://h'}}\n"
    path = project.root / "project.yaml"
    path.write_text(path.read_text() + settings)
    rows = json.loads(run("plan", project.root, "--json").stdout)
    assert [(row["run"], row["step"]) for row in rows] == [
        (name, step) for name in ("cheap", "dear") for step in ("emotions", "causes")
    ]
    assert rows[0]["price"] == pytest.approx(rows[0]["prompt_tokens"] / 1e6 + rows[0]["answer_tokens"] * 2e-6)
    assert rows[2]["price"] is None
    printed = " ".join(run("plan", project.root, "--model", "cheap").stdout.split())
    assert "≤ 3" in printed and "depend on answers to come" in printed
    assert run("plan", project.root, "--run", "x").exit_code == 2


def test_the_sample_can_be_planned_whole(tmp_path: Path) -> None:
    project = create_project(tmp_path / "p", [bundled_sample("train")])
    assert len(project.dialogues) == len(read_corpus(bundled_sample("train")).dialogues)
    assert plan_run(project, "m", RunSettings(model="m"), None)[0].num_calls == len(project.dialogues)
