"""A student's export to ONNX, an artifact directory of kind student-onnx, and its logits by ONNX Runtime.

    model.onnx       the graph, from token ids to the logits at the masks
    tokenizer.json   the tokenizer
    student.json     the student's card (kdecs.student.config)
    onnx.json        OnnxCard: the precision, and what the tokenizer's file does not say
    manifest.json    details: versions, the largest difference to PyTorch, what the export measured

Neither torch nor Transformers is imported here.

In the layout `pair` each prompt is a row of the graph's batch. In the layout `tree` the batch is one row without
padding, the trunks of all targets and then the branches, as in kdecs.trees. Attention runs over groups of pieces: each
trunk against itself, and each branch against its trunk and itself. So the graph computes no pair of tokens that Eq. 5's
cut hides, as a mask over the whole row would.

Legend: B pairs, R rows or trunks, T tokens of the longest, N tokens of all, M tokens of u_j's copy, P = 5 + M places
read of each pair, L tokens of the longest piece, K of the longest piece with its trunk.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from kdecs.artifact import read_record
from kdecs.corpus.encoding import EncodedPair
from kdecs.corpus.pairs import Ints, batches_of_tokens, encoded_targets, padded
from kdecs.errors import DependencyError, DeviceError, ModelError
from kdecs.process import num_threads, refusing, try_tokenizer
from kdecs.student.config import CARD_NAME, StudentCard, read_card
from kdecs.student.decision import Logits

GRAPH_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
ONNX_CARD_NAME = "onnx.json"
Precision = Literal["float32", "int8"]
BRANCH_GROUPS = 3
"""Groups of branches of similar length: one group would spend a third of its attention on padding."""
# In ONNX Runtime 1.32 the fused operator takes eight times as long as the two that it replaces.
_DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]
_MAX_BATCH_TOKENS = 512  # larger batches leave the processor's caches: 1,024 were a tenth slower


class OnnxCard(BaseModel):
    """`onnx.json`: what a predictor has to know of an export in addition to the student's card."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    precision: Precision
    mask_token: str
    separator: str | None
    pad_id: int


@dataclass(frozen=True)
class PlainTokenizer:
    """What encoders ask of a fast Transformers tokenizer, over the library beneath it."""

    name_or_path: str
    backend_tokenizer: Any
    mask_token: str
    sep_token: str | None
    eos_token: str | None = None
    is_fast: bool = True


class OnnxScorer:
    """A student's graph in ONNX Runtime, on the CPU: encoded pairs in, logits out. Thread-safe."""

    def __init__(self, graph: Path, pad_id: int, *, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or num_threads()
        options.log_severity_level = 4  # an error is raised, too
        with refusing(f"{graph}: ONNX Runtime cannot load it"):
            self._session = onnxruntime.InferenceSession(
                str(graph),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_DISABLED_OPTIMIZERS,
            )
        self._graph, self._pad_id = graph, pad_id
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def batches(self, encoded: Sequence[EncodedPair], max_tokens: int) -> Iterator[tuple[Ints, Logits]]:
        """The logits of all pairs, a batch at a time, each with the indices of its pairs."""
        lengths = np.array([len(pair.token_ids) for pair in encoded])
        max_tokens = min(max_tokens, _MAX_BATCH_TOKENS)
        for rows in batches_of_tokens(lengths, np.arange(len(encoded)), max_tokens, encoded_targets(encoded)):
            yield rows, self._logits(batch_feeds([encoded[row] for row in rows], self._pad_id))

    def _logits(self, feeds: dict[str, npt.NDArray[Any]]) -> Logits:
        """The graph's outputs for the inputs that it takes of these."""
        wanted = {name: value for name, value in feeds.items() if name in self._inputs}
        with refusing(f"{self._graph}: ONNX Runtime cannot run it"):
            found = self._session.run(self._outputs, wanted)
        by_name = dict(zip(self._outputs, found, strict=True))
        return Logits(*(by_name.get(name) for name in Logits._fields))


def batch_feeds(encoded: Sequence[EncodedPair], pad_id: int) -> dict[str, npt.NDArray[Any]]:
    """The graph's inputs for a batch of pairs."""
    return _tree_feeds(encoded) if encoded[0].trunk_ids else _pair_feeds(encoded, pad_id)


def _pair_feeds(encoded: Sequence[EncodedPair], pad_id: int) -> dict[str, npt.NDArray[Any]]:
    token_ids_RT, is_token_RT = padded([pair.token_ids for pair in encoded], pad_id)
    begins_B = np.arange(len(encoded)) * token_ids_RT.shape[1]
    return {
        "token_ids": token_ids_RT,
        "attention": is_token_RT,
        **_places(encoded, begins_B, begins_B, begins_B),
    }


def _tree_feeds(encoded: Sequence[EncodedPair]) -> dict[str, npt.NDArray[Any]]:
    trunks = list({id(pair.trunk_ids): pair.trunk_ids for pair in encoded}.values())
    numbers = {id(trunk): number for number, trunk in enumerate(trunks)}
    trunk_of_B = np.array([numbers[id(pair.trunk_ids)] for pair in encoded])
    trunk_lengths_R = np.array([len(trunk) for trunk in trunks])
    lengths_B = np.array([len(pair.token_ids) for pair in encoded])
    starts = np.cumsum([0, *trunk_lengths_R, *lengths_B])[:-1]
    trunk_starts_R, starts_B = starts[: len(trunks)], starts[len(trunks) :]
    before_B = trunk_lengths_R[trunk_of_B]
    feeds: dict[str, npt.NDArray[Any]] = {}
    feeds["trunk_tokens"], feeds["trunk_mask"] = _grid(trunk_starts_R, trunk_lengths_R)
    at_N = np.empty(starts[-1] + lengths_B[-1], dtype=np.int64)  # of each token, its place in the pieces
    at_N[feeds["trunk_tokens"][feeds["trunk_mask"]]] = np.flatnonzero(feeds["trunk_mask"])
    num_places = feeds["trunk_mask"].size
    by_length = np.argsort(lengths_B, kind="stable")
    for number, rows in enumerate(np.array_split(by_length, BRANCH_GROUPS)):
        tokens_BL, is_token_BL = _grid(starts_B[rows], lengths_B[rows])
        # The keys of a branch: the tokens of its trunk, then its own.
        before_B1, num_keys_B1 = before_B[rows, None], (before_B + lengths_B)[rows, None]
        places_K = np.arange(int(num_keys_B1.max(initial=1)))
        own_BK = starts_B[rows, None] - before_B1 + places_K
        in_trunk_BK = trunk_starts_R[trunk_of_B[rows], None] + places_K
        mask_BK = places_K < num_keys_B1
        # A padded key is token 0, which exists in every batch and which the mask hides.
        keys_BK = np.where(places_K < before_B1, in_trunk_BK, np.where(mask_BK, own_BK, 0))
        feeds |= {f"branch_tokens_{number}": tokens_BL, f"branch_keys_{number}": keys_BK}
        feeds[f"branch_mask_{number}"] = mask_BK
        at_N[tokens_BL[is_token_BL]] = num_places + np.flatnonzero(is_token_BL)
        num_places += is_token_BL.size
    positions = [np.arange(length) for length in trunk_lengths_R]
    positions += [
        np.arange(before, before + length) for before, length in zip(before_B, lengths_B, strict=True)
    ]
    return {
        "token_ids": np.concatenate([*trunks, *(pair.token_ids for pair in encoded)])[None].astype(np.int64),
        "positions": np.concatenate(positions)[None],
        **feeds,
        "in_pieces": at_N,
        **_places(encoded, starts_B + lengths_B - 1, trunk_starts_R[trunk_of_B], starts_B - before_B),
    }


def _grid(starts: Ints, lengths: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The tokens of pieces, padded with the first one, and which of them are real."""
    places = np.arange(int(lengths.max(initial=1)))
    mask = places < lengths[:, None]
    return starts[:, None] + np.where(mask, places, 0), mask


def _places(
    encoded: Sequence[EncodedPair], first_B: Ints, trunk_B: Ints, branch_B: Ints
) -> dict[str, npt.NDArray[Any]]:
    """What is read of each pair, as indices into the tokens of all rows, and the inputs that say what they are.

    `first_B` is the token that a classifier reads, `trunk_B` and `branch_B` what a position in trunk or branch adds to.
    """
    masks_B4 = np.array([(p.emotion_mask, p.connective_mask, p.start_mask, p.end_mask) for p in encoded])
    begin_B1 = np.array([[pair.candidate_first] for pair in encoded])
    length_B1 = np.array([[len(pair.candidate_offsets)] for pair in encoded])
    places_M = np.arange(int(length_B1.max()))
    candidate_mask_BM = places_M < length_B1
    # Padding points to a token that the prompt has; the mask keeps it out of every softmax.
    candidate_BM = np.where(candidate_mask_BM, begin_B1 + places_M, begin_B1)
    # A mask that this mode's prompt lacks has position 0; any token can be read in its place, since no output uses it.
    in_branch_B3 = np.where(masks_B4[:, 1:] > 0, masks_B4[:, 1:] + branch_B[:, None], first_B[:, None])
    places = (
        first_B[:, None],
        trunk_B[:, None] + masks_B4[:, :1],
        in_branch_B3,
        candidate_BM + branch_B[:, None],
    )
    return {
        "places": np.concatenate(places, axis=1),
        "candidate": candidate_BM,
        "candidate_mask": candidate_mask_BM,
        "distance": np.array([pair.distance for pair in encoded]),
    }


def load_onnx_student(
    directory: Path, *, device: str, precision: str
) -> tuple[OnnxScorer, PlainTokenizer, StudentCard]:
    """Scorer, tokenizer and card of an exported student, whose manifest has been verified.

    Raises DependencyError without ONNX Runtime or tokenizers, DeviceError for another device than the CPU,
    ArtifactError for a card that does not fit, ModelError for a graph or tokenizer that cannot be loaded.
    """
    if device not in ("auto", "cpu"):
        raise DeviceError(
            f"device {device}: {directory} is an export to ONNX, which runs on the CPU; use device cpu"
        )
    if precision != "float32":
        raise ModelError(
            f"precision {precision}: {directory} is an export to ONNX, which keeps its own precision"
        )
    require_packages(f"{directory}: an export to ONNX", ("onnxruntime", "tokenizers"), "onnx")
    from tokenizers import Tokenizer

    card, found = (
        read_card(directory / CARD_NAME),
        read_record(OnnxCard, directory / ONNX_CARD_NAME, "export the student again"),
    )
    path = directory / TOKENIZER_NAME
    with refusing(f"tokenizer {path}: cannot be loaded"):
        backend = Tokenizer.from_file(str(path))
        try_tokenizer(backend.encode)
    tokenizer = PlainTokenizer(str(path), backend, found.mask_token, found.separator)
    return OnnxScorer(directory / GRAPH_NAME, found.pad_id), tokenizer, card


def require_packages(subject: str, names: Sequence[str], extra: str) -> None:
    """Raise DependencyError, which names the extra of kdecs that has them, if one of the packages is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise DependencyError(
                f'{subject} needs {name}, which is not installed; run: pip install "kdecs[{extra}]"'
            )
