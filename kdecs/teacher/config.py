"""The config of a teacher's training (`launch/train_teacher.py`)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdecs.config import (
    Config,
    HashedUnlessDefault,
    LostRankSeconds,
    ModelReference,
    Name,
    Optimization,
    OutputPath,
    Threads,
    Unhashed,
)
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.corpus.splits import CandidatesConfig, CorpusConfig
from kdecs.tracking.record import TrackingConfig

BATCHES_VERSION = 2
"""Version of how pairs are dealt to optimizer steps: part of the config hash, so that no other steps resume."""
TREE_BATCHES_VERSION = 2
"""The same for target trees alone, which are dealt in random order; part of the hash only with the layout tree."""
TREE_PROMPTS_VERSION = 2
"""Version of how the prompts of target trees are cut, which is part of their hash and of their labels' lineage."""
SEPARATOR_VERSION = 2
"""Version of what joins the history: part of the hash of the family seq2seq alone, since T5 drops newlines."""
GOLD_HINT_VERSION = 1
"""Version of the hint's wording and of its draw: part of the hash only with a `gold_hint_share` above 0."""


class LoraConfig(Config):
    """LoRA (Hu et al. 2021). Dropout is fixed at 0, because tokens shared in a prefix tree would share its mask."""

    rank: int = Field(default=16, ge=1, le=16_384)
    alpha: float = Field(default=32, gt=0)
    dropout: Literal[0] = 0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class PretrainedModel(Config):
    """The pretrained network to fine-tune."""

    base: ModelReference
    load_in_4bit: bool = Field(
        default=False, description="keep frozen weights in 4 bits (NF4); needs CUDA, bitsandbytes and LoRA"
    )


class CausalModel(PretrainedModel):
    """A decoder-only teacher: the connective is the next token after the prompt."""

    family: Literal["causal"]


class Seq2SeqModel(PretrainedModel):
    """An encoder-decoder teacher (T5): it generates the connective in place of `<extra_id_0>`."""

    family: Literal["seq2seq"]


class MaskedModel(PretrainedModel):
    """An encoder teacher (RoBERTa, BERT): the connective fills the mask token."""

    family: Literal["masked"]
    layout: Annotated[Literal["pair", "tree"], HashedUnlessDefault()] = Field(
        default="pair",
        description="pair: a prompt per pair (Eq. 1); tree: a sequence per target, whose history and clause are read "
        "once for all of its candidates",
    )


ModelConfig = Annotated[CausalModel | Seq2SeqModel | MaskedModel, Field(discriminator="family")]


class ZeroConfig(Config):
    """DeepSpeed ZeRO: stage, CPU offload, and the precision of frozen weights and activations."""

    # What is unhashed says where numbers are kept, not what they are: a resume may change it.
    stage: Annotated[Literal[0, 1, 2, 3], Unhashed()] = 2
    offload_optimizer: Annotated[bool, Unhashed()] = False
    offload_parameters: Annotated[bool, Unhashed()] = False
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    activation_checkpointing: Annotated[bool, Unhashed()] = False

    @model_validator(mode="after")
    def _stage_allows(self) -> "ZeroConfig":
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, found stage {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, found stage 0")
        if self.dtype == "float16" and self.stage == 0:
            raise ValueError(
                "dtype float16 needs stage 1, 2 or 3, found stage 0, where DeepSpeed does not scale the loss; "
                "set zero.stage=1, or zero.dtype=bfloat16"
            )
        return self


TreeAttention = Literal["auto", "flex", "blocks", "mask"]


class TeacherBatches(Config):
    """How pairs become micro-batches. A global batch counts pairs, whatever the number of ranks."""

    global_batch_pairs: int = Field(default=64, ge=1)
    # Hashed although it only bounds memory: prefix trees are cut at it, so another budget deals other batches.
    micro_batch_tokens: int = Field(default=4096, ge=16, description="token budget of one forward")
    max_prompt_tokens: int = Field(
        default=2048, ge=16, description="longer prompts lose their oldest history"
    )
    batching: Literal["auto", "tree", "pairs"] = Field(
        default="auto", description="auto: tree for causal models"
    )
    tree_attention: Annotated[TreeAttention, Unhashed()] = Field(
        default="auto", description="auto: FlexAttention on CUDA, blocks of queries elsewhere"
    )

    @property
    def size(self) -> dict[str, int]:
        """The key that says how much a step trains on, with its value."""
        return {"global_batch_pairs": self.global_batch_pairs}


class TuningConfig(Config):
    """Fine-tuning of a language model under DeepSpeed, with LoRA or whole, whatever it learns."""

    name: Name
    output: OutputPath
    corpus: CorpusConfig
    model: ModelConfig
    lora: LoraConfig | None = Field(
        default=LoraConfig(), description="null: full tuning, which trains all parameters"
    )
    zero: ZeroConfig = ZeroConfig()
    batches: TeacherBatches = TeacherBatches()
    optimization: Optimization = Optimization()
    validate_per_epoch: int = Field(default=1, ge=1, le=1_000, description="validations per epoch")
    checkpoint_every_steps: Annotated[int, Unhashed()] = Field(default=200, ge=1)
    keep_last: Annotated[int, Unhashed()] = Field(
        default=1, ge=1, description="number of newest checkpoints to keep, besides the best on validation"
    )
    log_every_steps: Annotated[int, Unhashed()] = Field(
        default=20, ge=1, description="steps per line of metrics.jsonl; every validation writes one, too"
    )
    device_peak_tflops: Annotated[float | None, Unhashed()] = Field(
        default=None, gt=0, description="peak of one device, for MFU; null: from the table of known GPUs"
    )
    tracking: Annotated[TrackingConfig | None, Unhashed()] = Field(
        default=None, description="MLflow; null: write only metrics.jsonl"
    )
    threads_per_rank: Threads = 0
    lost_rank_s: LostRankSeconds = 120.0

    @model_validator(mode="after")
    def _four_bits_are_frozen(self) -> "TuningConfig":
        if self.model.load_in_4bit and self.lora is None:
            raise ValueError(
                "model.load_in_4bit freezes the base, so it needs lora, whereas full tuning trains it"
            )
        if self.model.load_in_4bit and self.zero.stage == 3:
            raise ValueError(
                "model.load_in_4bit: a 4-bit base cannot be partitioned; set zero.stage to 0, 1 or 2, found 3"
            )
        return self


class TeacherConfig(TuningConfig):
    """Fine-tuning of a teacher on connectives (Eq. 1-4)."""

    method_versions: ClassVar[dict[str, int]] = {"prompt": PROMPT_VERSION, "batches": BATCHES_VERSION}
    candidates: Annotated[CandidatesConfig, HashedUnlessDefault()] = CandidatesConfig()
    train_pairs: Literal["fold1", "fold1+neutral"] = Field(
        default="fold1+neutral",
        description="fold1+neutral adds the pairs (i, i) of neutral targets, since the export labels them, too",
    )
    emotions_shown: Literal["coarse", "fine"] = Field(
        default="coarse", description="coarse: the prompt shows RECCON's labels in place of fine ones"
    )
    gold_connective: Annotated[Literal["any", "because", "as", "since", "thus"], HashedUnlessDefault()] = (
        Field(
            default="any",
            description="what a causal pair is trained towards: any causal word (their summed probability) or this one",
        )
    )
    gold_hint_share: Annotated[float, HashedUnlessDefault()] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the training pairs whose prompt says whether the pair is causal, drawn by seed and pair",
    )
    target_loss_weight: Annotated[float, HashedUnlessDefault()] = Field(
        default=0.0,
        ge=0,
        description="of the cross-entropy over the candidates of a target, beside that of each pair; needs trees",
    )

    @model_validator(mode="after")
    def _targets_are_in_trees(self) -> "TeacherConfig":
        if not self.target_loss_weight:
            return self
        if self.model.family == "causal" and self.batches.batching == "pairs":
            raise ValueError(
                "target_loss_weight needs trees, found batches.batching pairs; set batches.batching=tree"
            )
        if self.model.family == "masked" and self.model.layout == "pair":
            raise ValueError("target_loss_weight needs trees, found model.layout pair; set model.layout=tree")
        if self.model.family == "seq2seq":
            raise ValueError(
                "target_loss_weight needs trees, which teachers of the family seq2seq do not have; set it to 0"
            )
        return self

    @property
    def versions(self) -> dict[str, int]:
        """Of target trees also how they are dealt and cut, of T5 what joins the history, and of hints their wording."""
        is_tree = getattr(self.model, "layout", "pair") == "tree"
        return (
            super().versions
            | (
                {"tree_batches": TREE_BATCHES_VERSION, "tree_prompts": TREE_PROMPTS_VERSION}
                if is_tree
                else {}
            )
            | ({"separator": SEPARATOR_VERSION} if self.model.family == "seq2seq" else {})
            | ({"gold_hint": GOLD_HINT_VERSION} if self.gold_hint_share else {})
        )
