"""From a student's logits to decisions: emotion of a target, cause or not, best span.

Legend: P pairs, B prompts of a batch, E emotions, S span places (0 = no span), M tokens of u_j's copy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.corpus.schema import NEUTRAL
from kdecs.evaluation.text_match import match, squad_f1
from kdecs.student.batches import Ints
from kdecs.student.model import Batch, StudentModel, StudentOutput
from kdecs.student.threshold import PairGains


@dataclass(frozen=True)
class PairScores:
    """A student's view of P pairs: emotion log-probabilities, cause scores in [0, 1], best spans.

    `span_P2` holds the first and last token of the best span, 1-based within u_j's copy. `emotion_PE` is None for
    a student that is given the emotions, `span_P2` for one that finds no spans (task ecpe).
    """

    emotion_PE: npt.NDArray[np.float32] | None
    cause_P: npt.NDArray[np.float32]
    span_P2: npt.NDArray[np.int64] | None


def cause_scores(output: StudentOutput) -> Tensor:
    """The mean of what the mode has of p(cause) and 1 - p(no span). Shape (B,).

    p(cause): that of the causal words at mask_cau, or the classifier's. p(no span): the geometric mean of start
    and end.
    """
    scores = []
    if output.connective_BA is not None:
        words_BA = functional.softmax(output.connective_BA.float(), dim=-1)
        scores.append(words_BA[:, :NUM_CAUSAL].sum(dim=-1))
    if output.classifier_B2 is not None:
        scores.append(functional.softmax(output.classifier_B2.float(), dim=-1)[:, 1])
    if output.start_BS is not None and output.end_BS is not None:
        no_start_B = functional.log_softmax(output.start_BS, dim=-1)[:, 0]
        no_end_B = functional.log_softmax(output.end_BS, dim=-1)[:, 0]
        scores.append(-torch.expm1((no_start_B + no_end_B) / 2))
    return torch.stack(scores).mean(dim=0)


def best_spans(start_BS: Tensor, end_BS: Tensor) -> Tensor:
    """The likeliest first and last token with first <= last, 1-based: (B, 2)."""
    start_BM, end_BM = start_BS[:, 1:], end_BS[:, 1:]
    # Right of each place the best end, from a running maximum: O(M) in memory instead of M × M.
    flipped_BM, from_right_BM = torch.cummax(end_BM.flip(1), dim=1)
    best_end_BM, end_at_BM = flipped_BM.flip(1), end_BM.size(1) - 1 - from_right_BM.flip(1)
    first_B = (start_BM + best_end_BM).argmax(dim=1, keepdim=True)
    last_B = end_at_BM.gather(1, first_B)
    return torch.cat((first_B, last_B), dim=1) + 1


def score_pairs(
    model: StudentModel,
    batches: Iterable[tuple[Ints, Batch]],
    num_pairs: int,
    *,
    device: torch.device,
    precision: str,
    on_batch: Callable[[int], object] | None = None,
) -> PairScores:
    """Scores of pairs 0 … num_pairs - 1; `batches` gives the places of a batch's pairs and its prompts."""
    emotion_PE = np.zeros((num_pairs, model.num_emotions), np.float32) if model.outputs.emotions else None
    cause_P = np.zeros(num_pairs, dtype=np.float32)
    span_P2 = np.zeros((num_pairs, 2), dtype=np.int64) if model.outputs.spans else None
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(device, precision):
        for places, batch in batches:
            output = model(batch.to(device))
            if emotion_PE is not None:
                emotion_PE[places] = functional.log_softmax(output.emotion_BE.float(), dim=-1).cpu().numpy()
            cause_P[places] = cause_scores(output).cpu().numpy()
            if span_P2 is not None:
                span_P2[places] = best_spans(output.start_BS, output.end_BS).cpu().numpy()
            if on_batch:
                on_batch(len(places))
    model.train(was_training)
    return PairScores(emotion_PE, cause_P, span_P2)


def autocast(device: torch.device, precision: str) -> Any:
    """A context of bfloat16 autocast where the precision asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def target_emotions(
    emotion_PE: npt.NDArray[np.float32],
    target_of_P: Ints,
    is_own_P: npt.NDArray[np.bool_],
    emotions: Sequence[str],
    neutral_offset: float = 0.0,
) -> list[str]:
    """The emotion of each target 0 … max(target_of_P): argmax of the log-probabilities at its own pair (i, i).

    `neutral_offset` is added to neutral's log-probability first.

    Where (i, i) is not among the pairs: of their mean over the target's pairs. Not of the mean in general, since
    which other pairs a scored target has tells whether it is neutral: in training and in fold1 + neutral only
    emotional targets have pairs with j < i, and a student learns to take the hint.
    """
    num_targets = int(target_of_P.max()) + 1
    has_own = np.zeros(num_targets, dtype=bool)
    has_own[target_of_P[is_own_P]] = True
    counts_P = is_own_P | ~has_own[target_of_P]
    sums = np.zeros((num_targets, len(emotions)), dtype=np.float64)
    np.add.at(sums, target_of_P[counts_P], emotion_PE[counts_P])
    if NEUTRAL in emotions:
        sums /= np.bincount(target_of_P[counts_P], minlength=num_targets)[:, None]
        sums[:, list(emotions).index(NEUTRAL)] += neutral_offset
    return [emotions[index] for index in sums.argmax(axis=1)]


def span_text(text: str, offsets_M2: Ints, span: Sequence[int]) -> str:
    """The exact substring of u_j's text from a span's first to its last token (1-based)."""
    start, end = span_characters(offsets_M2, span)
    return text[start:end]


def span_characters(offsets_M2: Ints, span: Sequence[int]) -> tuple[int, int]:
    """The characters [start, end) in u_j's text of a span of tokens (1-based, both included)."""
    return int(offsets_M2[span[0] - 1][0]), int(offsets_M2[span[1] - 1][1])


def pair_gains(
    cause_P: npt.NDArray[np.float32],
    emotion_of_pair: Sequence[str | None],
    gold_spans: Sequence[Sequence[str]],
    predicted_spans: Sequence[str],
) -> PairGains:
    """What each pair is worth as a cause (protocol reccon), for the choice of the threshold."""
    score_P = cause_P.astype(np.float64)
    score_P[np.array([emotion == NEUTRAL for emotion in emotion_of_pair], dtype=bool)] = -np.inf
    f_sum = [
        sum(_row_f(gold, predicted) for gold in spans)
        for spans, predicted in zip(gold_spans, predicted_spans, strict=True)
    ]
    return PairGains(
        score_P, np.array([len(s) for s in gold_spans], dtype=np.float64), np.array(f_sum, dtype=float)
    )


def _row_f(gold: str, predicted: str) -> float:
    kind = match(gold, predicted)
    if kind == "correct":
        return 1.0
    return squad_f1(gold, predicted) if kind == "similar" and predicted.strip() else 0.0
