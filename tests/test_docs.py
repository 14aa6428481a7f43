"""Every link and every command of the documents exists; options are parsed by the real parsers, nothing is run."""

import argparse
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from pydantic.fields import FieldInfo
from support import save_tiny_encoder
from typer.core import TyperGroup

from kdecs import cli
from kdecs.baselines.config import BaselineConfig, MrcConfig, baseline_type
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.config import (
    COMMITTED,
    BudgetedOptimization,
    Config,
    Optimization,
    Unhashed,
    find_config,
    load_config,
    parse_config,
    read_yaml,
    set_dotted,
)
from kdecs.corpus.reading import find_faults
from kdecs.corpus.splits import CorpusConfig
from kdecs.demo.config import BaseModelConfig
from kdecs.runtime import Runtime
from kdecs.soft_labels.config import ExportConfig
from kdecs.soft_labels.derive.config import CrossFitConfig
from kdecs.student.config import StudentConfig
from kdecs.student.training import train_student
from kdecs.sweep.config import SweepConfig
from kdecs.teacher.config import TeacherConfig
from kdecs.tracking.record import TrackingConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cluster").rglob("*.md")],
    key=lambda page: page.as_posix(),
)
STAGES: dict[str, tuple[type[Config], str]] = {
    "train_teacher": (TeacherConfig, "teacher"),
    "export_soft_labels": (ExportConfig, "export"),
    "cross_fit": (CrossFitConfig, "cross_fit"),
    "train_student": (StudentConfig, "student"),
    "train_baseline": (BaselineConfig, "baseline"),
    "train_generative": (GenerativeConfig, "generative"),
    "pretrain_base": (BaseModelConfig, "demo"),
    "sweep": (SweepConfig, "spaces"),
}
PROGRAM = re.compile(r"(?:kdecs|make|python|deepspeed|torchrun|sbatch|pytest|\S+\.sh) ")


def pages(test: Any) -> Any:
    """Run a test for every document."""
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())(test)


def without_code(text: str) -> str:
    """The prose: no fenced blocks, indented blocks or code spans."""
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return re.sub(r"`[^`\n]+`", "", "\n".join(line for line in text.splitlines() if line[:4] != "    "))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8"))):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_external = target.startswith(("http://", "https://"))
        if not is_external and not (file.exists() and (not anchor or anchor in anchors(file))):
            broken.append(target)
    return broken


@pages
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading\n[a](page.md#one-heading) [b](#one) [c](other.md) ![d](page.png)\n`[e](code)`\n",
        "utf-8",
    )
    assert broken_links(page) == ["#one", "other.md", "page.png"]


@pages
def test_named_files_exist(page: Path) -> None:
    """Paths in code spans are of the repository, or of the package where they begin with one of its folders."""
    folders = "|".join(
        path.name for place in (ROOT, ROOT / "kdecs") for path in place.iterdir() if path.is_dir()
    )
    spans = re.findall(
        rf"`((?:{folders})/[\w*./-]*[\w*/])`", re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))
    )
    made = ("runs/", "data/", "models/")
    missing = [
        span
        for span in spans
        if not span.startswith(made) and not any(any(place.glob(span)) for place in (ROOT, ROOT / "kdecs"))
    ]
    assert missing == []


def test_search_spaces_in_the_documents_parse() -> None:
    blocks = [
        block for page in PAGES for block in re.findall(r"(?ms)^```yaml\n(.*?)^```$", page.read_text("utf-8"))
    ]
    spaces = [values for values in map(yaml.safe_load, blocks) if "space" in values]
    assert len(spaces) == 2
    for values in spaces:
        parse_config(SweepConfig, values, source="docs")


def test_the_corpus_of_the_documents_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "bring-your-own-corpus.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"(?ms)^```json\n(.*?)^```$", text) if "utterances" in block]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(json.loads(block)) + "\n" for block in blocks), "utf-8")
    assert blocks
    assert find_faults(file) == []


def shown_commands(text: str) -> Iterator[tuple[str, bool]]:
    """Commands of shell blocks and of code spans; the latter may leave out what a command needs."""
    fenced = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text)
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    blocks = [code for language, code in fenced if language == "sh"]
    blocks += re.findall(r"(?m)((?:^ {4,}\S.*\n)+)", prose)
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield from ((part, True) for part in split_line(line))
    for span in re.findall(r"`([^`]+)`", re.sub(r"(?m)^ {4,}\S.*$", "", prose)):
        yield from ((part, False) for part in split_line(" ".join(span.split())))


def split_line(line: str) -> Iterator[str]:
    """The commands of a line that are of this project or of its launchers, without prompt, comment and pipes."""
    line = re.sub(r"<[^<>]+>", "X", re.sub(r"^\$ ", "", line.strip()))
    for part in re.split(r"&&|\|(?!\|)|;", re.sub(r"\s#.*", "", line)):
        part = re.sub(r"(?:\s>\s*\S+)|\s&$", "", part.strip()).strip()
        part = re.sub(r"^(?:time |(?:[A-Z_]+=\S*\s+))*", "", part)
        if PROGRAM.match(part):
            yield part


@pages
def test_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command, whole in dict.fromkeys(shown_commands(page.read_text("utf-8"))):
        try:
            check_command(shlex.split(command), whole=whole)
        except Exception as error:
            pytest.fail(f"{page.relative_to(ROOT)}: {command}\n{type(error).__name__}: {error}")


def check_command(words: list[str], *, whole: bool) -> None:
    """Raise for a program, file, option or config key that does not exist."""
    program, *rest = [word for word in words if word not in ("…", "...")]
    if Path(program).name == "kdecs":
        check_kdecs(rest, whole=whole)
    elif program == "make":
        targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text("utf-8")))
        assert {word for word in rest if "=" not in word} <= targets, "no such target"
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        with quiet():
            parsed = parse_args(rest)
        check_stage(parsed.user_script, parsed.user_args, is_module=parsed.module, whole=whole)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        with quiet():
            parsed = get_args_parser().parse_args(rest)
        check_stage(parsed.training_script, parsed.training_script_args, is_module=parsed.module, whole=whole)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), "no such test file"
    elif program == "python" and rest[0] == "-m":
        check_stage(rest[1], rest[2:], is_module=True, whole=whole)
    elif program == "python":
        check_stage(rest[0], rest[1:], is_module=False, whole=whole)
    elif program == "sbatch":
        scripts = [word for word in rest if not word.startswith("-") and word != "…"]
        assert all((ROOT / word).is_file() for word in scripts), "no such job"
    else:
        assert (ROOT / program).is_file(), "no such script"


def check_kdecs(arguments: list[str], *, whole: bool) -> None:
    """Parse a `kdecs` command line as typer does, down to the last subcommand."""
    command: Any = typer.main.get_command(cli.app)
    name = "kdecs"
    while isinstance(command, TyperGroup):
        if not arguments and not whole:
            return
        assert arguments[0] in command.commands, f"{name} has no command {arguments[0]}"
        name, command, arguments = arguments[0], command.commands[arguments[0]], arguments[1:]
    try:
        command.make_context(name, [re.sub(r"^N$", "1", word) for word in arguments])
    except Exception as error:
        if whole or type(error).__name__ != "MissingParameter":
            raise


def check_stage(program: str, arguments: list[str], *, is_module: bool, whole: bool) -> None:
    """Parse a stage's options by its own parser, and its `--set` keys by its config."""
    if not is_module:
        assert (ROOT / program).is_file(), "no such script"
        if not program.startswith(("launch/", "tune/")):
            return
    name = program.rpartition(".")[2] if is_module else Path(program).stem
    if is_module and not program.startswith("kdecs."):
        importlib.import_module(program)
        return
    module = importlib.import_module(program if is_module else f"kdecs.launch.{name}")
    if not arguments and not whole:
        return
    parsed = parse_only(module.main, arguments)
    if name not in STAGES:
        return
    model, folder = STAGES[name]
    values = read_yaml(find_config(folder, parsed.config))
    for override in parsed.overrides:
        key, _, text = override.partition("=")
        set_dotted(values, key, yaml.safe_load(text))
    parse_config(baseline_type(values) if folder == "baseline" else model, values, source="the command")


def parse_only(main: Any, arguments: list[str]) -> argparse.Namespace:
    """What an entry's parser makes of the arguments; the entry stops there."""

    class Parsed(BaseException):
        pass

    parse = argparse.ArgumentParser.parse_args
    found: list[argparse.Namespace] = []

    def stop_after(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        found.append(parse(self, args, namespace))
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
        patch.setattr(sys, "argv", ["entry", *arguments])
        with contextlib.suppress(Parsed):
            main()
    return found[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn a parser's exit into an error with what it printed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as error:
        raise ValueError(" ".join(printed.getvalue().split())[-300:]) from error


PYTHON_PAGES = (
    "README.md",
    "docs/predict-and-serve.md",
    "docs/bring-your-own-corpus.md",
    "docs/reference/formats-and-metrics.md",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like a checkout after `train_student --config tiny`, with a student of one step."""
    directory = tmp_path_factory.mktemp("checkout")
    (directory / "kdecs").symlink_to(ROOT / "kdecs")
    sample = json.loads((ROOT / "kdecs" / "corpus" / "sample" / "valid.json").read_text("utf-8"))
    few = directory / "few.json"
    few.write_text(json.dumps({key: [sample[key][0][:4]] for key in list(sample)[:2]}), "utf-8")
    config = load_config(
        StudentConfig,
        COMMITTED / "student" / "tiny.yaml",
        [
            f"output={directory / 'runs' / 'student-tiny'}",
            f"cache={directory / 'cache'}",
            f"corpus={{train: {few}, valid: {few}}}",
            f"model.base={save_tiny_encoder(directory / 'base')}",
            "optimization.epochs=1",
        ],
    )
    train_student(config, Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu")))
    return directory


def test_python_runs_as_printed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for page in PYTHON_PAGES:  # in this order: the last one reads what the one before it writes
        for code in re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8")):
            exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("kdecs evaluate --corpus a --predictions b --protocoll squad", "No such option"),
        ("kdecs evaluate --corpus a", "Missing"),
        ("kdecs evaluate --corpus a --predictions b --protocol rekon", "rekon"),
        ("kdecs corpus chart a", "no command"),
        ("make demoo", "target"),
        (
            "deepspeed --no_local_ranks --module kdecs.launch.train_teacher --config llama-7b",
            "no_local_ranks",
        ),
        ("python -m kdecs.launch.train_student --config kdd", "kdd"),
        ("python -m kdecs.launch.train_student --config kd --set optimization.seeds=1", "seeds"),
        ("python -m kdecs.launch.sweep main --dry-runs", "dry-runs"),
        ("python -m kdecs.launch.train_pupil --config kd", "train_pupil"),
        ("python launch/train_pupil.py --config kd", "no such script"),
        ("sbatch cluster/slurm/train_pupil.sbatch", "no such job"),
        ("pytest tests/test_pupil.py", "no such test"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=message):
        check_command(shlex.split(command), whole=True)


GROUPS: dict[str, type[Config]] = {
    "Corpus": CorpusConfig,
    "Optimization": BudgetedOptimization,
    "Tracking": TrackingConfig,
    "Teacher": TeacherConfig,
    "Export": ExportConfig,
    "Cross-fitting": CrossFitConfig,
    "Student": StudentConfig,
    "MRC baseline": MrcConfig,
    "Baselines": BaselineConfig,
    "Generative baseline": GenerativeConfig,
    "Sweep": SweepConfig,
}
OWN_TABLE = (CorpusConfig, Optimization, BudgetedOptimization, TrackingConfig, TeacherConfig)


@pytest.mark.parametrize("title", GROUPS)
def test_the_config_page_lists_every_key_with_its_default(title: str) -> None:
    text = (ROOT / "docs" / "reference" / "config.md").read_text("utf-8")
    section = re.search(rf"(?ms)^## {title}$(.*?)(?=^## |\Z)", text)
    assert section
    rows = re.findall(r"(?m)^\| `([\w.]+)`( †)? \| (.*?) \|", section[1])
    shown = {key: (bool(mark), default) for key, mark, default in rows}
    assert shown == {key: (mark, default_of(field)) for key, field, mark in config_keys(GROUPS[title])}


def config_keys(model: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo, bool]]:
    """Dotted keys of a config, whether each is out of the hash; of a union every member's keys."""
    for name, field in model.model_fields.items():
        is_unhashed = any(isinstance(mark, Unhashed) for mark in field.metadata)
        groups = [group for group in configs_in(field.annotation) if group not in OWN_TABLE]
        if not groups:
            yield prefix + name, field, is_unhashed
        keys = {
            key: (leaf, mark)
            for g in reversed(groups)
            for key, leaf, mark in config_keys(g, f"{prefix}{name}.")
        }
        yield from ((key, leaf, mark or is_unhashed) for key, (leaf, mark) in keys.items())


def configs_in(annotation: Any) -> list[type[Config]]:
    """The config groups that a field may hold, not those in its lists and tables."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if typing.get_origin(annotation) in (tuple, dict):
        return []
    return [group for part in typing.get_args(annotation) for group in configs_in(part)]


def default_of(field: FieldInfo) -> str:
    """A default as the page writes it."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Config):
        return "–"
    if default in ((), {}):
        return "none"
    if isinstance(default, tuple):
        return f"[{', '.join(default)}]"
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)
