"""ECPE-2D: emotion-cause pairs by a two-dimensional transformer over the matrix of pairs.

Ding, Xia and Yu, "ECPE-2D: Emotion-Cause Pair Extraction based on Joint Two-Dimensional Representation, Interaction and
Prediction", ACL 2020. Here: the variant Inter-EC, which predicts emotions first and shows them to the causes, with
cross-road interaction, or with `window` the window-constrained one. In the order of the paper: representation (section
3.1), interaction (3.2), prediction (3.3).

What differs from the paper:

- Both sides read the encoder's [CLS] of an utterance; the paper's cause side reads word2vec by a BiLSTM.
- The vector of [CLS] comes from the last layer, without BERT's pooler, which RoBERTa's checkpoints do not have.
- Emotions are a softmax over the corpus' labels (7 or 16), not over emotion and no emotion.
- Causality: the emotion side has a causal mask, the cause side a forward LSTM of the same width instead of a BiLSTM,
  the matrix the cells j <= i alone, or j <= i + k if candidates may follow their target by k turns, and a cell
  interacts with those of its row and of targets up to its own.
- A span head over the cell (kdecs.baselines.model.SpanHead).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecs.baselines.config import Ecpe2d, Task
from kdecs.baselines.dialogues import (
    DialogueEncoder,
    EncodedDialogue,
    Labels,
    UtteranceBatch,
    utterance_batch,
)
from kdecs.baselines.model import (
    LossPart,
    Output,
    PairView,
    UtteranceModel,
    causal_mask,
    cross_entropy,
    pair_loss,
)

_DISTANCES = 50  # rows of the table of relative positions


class Ecpe2dModel(UtteranceModel):
    """Inter-EC with a pair matrix (D, N, N) of cells (i, j) for target i and candidate j."""

    parts = ("emotion", "cause", "pair", "l2")

    def __init__(
        self,
        language_model: Any,
        system: Ecpe2d,
        num_emotions: int,
        task: Task,
        candidates_after: int = 0,
    ) -> None:
        super().__init__(language_model, task, system.pair_size)
        self.system = system
        self.after = candidates_after
        size, cell = system.hidden_size, system.pair_size
        self.emotion_side = nn.Linear(self.hidden_size, size)
        self.emotion_layer = nn.TransformerEncoderLayer(
            size, nhead=1, dim_feedforward=size, dropout=system.dropout, batch_first=True
        )
        self.cause_side = nn.Linear(self.hidden_size, size)
        self.cause_layer = nn.LSTM(size + num_emotions, size, batch_first=True)
        self.emotion_head, self.cause_head = nn.Linear(size, num_emotions), nn.Linear(size, 2)
        # One linear map of each row of the sum in the paper's M_ij.
        self.of_emotion, self.of_cause = nn.Linear(size, cell), nn.Linear(size, cell, bias=False)
        self.of_emotion_p = nn.Linear(num_emotions, cell, bias=False)
        self.of_cause_p = nn.Linear(2, cell, bias=False)
        self.of_distance = nn.Embedding(_DISTANCES + candidates_after, cell)
        self.roads = nn.ModuleList(
            CrossRoad(cell, system.dropout)
            if system.window is None
            else Window(cell, system.dropout, system.window)
            for _ in range(system.layers)
        )
        self.pair_head = nn.Linear(cell, 1)
        self.dropout = nn.Dropout(system.dropout)

    def inputs(self, dialogues: Sequence[EncodedDialogue], pairs_P3: Tensor, encoder: DialogueEncoder) -> Any:
        """The utterances of the dialogues."""
        del pairs_P3
        return utterance_batch(dialogues, encoder)

    def view(self, inputs: UtteranceBatch, states_RTH: Tensor, pairs_P3: Tensor) -> PairView:
        """Representation, interaction, prediction."""
        first_DNH = self.dropout(self.first_states(inputs, states_RTH))
        size = first_DNH.size(1)
        sees_NN = causal_mask(size, first_DNH.device)
        # Emotions first; the causes see their distribution, which learns nothing from them.
        emotion_DNC = self.emotion_layer(self.emotion_side(first_DNH), src_mask=~sees_NN)
        emotion_DNE = self.emotion_head(self.dropout(emotion_DNC))
        emotion_p_DNE = functional.softmax(emotion_DNE.float(), -1).detach().to(first_DNH.dtype)
        cause_DNC, _ = self.cause_layer(torch.cat((self.cause_side(first_DNH), emotion_p_DNE), -1))
        causes_DN2 = self.cause_head(self.dropout(cause_DNC))
        cause_p_DN2 = functional.softmax(causes_DN2.float(), -1).to(first_DNH.dtype)
        if self.system.stop_gradient:
            emotion_DNC, cause_DNC, cause_p_DN2 = (
                emotion_DNC.detach(),
                cause_DNC.detach(),
                cause_p_DN2.detach(),
            )
        # M_ij, the sum of what i says, what j says, and how far apart they are.
        rows_DNV = self.of_emotion(emotion_DNC) + self.of_emotion_p(emotion_p_DNE)
        columns_DNV = self.of_cause(cause_DNC) + self.of_cause_p(cause_p_DN2)
        place_N = torch.arange(size, device=first_DNH.device)
        # From the farthest later candidate, in the first row of the table, to the farthest earlier one.
        distance_NN = (place_N[:, None] - place_N).clamp(-self.after, _DISTANCES - 1) + self.after
        cells = functional.relu(rows_DNV[:, :, None] + columns_DNV[:, None] + self.of_distance(distance_NN))
        is_pair_DNN = causal_mask(size, first_DNH.device, self.after)[None]
        if self.after:  # else what pads a dialogue follows all of its targets
            is_pair_DNN = is_pair_DNN & inputs.is_real_DN[:, None]
        for road in self.roads:
            cells = road(cells, is_pair_DNN)
        dialogue_P, target_P, candidate_P = pairs_P3.unbind(1)
        cells_PV = cells[dialogue_P, target_P, candidate_P]
        cause_P = self.pair_head(self.dropout(cells_PV)).squeeze(-1)
        return PairView(emotion_DNE, cause_P, cells_PV, causes_DN2)

    def losses(self, output: Output, labels: Labels, spanned_P: Tensor) -> list[LossPart]:
        """Emotions, causes and pairs with equal weights, the squared weights of their heads, and spans."""
        squares = [
            head.weight.square().sum() for head in (self.emotion_head, self.cause_head, self.pair_head)
        ]
        return [
            cross_entropy(output.emotion_DNE.flatten(0, 1), labels.emotion_DN.flatten()),
            cross_entropy(output.own.flatten(0, 1), labels.causes_DN.flatten()),
            pair_loss(output.cause_P, labels.is_cause_P),
            # Each rank has the whole of it and counts it once.
            LossPart(
                self.system.l2 * torch.stack(squares).sum(), torch.ones_like(squares[0], dtype=torch.long)
            ),
            *self.span_losses(output, labels, spanned_P),
        ]


class CrossRoad(nn.Module):
    """A transformer layer over the matrix: a cell attends to the cells of its row and, apart, of its column.

    The two have their own weights and are averaged.
    """

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.along_row, self.along_column = nn.Linear(size, 3 * size), nn.Linear(size, 3 * size)
        self.feed_forward = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        self.first_norm, self.second_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor, is_pair_DNN: Tensor) -> Tensor:
        """(D, N, N, V) from the same; `is_pair_DNN`, or (N, N) for all dialogues, says which cells are pairs."""
        # In row i the candidates of i: the same for every query of that row.
        by_row = _attention(self.along_row(cells), is_pair_DNN.unsqueeze(-2))
        # In column j the targets whose candidate j is, up to i. A cell that is no pair sees itself, or its softmax
        # would be over nothing.
        sees_NN = causal_mask(cells.size(1), cells.device)
        itself_NN = torch.eye(len(sees_NN), dtype=torch.bool, device=cells.device)
        sees_column = (sees_NN & is_pair_DNN.transpose(-2, -1).unsqueeze(-2)) | itself_NN
        by_column = _attention(self.along_column(cells.transpose(1, 2)), sees_column).transpose(1, 2)
        return _pass_on(self, cells, (by_row + by_column) / 2)


class Window(nn.Module):
    """A transformer layer over the pairs whose utterances are at most `window` apart, as one sequence."""

    def __init__(self, size: int, dropout: float, window: int) -> None:
        super().__init__()
        self.window, self.along_window = window, nn.Linear(size, 3 * size)
        self.feed_forward = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        self.first_norm, self.second_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor, is_pair_DNN: Tensor) -> Tensor:
        """(D, N, N, V) from the same, as for `CrossRoad`; cells beyond the window stay as they are."""
        size = cells.size(1)
        is_pair_DNN = is_pair_DNN.expand(len(cells), size, size)
        place_N = torch.arange(size, device=cells.device)
        is_near_NN = (place_N[:, None] - place_N).abs() <= self.window
        target_S, candidate_S = (is_near_NN & is_pair_DNN.any(0)).nonzero().unbind(1)
        sees_SS = target_S <= target_S[:, None]
        itself_SS = torch.eye(len(target_S), dtype=torch.bool, device=cells.device)
        sees_DSS = (sees_SS & is_pair_DNN[:, target_S, candidate_S].unsqueeze(-2)) | itself_SS
        near_DSV = cells[:, target_S, candidate_S]
        near_DSV = _pass_on(self, near_DSV, _attention(self.along_window(near_DSV), sees_DSS))
        return cells.index_put(
            (torch.arange(len(cells), device=cells.device)[:, None], target_S, candidate_S), near_DSV
        )


def _pass_on(layer: CrossRoad | Window, cells: Tensor, attended: Tensor) -> Tensor:
    """The rest of a transformer layer after its attention: residual, norm, feed-forward, residual, norm."""
    cells = layer.first_norm(cells + layer.dropout(attended))
    found: Tensor = layer.second_norm(cells + layer.dropout(layer.feed_forward(cells)))
    return found


def _attention(projected: Tensor, allowed: Tensor) -> Tensor:
    """Attention of one head along the last place axis; `allowed[a, q, k]` for line a, query q, key k."""
    query, key, value = projected.chunk(3, -1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
