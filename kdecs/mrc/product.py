"""The product of an MRC training, an artifact directory of kind mrc.

    model/          a Transformers question-answering model (safetensors) with its tokenizer
    mrc.json        MrcCard: what prediction needs to know
    config.json     the resolved config of the training
    metrics.jsonl   one JSON object an epoch
    manifest.json   details: metrics on validation, threshold

Nothing here is unpickled.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdecs.artifact import write_json, write_manifest
from kdecs.config import CONFIG_NAME, input_checksums
from kdecs.errors import ArtifactError
from kdecs.mrc.config import QUESTION_VERSION, MrcConfig
from kdecs.mrc.model import load_reader
from kdecs.quiet import without_progress_bars
from kdecs.student.model import load_tokenizer
from kdecs.student.product import METRICS_NAME, MODEL_FOLDER

CARD_NAME = "mrc.json"
READER_NAMES = (MODEL_FOLDER, CARD_NAME)
"""What `save_reader` writes."""


class MrcCard(BaseModel):
    """`mrc.json`: the question's version, the input's length and the threshold of "no answer"."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    question_version: int
    max_tokens: int = Field(ge=48)
    answer_within: Literal["context", "candidate"]
    threshold: float = Field(ge=0, le=1, description="a pair is a cause where its score is at least this")


def save_reader(directory: Path, reader: Any, tokenizer: Any, card: MrcCard) -> None:
    """Write weights, tokenizer and card into a directory, without config, metrics and manifest."""
    folder = directory / MODEL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with without_progress_bars():
        reader.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(directory / CARD_NAME, card.model_dump(mode="json"))


def load_product(directory: Path) -> tuple[Any, Any, MrcCard]:
    """Model (float32, on the CPU, in evaluation mode), tokenizer and card.

    Raises ArtifactError for a card that does not fit, ModelError where the weights cannot be loaded.
    """
    path = directory / CARD_NAME
    try:
        card = MrcCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{path}: {field}: {first['msg']}; train the baseline again") from None
    if card.question_version != QUESTION_VERSION:
        raise ArtifactError(
            f"{path}: question version {card.question_version}, this kdecs has {QUESTION_VERSION}; "
            "train the baseline again"
        )
    folder = directory / MODEL_FOLDER
    return load_reader(folder, has_head=True).eval(), load_tokenizer(str(folder)), card


def finish_product(config: MrcConfig, digest: str, details: dict[str, Any], *, num_epochs: int) -> None:
    """Write the manifest over all files: from now on the directory is complete."""
    folder = config.output / MODEL_FOLDER
    write_manifest(
        config.output,
        "mrc",
        config_hash=digest,
        inputs=input_checksums(train=config.corpus.train, valid=config.corpus.valid, base=config.model.base),
        files=[
            *(path.relative_to(config.output).as_posix() for path in folder.iterdir() if path.is_file()),
            CARD_NAME,
            CONFIG_NAME,
            METRICS_NAME,
        ],
        rows={METRICS_NAME: num_epochs},
        details=details,
    )
