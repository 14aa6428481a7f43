"""The config of a teacher's training (`launch/train_teacher.py`)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from kdecs.config import Config, ModelReference, Name, Optimization, OutputPath, Unhashed
from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.prompts import PROMPT_VERSION


class LoraConfig(Config):
    """LoRA (Hu et al. 2021). Dropout is 0: tokens shared in a prefix tree would share its mask."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: Literal[0] = 0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class CausalModel(Config):
    """A decoder-only teacher: the connective is the next token after the prompt."""

    family: Literal["causal"]
    base: ModelReference


class Seq2SeqModel(Config):
    """An encoder-decoder teacher (T5): the connective is generated in the place of `<extra_id_0>`."""

    family: Literal["seq2seq"]
    base: ModelReference


class MaskedModel(Config):
    """An encoder teacher (RoBERTa, BERT): the connective fills the mask token."""

    family: Literal["masked"]
    base: ModelReference


ModelConfig = Annotated[CausalModel | Seq2SeqModel | MaskedModel, Field(discriminator="family")]


class ZeroConfig(Config):
    """DeepSpeed ZeRO: stage, CPU offload, and precision of the frozen weights and activations."""

    stage: Annotated[Literal[0, 1, 2, 3], Unhashed()] = 2
    offload_optimizer: Annotated[bool, Unhashed()] = False
    offload_parameters: Annotated[bool, Unhashed()] = False
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    activation_checkpointing: Annotated[bool, Unhashed()] = False

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> "ZeroConfig":
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, found stage {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, found stage 0")
        return self


class TeacherBatches(Config):
    """How pairs become micro-batches. A global batch counts pairs; world size does not change it."""

    global_batch_pairs: int = Field(default=64, ge=1)
    micro_batch_tokens: int = Field(default=4096, ge=16, description="token budget of one forward")
    max_prompt_tokens: int = Field(
        default=2048, ge=16, description="longer prompts lose their oldest history"
    )
    batching: Literal["auto", "tree", "pairs"] = Field(
        default="auto", description="auto: tree for causal models"
    )


class TeacherConfig(Config):
    """`launch/train_teacher.py`: LoRA fine-tuning of a teacher on connectives (Eq. 1-4)."""

    method_versions: ClassVar[dict[str, int]] = {"prompt": PROMPT_VERSION}
    name: Name
    output: OutputPath
    corpus: CorpusConfig
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    zero: ZeroConfig = ZeroConfig()
    batches: TeacherBatches = TeacherBatches()
    optimization: Optimization = Optimization()
    train_pairs: Literal["fold1", "fold1+neutral"] = Field(
        default="fold1+neutral",
        description="fold1+neutral adds (i, i) of neutral targets, which are exported and so should be known",
    )
    emotions_shown: Literal["coarse", "fine"] = Field(
        default="coarse", description="coarse maps fine labels to RECCON's in the teacher's prompt"
    )
    validate_per_epoch: int = Field(default=1, ge=1, description="validations an epoch")
    checkpoint_every_steps: Annotated[int, Unhashed()] = Field(default=200, ge=1)
    threads_per_rank: Annotated[int, Unhashed()] = Field(
        default=0, ge=0, description="0: the library's choice"
    )
