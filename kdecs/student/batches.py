"""A student's batches, in two layouts: a sequence per pair, or a tree per target.

Legend: B pairs, R sequences, T tokens of the longest, N tokens of all, U of them read, M tokens of u_j's copy, P rows
of a cache.

In the layout `pair` each pair is a sequence, padded to the longest (R = B). In the layout `tree` the pairs of a target
share its trunk, and all of them are one sequence without padding (R = 1, T = N; kdecs.trees).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdecs.corpus.encoding import EncodedPair
from kdecs.student.grouping import Ints, padded
from kdecs.trees import Tree, plant

if TYPE_CHECKING:  # prediction runs without pyarrow
    from kdecs.corpus.cache import CorpusCache

_MASK_COLUMNS = ("emotion_mask", "connective_mask", "start_mask", "end_mask")


class Batch(NamedTuple):
    """Tensors of B pairs, int64 except for the bool `candidate_mask_BM`. Positions count from the prompt's begin.

    `masks_B4` are the positions of mask_emo, mask_cau, mask_st and mask_ed; masks missing from the prompt have
    position 0. `candidate_BM` are the positions of u_j's tokens, `distance_B` is i - j. `attention_RT` is 0 for
    padding and 1 for others. In the layout tree `read_U` are the tokens (of N) of which a state is read, each once, and
    `places_BP` are indices into them: of each pair the last token of its branch, the four masks, and the tokens of u_j
    (P = 5 + M).
    """

    token_ids_RT: Tensor
    attention_RT: Tensor
    masks_B4: Tensor
    candidate_BM: Tensor
    candidate_mask_BM: Tensor
    distance_B: Tensor
    tree: Tree | None = None
    read_U: Tensor | None = None
    places_BP: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; to a GPU without waiting for it."""
        moved = {
            name: on_device(part, device) for name, part in self._asdict().items() if isinstance(part, Tensor)
        }
        if self.tree is not None:
            moved["tree"] = self.tree.to(device)
        return self._replace(**moved)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU from pinned memory, since any other copy waits for what runs there."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cached_batch(cache: "CorpusCache", rows: Ints, pad_id: int) -> Batch:
    """The prompts of some rows of a memory-mapped cache."""
    trunks = None
    if cache.layout == "tree":
        # One array per target, so that equal trunks are known by their identity.
        found = {int(row): cache.list_at("trunk_ids", int(row)) for row in np.unique(cache.trunk_row[rows])}
        trunks = [found[int(row)] for row in cache.trunk_row[rows]]
    return padded_batch(
        [cache.list_at("token_ids", int(row)) for row in rows],
        np.stack([cache.column(name)[rows] for name in _MASK_COLUMNS], axis=1),
        cache.column("candidate_first")[rows],
        cache.num_candidate_tokens[rows],
        cache.column("target")[rows] - cache.column("candidate")[rows],
        pad_id,
        trunks,
    )


def encoded_batch(encoded: Sequence[EncodedPair], pad_id: int) -> Batch:
    """The prompts of freshly encoded pairs."""
    return padded_batch(
        [np.asarray(pair.token_ids) for pair in encoded],
        np.array([(p.emotion_mask, p.connective_mask, p.start_mask, p.end_mask) for p in encoded]),
        np.array([pair.candidate_first for pair in encoded]),
        np.array([len(pair.candidate_offsets) for pair in encoded]),
        np.array([pair.distance for pair in encoded]),
        pad_id,
        [pair.trunk_ids for pair in encoded] if encoded[0].trunk_ids else None,
    )


def padded_batch(
    prompts: Sequence[Ints],
    masks_B4: Ints,
    first_B: Ints,
    length_B: Ints,
    distance_B: Ints,
    pad_id: int,
    trunks: Sequence[Sequence[int] | Ints] | None = None,
) -> Batch:
    """Prompts padded on the right to the longest, rounded up to a multiple of 8 tokens.

    `first_B` and `length_B` give the place of u_j's copy in each prompt, `distance_B` is i - j. With `trunks` (layout
    tree) `prompts` are branches; pairs whose trunk is the same object share it.
    """
    places_M = np.arange(int(length_B.max()))
    candidate_mask_BM = places_M < length_B[:, None]
    # Padding points to a token that the prompt has; the mask keeps it out of every softmax.
    inside_BM = first_B[:, None] + places_M
    candidate_BM = np.where(candidate_mask_BM, inside_BM, 0 if trunks is None else first_B[:, None])
    tree = read_U = places_BP = None
    if trunks is None:
        token_ids_RT, is_token_RT = padded(prompts, pad_id)
        attention_RT: Ints = is_token_RT.astype(np.int64)
    else:
        numbers: dict[int, int] = {}
        trunk_of_B = np.array([numbers.setdefault(id(trunk), len(numbers)) for trunk in trunks])
        of_number = dict(zip(trunk_of_B.tolist(), trunks, strict=True))
        token_ids_N, trunk_starts_R, branch_starts_B, tree = plant(
            [of_number[number] for number in range(len(numbers))], prompts, trunk_of_B
        )
        token_ids_RT = token_ids_N[None]
        attention_RT = np.ones_like(token_ids_RT)
        # Positions in a branch count from the trunk's begin.
        shift_B1 = (branch_starts_B - np.array([len(trunk) for trunk in trunks]))[:, None]
        last_B1 = (branch_starts_B + np.array([len(prompt) - 1 for prompt in prompts]))[:, None]
        # mask_emo stands in the target's clause, which is part of the trunk; the other masks stand in the branch.
        in_trunk_B1 = trunk_starts_R[trunk_of_B][:, None] + masks_B4[:, :1]
        # A mask that this mode's prompt lacks has position 0. The last token is read in its place, by no output of the
        # mode.
        in_branch_B3 = np.where(masks_B4[:, 1:] > 0, masks_B4[:, 1:] + shift_B1, last_B1)
        places = (last_B1, in_trunk_B1, in_branch_B3, candidate_BM + shift_B1)
        # Candidates are padded to the longest, and pairs share a mask: half of the places repeat others.
        all_places_BP = np.concatenate(places, axis=1)
        read_U, index = np.unique(all_places_BP, return_inverse=True)
        places_BP = index.reshape(all_places_BP.shape)
    return Batch(
        token_ids_RT=torch.from_numpy(token_ids_RT),
        attention_RT=torch.from_numpy(attention_RT),
        masks_B4=torch.from_numpy(masks_B4.astype(np.int64)),
        candidate_BM=torch.from_numpy(candidate_BM.astype(np.int64)),
        candidate_mask_BM=torch.from_numpy(candidate_mask_BM),
        distance_B=torch.from_numpy(distance_B.astype(np.int64)),
        tree=tree,
        read_U=None if read_U is None else torch.from_numpy(read_U),
        places_BP=None if places_BP is None else torch.from_numpy(places_BP),
    )
