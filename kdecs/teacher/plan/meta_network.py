"""A teacher's network on the meta device: exact shapes and parameter counts, no weights, no download."""

import warnings
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from kdecs.errors import ModelError
from kdecs.teacher.config import LoraConfig
from kdecs.teacher.network import add_lora

AUTO_MODELS: dict[str, tuple[Any, str]] = {
    "causal": (AutoModelForCausalLM, "CAUSAL_LM"),
    "seq2seq": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "masked": (AutoModelForMaskedLM, "FEATURE_EXTRACTION"),
}


def meta_network(
    config: Any, lora: LoraConfig | None, *, dtype: torch.dtype = torch.bfloat16
) -> nn.Module | PeftModel:
    """The network of a Transformers config on the meta device; with adapters unless `lora` is None.

    Raises ModelError where no family's auto class knows the config, or a LoRA target does not exist.
    """
    auto_model, task = AUTO_MODELS[family_of(config)]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for a name that Transformers has renamed
        network = auto_model.from_config(config, dtype=dtype)
        if lora is None:
            return network
        return add_lora(network, lora, task)


def family_of(config: Any) -> str:
    """causal, seq2seq or masked: how a model of this config fills the connective. Raises ModelError."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    architectures = " ".join(getattr(config, "architectures", None) or ())
    is_decoder = "CausalLM" in architectures or "LMHead" in architectures
    in_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    in_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if in_masked and ("MaskedLM" in architectures or not is_decoder):
        return "masked"
    if in_causal:
        return "causal"
    raise ModelError(
        f"model type {config.model_type!r}: no causal, seq2seq or masked language model of Transformers"
    )
