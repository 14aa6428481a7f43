"""A project directory of `kdecs annotate`: its settings, its dialogues, and the places of everybody's labels.

    project.yaml            labels, annotators, models with their prices (ProjectConfig)
    dialogues.jsonl         the dialogues: JSON lines without labels
    runs/NAME/run.json      what a model was asked with (RunSettings)
    runs/NAME/answers.jsonl the record of its answers (kdecs.annotate.running)
    reviews/NAME.jsonl      what a person decided, line by line as they were imported (kdecs.annotate.labels)

The directory can be copied to another machine as it is. Labels are always read from answers and reviews, so nothing in
it can be out of date.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from kdecs.artifact import file_lock, sha256_of_file, write_text
from kdecs.config import Config, Name, parse_config, read_yaml
from kdecs.corpus.checking import NotJson, decode_json, is_unicode
from kdecs.corpus.reading import iter_dialogues, read_corpus, read_table
from kdecs.corpus.schema import COARSE_EMOTIONS, FINE_EMOTIONS, KNOWN_EMOTIONS, NEUTRAL, Dialogue
from kdecs.errors import ConfigError, CorpusError
from kdecs.output import refuse_inputs

PROJECT_NAME = "project.yaml"
DIALOGUES_NAME = "dialogues.jsonl"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What the name of an annotator or a run looks like, which is also that of a file or folder."""
_NO_PROJECT = "is no annotation project; make one with: kdecs annotate init DIR --input FILE"
_COMMENT = """\
# The settings of an annotation project. Add the models that label its dialogues, each under the name of its run:
#
# models:
#   gpt-4o-mini:
#     base_url: https://api.openai.com/v1
#     input_price: 0.15      # dollars per million prompt tokens
#     output_price: 0.6      # dollars per million answer tokens
#   gpt-4o-mini-seed2:       # the same model once more
#     model: gpt-4o-mini
#     base_url: https://api.openai.com/v1
#     options: {seed: 2, temperature: 1}
"""


class RunSettings(Config):
    """What a model is asked with. The answers depend on all but `repeats` and `base_url`."""

    model: str = Field(min_length=1, description="model, as the server names it")
    base_url: str | None = Field(default=None, description="server, up to the path before /chat/completions")
    max_answer_tokens: int = Field(default=2048, ge=1, description="most tokens of an answer")
    answers: Literal["schema", "text"] = Field(
        default="schema",
        description="schema: ask for JSON by its schema, without it if the server refuses that; text: never ask for it",
    )
    repeats: int = Field(default=2, ge=0, le=20, description="how often to ask again after a faulty answer")
    options: dict[str, Any] = Field(
        default={}, description="further keys of each request; null leaves one out"
    )

    @field_validator("options")
    @classmethod
    def _no_own_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        instead = {"model": "model", "max_tokens": "max_answer_tokens", "response_format": "answers"}
        for key in ("messages", "stream", "n", *instead):
            # Null leaves a key out, which no setting can say.
            if value.get(key) is not None:
                remedy = (
                    f"set {instead[key]} of the model" if key in instead else "kdecs sets it; leave it out"
                )
                raise ValueError(f"{key} cannot stand here: {remedy}")
        return value


class ModelConfig(RunSettings):
    """A model of the project, with its prices."""

    model: str = Field(default="", description="model, as the server names it; default: the name of the run")
    input_price: float | None = Field(default=None, ge=0, description="dollars per million prompt tokens")
    output_price: float | None = Field(default=None, ge=0, description="dollars per million answer tokens")

    @model_validator(mode="after")
    def _both_prices(self) -> "ModelConfig":
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("expected both input_price and output_price, or neither")
        return self

    @property
    def prices(self) -> tuple[float, float] | None:
        """Dollars per million prompt tokens and answer tokens."""
        if self.input_price is None or self.output_price is None:
            return None
        return self.input_price, self.output_price

    def settings(self, name: str) -> RunSettings:
        """What the run of this name asks with."""
        values = self.model_dump(exclude={"input_price", "output_price"})
        return RunSettings(**{**values, "model": self.model or name})


class ProjectConfig(Config):
    """The settings of a project, in `project.yaml`."""

    labels: tuple[str, ...] = Field(min_length=2, description="emotions to choose from, in this order")
    label_table: dict[str, str] = Field(
        default={}, description="label of your own: a label of kdecs that stands for it in a corpus"
    )
    annotators: tuple[Name, ...] = Field(
        default=(), description="people who review, in the order of their say"
    )
    causes_after: int = Field(
        default=0, ge=0, description="how many turns after the emotional one a cause may lie"
    )
    models: dict[Name, ModelConfig] = Field(
        default={}, description="models that label, by the name of the run"
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> "ProjectConfig":
        if len({label.casefold() for label in self.labels}) < len(self.labels):
            raise ValueError("labels: expected each label once, whatever its capitals")
        if odd := [label for label in self.labels if not label or label != " ".join(label.split())]:
            raise ValueError(f"labels: found {odd[0]!r}, expected words on one line")
        unknown = sorted(set(self.labels) - KNOWN_EMOTIONS - self.label_table.keys())
        if unknown:
            raise ValueError(
                f"labels: {', '.join(unknown)}: no labels of kdecs; say in label_table which of its labels each one "
                "stands for"
            )
        if len(set(self.annotators)) < len(self.annotators):
            raise ValueError("annotators: expected each name once")
        if both := set(self.annotators) & self.models.keys():
            raise ValueError(
                f"{', '.join(sorted(both))}: names both an annotator and a run; rename one of them"
            )
        return self


@dataclass(frozen=True)
class Project:
    """An open project directory."""

    root: Path
    config: ProjectConfig

    @classmethod
    def open(cls, root: Path) -> "Project":
        """Read the settings of a directory. Raises ConfigError, one line, if it holds no project or a faulty one."""
        path = root / PROJECT_NAME
        if not path.is_file():
            raise ConfigError(f"{root}: {_NO_PROJECT}")
        return cls(root, parse_config(ProjectConfig, read_yaml(path), source=str(path)))

    @cached_property
    def dialogues(self) -> dict[str, Dialogue]:
        """The dialogues by id, in their order. Raises CorpusError for a file that was damaged."""
        corpus = read_corpus(self.root / DIALOGUES_NAME, labelled=False, log=False)
        return {dialogue.id: dialogue for dialogue in corpus.dialogues}

    @cached_property
    def texts_sha256(self) -> str:
        """What a review says it belongs to: the checksum of the dialogues."""
        return sha256_of_file(self.root / DIALOGUES_NAME)

    def run_folder(self, name: str) -> Path:
        """Where the run of this name keeps its answers."""
        return self.root / "runs" / name

    def review_file(self, annotator: str) -> Path:
        """Where the decisions of a person are kept."""
        return self.root / "reviews" / f"{annotator}.jsonl"

    @property
    def files(self) -> list[Path]:
        """What the project consists of, which no output may replace."""
        own = [self.root / PROJECT_NAME, self.root / DIALOGUES_NAME]
        return own + [path for name in ("runs", "reviews") for path in self.root.glob(f"{name}/**/*.*")]

    @property
    def run_names(self) -> list[str]:
        """The runs that have begun, those of the settings first and in their order."""
        return self._sorted(
            self.config.models, (path.parent.name for path in self.root.glob("runs/*/run.json"))
        )

    @property
    def reviewers(self) -> list[str]:
        """The people whose decisions were imported, those of the settings first and in their order."""
        return self._sorted(self.config.annotators, (path.stem for path in self.root.glob("reviews/*.jsonl")))

    @staticmethod
    def _sorted(first: Iterable[str], found: Iterable[str]) -> list[str]:
        names = set(found)
        named = [name for name in first if name in names]
        return named + sorted(names - set(named))


def create_project(
    root: Path,
    inputs: Sequence[Path],
    *,
    labels: str = "coarse",
    annotators: Sequence[str] = (),
    causes_after: int = 0,
) -> Project:
    """Make a project of the dialogues of corpus files of any format; their labels, if any, are left out.

    Raises CorpusError for a faulty file or an id that occurs twice, ConfigError if the directory holds a project,
    OutputError if the project would replace one of the files.
    """
    refuse_inputs(root, [], is_directory=True)
    for name in (DIALOGUES_NAME, PROJECT_NAME):
        refuse_inputs(root / name, inputs)
    chosen, table = label_set(labels)
    values: dict[str, Any] = {"labels": list(chosen)}
    if table:
        values["label_table"] = table
    values |= {"annotators": list(annotators), "causes_after": causes_after}
    config = parse_config(ProjectConfig, values, source="kdecs annotate init")
    first: dict[str, tuple[Path, str]] = {}
    lines = []
    for path in inputs:
        for dialogue in iter_dialogues(path, labelled=False):
            # A transcript has no ids, so that several of them have the same ones.
            name = f"{path.stem}_{dialogue.id}" if dialogue.id in first else dialogue.id
            other, other_texts = first.get(dialogue.id, (path, ""))
            if name in first or other_texts == dialogue.context_hashes[-1]:
                raise CorpusError(
                    f"{path}: found the dialogue {dialogue.id}, which is also in {other}; give each file once, and "
                    "no two dialogues the same id"
                )
            first[name] = path, dialogue.context_hashes[-1]
            said = [{"turn": u.turn, "speaker": u.speaker, "utterance": u.text} for u in dialogue.utterances]
            lines.append(json.dumps({"id": name, "utterances": said}, ensure_ascii=False) + "\n")
    # Under a lock, so that two that start at the same time do not mix their files.
    with file_lock(root / f".{PROJECT_NAME}.lock"):
        if (root / PROJECT_NAME).exists():
            raise ConfigError(
                f"{root}: holds a project already; choose another directory, or edit {PROJECT_NAME}"
            )
        write_text(root / DIALOGUES_NAME, "".join(lines))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
        # Last: a directory without it is no project.
        write_text(root / PROJECT_NAME, _COMMENT + text)
    return Project(root, config)


def label_set(choice: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The labels that `--labels` names, and the table that maps labels unknown to kdecs.

    "coarse" and "fine" are RECCON's and FG-RECCON's. A file holds one label per line, or a JSON object
    {label: label of kdecs}, as `kdecs corpus verify --table` takes it. Raises ConfigError for anything else.
    """
    if choice in ("coarse", "fine"):
        return (COARSE_EMOTIONS if choice == "coarse" else FINE_EMOTIONS), {}
    path = Path(choice)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--labels {choice}: {error.strerror}, expected coarse, fine or a file of labels"
        ) from None
    try:
        value = decode_json(data).value
    except NotJson:
        value = None
    if isinstance(value, dict):
        read_table(path)  # refuses what is no table
        return tuple(value), {label: known for label, known in value.items() if label not in KNOWN_EMOTIONS}
    try:
        labels = tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise ConfigError(f"--labels {choice}: not UTF-8 text, expected one label per line") from None
    unknown = [label for label in labels if label not in KNOWN_EMOTIONS or not is_unicode(label)]
    if unknown:
        raise ConfigError(
            f"--labels {choice}: {unknown[0][:60]!r} is no label of kdecs ({', '.join(sorted(KNOWN_EMOTIONS))}); to "
            f'use labels of your own, write the file as a JSON object {{"your label": "{NEUTRAL}", …}} that says which '
            "label of kdecs each one stands for"
        )
    return labels, {}
