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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdecs.artifact import atomic_path, read_manifest, write_json, write_manifest
from kdecs.config import CONFIG_NAME
from kdecs.errors import ArtifactError, refusing
from kdecs.models import load_tokenizer, save_pretrained
from kdecs.runtime import start_runtime
from kdecs.student.config import StudentConfig
from kdecs.student.model import StudentModel, TorchScorer, load_language_model, student_answer_ids
from kdecs.student.predict.card import CARD_NAME, StudentCard, read_card
from kdecs.student.priors import PRIOR_NAMES
from kdecs.tracking.record import METRICS_NAME

MODEL_FOLDER = "model"
HEADS_NAME = "heads.safetensors"
VALIDATION_NAME = "valid-predictions.jsonl"
STUDENT_NAMES = (MODEL_FOLDER, HEADS_NAME, CARD_NAME)
"""What `save_student` writes."""


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
    card = read_card(directory / CARD_NAME)
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


def load_scorer(
    directory: Path, *, device: torch.device | str, precision: str
) -> tuple[TorchScorer, Any, StudentCard]:
    """Scorer, tokenizer and card of a student directory, on a device of torch or on auto, cpu or cuda."""
    if device in ("auto", "cpu", "cuda"):
        device = start_runtime(device=str(device)).device
    model, tokenizer, card = load_student(directory)
    scorer = TorchScorer(
        model, pad_id=tokenizer.pad_token_id or 0, device=torch.device(device), precision=precision
    )
    return scorer, tokenizer, card


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
