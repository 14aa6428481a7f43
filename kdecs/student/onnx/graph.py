"""A student as a graph of ONNX, traced from the student itself.

Only attention is written anew, as plain products over the pieces that the predictor names (kdecs.student.onnx.scoring),
so that the graph makes each mask once for all layers.

Legend: R rows, T tokens, N tokens of a tree batch, P pieces or places read of each pair, L tokens of the longest piece,
K keys of the longest, D head size.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kdecs.models import first_position
from kdecs.process import refusing
from kdecs.student.decision import Logits
from kdecs.student.model import StudentModel
from kdecs.student.onnx.scoring import BRANCH_GROUPS

OPSET = 18
_ATTENTION = "kdecs_onnx"
_AXES = {
    "token_ids": ("rows", "tokens"),
    "attention": ("rows", "tokens"),
    "positions": ("rows", "tokens"),
    "trunk_tokens": ("trunks", "trunk_tokens"),
    "trunk_mask": ("trunks", "trunk_tokens"),
    **{
        f"branch_{part}_{number}": (
            f"pairs_{number}",
            f"branch_{'tokens' if part == 'tokens' else 'keys'}_{number}",
        )
        for number in range(BRANCH_GROUPS)
        for part in ("tokens", "keys", "mask")
    },
    "in_pieces": ("tokens",),
    "places": ("pairs", "places"),
    "candidate": ("pairs", "candidate_tokens"),
    "candidate_mask": ("pairs", "candidate_tokens"),
    "distance": ("pairs",),
}


class Graph(nn.Module):
    """What is exported: from the predictor's arrays to the logits that the student's mode has, in `Logits`' order."""

    def __init__(self, model: StudentModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self._encoder = model.language_model.base_model
        self._takes_attention = getattr(self._encoder, "_supports_attention_backend", False)
        if self._takes_attention:
            AttentionInterface.register(_ATTENTION, _attend)
            AttentionMaskInterface.register(_ATTENTION, _no_mask)
            self._encoder.set_attn_implementation(_ATTENTION)

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        """The logits; None is left out."""
        given = dict(zip(self.names, arrays, strict=True))
        states_BPH = self.model.states.picked(
            lambda states: states.flatten(0, 1)[given["places"]], **self._inputs(given)
        )
        output = self.model.read(states_BPH, given["candidate"], given["candidate_mask"], given["distance"])
        return tuple(part for part in output if part is not None)

    @property
    def output_names(self) -> list[str]:
        """The fields of `Logits` that the student's mode has."""
        has = self.model.outputs
        found = {
            "emotion_BE": has.emotions,
            "connective_BA": has.cause_by == "connective",
            "start_BS": has.spans,
            "end_BS": has.spans,
            "classifier_B2": has.cause_by == "cls",
        }
        return [name for name in Logits._fields if found[name]]

    def _inputs(self, given: dict[str, Tensor]) -> dict[str, Any]:
        token_ids_RT = given["token_ids"]
        if not self._takes_attention:
            return {"input_ids": token_ids_RT, "attention_mask": given["attention"]}
        positions_RT = given.get("positions", torch.arange(token_ids_RT.size(1))[None])
        groups = (
            [_Pieces(None, None, given["attention"], positions_RT)]
            if "attention" in given
            else [
                _Pieces(given["trunk_tokens"], given["trunk_tokens"], given["trunk_mask"], positions_RT),
                *(
                    _Pieces(
                        given[f"branch_tokens_{number}"],
                        given[f"branch_keys_{number}"],
                        given[f"branch_mask_{number}"],
                        positions_RT,
                    )
                    for number in range(BRANCH_GROUPS)
                ),
            ]
        )
        inputs = {
            "input_ids": token_ids_RT,
            "position_ids": positions_RT + first_position(self._encoder),
            "groups": groups,
            "in_pieces": given.get("in_pieces"),
        }
        if hasattr(getattr(self._encoder, "embeddings", None), "token_type_embeddings"):
            # All tokens are of type 0. One number for all of them saves a look-up per token.
            inputs["token_type_ids"] = torch.zeros(1, 1, dtype=torch.long)
        return inputs


class _Pieces:
    """Pieces whose attention is one product: the tokens of their queries and of their keys, and which keys are real.

    Without tokens, the pieces are the rows themselves.
    """

    def __init__(
        self, query_PL: Tensor | None, key_PK: Tensor | None, mask_PK: Tensor, positions_RT: Tensor
    ) -> None:
        self._query_PL, self._key_PK, self._mask_PK, self._positions_RT = (
            query_PL,
            key_PK,
            mask_PK,
            positions_RT,
        )
        self._hidden: dict[int | None, Tensor] = {}

    def sums(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """Softmax attention, (R, heads, T, D) -> (P, L, heads, D)."""
        key, value = _taken(key, self._key_PK), _taken(value, self._key_PK)
        scores = torch.matmul(_taken(query, self._query_PL), key.transpose(2, 3)) + self._hidden_within(
            window
        )
        return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2)

    def _hidden_within(self, window: int | None) -> Tensor:
        """0 for keys that are seen and -inf for others (P, 1, 1 or L, K): made once for all layers of a kind."""
        if window not in self._hidden:
            seen = self._mask_PK[:, None, None]
            if window is not None:  # ModernBERT counts the token itself
                at_PL = (
                    self._positions_RT if self._query_PL is None else self._positions_RT[0][self._query_PL]
                )
                at_PK = self._positions_RT if self._key_PK is None else self._positions_RT[0][self._key_PK]
                seen = seen & ((at_PL[:, :, None] - at_PK[:, None]).abs() < window)[:, None]
            self._hidden[window] = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)
        return self._hidden[window]


def _taken(states: Tensor, tokens_PL: Tensor | None) -> Tensor:
    """The states of the tokens of pieces, (1, heads, N, D) -> (P, heads, L, D)."""
    return states if tokens_PL is None else states[0].transpose(0, 1)[tokens_PL].transpose(1, 2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    groups: Sequence[_Pieces] = (),
    in_pieces: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention for Transformers, (R, heads, T, D) -> (R, T, heads, D), over groups of pieces."""
    del module, attention_mask, options
    query = query * (query.size(-1) ** -0.5 if scaling is None else scaling)
    found = [group.sums(query, key, value, sliding_window) for group in groups]
    if in_pieces is None:
        return found[0], None
    return torch.cat([sums.flatten(0, 1) for sums in found])[in_pieces][None], None


def _no_mask(*arguments: Any, **options: Any) -> None:
    """No mask of Transformers is read."""
    del arguments, options


def export_graph(model: StudentModel, feeds: dict[str, npt.NDArray[Any]], path: Path) -> None:
    """Write the graph of a student to a file; the model is of no other use afterwards.

    `feeds` are the predictor's arrays of one batch: they say which inputs there are, and no size of theirs is fixed.
    Raises ModelError, one line, for an encoder that cannot be exported.
    """
    _keep_answer_rows(model)
    graph = Graph(model, list(feeds)).eval()
    arrays = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.values())
    name = type(model.language_model).__name__
    with refusing(f"{name}: cannot be exported to ONNX"), warnings.catch_warnings():
        # Tracing warns of Python values that it takes for constants. Whoever exports compares the graph with PyTorch
        # over batches of other sizes.
        warnings.simplefilter("ignore")
        # By tracing (`dynamo=False`): the exporter over torch.export gives the same logits (to 4e-6, all families),
        # but takes ten seconds instead of a third of one, and one more package.
        torch.onnx.export(
            graph,
            arrays,
            str(path),
            input_names=list(feeds),
            output_names=graph.output_names,
            opset_version=OPSET,
            dynamic_axes={key: dict(enumerate(_AXES[key])) for key in feeds},
            dynamo=False,
        )


def _keep_answer_rows(model: StudentModel) -> None:
    """Leave only the answer words in the output embedding: of a tied one the graph would hold a second copy."""
    decoder = model.language_model.get_output_embeddings()
    ids = torch.cat((model.emotion_ids, model.connective_ids))
    kept = nn.Linear(decoder.in_features, len(ids), bias=decoder.bias is not None)
    with torch.no_grad():
        kept.weight.copy_(decoder.weight[ids])
        if decoder.bias is not None:
            kept.bias.copy_(decoder.bias[ids])
    model.language_model.set_output_embeddings(kept)
    num_emotions = len(model.emotion_ids)
    model.emotion_ids = torch.arange(num_emotions)
    model.connective_ids = torch.arange(num_emotions, len(ids))
