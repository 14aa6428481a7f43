"""The MRC baseline's network: an encoder with two scores a token, and what they decide.

Legend: B questions, T tokens (0 = the classifier's token = no answer), H hidden.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering

from kdecs.errors import ModelError
from kdecs.mrc.encoding import UNKNOWN_ANSWER, EncodedQuestion
from kdecs.quiet import without_progress_bars, without_reports
from kdecs.student.inference import best_spans
from kdecs.student.model import on_device

_PAD_MULTIPLE = 8


class QuestionBatch(NamedTuple):
    """Tensors of B questions, int64 but for the bool `attention_BT` and `answerable_BT`; `start_B`, `end_B`: gold."""

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
    """The base with a question-answering head in float32, from safetensors; the head is new unless it `has_head`.

    Raises ModelError, one line, where it cannot be loaded or lacks other weights.
    """
    try:
        with without_progress_bars(), without_reports():
            reader, report = AutoModelForQuestionAnswering.from_pretrained(
                str(reference), dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{reference}: no question-answering model could be loaded from there ({reason})"
        ) from None
    lacking = sorted(k for k in report["missing_keys"] if has_head or not k.startswith("qa_outputs."))
    if lacking:
        raise ModelError(f"{reference}: found no weights for {lacking[0]}, expected a whole encoder")
    return reader


def answer_logits(reader: Any, batch: QuestionBatch) -> tuple[Tensor, Tensor]:
    """Float32 logits (B, T) of an answer's first and last token; -inf where no answer may begin or end."""
    segments = (
        {"token_type_ids": batch.type_ids_BT} if getattr(reader.config, "type_vocab_size", 0) > 1 else {}
    )
    output = reader(input_ids=batch.token_ids_BT, attention_mask=batch.attention_BT.long(), **segments)
    barred_BT = ~batch.answerable_BT
    barred_BT[:, 0] = False
    return (
        output.start_logits.float().masked_fill(barred_BT, -torch.inf),
        output.end_logits.float().masked_fill(barred_BT, -torch.inf),
    )


def answer_loss(start_BT: Tensor, end_BT: Tensor, start_B: Tensor, end_B: Tensor) -> Tensor:
    """The mean of the cross-entropies of first and last token (SQuAD), a mean over the questions with known answers."""
    known = (start_B != UNKNOWN_ANSWER).sum().clamp(min=1)
    start, end = (
        functional.cross_entropy(logits_BT, gold_B, ignore_index=UNKNOWN_ANSWER, reduction="sum")
        for logits_BT, gold_B in ((start_BT, start_B), (end_BT, end_B))
    )
    return (start + end) / (2 * known)


def answers(start_BT: Tensor, end_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B,) in [0, 1] and the best answers' first and last tokens (B, 2).

    The score is σ(s_answer - s_null), each the sum of a first and a last token's logit (SQuAD 2.0's difference,
    brought into [0, 1] by an increasing function).
    """
    span_B2 = best_spans(start_BT, end_BT)
    best_B = start_BT.gather(1, span_B2[:, :1]) + end_BT.gather(1, span_B2[:, 1:])
    return torch.sigmoid(best_B.squeeze(1) - start_BT[:, 0] - end_BT[:, 0]), span_B2
