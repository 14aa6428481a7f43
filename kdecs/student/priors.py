"""Biases that a student starts with: what the training pairs say before a word is read.

Legend: B pairs, E emotions, A connective answer words, M tokens of u_j's copy, S = M + 1 span places, D distances
0 … 7 (the last one stands for all beyond) and, where candidates may be later, one for these; N training rows.

Small encoders learn distance, class balance and the shape of spans slowly, and from a tenth of the corpus hardly at
all. Set from counts, they are there from the first step: a student starts from the distance rule and learns from the
text what the rule does not know. They are parameters like any other and keep learning.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecs.corpus.answer_words import NUM_CAUSAL

NUM_DISTANCES = 8  # most causes lie within a few turns; the last distance stands for 7 and more
PRIOR_NAMES = ("emotion", "connective", "cause", "span", "first_start", "last_end")
_SMOOTHING = 1.0  # added to each count, so that none is 0
Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class TrainingCounts:
    """Counts over the rows with gold labels: emotions of targets, causes and pairs by distance.

    `whole_start` and `whole_end` are the shares of spans that begin with u_j's first token and end with its last;
    `num_tokens` is the mean number of tokens of u_j over the causes with a span.
    """

    emotions_E: Ints
    causes_D: Ints
    pairs_D: Ints
    whole_start: float
    whole_end: float
    num_tokens: float


class Priors(nn.Module):
    """Biases of emotion and connective words, of a cause by distance, and of a span by distance and at u_j's edges.

    Biases without an output in the mode are None: DistributedDataParallel fails on parameters without a gradient.
    """

    def __init__(
        self,
        num_emotions: int,
        num_connectives: int,
        *,
        has_cause: bool = True,
        has_spans: bool = True,
        has_later: bool = False,
    ) -> None:
        super().__init__()
        self._has_later = has_later
        num_distances = NUM_DISTANCES + has_later
        self.emotion = _zeros(num_emotions) if num_emotions else None
        self.connective = _zeros(num_connectives) if num_connectives else None
        self.cause = _zeros(num_distances) if has_cause else None
        self.span = _zeros(num_distances) if has_spans else None
        self.first_start = _zeros() if has_spans else None
        self.last_end = _zeros() if has_spans else None

    def shifted(
        self,
        emotion_BE: Tensor | None,
        connective_BA: Tensor | None,
        classifier_B2: Tensor | None,
        distance_B: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The logits of words and classifier plus their priors, float32; None stays None."""
        if emotion_BE is not None:
            assert self.emotion is not None
            emotion_BE = emotion_BE.float() + self.emotion
        if connective_BA is not None:
            assert self.connective is not None
            # The causal words share one bias, so that their odds among each other come from the text alone.
            causal_BA = self.cause_shift(distance_B).unsqueeze(1).expand(-1, NUM_CAUSAL)
            causal_BA = functional.pad(causal_BA, (0, connective_BA.size(1) - NUM_CAUSAL))
            connective_BA = connective_BA.float() + self.connective + causal_BA
        if classifier_B2 is not None:
            classifier_B2 = classifier_B2.float() + functional.pad(
                self.cause_shift(distance_B).unsqueeze(1), (1, 0)
            )
        return emotion_BE, connective_BA, classifier_B2

    def _index_of(self, distance_B: Tensor) -> Tensor:
        """The place of each distance i - j in a bias; later candidates share the one after the last."""
        index_B = distance_B.clamp(max=NUM_DISTANCES - 1)
        return torch.where(distance_B < 0, NUM_DISTANCES, index_B) if self._has_later else index_B

    def cause_shift(self, distance_B: Tensor) -> Tensor:
        """The bias of the logits of a cause. Shape (B,)."""
        assert self.cause is not None
        return self.cause[self._index_of(distance_B)]

    def span_shift(self, distance_B: Tensor, mask_BM: Tensor) -> tuple[Tensor, Tensor]:
        """The biases of the span logits of start and end, each (B, S): at place 0 and at u_j's edges.

        If all other logits are 0, P(a span) is sigmoid(span[distance]), whatever the number of tokens.
        """
        assert self.span is not None and self.first_start is not None and self.last_end is not None
        span_B = self.span[self._index_of(distance_B)]
        others_B = mask_BM.sum(dim=1) - 1
        first_BM = torch.zeros_like(mask_BM, dtype=span_B.dtype)
        first_BM[:, 0] = 1
        last_BM = torch.zeros_like(first_BM).scatter_(1, others_B.unsqueeze(1), 1)
        shifts = []
        for edge, at_edge_BM in ((self.first_start, first_BM), (self.last_end, last_BM)):
            # With the other logits 0 the places of u_j weigh (M - 1) + exp(edge) together. The bias of "no span" is set
            # against that sum, so that P(a span) is sigmoid(span_B) whatever M is.
            none_B = torch.log(others_B + edge.exp()) - span_B
            shifts.append(torch.cat((none_B.unsqueeze(1), edge * at_edge_BM), dim=1))
        return shifts[0], shifts[1]


def count_training(
    emotion_N: Ints,
    is_own_N: npt.NDArray[np.bool_],
    distance_N: Ints,
    is_cause_N: Ints,
    start_N: Ints,
    end_N: Ints,
    num_tokens_N: Ints,
    num_emotions: int,
    *,
    has_later: bool = False,
) -> TrainingCounts:
    """Counts over training rows. Emotions are counted at the pairs (i, i) only, and unknown ones (-1) not at all."""
    own = emotion_N[is_own_N]
    num_distances = NUM_DISTANCES + has_later
    distance_N = np.where(distance_N < 0, NUM_DISTANCES, np.minimum(distance_N, NUM_DISTANCES - 1))
    # 0 is "no span", -1 a gold span that was truncated away.
    with_span = start_N > 0
    share = [
        float(np.mean(edge[with_span])) if with_span.any() else 0.5
        for edge in (start_N == 1, end_N == num_tokens_N)
    ]
    return TrainingCounts(
        emotions_E=np.bincount(own[own >= 0], minlength=num_emotions),
        causes_D=np.bincount(distance_N[is_cause_N > 0], minlength=num_distances),
        pairs_D=np.bincount(distance_N, minlength=num_distances),
        whole_start=share[0],
        whole_end=share[1],
        num_tokens=float(num_tokens_N[with_span].mean()) if with_span.any() else 1.0,
    )


@torch.no_grad()
def begin_at_counts(
    priors: Priors,
    counts: TrainingCounts,
    emotion_BE: Tensor | None,
    connective_BA: Tensor | None,
    *,
    is_classifier: bool,
) -> None:
    """Set the biases so that the untrained student predicts the counted frequencies.

    `emotion_BE` and `connective_BA` are its own logits on some pairs, whose means the biases offset; None in a mode
    without such logits.
    """
    if emotion_BE is not None:
        assert priors.emotion is not None
        share_E = torch.tensor((counts.emotions_E + _SMOOTHING) / (counts.emotions_E + _SMOOTHING).sum())
        priors.emotion.copy_(share_E.log() - emotion_BE.float().mean(dim=0).cpu())
    odds_D = torch.tensor(
        (counts.causes_D + _SMOOTHING) / (counts.pairs_D - counts.causes_D + _SMOOTHING), dtype=torch.float32
    )
    if connective_BA is not None:
        assert priors.connective is not None
        # Offset the words' own logits only; how probable a cause is comes from `priors.cause`.
        priors.connective.copy_(-connective_BA.float().mean(dim=0).cpu())
    if priors.cause is not None:
        # Four causal words share the probability of a cause; the classifier has one class for it.
        priors.cause.copy_(odds_D.log() - (0.0 if is_classifier else float(np.log(NUM_CAUSAL))))
    if priors.span is not None:
        priors.span.copy_(odds_D.log())
    others = max(counts.num_tokens - 1, 1.0)
    for parameter, share in ((priors.first_start, counts.whole_start), (priors.last_end, counts.whole_end)):
        if parameter is not None:
            # The edge against `others` places of logit 0. Bounded, since a share of 0 or 1 has no finite bias.
            bounded = min(max(share, 0.01), 0.99)
            parameter.fill_(float(np.log(bounded / (1 - bounded) * others)))


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
