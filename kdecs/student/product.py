"""The product of a student's training, an artifact directory of kind student.

    model/              a Transformers masked language model (safetensors) with its tokenizer
    heads.safetensors   the span head's tensors
    student.json        StudentCard: what a predictor needs to know
    config.json         the resolved config of the training
    metrics.jsonl       one JSON object an epoch
    manifest.json       details: metrics on validation, threshold, emotions, teacher

Nothing here is unpickled.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdecs.artifact import atomic_path, write_json, write_manifest
from kdecs.config import CONFIG_NAME
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.errors import ArtifactError
from kdecs.student.model import (
    StudentModel,
    load_language_model,
    load_tokenizer,
    student_answer_ids,
    without_progress_bars,
)

MODEL_FOLDER = "model"
HEADS_NAME = "heads.safetensors"
CARD_NAME = "student.json"
METRICS_NAME = "metrics.jsonl"


class StudentCard(BaseModel):
    """`student.json`: answer words, template version and decision threshold of a student."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    emotions: tuple[str, ...] = Field(min_length=1)
    stand_ins: dict[str, str]
    connectives: tuple[str, ...]
    span_head: Literal["position", "pointer"]
    max_prompt_tokens: int = Field(ge=32)
    prompt_version: int
    threshold: float = Field(ge=0, le=1, description="a pair is a cause where its score is at least this")


def save_student(directory: Path, model: StudentModel, tokenizer: Any, card: StudentCard) -> None:
    """Write weights, tokenizer and card (no manifest yet: the directory stays unfinished)."""
    folder = directory / MODEL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with without_progress_bars():
        model.language_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with atomic_path(directory / HEADS_NAME) as temporary:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in model.span_head.state_dict().items()}, temporary
        )
    write_json(directory / CARD_NAME, card.model_dump(mode="json"))


def load_student(directory: Path) -> tuple[StudentModel, Any, StudentCard]:
    """Model (float32, on the CPU, in evaluation mode), tokenizer and card of a student directory.

    Raises ArtifactError for a card or heads that do not fit, ModelError where the weights cannot be loaded.
    """
    card = _read_card(directory / CARD_NAME)
    tokenizer = load_tokenizer(str(directory / MODEL_FOLDER))
    model = StudentModel(
        load_language_model(directory / MODEL_FOLDER),
        student_answer_ids(tokenizer, card.emotions, card.stand_ins),
        span_head=card.span_head,
        max_prompt_tokens=card.max_prompt_tokens,
    )
    path = directory / HEADS_NAME
    try:
        model.span_head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path}: not the span head of this student ({reason}); train it again") from None
    return model.eval(), tokenizer, card


def finish_student(
    directory: Path, *, config_hash: str, inputs: Mapping[str, str], details: Mapping[str, Any]
) -> None:
    """Write the manifest over all files of the student: from now on the directory is complete."""
    folder = directory / MODEL_FOLDER
    model_files = [p.relative_to(directory).as_posix() for p in folder.iterdir() if p.is_file()]
    num_epochs = len((directory / METRICS_NAME).read_text(encoding="utf-8").splitlines())
    write_manifest(
        directory,
        "student",
        config_hash=config_hash,
        inputs=inputs,
        files=[*model_files, HEADS_NAME, CARD_NAME, CONFIG_NAME, METRICS_NAME],
        rows={METRICS_NAME: num_epochs},
        details=details,
    )


def write_metrics(directory: Path, history: list[dict[str, float]]) -> None:
    """Replace `metrics.jsonl` by the epochs so far."""
    lines = "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history)
    with atomic_path(directory / METRICS_NAME) as temporary:
        temporary.write_text(lines, encoding="utf-8")


def _read_card(path: Path) -> StudentCard:
    try:
        card = StudentCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path}: {field}: {first['msg']}; train the student again") from None
    if card.prompt_version != PROMPT_VERSION or card.connectives != CONNECTIVES:
        raise ArtifactError(
            f"{path}: template version {card.prompt_version} with connectives {', '.join(card.connectives)}, "
            f"this kdecs has {PROMPT_VERSION} with {', '.join(CONNECTIVES)}; train the student again"
        )
    return card
