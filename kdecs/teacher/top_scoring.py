"""The largest logits over a teacher's whole vocabulary, beside those of the answer words.

They serve students of the teacher's own tokenizer alone: a token id means nothing to another.
Shapes: n pairs, P prompts of a batch, A answer words, V vocabulary, K top logits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from kdecs.artifact import Manifest
from kdecs.corpus.pairs import Pair
from kdecs.errors import ConfigError
from kdecs.teacher.batches import fixed_batches, make_units
from kdecs.teacher.scoring import TeacherScorer


class TopTeacherScorer:
    """A teacher's scorer that can also give the K largest logits; raises ConfigError where K is above V."""

    def __init__(self, scorer: TeacherScorer, top_k: int) -> None:
        self._scorer = scorer
        language_model = scorer.network.network
        if hasattr(language_model, "get_base_model"):
            language_model = language_model.get_base_model()
        self._head: nn.Module = language_model.get_output_embeddings()
        vocabulary = len(scorer.network.family.tokenizer)
        if top_k > vocabulary:
            raise ConfigError(f"top_k: found {top_k}, the teacher's vocabulary has {vocabulary} tokens")

    @property
    def answer_words(self) -> tuple[str, ...]:
        """The scorer's."""
        return self._scorer.answer_words

    @property
    def lineage(self) -> Mapping[str, str]:
        """The scorer's."""
        return self._scorer.lineage

    @property
    def manifest(self) -> Manifest:
        """The teacher's."""
        return self._scorer.manifest

    @property
    def tokenizer_sha256(self) -> str:
        """Over the names and checksums of the tokenizer's files, as in the lineage."""
        return self._scorer.lineage["tokenizer"]

    def score(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """The scorer's."""
        return self._scorer.score(pairs)

    @torch.inference_mode()
    def score_with_top(
        self, pairs: Sequence[Pair], top_k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `score`, and ids (n, K) int32 and raw logits (n, K) float32 of the K largest logits, largest first.

        The batches are those of `score`; top logits are read where the head computes them, in the teacher's dtype.
        """
        network, tokens = self._scorer.network, self._scorer.micro_batch_tokens
        prompts = [network.family.encode(pair) for pair in pairs]
        units = make_units(
            network.family,
            pairs,
            prompts,
            use_tree=network.use_tree,
            max_tokens=tokens,
            max_pairs=len(pairs),
        )
        logits = np.zeros((len(pairs), len(self.answer_words)), dtype=np.float32)
        log_rest = np.zeros(len(pairs), dtype=np.float32)
        top_ids = np.zeros((len(pairs), top_k), dtype=np.int32)
        top_logits = np.zeros((len(pairs), top_k), dtype=np.float32)
        with self._captured(top_k) as captured:
            for batch in fixed_batches(units, micro_batch_tokens=tokens, padded=not network.use_tree):
                captured.clear()
                indices = list(batch.pairs)
                answers_PA, rest_P = network.answers_and_rest([prompts[n] for n in indices])
                values_PK, ids_PK = captured[0]  # a partitioned head runs twice over the same states
                logits[indices] = answers_PA.cpu().numpy()
                log_rest[indices] = rest_P.cpu().numpy()
                top_ids[indices] = ids_PK.cpu().numpy()
                top_logits[indices] = values_PK.cpu().numpy()
        return logits, log_rest, top_ids, top_logits

    @contextmanager
    def _captured(self, top_k: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Values and ids (P, K) of each run of the head, as they come; only K of V values are kept."""
        captured: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, inputs: object, logits_PV: Tensor) -> None:
            del module, inputs
            values_PK, ids_PK = torch.topk(logits_PV.float(), top_k, dim=-1)
            captured.append((values_PK, ids_PK))

        handle = self._head.register_forward_hook(keep)
        try:
            yield captured
        finally:
            handle.remove()
