"""A teacher's network on the meta device: exact shapes and parameter counts, no weights, no download."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from kdecs.corpus.answer_words import NUM_CAUSAL
from kdecs.errors import ModelError
from kdecs.models import first_line
from kdecs.teacher.config import LoraConfig, ModelConfig
from kdecs.teacher.families import CausalFamily, EncodedPrompt, Family


def connective_loss(logits_PA: Tensor, is_cause_P: Tensor) -> Tensor:
    """Sum over prompts of -log p(gold), softmax over the answer words alone, in float32.

    A causal pair's gold is any causal word: p is their summed probability; a non-causal pair's is `other`.
    """
    log_p_PA = torch.log_softmax(logits_PA.float(), dim=-1)
    log_causal_P = torch.logsumexp(log_p_PA[:, :NUM_CAUSAL], dim=-1)
    return -torch.where(is_cause_P, log_causal_P, log_p_PA[:, NUM_CAUSAL]).sum()


def is_causal(logits_PA: Tensor) -> Tensor:
    """Boolean (P,): whether the causal words together are more probable than `other`."""
    log_causal_P = torch.logsumexp(logits_PA[:, :NUM_CAUSAL].float(), dim=-1)
    return log_causal_P > logits_PA[:, NUM_CAUSAL].float()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TeacherNetwork(nn.Module):
    """Answer-word logits of prompts. `use_tree`: one walk over the prefix tree instead of padded prompts."""

    def __init__(self, family: Family, network: nn.Module, *, use_tree: bool, device: torch.device) -> None:
        super().__init__()
        # Told, not asked of a parameter: partitioned or offloaded parameters live elsewhere than inputs.
        self.device = device
        self.family = family
        self.network = network
        self.use_tree = use_tree and family.can_share_prefixes
        self.register_state_dict_post_hook(_drop_frozen)

    def forward(self, prompts: Sequence[EncodedPrompt], *, by_model: bool = False) -> Tensor:
        """Raw logits (P, A) at temperature 1: the head runs at the answers, over the answer words' rows.

        `by_model`, for a check: of one prompt the model's own logits and what its head gave, (2, V).
        """
        if by_model:
            return self.family.model_logits(self.network, prompts[0], self.device)
        return self.family.answer_logits(self.network, self._hidden(prompts))

    def answers_and_rest(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        """Raw answer logits (P, A) and the log-probability mass (P,) of the rest of the vocabulary, float32."""
        hidden_PH = self._hidden(prompts)
        logits_PV = self.family.head(self.network, hidden_PH).float()
        answers_PA = self.family.answer_logits(self.network, hidden_PH)
        rest_PV = logits_PV.clone()
        rest_PV[:, self.family.answer_ids] = float("-inf")
        log_rest_P = torch.logsumexp(rest_PV, dim=-1) - torch.logsumexp(logits_PV, dim=-1)
        return answers_PA, log_rest_P

    def _hidden(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        if self.use_tree and isinstance(self.family, CausalFamily):
            return self.family.hidden_at_leaves(self.network, prompts, self.device)
        return self.family.hidden_at_answers(self.network, prompts, self.device)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave frozen weights out of checkpoints; DeepSpeed itself forgets the second name of tied ones."""
    del metadata
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def load_base(
    model: ModelConfig,
    family: Family,
    *,
    dtype: torch.dtype,
    device: torch.device,
    new_head: bool = False,
) -> nn.Module:
    """The pretrained network, in 4 bits (NF4, double quantisation, computing in `dtype`) where asked for.

    With `new_head` a model without the language model's head gets a random one: for those that are tuned whole.
    """
    if not model.load_in_4bit:
        return family.load_network(model.base, dtype=dtype, new_head=new_head)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return family.load_network(
        model.base, dtype=dtype, quantization_config=quantization, device_map={"": device}
    )


def add_lora(network: nn.Module, lora: LoraConfig, task: str) -> PeftModel:
    """The network with fresh LoRA adapters (B is zero), all else frozen. Raises ModelError for an unknown target."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    if isinstance(targets, list):
        parts = [name.split(".") for name, _ in network.named_modules()]
        for target in targets:
            wanted = target.split(".")
            if not any(path[-len(wanted) :] == wanted for path in parts):
                linear = {
                    n.rsplit(".", 1)[-1] for n, m in network.named_modules() if isinstance(m, nn.Linear)
                }
                raise ModelError(
                    f"lora.targets: the model has no module {target!r}; its linear layers are "
                    f"{', '.join(sorted(linear))}"
                )
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=float(lora.dropout),
        target_modules=targets,
        task_type=task,
    )
    try:
        return get_peft_model(network, config)
    except ValueError as error:
        raise ModelError(f"lora.targets {targets!r}: {first_line(error)}") from None


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What the optimizer moves."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


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
