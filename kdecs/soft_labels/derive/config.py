"""Configs of label directories that no export wrote: combined, calibrated, imported, cross-fitted ones, controls."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdecs.config import (
    Config,
    HashedUnlessDefault,
    InputFiles,
    InputPath,
    LostRankSeconds,
    Name,
    OutputPath,
    Seed,
    Unhashed,
)
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.corpus.splits import CandidatesConfig, CorpusConfig
from kdecs.soft_labels.config import ExportConfig
from kdecs.teacher.config import TeacherConfig

CombineRule = Literal["mean-probability", "mean-logit", "most-confident", "gold-correct"]


class CombineConfig(Config):
    """`kdecs soft-labels combine`: several teachers as one (rules in `kdecs.soft_labels.derive.combine`)."""

    labels: tuple[InputPath, ...] = Field(min_length=2, description="the directories, in order")
    weights: tuple[float, ...] = Field(default=(), description="one per directory; none: all 1")
    rule: CombineRule = "mean-probability"
    train: InputFiles | None = Field(default=None, description="training corpus, for gold-correct")
    output: OutputPath

    @model_validator(mode="after")
    def _fits_the_rule(self) -> "CombineConfig":
        if self.weights and len(self.weights) != len(self.labels):
            raise ValueError(f"{len(self.weights)} weights for {len(self.labels)} directories")
        if any(weight <= 0 for weight in self.weights):
            raise ValueError("weights must be above 0")
        if self.weights and self.rule == "most-confident":
            raise ValueError("most-confident takes one teacher per pair, so weights have no effect")
        if (self.rule == "gold-correct") != (self.train is not None):
            raise ValueError("the rule gold-correct needs the training corpus; no other rule takes one")
        return self


class ImportConfig(Config):
    """`kdecs soft-labels import`: a table of scores made elsewhere (`kdecs.soft_labels.derive.importing`)."""

    table: InputPath
    train: InputFiles | None = None
    valid: InputPath | None = None
    test: InputPath | None = None
    candidates: Annotated[CandidatesConfig, HashedUnlessDefault()] = CandidatesConfig()
    scores: Literal["logits", "probabilities"] = "logits"
    ignore_unknown: bool = Field(default=False, description="leave out pairs that the corpora do not have")
    output: OutputPath

    @model_validator(mode="after")
    def _names_a_corpus(self) -> "ImportConfig":
        if self.train is None and self.valid is None and self.test is None:
            raise ValueError("no corpus: name the file whose pairs the table labels")
        return self


class ControlConfig(Config):
    """`kdecs soft-labels control`: labels that no model made (`kdecs.soft_labels.derive.control`)."""

    control: Literal["oracle", "rule", "random"]
    train: InputFiles | None = None
    valid: InputPath | None = None
    test: InputPath | None = None
    candidates: Annotated[CandidatesConfig, HashedUnlessDefault()] = CandidatesConfig()
    smoothing: float = Field(default=0.1, ge=0, lt=0.5, description="probability left for the other decision")
    wrong_share: float = Field(
        default=0.0, ge=0, le=1, description="share of pairs that the oracle gets wrong"
    )
    seed: Seed = 0
    output: OutputPath

    @model_validator(mode="after")
    def _fits_the_control(self) -> "ControlConfig":
        if self.train is None and self.valid is None and self.test is None:
            raise ValueError("no corpus: name the file whose pairs are to be labelled")
        if self.wrong_share and self.control != "oracle":
            raise ValueError("wrong_share is of the oracle; the other controls do not read gold labels")
        return self


class CalibrateConfig(Config):
    """`kdecs soft-labels calibrate`: a teacher's labels against gold (`kdecs.soft_labels.derive.calibrate`)."""

    labels: InputPath
    train: InputFiles | None = None
    valid: InputPath | None = None
    output: OutputPath

    @model_validator(mode="after")
    def _names_one_split(self) -> "CalibrateConfig":
        if (self.train is None) == (self.valid is None):
            raise ValueError(
                "name one corpus whose gold the labels are fitted to: that of train or that of valid"
            )
        return self

    @property
    def split(self) -> Literal["train", "valid"]:
        """The split whose gold is read."""
        return "valid" if self.train is None else "train"


class FoldExport(Config):
    """The settings of each fold's export (`kdecs.launch.export_soft_labels`) besides teacher, corpus and output."""

    num_shards: int = Field(default=8, ge=1, le=100_000, description="shards of each fold's export")
    micro_batch_tokens: int = Field(default=4096, ge=16)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads_per_worker: int = Field(default=1, ge=1, le=4096)
    engine: Literal["replica", "zero3"] = "replica"
    persistence_threshold: Annotated[int | None, Unhashed()] = Field(default=None, ge=0)
    lease_s: Annotated[float, Unhashed()] = Field(default=60.0, ge=1.0)
    lost_rank_s: LostRankSeconds = 120.0

    @model_validator(mode="before")
    @classmethod
    def _has_no_top_logits(cls, values: Any) -> Any:
        if isinstance(values, dict) and "top_k" in values:
            raise ValueError(
                "top_k is not supported: merged labels hold the logits of the answer words only; "
                "for a student with a teacher's tokenizer, export that teacher with top_k"
            )
        return values


class CrossFitConfig(Config):
    """`kdecs.launch.cross_fit`: K teachers, each of which labels the fold of training dialogues that it did not see."""

    method_versions: ClassVar[dict[str, int]] = {"prompt": PROMPT_VERSION}
    name: Name
    output: OutputPath
    work: Annotated[OutputPath | None, Unhashed()] = Field(
        default=None,
        description="folds, their teachers and exports; null: next to the output, with .folds added",
    )
    corpus: CorpusConfig
    num_folds: int = Field(default=5, ge=2, le=100)
    fold_seed: Seed = 0
    evaluation_labels: Literal["mean"] | int = Field(
        default="mean",
        description="labels of valid and test: the mean probability of all teachers, or those of one fold's (0, 1, …)",
    )
    teacher: TeacherConfig = Field(description="as a teacher's config, without name, output and corpus")
    export: FoldExport = FoldExport()
    launcher: Annotated[tuple[str, ...], Unhashed()] = Field(
        default=(),
        description="the command that starts each stage, such as [deepspeed]; empty: one process",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_teacher(cls, values: Any) -> Any:
        """Name, output and corpus of the teachers are those of the folds."""
        if not isinstance(values, dict) or not isinstance(values.get("teacher"), dict):
            return values
        # Placeholders, so that the teacher's config is valid as a whole; `teacher_config` replaces all three.
        own = {"name": values.get("name"), "output": values.get("output"), "corpus": values.get("corpus")}
        given = values["teacher"]
        for key, value in own.items():
            if key in given and given[key] != value:
                raise ValueError(f"teacher.{key} cannot be set here: each fold has its own")
        return values | {"teacher": given | own}

    @model_validator(mode="after")
    def _names_a_fold(self) -> "CrossFitConfig":
        if self.evaluation_labels != "mean" and not 0 <= self.evaluation_labels < self.num_folds:
            raise ValueError(
                f"evaluation_labels: found {self.evaluation_labels}, expected mean or a fold up to {self.num_folds - 1}"
            )
        return self

    @property
    def work_directory(self) -> Path:
        """The directory of the folds, with their teachers and exports."""
        default = self.output.with_name(f"{self.output.name}.folds")
        return default if self.work is None else Path(self.work).expanduser().absolute()

    def fold_directory(self, fold: int) -> Path:
        """The directory of one fold: its corpus files, configs, teacher and labels."""
        return self.work_directory / f"fold-{fold}"

    def fold_corpus(self, fold: int, part: str) -> Path:
        """The file of a fold's training dialogues (`train`) or of those held out from it (`held-out`)."""
        # What several files have in common is written as JSON lines.
        source = self.corpus.train
        suffix = ".jsonl" if isinstance(source, tuple) else source.suffix or ".json"
        return self.fold_directory(fold) / f"{part}{suffix}"

    def teacher_config(self, fold: int) -> TeacherConfig:
        """The training of a fold's teacher, on all training dialogues except the fold's."""
        return self.teacher.model_copy(
            update={
                "name": f"{self.name}-fold-{fold}",
                "output": self.fold_directory(fold) / "teacher",
                "corpus": self._corpus(self.fold_corpus(fold, "train"), None),
            }
        )

    def export_config(self, fold: int) -> ExportConfig:
        """The export of a fold: its held-out dialogues, and the evaluation splits where their labels are used."""
        # Every export labels valid, on which its agreement with gold is counted; test only where its labels are kept.
        uses_test = self.evaluation_labels in ("mean", fold)
        return ExportConfig(
            teacher=self.fold_directory(fold) / "teacher",
            corpus=self._corpus(self.fold_corpus(fold, "held-out"), self.corpus.test if uses_test else None),
            candidates=self.teacher.candidates,
            output=self.fold_directory(fold) / "labels",
            allow_other_corpus=True,  # the teacher was not trained on what it labels: that is the point
            **self.export.model_dump(),
        )

    def _corpus(self, train: Path, test: Path | None) -> CorpusConfig:
        # Share and dropped dialogues are decided when the folds are made.
        return self.corpus.model_copy(
            update={"train": train, "test": test, "train_share": 1.0, "drop_cross_split": False}
        )
