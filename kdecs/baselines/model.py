"""What the systems of Table 4 share here: the encoder, the span head, the losses.

`BaselineModel` is a masked language model with a system on it, `UtteranceModel` one that reads each utterance by itself
and joins the vectors. A system is a subclass with its own module, which reads like its paper.

All systems decide about target i from u_1 … u_i alone, as a teacher and a student do, where the papers' documents are
read as a whole: what looks from one utterance at others has a causal mask. ECPE-2D alone takes candidates after the
target, and then reads as far as they reach.

Legend: D dialogues, N utterances of the longest, R utterances in a row, T tokens with [CLS] and [SEP], M tokens of a
text, S = M + 1 span places (0 = no span), P pairs, Q pairs whose spans are wanted, H hidden, E emotions, V size of a
pair's vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecs.baselines.config import Task
from kdecs.baselines.dialogues import (
    UNKNOWN,
    DialogueEncoder,
    EncodedDialogue,
    Labels,
    RowGroup,
    UtteranceBatch,
)

SPAN_SIZE = 128


class Output(NamedTuple):
    """Raw logits. Those of spans are -inf beyond a candidate's own tokens; None where the task has no spans.

    `cause_P` is the logit of "a cause". `own` holds what only this system's losses need.
    """

    emotion_DNE: Tensor
    cause_P: Tensor
    start_QS: Tensor | None = None
    end_QS: Tensor | None = None
    own: Any = None


class LossPart(NamedTuple):
    """A part of a loss: a sum, and the number of labels that it is a sum over.

    The ranks of a training share a batch and have different numbers of its labels, so the mean is taken over all ranks.
    """

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """The sum by the number; 0, not NaN, without a label."""
        return self.total / self.count.clamp(min=1)


class PairView(NamedTuple):
    """What an utterance-wise system makes of a batch: emotion logits, cause logits, and a vector per pair."""

    emotion_DNE: Tensor
    cause_P: Tensor
    vector_PV: Tensor
    own: Any = None


class BaselineModel(nn.Module, ABC):
    """A masked language model and what a system puts on it. The subclass names its losses (`parts`), in order."""

    parts: tuple[str, ...] = ("emotion", "pair")

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model
        self.hidden_size: int = language_model.config.hidden_size

    @property
    def encoder(self) -> Any:
        """The language model without its head."""
        return self.language_model.base_model

    def head_tensors(self) -> dict[str, Tensor]:
        """The tensors beside the language model, by name."""
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith("language_model.")
        }

    @abstractmethod
    def inputs(self, dialogues: Sequence[EncodedDialogue], pairs_P3: Tensor, encoder: DialogueEncoder) -> Any:
        """The dialogues as nested named tuples of tensors, for the pairs (dialogue, target, candidate)."""

    @abstractmethod
    def forward(self, inputs: Any, pairs_P3: Tensor, spanned_P: Tensor) -> Output:
        """Logits of all utterances' emotions and of the pairs; spans for the pairs that `spanned_P` marks."""

    @abstractmethod
    def losses(self, output: Output, labels: Labels, spanned_P: Tensor) -> list[LossPart]:
        """The parts of the loss in the order of `parts`, each over what has a label; the sum of means is trained."""

    def states_of(self, group: RowGroup) -> Tensor:
        """The encoder's states (G, T, H) of a group of rows."""
        states_GTH: Tensor = self.encoder(
            input_ids=group.token_ids_GT, attention_mask=group.attention_GT.long()
        )[0]
        return states_GTH


class SpanHead(nn.Module):
    """Spans for a system that only scores pairs: "a simple modification", as the paper of Table 4 has it.

    For a pair with the vector r and the states h_t of the candidate's tokens:

        start_t = v_s · tanh(A_s h_t + B_s r),  end_t = v_e · tanh(A_e h_t + B_e r),  no span: c_s · r and c_e · r

    The paper says no more than those words; this form is a choice made here, the same for all systems.
    """

    def __init__(self, hidden_size: int, pair_size: int) -> None:
        super().__init__()
        self.token = nn.Linear(hidden_size, 2 * SPAN_SIZE)
        self.pair = nn.Linear(pair_size, 2 * SPAN_SIZE, bias=False)
        self.score = nn.Parameter(torch.empty(2, SPAN_SIZE).uniform_(-(SPAN_SIZE**-0.5), SPAN_SIZE**-0.5))
        self.none = nn.Linear(pair_size, 2)

    def forward(
        self, states_RMH: Tensor, is_text_RM: Tensor, row_Q: Tensor, vector_QV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (Q, S) of start and end, for pairs whose candidates are the rows `row_Q`."""
        # The tokens' part once per utterance, however many pairs it is the candidate of.
        tokens_QMF = self.token(states_RMH)[row_Q]
        mixed_QM2A = torch.tanh(tokens_QMF + self.pair(vector_QV)[:, None]).unflatten(-1, (2, SPAN_SIZE))
        logits_QM2 = (mixed_QM2A * self.score).sum(-1).float()
        logits_QM2 = logits_QM2.masked_fill(~is_text_RM[row_Q][..., None], -torch.inf)
        logits_QS2 = torch.cat((self.none(vector_QV).float()[:, None], logits_QM2), 1)
        return logits_QS2[..., 0], logits_QS2[..., 1]


class UtteranceModel(BaselineModel):
    """A system over one vector per utterance. The subclass makes a `PairView` of them."""

    def __init__(self, language_model: Any, task: Task, pair_size: int) -> None:
        super().__init__(language_model)
        self.span_head = SpanHead(self.hidden_size, pair_size) if task == "ecspe" else None
        if self.span_head is not None:
            self.parts = (*type(self).parts, "span")

    def utterances(self, inputs: Any) -> UtteranceBatch:
        """The utterances among the inputs."""
        batch: UtteranceBatch = inputs
        return batch

    @abstractmethod
    def view(self, inputs: Any, states_RTH: Tensor, pairs_P3: Tensor) -> PairView:
        """The system itself, from the states of the tokens of each utterance."""

    def forward(self, inputs: Any, pairs_P3: Tensor, spanned_P: Tensor) -> Output:
        """Logits of all utterances' emotions and of the pairs; spans for the pairs that `spanned_P` marks."""
        batch = self.utterances(inputs)
        states_RTH = self.token_states(batch)
        view = self.view(inputs, states_RTH, pairs_P3)
        if self.span_head is None:
            return Output(view.emotion_DNE, view.cause_P, own=view.own)
        dialogue_Q, _, candidate_Q = pairs_P3[spanned_P].unbind(1)
        num_places = batch.is_text_RM.size(1)
        start_QS, end_QS = self.span_head(
            states_RTH[:, 1 : 1 + num_places],
            batch.is_text_RM,
            batch.row_DN[dialogue_Q, candidate_Q],
            view.vector_PV[spanned_P],
        )
        return Output(view.emotion_DNE, view.cause_P, start_QS, end_QS, view.own)

    def token_states(self, batch: UtteranceBatch) -> Tensor:
        """The states (R, T, H) of all tokens, 0 where a row has none."""
        states = [self.states_of(group) for group in batch.groups]
        width = batch.is_text_RM.size(1) + 2
        # Padded to one width and put into the order of the rows by a single selection, whose gradient is cheap.
        rows_R = torch.cat([group.rows_G for group in batch.groups])
        together_RTH = torch.cat([_to_width(item, width) for item in states])
        return together_RTH[torch.argsort(rows_R)]

    def first_states(self, batch: UtteranceBatch, states_RTH: Tensor) -> Tensor:
        """(D, N, H): the state of each utterance's [CLS]."""
        return states_RTH[:, 0][batch.row_DN]

    def losses(self, output: Output, labels: Labels, spanned_P: Tensor) -> list[LossPart]:
        """Emotion and pair, and the span's part if the task has spans; a system puts its own between them."""
        return [
            cross_entropy(output.emotion_DNE.flatten(0, 1), labels.emotion_DN.flatten()),
            pair_loss(output.cause_P, labels.is_cause_P),
            *self.span_losses(output, labels, spanned_P),
        ]

    def span_losses(self, output: Output, labels: Labels, spanned_P: Tensor) -> list[LossPart]:
        """The sum of the cross-entropies of start and end, as for a student (Eq. 11); none without spans."""
        if output.start_QS is None or output.end_QS is None:
            return []
        start = cross_entropy(output.start_QS, labels.start_P[spanned_P])
        end = cross_entropy(output.end_QS, labels.end_P[spanned_P])
        return [LossPart(start.total + end.total, start.count)]  # a span's ends are known together


def _to_width(states_GTH: Tensor, width: int) -> Tensor:
    missing = width - states_GTH.size(1)
    return functional.pad(states_GTH, (0, 0, 0, missing)) if missing >= 0 else states_GTH[:, :width]


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> LossPart:
    """The sum over the rows whose label is known, and their number."""
    total = functional.cross_entropy(logits_BC.float(), labels_B, ignore_index=UNKNOWN, reduction="sum")
    return LossPart(total, (labels_B != UNKNOWN).sum())


def pair_loss(cause_P: Tensor, is_cause_P: Tensor) -> LossPart:
    """The binary cross-entropy of the pairs whose label is known. A softmax over two classes is the same thing."""
    known_P = is_cause_P != UNKNOWN
    total = functional.binary_cross_entropy_with_logits(
        cause_P.float(), is_cause_P.clamp(min=0).float(), weight=known_P.float(), reduction="sum"
    )
    return LossPart(total, known_P.sum())


def causal_mask(size: int, device: torch.device, after: int = 0) -> Tensor:
    """(N, N), True where utterance i may look at j: j <= i + `after`."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(after)
