"""The config of an export of soft labels."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdecs.config import (
    Config,
    HashedUnlessDefault,
    InputPath,
    LostRankSeconds,
    ModelReference,
    OutputPath,
    Unhashed,
)
from kdecs.corpus.pairs import EXPORT_UNIVERSE, UNANNOTATED_UNIVERSE, Universe
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.corpus.splits import CandidatesConfig, CorpusConfig
from kdecs.tracking.record import TrackingConfig

MAX_TOP_K = 1000


class ExportConfig(Config):
    """`kdecs.launch.export_soft_labels`: raw logits of the answer words for every pair of every split."""

    method_versions: ClassVar[dict[str, int]] = {"prompt": PROMPT_VERSION}
    teacher: InputPath
    base: Annotated[ModelReference | None, Unhashed()] = Field(
        default=None,
        description="the teacher's base model on this machine, if it is not where it was at training",
    )
    corpus: CorpusConfig
    candidates: Annotated[CandidatesConfig, HashedUnlessDefault()] = CandidatesConfig()
    output: OutputPath
    num_shards: int = Field(default=8, ge=1, le=100_000)
    # Hashed, like the threads: other batches add up in another order and change the last bits.
    micro_batch_tokens: int = Field(default=4096, ge=16)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads_per_worker: int = Field(
        default=1, ge=1, le=4096, description="fixed, because it can change the last bits"
    )
    engine: Literal["replica", "zero3"] = Field(
        default="replica",
        description="replica: the whole teacher on each rank; zero3: partitioned over the ranks of one launch",
    )
    persistence_threshold: Annotated[int | None, Unhashed()] = Field(
        default=None, ge=0, description="zero3: parameters with up to this many values are not partitioned"
    )
    top_k: int = Field(
        default=0,
        ge=0,
        le=MAX_TOP_K,
        description="number of largest logits over the whole vocabulary to keep for each pair; 0: none",
    )
    lease_s: Annotated[float, Unhashed()] = Field(
        default=60.0,
        ge=1.0,
        description="seconds without a sign of life after which another host's shard is taken over",
    )
    lost_rank_s: LostRankSeconds = 120.0
    tracking: Annotated[TrackingConfig | None, Unhashed()] = Field(
        default=None, description="MLflow; null: none"
    )
    allow_other_corpus: bool = Field(
        default=False, description="label a corpus the teacher was not trained on"
    )
    emotions: Annotated[InputPath | None, HashedUnlessDefault()] = Field(
        default=None,
        description="predictions whose emotions the teacher is shown where the corpus has none: labels dialogues "
        "without gold labels; null: every utterance has its emotion",
    )

    @property
    def universe(self) -> Universe:
        """The pairs that are labelled."""
        return EXPORT_UNIVERSE if self.emotions is None else UNANNOTATED_UNIVERSE
