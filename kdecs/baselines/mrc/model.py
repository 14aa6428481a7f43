"""The MRC baseline: a question-answering model, its batches and scores, and its product of kind mrc.

    model/          a Transformers question-answering model (safetensors) with its tokenizer
    mrc.json        MrcCard: what prediction needs to know
    config.json     the resolved config of the training
    metrics.jsonl   one JSON object per epoch
    manifest.json   details: metrics on validation, threshold

Loading unpickles nothing. Legend: B questions, T tokens of question and context.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from kdecs.artifact import read_record, write_json
from kdecs.baselines.config import QUESTION_VERSION
from kdecs.baselines.dialogues import UNKNOWN
from kdecs.baselines.model import LossPart, cross_entropy
from kdecs.baselines.mrc.questions import UNKNOWN_ANSWER, EncodedQuestion
from kdecs.errors import ArtifactError, ModelError
from kdecs.models import load_pretrained, load_tokenizer, save_pretrained
from kdecs.process import refusing
from kdecs.runtime import on_device
from kdecs.student.decision import best_spans
from kdecs.student.model import MODEL_FOLDER

_PAD_MULTIPLE = 8


class QuestionBatch(NamedTuple):
    """Tensors of B questions, int64 except for the bool `attention_BT` and `answerable_BT`.

    `start_B` and `end_B` are the gold answer's first and last token: 0 for no answer, -1 if it was truncated away.
    """

    token_ids_BT: Tensor
    type_ids_BT: Tensor
    attention_BT: Tensor
    answerable_BT: Tensor
    start_B: Tensor
    end_B: Tensor

    def to(self, device: torch.device) -> "QuestionBatch":
        """The same batch on a device."""
        return QuestionBatch(*(on_device(tensor, device) for tensor in self))


def question_batch(encoded: Sequence[EncodedQuestion], pad_id: int) -> QuestionBatch:
    """Questions padded on the right to the longest, rounded up to a multiple of 8 tokens."""
    width = -(-max(len(question.token_ids) for question in encoded) // _PAD_MULTIPLE) * _PAD_MULTIPLE
    shape = (len(encoded), width)
    token_ids_BT = np.full(shape, pad_id, dtype=np.int64)
    type_ids_BT = np.zeros(shape, dtype=np.int64)
    attention_BT, answerable_BT = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, question in enumerate(encoded):
        length = len(question.token_ids)
        token_ids_BT[row, :length] = question.token_ids
        type_ids_BT[row, :length] = question.type_ids
        attention_BT[row, :length] = True
        answerable_BT[row, :length] = question.answerable
    gold = ([q.answer_start for q in encoded], [q.answer_end for q in encoded])
    arrays = (token_ids_BT, type_ids_BT, attention_BT, answerable_BT, *map(np.array, gold))
    return QuestionBatch(*map(torch.from_numpy, arrays))


def load_reader(reference: str | Path, *, has_head: bool = False) -> Any:
    """The base with a question-answering head in float32; the head is new unless the base `has_head`.

    Raises ModelError if it cannot be loaded or lacks other weights.
    """
    reader, missing = load_pretrained(AutoModelForQuestionAnswering, reference, "a question-answering model")
    lacking = [key for key in missing if has_head or not key.startswith("qa_outputs.")]
    if lacking:
        raise ModelError(f"{reference}: found no weights for {lacking[0]}, expected a whole encoder")
    return reader


def answer_logits(reader: Any, batch: QuestionBatch) -> tuple[Tensor, Tensor]:
    """Float32 logits (B, T) of an answer's first and last token; -inf at tokens where no answer may begin or end."""
    # What joins the gradients of several ranks wraps the reader and has no config.
    config = getattr(reader, "module", reader).config
    # RoBERTa has a single segment, and an id of 1 would be out of range.
    segments = {"token_type_ids": batch.type_ids_BT} if getattr(config, "type_vocab_size", 0) > 1 else {}
    output = reader(input_ids=batch.token_ids_BT, attention_mask=batch.attention_BT.long(), **segments)
    barred_BT = ~batch.answerable_BT
    barred_BT[:, 0] = False  # "no answer" is always possible
    return (
        output.start_logits.float().masked_fill(barred_BT, -torch.inf),
        output.end_logits.float().masked_fill(barred_BT, -torch.inf),
    )


def answer_loss(start_BT: Tensor, end_BT: Tensor, start_B: Tensor, end_B: Tensor) -> LossPart:
    """SQuAD's loss: the cross-entropies of first and last token, over the questions with a known answer."""
    assert UNKNOWN_ANSWER == UNKNOWN
    start, end = cross_entropy(start_BT, start_B), cross_entropy(end_BT, end_B)
    return LossPart(start.total + end.total, start.count + end.count)


def answers(start_BT: Tensor, end_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B,) in [0, 1], and the first and last tokens (B, 2) of the best answers.

    The score is σ(s_answer - s_null), where each s is the sum of the logits of a first and a last token: SQuAD 2.0's
    difference, mapped to [0, 1] so that its threshold is like a student's.
    """
    # `best_spans` leaves out place 0, here the classifier token, and counts from 1: its places are token indices.
    span_B2 = torch.from_numpy(best_spans(start_BT.cpu().numpy(), end_BT.cpu().numpy())).to(start_BT.device)
    best_B = start_BT.gather(1, span_B2[:, :1]) + end_BT.gather(1, span_B2[:, 1:])
    return torch.sigmoid(best_B.squeeze(1) - start_BT[:, 0] - end_BT[:, 0]), span_B2


CARD_NAME = "mrc.json"
READER_NAMES = (MODEL_FOLDER, CARD_NAME)
"""What `save_reader` writes."""


class MrcCard(BaseModel):
    """`mrc.json`: the question's version, the input's length and the threshold of "no answer"."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    question_version: int
    max_tokens: int = Field(ge=48)
    answer_within: Literal["context", "candidate"]
    threshold: float = Field(ge=0, le=1, description="a pair is a cause if its score is at least this")


def save_reader(directory: Path, reader: Any, tokenizer: Any, card: MrcCard) -> None:
    """Write weights, tokenizer and card into a directory, without config, metrics and manifest."""
    save_pretrained([reader, tokenizer], directory / MODEL_FOLDER)
    write_json(directory / CARD_NAME, card.model_dump(mode="json"))


def load_product(directory: Path) -> tuple[Any, Any, MrcCard]:
    """Model (float32, on the CPU, in evaluation mode), tokenizer and card.

    Raises ArtifactError if the card does not fit, ModelError if the weights cannot be loaded.
    """
    path = directory / CARD_NAME
    card = read_record(MrcCard, path, "train the baseline again")
    if card.question_version != QUESTION_VERSION:
        raise ArtifactError(
            f"{path}: the baseline was trained with question version {card.question_version}, but this kdecs uses "
            f"version {QUESTION_VERSION}; train the baseline again"
        )
    folder = directory / MODEL_FOLDER
    reader, tokenizer = load_reader(folder, has_head=True).eval(), load_tokenizer(folder)
    # Settings that load may still not run, which a first question shows.
    with refusing(f"model {folder}: does not run as a question-answering model"), torch.no_grad():
        ids_BT = torch.arange(8).unsqueeze(0) % reader.config.vocab_size
        gold_B = torch.zeros(1, dtype=torch.long)
        is_text_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        answer_logits(
            reader, QuestionBatch(ids_BT, torch.zeros_like(ids_BT), is_text_BT, is_text_BT, gold_B, gold_B)
        )
    return reader, tokenizer, card
