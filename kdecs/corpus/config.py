"""Which corpus files a stage reads."""

from pydantic import Field

from kdecs.config import Config, InputPath


class CorpusConfig(Config):
    """The corpus files of the three splits, and which part of the training split is used."""

    train: InputPath
    valid: InputPath
    test: InputPath | None = None
    train_share: float = Field(default=1.0, gt=0, le=1, description="share of the training dialogues")
    train_share_seed: int = 0
    drop_cross_split: bool = Field(
        default=False,
        description="leave out training dialogues whose text stands in another split named here",
    )
