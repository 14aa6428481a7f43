"""Scoring pairs with a finished teacher: raw answer-word logits and the mass of the rest of the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError

from kdecs.artifact import MANIFEST_NAME, Manifest, check_whole, sha256_of_file
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.errors import ModelError
from kdecs.runtime import Runtime
from kdecs.teacher.adapter import check_base, read_teacher_config
from kdecs.teacher.batches import fixed_batches, make_units
from kdecs.teacher.families import first_line, make_family
from kdecs.teacher.network import DTYPES, TeacherNetwork


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
        """Load base and adapter of a finished teacher directory onto this rank's device.

        `base` names the base where it lies elsewhere than in training; its checksum must be the same.

        Raises ArtifactError for a directory that is unfinished or whose base is another, ModelError where the
        weights do not load.
        """
        manifest = check_whole(directory, "teacher")
        config = read_teacher_config(directory)
        model = config.model.model_copy(update={"base": base}) if base else config.model
        check_base(directory, model.base)
        family = make_family(
            model,
            max_prompt_tokens=config.batches.max_prompt_tokens,
            emotions_shown=config.emotions_shown,
        )
        frozen = family.load_network(model.base, dtype=DTYPES[dtype])
        try:
            network = PeftModel.from_pretrained(frozen, str(directory))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{directory}: the adapter does not load: {first_line(error)}") from None
        use_tree = manifest.details["batching"] == "tree"  # as measured when it was trained
        teacher = TeacherNetwork(family, network, use_tree=use_tree, device=runtime.device)
        lineage = {
            "teacher": sha256_of_file(directory / MANIFEST_NAME),
            "base": manifest.inputs["base"],
            "prompt_version": str(PROMPT_VERSION),
            "emotions_shown": config.emotions_shown,
            "name": config.name,
            "dtype": dtype,
        }
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
