"""The config of a student's training (`launch/train_student.py`)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdecs.config import Config, InputPath, ModelReference, Name, Optimization, OutputPath, Unhashed
from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.prompts import PROMPT_VERSION


class StudentModel(Config):
    """The student: a masked language model with span heads."""

    base: ModelReference
    span_head: Literal["position", "pointer"] = Field(
        default="position", description="position: Eq. 8-9 as written; pointer: a query against each token"
    )
    max_prompt_tokens: int = Field(default=512, ge=32)
    stand_ins: dict[str, str] = Field(
        default_factory=dict, description="emotion -> single-token word, where the emotion's own word splits"
    )


class Distillation(Config):
    """Eq. 12-13. Mode kd needs labels; joint (w/o KD) is hard cross-entropy on mask_cau, weight 1."""

    mode: Literal["kd", "joint"] = "kd"
    labels: InputPath | None = Field(default=None, description="soft-label directory of the teacher")
    alpha: float = Field(default=0.6, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _kd_needs_labels(self) -> "Distillation":
        if self.mode == "kd" and self.labels is None:
            raise ValueError("mode kd needs labels, a soft-label directory; mode joint works without")
        return self


class StudentBatches(Config):
    """Pairs a step over all ranks; batches of like length are drawn from buckets."""

    global_batch_pairs: int = Field(default=16, ge=1)
    bucket_batches: int = Field(default=50, ge=1, description="batches a length bucket")
    evaluation_batch_tokens: Annotated[int, Unhashed()] = Field(default=8192, ge=32)


class StudentConfig(Config):
    """`launch/train_student.py`: joint emotion, connective and span training with distillation (Eq. 5-13)."""

    method_versions: ClassVar[dict[str, int]] = {"prompt": PROMPT_VERSION}
    name: Name = "student"
    output: OutputPath
    cache: OutputPath = Field(description="tokenised corpus and label files, shared by all trials of a node")
    corpus: CorpusConfig
    model: StudentModel
    distillation: Distillation
    batches: StudentBatches = StudentBatches()
    optimization: Optimization = Optimization(learning_rate=1e-5, weight_decay=0.01, epochs=10)
    precision: Literal["float32", "bfloat16"] = "float32"
    patience_epochs: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without gain"
    )
    neutral_share: float = Field(
        default=1.0, gt=0, le=1, description="share of the pairs (i, i) of neutral targets in training"
    )
    emotion_weight: Literal["pair", "target"] = Field(
        default="pair", description="what weighs the same in L_emo: every pair (Eq. 10), or every target"
    )
    threads: Annotated[int, Unhashed()] = Field(default=0, ge=0, description="0: the library's choice")
