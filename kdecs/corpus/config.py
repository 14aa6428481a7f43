"""Which corpus files a stage reads."""

from typing import Literal

from pydantic import Field, model_validator

from kdecs.config import Config, InputPath


class CorpusConfig(Config):
    """The corpus files of the three splits, and which part of the training split is used."""

    train: InputPath
    valid: InputPath
    test: InputPath | None = None
    train_share: float = Field(default=1.0, gt=0, le=1, description="share of the training dialogues")
    train_share_seed: int = Field(default=0, ge=0)
    drop_cross_split: bool = Field(
        default=False,
        description="leave out training dialogues whose text stands in another split named here",
    )
    emotions: Literal["as-is", "coarse"] = Field(
        default="as-is",
        description="coarse: fine labels mapped to RECCON's, so that both tasks run from one corpus",
    )
    emotion_table: InputPath | None = Field(
        default=None, description="JSON {label: coarse label} laid over the built-in table"
    )

    @model_validator(mode="after")
    def _table_needs_coarse(self) -> "CorpusConfig":
        if self.emotion_table is not None and self.emotions != "coarse":
            raise ValueError("emotion_table needs emotions: coarse")
        return self
