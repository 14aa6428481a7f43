"""The config of the MRC baseline's training (`kdecs.launch.train_mrc`)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdecs.config import (
    BudgetedOptimization,
    Config,
    ModelReference,
    Name,
    OutputPath,
    Threads,
    Unhashed,
)
from kdecs.corpus.splits import CorpusConfig
from kdecs.student.config import StudentBatches
from kdecs.tracking.record import TrackingConfig

QUESTION_VERSION = 2
"""Version of the question's wording and the context's layout: part of the config hash and of a product.

2: the wording of RECCON's released questions, whose utterances end without an added full stop.
"""


class MrcModel(Config):
    """An encoder with a question-answering head."""

    base: ModelReference
    max_tokens: int = Field(default=512, ge=48, description="question and context together")
    answer_within: Literal["context", "candidate"] = Field(
        default="context",
        description="context: anywhere in the conversation, as in RECCON's released setup; candidate: only in the "
        "evidence utterance that the question names",
    )


class MrcConfig(Config):
    """RECCON's question-answering baseline: SQuAD 2.0 with impossible questions."""

    method_versions: ClassVar[dict[str, int]] = {"question": QUESTION_VERSION}
    name: Name = "mrc"
    output: OutputPath
    corpus: CorpusConfig
    model: MrcModel
    batches: StudentBatches = StudentBatches()
    optimization: BudgetedOptimization = BudgetedOptimization(
        learning_rate=1e-5, weight_decay=0.01, epochs=12
    )
    negative_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the impossible questions to train on, drawn once by seed",
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    patience_epochs: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many epochs without improvement; with optimization.steps an epoch is the time "
        "between two validations",
    )
    tracking: Annotated[TrackingConfig | None, Unhashed()] = Field(
        default=None, description="MLflow; null: write only metrics.jsonl"
    )
    threads: Threads = 0
