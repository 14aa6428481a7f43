"""Configs of label directories that are made from others or from tables: what their config hash is taken over."""

from typing import Literal

from pydantic import Field, model_validator

from kdecs.config import Config, InputPath, OutputPath

CombineRule = Literal["mean-probability", "mean-logit", "most-confident", "gold-correct"]


class CombineConfig(Config):
    """`kdecs soft-labels combine`: several teachers as one (rules in `kdecs.soft_labels.ensemble`)."""

    labels: tuple[InputPath, ...] = Field(min_length=2, description="the directories, in order")
    weights: tuple[float, ...] = Field(default=(), description="one a directory; none: all 1")
    rule: CombineRule = "mean-probability"
    train: InputPath | None = Field(default=None, description="training corpus, for gold-correct")
    output: OutputPath

    @model_validator(mode="after")
    def _fits_the_rule(self) -> "CombineConfig":
        if self.weights and len(self.weights) != len(self.labels):
            raise ValueError(f"{len(self.weights)} weights for {len(self.labels)} directories")
        if any(weight <= 0 for weight in self.weights):
            raise ValueError("weights must be above 0")
        if self.weights and self.rule == "most-confident":
            raise ValueError("most-confident takes one teacher a pair, so weights mean nothing")
        if (self.rule == "gold-correct") != (self.train is not None):
            raise ValueError("the rule gold-correct needs the training corpus, and no other rule reads it")
        return self


class ImportConfig(Config):
    """`kdecs soft-labels import`: a table of scores made elsewhere (`kdecs.soft_labels.importing`)."""

    table: InputPath
    train: InputPath | None = None
    valid: InputPath | None = None
    test: InputPath | None = None
    scores: Literal["logits", "probabilities"] = "logits"
    ignore_unknown: bool = Field(default=False, description="leave out pairs that the corpora do not have")
    output: OutputPath

    @model_validator(mode="after")
    def _names_a_corpus(self) -> "ImportConfig":
        if self.train is None and self.valid is None and self.test is None:
            raise ValueError("no corpus: name the file whose pairs the table labels")
        return self
