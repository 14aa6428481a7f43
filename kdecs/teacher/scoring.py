"""Scoring pairs with a finished teacher: raw answer-word logits and the mass of the rest of the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from kdecs.artifact import Manifest, check_whole
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import Pair
from kdecs.runtime import Runtime
from kdecs.teacher.batches import fixed_batches, make_units
from kdecs.teacher.lineage import lineage_of
from kdecs.teacher.network import TeacherNetwork
from kdecs.teacher.product import load_trained, read_teacher_config


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
        manifest = check_whole(directory, "teacher")
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
