"""The config of an export of soft labels (`launch/export_soft_labels.py`)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kdecs.config import Config, InputPath, ModelReference, OutputPath, Unhashed
from kdecs.corpus.config import CorpusConfig
from kdecs.corpus.prompts import PROMPT_VERSION


class ExportConfig(Config):
    """`launch/export_soft_labels.py`: raw logits of the answer words for every pair of every split."""

    method_versions: ClassVar[dict[str, int]] = {"prompt": PROMPT_VERSION}
    teacher: InputPath
    base: Annotated[ModelReference | None, Unhashed()] = Field(
        default=None, description="where the teacher's base lies on this machine, if not where it was trained"
    )
    corpus: CorpusConfig
    output: OutputPath
    num_shards: int = Field(default=8, ge=1)
    micro_batch_tokens: int = Field(default=4096, ge=16)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads_per_worker: int = Field(default=1, ge=1, description="fixed, since it can change last bits")
    allow_other_corpus: bool = Field(
        default=False, description="label a corpus the teacher was not trained on"
    )
