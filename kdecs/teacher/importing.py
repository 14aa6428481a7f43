"""Turn a LoRA adapter that was trained elsewhere into a teacher directory, after trying it on its base.

Only safetensors and JSON files of the adapter are read; a pickled one (adapter_model.bin) is refused.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from kdecs.artifact import (
    Manifest,
    atomic_path,
    check_output,
    is_complete,
    read_manifest,
    write_json,
    write_manifest,
)
from kdecs.config import config_hash, input_checksums, parse_config, write_config
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.splits import read_split
from kdecs.errors import ConfigError, CorpusError, ModelError, first_line
from kdecs.evaluation.counts import PairCounts
from kdecs.models import save_pretrained
from kdecs.output import refuse_inputs, refuse_overlaps
from kdecs.runtime import Runtime
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import EncodedPrompt, Family, make_family
from kdecs.teacher.network import (
    DTYPES,
    TeacherNetwork,
    check_config,
    check_head,
    is_causal,
    load_base,
    tree_is_exact,
    tree_probes,
)
from kdecs.teacher.product import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_values,
    check_adapter,
    load_adapter,
    separator_details,
)
from kdecs.teacher.scoring import check_folded

_PAIRS_PER_FORWARD = 16


@dataclass(frozen=True)
class AdapterImport:
    """What to import, and how it was trained: on exactly these corpus files if `is_of_corpus` is true."""

    adapter: Path
    base: str
    family: str
    output: Path
    train: Path
    valid: Path
    emotions_shown: str = "coarse"
    max_prompt_tokens: int = 2048
    is_of_corpus: bool = True


def import_adapter(wanted: AdapterImport, runtime: Runtime, *, dtype: str) -> Manifest:
    """Write the teacher directory of an adapter, unless it is complete already.

    The adapter is loaded onto the base, each of its tensors must find its place there, and the fold1 pairs of the
    validation split are scored. Raises ModelError if it does not fit, TrainingError if it is not finite or does
    nothing, ArtifactError if the output holds another teacher, and ConfigError or CorpusError.
    """
    values = adapter_values(wanted.adapter)
    config = _config(wanted, values)
    refuse_overlaps(config)
    refuse_inputs(wanted.output, [wanted.adapter], is_directory=True)
    work_hash = _work_hash(wanted, config)
    # A second start returns at once, without loading the base.
    if is_complete(wanted.output, "teacher", work_hash):
        return read_manifest(wanted.output, "teacher")
    check_output(wanted.output, "teacher", work_hash)
    pairs = [p for d in read_split(config.corpus, wanted.valid).dialogues for p in pairs_of(d, "fold1")]
    if not pairs:
        raise CorpusError(
            f"{wanted.valid}: no pairs to try the adapter on; expected dialogues with targets and their causes"
        )
    family = make_family(
        config.model, max_prompt_tokens=wanted.max_prompt_tokens, emotions_shown=wanted.emotions_shown
    )
    check_config(config.model.base, wanted.family, family.max_prompt_tokens)
    network = _load(wanted.adapter, values, config, family, runtime, dtype)
    teacher = TeacherNetwork(family, network, use_tree=False, device=runtime.device)
    teacher = teacher.to(runtime.device).eval()
    prompts = [family.encode(pair) for pair in tqdm(pairs, desc="prompts", unit="pair", disable=None)]
    check_head(teacher, teacher, min(prompts, key=lambda prompt: len(prompt.tokens)), config.model.base)
    if family.can_share_prefixes:
        probes = tree_probes(pairs, prompts, max_tokens=config.batches.micro_batch_tokens)
        teacher.use_tree = tree_is_exact(teacher, teacher, probes, runtime)
    scores = _scores(teacher, pairs, prompts)
    if dtype == "float32":  # in which an export folds the adapter
        check_folded(teacher, prompts[:_PAIRS_PER_FORWARD], wanted.adapter)
    return _write(
        wanted,
        values,
        config,
        work_hash,
        family,
        batching="tree" if teacher.use_tree else "pairs",
        scores=scores,
    )


def _config(wanted: AdapterImport, values: dict[str, Any]) -> TeacherConfig:
    targets = values.get("target_modules")
    # What PEFT needs stands in the adapter's own config; these keys only describe the adapter in the teacher's.
    lora = {"rank": values.get("r"), "alpha": values.get("lora_alpha")}
    if isinstance(targets, list):
        # PEFT keeps them as a set and writes it in any order, which must not change the config hash.
        lora["targets"] = sorted(targets)
    return parse_config(
        TeacherConfig,
        {
            "name": wanted.output.name,
            "output": wanted.output,
            "corpus": {"train": wanted.train, "valid": wanted.valid},
            "model": {"family": wanted.family, "base": wanted.base},
            "lora": lora,
            "batches": {"max_prompt_tokens": wanted.max_prompt_tokens},
            "emotions_shown": wanted.emotions_shown,
        },
        source=f"teacher import {wanted.adapter}",
    )


def _work_hash(wanted: AdapterImport, config: TeacherConfig) -> str:
    """Differs from that of a training with the same config, since the weights came from elsewhere."""
    for path in (wanted.train, wanted.valid):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
    adapter = input_checksums(weights=wanted.adapter / ADAPTER_FILE, config=wanted.adapter / ADAPTER_CONFIG)
    facts = [config_hash(config), adapter, wanted.is_of_corpus]
    return hashlib.sha256(f"imported\n{json.dumps(facts, sort_keys=True)}".encode()).hexdigest()


def _load(
    adapter: Path,
    values: dict[str, Any],
    config: TeacherConfig,
    family: Family,
    runtime: Runtime,
    dtype: str,
) -> nn.Module:
    """Base with adapter. Raises ModelError if a tensor of the adapter has no place in the base, or another shape."""
    try:
        tensors = load_file(adapter / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{adapter / ADAPTER_FILE}: cannot be read: {first_line(error)}") from None
    check_adapter(tensors, adapter)
    base = load_base(config.model, family, dtype=DTYPES[dtype], device=runtime.device)
    network = load_adapter(base, adapter, values, base=config.model.base)
    # PEFT skips tensors that have no place, and leaves missing ones at their first values. The base's embeddings may or
    # may not stand in an adapter.
    needed, known = (
        set(get_peft_model_state_dict(network, save_embedding_layers=embeddings))
        for embeddings in (False, True)
    )
    if strangers := sorted((set(tensors) - known) | (needed - set(tensors))):
        raise ModelError(
            f"{adapter}: does not fit the base {config.model.base}: only one of them has {strangers[0]} "
            f"({len(strangers)} such tensors); name the base that the adapter was trained on"
        )
    return network


@torch.inference_mode()
def _scores(
    teacher: TeacherNetwork, pairs: Sequence[Pair], prompts: Sequence[EncodedPrompt]
) -> dict[str, float]:
    predicted: list[bool] = []
    with tqdm(total=len(pairs), desc="try adapter", unit="pair", disable=None) as bar:
        for start in range(0, len(pairs), _PAIRS_PER_FORWARD):
            logits_PA = teacher(prompts[start : start + _PAIRS_PER_FORWARD])
            if not torch.isfinite(logits_PA).all():
                raise ModelError(
                    f"pair {pairs[start].id} or one shortly after it: the adapter's logits are not finite; "
                    "try it in float32, or train it again"
                )
            predicted += is_causal(logits_PA).tolist()
            bar.update(len(logits_PA))
    scores = PairCounts.of([pair.is_cause for pair in pairs], predicted).scores()
    return {f"valid_{key}": score for key, score in scores.items()}


def _write(
    wanted: AdapterImport,
    values: dict[str, Any],
    config: TeacherConfig,
    work_hash: str,
    family: Family,
    *,
    batching: str,
    scores: dict[str, float],
) -> Manifest:
    output = wanted.output
    output.mkdir(parents=True, exist_ok=True)
    with atomic_path(output / ADAPTER_FILE) as temporary:
        shutil.copyfile(wanted.adapter / ADAPTER_FILE, temporary)
    # As kdecs loads it, so that other tools follow none of the places that the original may have named.
    write_json(output / ADAPTER_CONFIG, {**values, "base_model_name_or_path": config.model.base})
    write_config(config, output)
    names = [ADAPTER_FILE, ADAPTER_CONFIG, "config.json", *save_pretrained([family.tokenizer], output)]
    # Without them, an export needs allow_other_corpus: nothing proves that the splits are those of the adapter.
    corpora = {"corpus_train": wanted.train, "corpus_valid": wanted.valid} if wanted.is_of_corpus else {}
    return write_manifest(
        output,
        "teacher",
        config_hash=work_hash,
        inputs=input_checksums(base=config.model.base, **corpora),
        files=names,
        details={
            "name": config.name,
            "family": config.model.family,
            "tuning": "lora",
            "imported": True,
            "emotions_shown": config.emotions_shown,
            "batching": batching,
            "valid": scores,
            **separator_details(family),
        },
    )
