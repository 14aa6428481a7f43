"""The config of a small base model trained from scratch (`kdecs.launch.pretrain_base`)."""

from typing import Literal

from pydantic import Field, model_validator

from kdecs.config import Config, Name, OutputPath, Seed, Threads
from kdecs.corpus.splits import CorpusConfig

# A config from somebody else must not fill the memory: "small" ends here.
_MAX_LAYERS = 256
_MAX_PARAMETERS = 1_000_000_000


class BaseModelConfig(Config):
    """A small base model and its tokenizer, trained from scratch on the text of a corpus."""

    name: Name
    output: OutputPath
    corpus: CorpusConfig
    architecture: Literal["llama", "t5", "roberta"]
    vocabulary_size: int = Field(default=1000, ge=400)
    hidden_size: int = Field(default=128, ge=16)
    num_layers: int = Field(default=3, ge=1, le=_MAX_LAYERS)
    num_heads: int = Field(default=4, ge=1)
    max_positions: int = Field(default=1024, ge=64)
    max_steps: int = Field(default=400, ge=1)
    batch_size: int = Field(default=32, ge=1, le=4096)
    sequence_tokens: int = Field(default=64, ge=16, le=65_536)
    learning_rate: float = Field(default=2e-3, gt=0)
    seed: Seed = 0
    threads: Threads = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> "BaseModelConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        # Attention and feed-forward of a layer have about 12 h² parameters.
        embedded = self.vocabulary_size + self.max_positions
        num_parameters = self.hidden_size * (12 * self.num_layers * self.hidden_size + embedded)
        if num_parameters > _MAX_PARAMETERS:
            raise ValueError(
                f"about {num_parameters:,} parameters, expected at most {_MAX_PARAMETERS:,} of a small base model; "
                "lower hidden_size, num_layers, vocabulary_size or max_positions"
            )
        return self
