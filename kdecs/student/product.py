"""The product of a student's training, an artifact directory of kind student.

    model/              a Transformers masked language model (safetensors) with its tokenizer
    heads.safetensors   the tensors of the heads beside the language model (span, classifier, priors)
    student.json        StudentCard: what a predictor needs to know
    valid-predictions.jsonl   predictions of these weights for the validation pairs (kdecs.evaluation.predictions)
    config.json         the resolved config of the training
    metrics.jsonl       one JSON object per epoch
    manifest.json       details: metrics on validation, threshold, emotions, teacher

Loading unpickles nothing. The validation predictions are those that the best epoch was scored by; students of earlier
versions of kdecs have none.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdecs.artifact import atomic_path, read_manifest, write_json, write_manifest
from kdecs.config import CONFIG_NAME
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION, PromptVariant
from kdecs.errors import ArtifactError
from kdecs.models import load_tokenizer, refusing, save_pretrained
from kdecs.student.config import CONNECTIVE_MODES, Mode, StudentConfig
from kdecs.student.model import (
    CauseBy,
    Outputs,
    StudentModel,
    load_language_model,
    student_answer_ids,
)
from kdecs.student.priors import PRIOR_NAMES
from kdecs.tracking.record import METRICS_NAME

MODEL_FOLDER = "model"
HEADS_NAME = "heads.safetensors"
CARD_NAME = "student.json"
VALIDATION_NAME = "valid-predictions.jsonl"
STUDENT_NAMES = (MODEL_FOLDER, HEADS_NAME, CARD_NAME)
"""What `save_student` writes."""


class StudentCard(BaseModel):
    """`student.json`: what a predictor has to know in addition to the weights."""

    # Fields with a default were added later: cards of earlier versions lack them.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    emotions: tuple[str, ...] = Field(min_length=1)
    stand_ins: dict[str, str]
    connectives: tuple[str, ...]
    span_head: Literal["position", "pointer"]
    max_prompt_tokens: int = Field(ge=32)
    prompt_version: int
    threshold: float = Field(ge=0, le=1, description="a pair is a cause if its score is at least this")
    neutral_offset: float = Field(
        default=0.0, description="added to neutral's log-probability in the decision"
    )
    mode: Mode = "kd"
    task: Literal["ecspe", "ecpe"] = "ecspe"
    priors: bool = False
    layout: Literal["pair", "tree"] = "pair"
    given_emotions: dict[str, str] | None = Field(
        default=None, description="if not null, the prompt gives the target's emotion, mapped by this table"
    )
    history_utterances: int | None = None

    @property
    def outputs(self) -> Outputs:
        """What the model of this mode predicts."""
        cause_by: dict[str, CauseBy] = {"cls": "cls", "span_only": "none"}
        return Outputs(
            cause_by=cause_by.get(self.mode, "connective"),
            emotions=self.given_emotions is None,
            spans=self.task == "ecspe",
            priors=self.priors,
        )

    @property
    def prompt(self) -> PromptVariant:
        """The variant of the prompt that this mode uses."""
        return PromptVariant(
            has_connective=self.mode in CONNECTIVE_MODES,
            given_emotions=self.given_emotions,
            history_utterances=self.history_utterances,
        )


def save_student(directory: Path, model: StudentModel, tokenizer: Any, card: StudentCard) -> None:
    """Write weights, tokenizer and card into a directory, without config, metrics and manifest."""
    save_pretrained([model.language_model, tokenizer], directory / MODEL_FOLDER)
    with atomic_path(directory / HEADS_NAME) as temporary:
        save_file(_head_tensors(model), temporary)
    write_json(directory / CARD_NAME, card.model_dump(mode="json"))


def load_student(directory: Path) -> tuple[StudentModel, Any, StudentCard]:
    """Model (float32, on the CPU, in evaluation mode), tokenizer and card of a student directory.

    Raises ArtifactError for a card or heads that do not fit, ModelError where the weights cannot be loaded.
    """
    card = _read_card(directory / CARD_NAME)
    folder = directory / MODEL_FOLDER
    tokenizer, language_model = load_tokenizer(folder), load_language_model(folder, has_head=True)
    # Settings that load may still not run, which a first prompt shows (`StudentModel`).
    with refusing(f"model {folder}: does not run as a student's"):
        model = StudentModel(
            language_model,
            student_answer_ids(tokenizer, card.emotions, card.stand_ins),
            span_head=card.span_head,
            max_prompt_tokens=card.max_prompt_tokens,
            outputs=card.outputs,
        )
    path = directory / HEADS_NAME
    try:
        _load_heads(model, load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path}: does not hold the heads of this student ({reason}); train the student again"
        ) from None
    return model.eval(), tokenizer, card


def _head_tensors(model: StudentModel) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, head in model.heads.items()
        for key, tensor in head.state_dict().items()
    }


def _load_heads(model: StudentModel, tensors: dict[str, Tensor]) -> None:
    """Load the heads. Raises RuntimeError if a tensor is missing, unknown, or of another shape."""
    # Earlier versions also saved priors that the mode does not use.
    if model.priors is not None:
        own = model.priors.state_dict()
        unused = {f"priors.{name}" for name in PRIOR_NAMES if name not in own}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in unused}
    # `load_state_dict` checks each head's own tensors, but sees no tensor of a head that this student lacks.
    if unknown := sorted(set(tensors) - set(_head_tensors(model))):
        raise RuntimeError(f"unexpected tensor {unknown[0]}")
    for name, head in model.heads.items():
        prefix = f"{name}."
        head.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})


def finish_student(
    directory: Path, *, config_hash: str, inputs: Mapping[str, str], details: Mapping[str, Any]
) -> None:
    """Write the manifest over all files of the student, which makes the directory complete."""
    folder = directory / MODEL_FOLDER
    model_files = [p.relative_to(directory).as_posix() for p in folder.rglob("*") if p.is_file()]
    rows = {METRICS_NAME: _num_lines(directory / METRICS_NAME)}
    if (directory / VALIDATION_NAME).is_file():
        rows[VALIDATION_NAME] = _num_lines(directory / VALIDATION_NAME)
    write_manifest(
        directory,
        "student",
        config_hash=config_hash,
        inputs=inputs,
        files=[*model_files, HEADS_NAME, CARD_NAME, CONFIG_NAME, *rows],
        rows=rows,
        details=details,
    )


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _read_card(path: Path) -> StudentCard:
    try:
        card = StudentCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path}: {field}: {first['msg']}; train the student again") from None
    # Another wording would still predict, only worse, and nobody would notice.
    if card.prompt_version != PROMPT_VERSION or card.connectives != CONNECTIVES:
        raise ArtifactError(
            f"{path}: the student was trained with prompt version {card.prompt_version} and the connectives "
            f"{', '.join(card.connectives)}, but this kdecs uses version {PROMPT_VERSION} and "
            f"{', '.join(CONNECTIVES)}; train the student again"
        )
    return card


def teacher_lineage(config: StudentConfig) -> dict[str, Any] | None:
    """Where the soft labels come from, by their own manifests; None without distillation.

    Of several teachers the first stands where a single one would, and `teachers` lists all with their weights.
    """
    used = config.distillation.used_teachers
    if not used:
        return None
    lineages = []
    for teacher in used:
        manifest = read_manifest(teacher.labels, "soft-labels")
        lineages.append(
            {"inputs": manifest.inputs, "soft_labels_hash": manifest.config_hash, "details": manifest.details}
        )
    if len(used) == 1:
        return lineages[0]
    weighed = [{**lineage, "weight": teacher.weight} for lineage, teacher in zip(lineages, used, strict=True)]
    return {**lineages[0], "teachers": weighed}
