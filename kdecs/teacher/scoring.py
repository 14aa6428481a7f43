"""The largest logits over a teacher's whole vocabulary, beside those of the answer words.

They serve students of the teacher's own tokenizer alone: a token id means nothing to another.
Shapes: n pairs, P prompts of a batch, A answer words, V vocabulary, K top logits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from kdecs.artifact import Manifest, read_verified_manifest
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import Pair
from kdecs.errors import ConfigError
from kdecs.runtime import Runtime
from kdecs.teacher.data import fixed_batches, make_units
from kdecs.teacher.network import TeacherNetwork
from kdecs.teacher.product import lineage_of, load_trained, read_teacher_config


@dataclass(frozen=True)
class TeacherScorer:
    """One replica of a teacher on one device. Batches depend on the pairs given alone."""

    network: TeacherNetwork
    manifest: Manifest
    lineage: dict[str, str]
    micro_batch_tokens: int
    answer_words: tuple[str, ...] = CONNECTIVES

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        runtime: Runtime,
        dtype: str,
        micro_batch_tokens: int,
        base: str | None = None,
    ) -> "TeacherScorer":
        """Load base and adapter, or the whole tuned model, of a finished teacher directory onto this rank's device.

        `base` names the base where it lies elsewhere than in training; its checksum must be the same.

        Raises ArtifactError for a directory that is unfinished or whose base is another, ModelError where the
        weights do not load.
        """
        manifest = read_verified_manifest(directory, "teacher")
        config = read_teacher_config(directory)
        family, network = load_trained(directory, config, dtype=dtype, device=runtime.device, base=base)
        use_tree = manifest.details["batching"] == "tree"  # as measured when it was trained
        if dtype == "float32" and not config.model.load_in_4bit:
            network = fold_adapter(network)
        teacher = TeacherNetwork(family, network, use_tree=use_tree, device=runtime.device)
        lineage = lineage_of(directory, manifest, config, family, dtype=dtype)
        return cls(teacher.to(runtime.device).eval(), manifest, lineage, micro_batch_tokens)

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Raw logits (n, A) and log-probability mass (n,) of the rest, float32, in the order of `pairs`.

        Pairs of one dialogue should stand together: they share a prefix tree.
        """
        family = self.network.family
        prompts = [family.encode(pair) for pair in pairs]
        units = make_units(
            family,
            pairs,
            prompts,
            use_tree=self.network.use_tree,
            max_tokens=self.micro_batch_tokens,
            max_pairs=len(pairs),
        )
        logits = np.zeros((len(pairs), len(self.answer_words)), dtype=np.float32)
        log_rest = np.zeros(len(pairs), dtype=np.float32)
        batches = fixed_batches(
            units, micro_batch_tokens=self.micro_batch_tokens, padded=not self.network.use_tree
        )
        for batch in batches:
            indices = list(batch.pairs)
            answers_PA, rest_P = self.network.answers_and_rest([prompts[n] for n in indices])
            logits[indices] = answers_PA.cpu().numpy()
            log_rest[indices] = rest_P.cpu().numpy()
        return logits, log_rest


def fold_adapter(network: nn.Module) -> nn.Module:
    """The base with the adapter's products added to its weights: a forward without PEFT's extra products.

    The same function up to rounding. Not for 16 bits: an update that is small beside its weight would be rounded
    away with it, where an adapter beside the base keeps it. A network whose weights ZeRO-3 has partitioned stays as
    it is: no rank holds a whole weight to add to.
    """
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in network.parameters())
    return network.merge_and_unload() if isinstance(network, PeftModel) and not is_partitioned else network


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
