"""The teacher's network: pretrained base, LoRA, the logits of the answer words, the loss (Eq. 2-4), and checks at load.

A prefix tree, and a head that multiplies only the answer words' rows, are shortcuts to a model's own logits. Not every
architecture allows them, so each loaded model is run both ways once (`tree_is_exact`, `check_head`).

Shapes: P prompts, A answer words, H hidden, V vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from kdecs.corpus.answer_words import CONNECTIVES, NUM_CAUSAL
from kdecs.corpus.pairs import Pair
from kdecs.errors import ConfigError, ModelError, first_line
from kdecs.models import load_config
from kdecs.runtime import Runtime, any_rank
from kdecs.teacher.config import LoraConfig, ModelConfig
from kdecs.teacher.families import (
    FAMILIES,
    CausalFamily,
    EncodedPrompt,
    Family,
)
from kdecs.teacher.tree.prefix_tree import tree_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TeacherNetwork(nn.Module):
    """Computes the answer words' logits of prompts, over their prefix tree (`use_tree`) or over padded prompts."""

    def __init__(self, family: Family, network: nn.Module, *, use_tree: bool, device: torch.device) -> None:
        super().__init__()
        # Passed in, because partitioned or offloaded parameters live elsewhere than the inputs.
        self.device = device
        self.family = family
        self.network = network
        self.use_tree = use_tree and family.can_share_prefixes
        # A checkpoint without the frozen base has megabytes instead of gigabytes.
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
        # The whole head runs first: `TeacherScorer` reads the top logits from this run.
        logits_PV = self.family.head(self.network, hidden_PH).float()
        # Once more from the answer rows: the whole head multiplies in the teacher's dtype, `answer_logits` in float32.
        answers_PA = self.family.answer_logits(self.network, hidden_PH)
        # Not 1 - p(answers): that loses every digit if the answers take almost all of the mass.
        rest_PV = logits_PV.clone()
        rest_PV[:, self.family.answer_ids] = float("-inf")
        log_rest_P = torch.logsumexp(rest_PV, dim=-1) - torch.logsumexp(logits_PV, dim=-1)
        return answers_PA, log_rest_P

    def _hidden(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        if self.use_tree and isinstance(self.family, CausalFamily):
            return self.family.hidden_at_leaves(self.network, prompts, self.device)
        return self.family.hidden_at_answers(self.network, prompts, self.device)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave frozen weights out of checkpoints; DeepSpeed's own filter misses the second name of tied weights."""
    del metadata
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def connective_loss(logits_PA: Tensor, is_cause_P: Tensor, gold: str = "any") -> Tensor:
    """Sum over prompts of -log p(gold), softmax over the answer words alone, in float32.

    The gold of a causal pair is the causal word `gold`, or any of them: p is then their summed probability. That of a
    non-causal pair is `other`.
    """
    log_p_PA = torch.log_softmax(logits_PA.float(), dim=-1)
    if gold == "any":
        log_causal_P = torch.logsumexp(log_p_PA[:, :NUM_CAUSAL], dim=-1)
    else:
        log_causal_P = log_p_PA[:, CONNECTIVES.index(gold)]
    return -torch.where(is_cause_P, log_causal_P, log_p_PA[:, NUM_CAUSAL]).sum()


def target_loss(logits_PA: Tensor, is_cause_P: Tensor, target_P: Tensor) -> Tensor:
    """Sum over targets of the cross-entropy between a softmax over their candidates and the gold causes, in float32.

    `target_P` (int64, on the CPU) numbers the target of each prompt. With the log-odds s_j = log p(causal) - log
    p(other) of candidate j, and the gold causes G of a target, its term is

        -1/|G| sum_{j in G} log(exp(s_j) / sum_k exp(s_k)) = log sum_k exp(s_k) - 1/|G| sum_{j in G} s_j,

    k over all prompts of the target; the gold distribution is uniform over G. A target without a cause has no term.
    """
    logits_PA = logits_PA.float()
    log_odds_P = torch.logsumexp(logits_PA[:, :NUM_CAUSAL], dim=-1) - logits_PA[:, NUM_CAUSAL]
    # A row per target: sums by index would add in another order at each run on a GPU.
    is_of_GP = (target_P.unique()[:, None] == target_P).to(logits_PA.device)
    is_gold_GP = is_of_GP & is_cause_P
    num_gold_G = is_gold_GP.sum(dim=-1)
    log_sum_G = torch.where(is_of_GP, log_odds_P, float("-inf")).logsumexp(dim=-1)
    mean_gold_G = torch.where(is_gold_GP, log_odds_P, 0.0).sum(dim=-1) / num_gold_G.clamp(min=1)
    return torch.where(num_gold_G > 0, log_sum_G - mean_gold_G, 0.0).sum()


def is_causal(logits_PA: Tensor) -> Tensor:
    """Boolean (P,): whether the causal words together are more probable than `other`."""
    log_causal_P = torch.logsumexp(logits_PA[:, :NUM_CAUSAL].float(), dim=-1)
    return log_causal_P > logits_PA[:, NUM_CAUSAL].float()


def load_base(
    model: ModelConfig,
    family: Family,
    *,
    dtype: torch.dtype,
    device: torch.device,
    new_head: bool = False,
) -> nn.Module:
    """The pretrained network, with frozen weights in 4 bits (NF4, double quantisation) if the config asks for it.

    With `new_head`, a model that comes without the language model's head gets a random one: only for full tuning.
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
        # PEFT ignores a target that matches nothing, as long as another one matches.
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
    """The parameters that the optimizer updates."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


# The network on the meta device, for planning: exact shapes and parameter counts, no weights, no download.


def meta_network(
    config: Any, lora: LoraConfig | None, *, dtype: torch.dtype = torch.bfloat16
) -> nn.Module | PeftModel:
    """The network of a Transformers config on the meta device, with adapters unless `lora` is None.

    Raises ModelError if no family knows the config, or if a LoRA target does not exist.
    """
    family = FAMILIES[family_of(config)]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a name that Transformers has renamed
        network = family.auto_model.from_config(config, dtype=dtype)
        if lora is None:
            return network
        return add_lora(network, lora, family.lora_task)


def family_of(config: Any) -> str:
    """The family (causal, seq2seq or masked) that a Transformers config belongs to. Raises ModelError if none."""
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
    # BERT and RoBERTa are in both mappings: the architecture that the checkpoint was saved as decides.
    if in_masked and ("MaskedLM" in architectures or not is_decoder):
        return "masked"
    if in_causal:
        return "causal"
    raise ModelError(
        f"model type {config.model_type!r} is not a causal, seq2seq or masked language model of Transformers; "
        "choose another model"
    )


# What a loaded model is checked for before it is trained or used.

OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet"}
"""Model types whose first position is the padding token's id + 1."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far two computations of one logit may differ, as a share of the largest logit. bfloat16 keeps 8 bits, so sums in
another order differ by 1 or 2% after a few dozen layers; a wrong mask moves logits by a fifth or more."""
LOGIT_KEYS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")
"""Config keys of models that change their logits after the head."""
NUM_PROBES = 8
"""Prompts in the tree that is compared with its prompts one by one."""


def check_config(base: str, family: str, max_prompt_tokens: int) -> None:
    """Raise ModelError if the base belongs to another family, ConfigError if prompts may exceed its positions.

    Reads only the base's config.json, so it refuses before weights are loaded.
    """
    config = load_config(base)
    check_family(config, base, family)
    check_positions(config, base, max_prompt_tokens)


def check_family(config: Any, base: str, family: str) -> None:
    """Raise ModelError if a Transformers config is not of the family that the teacher's config names."""
    if (found := family_of(config)) != family:
        raise ModelError(
            f"model {base}: is {found}, the config says model.family={family}; set model.family={found}"
        )


def check_positions(config: Any, base: str, max_prompt_tokens: int) -> None:
    """Raise ConfigError if prompts may be longer than the model has positions.

    Models with relative positions only (T5) have no limit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type in OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    if max_prompt_tokens > positions:
        raise ConfigError(
            f"batches.max_prompt_tokens: prompts of up to {max_prompt_tokens} tokens, but model {base} has "
            f"{positions} positions; set batches.max_prompt_tokens={positions}"
        )


def tree_probes(
    pairs: Sequence[Pair], prompts: Sequence[EncodedPrompt], *, max_tokens: int
) -> list[EncodedPrompt]:
    """Prompts whose tree shows whether the model takes trees: the longest of all, and others of the same dialogue.

    They spread from the dialogue's first target to its last, so that the tree branches. It holds at most `max_tokens`
    tokens, or the longest prompt alone.
    """
    longest = max(range(len(prompts)), key=lambda n: len(prompts[n].tokens))
    dialogue = pairs[longest].dialogue.id
    others = [n for n in range(len(pairs)) if pairs[n].dialogue.id == dialogue and n != longest]
    places = np.linspace(0, len(others) - 1, min(NUM_PROBES - 1, len(others))).round().astype(int)
    probes = [prompts[longest]]
    for place in places:
        more = [*probes, prompts[others[place]]]
        if tree_size([prompt.tokens for prompt in more]) <= max_tokens:
            probes = more
    return probes


@torch.no_grad()
def tree_is_exact(
    ask: Callable[[Sequence[EncodedPrompt]], Tensor],
    teacher: TeacherNetwork,
    prompts: Sequence[EncodedPrompt],
    runtime: Runtime,
) -> bool:
    """Whether this model gives the same logits over a tree as over its prompts one by one. Collective.

    Not every decoder takes a 4-D mask and explicit positions (ALiBi does not, nor do sliding windows shorter than the
    prompts). `ask` runs the teacher: pass the engine's forward if parameters are partitioned. All ranks return the same
    answer. Running out of memory says nothing about the model, so torch.OutOfMemoryError is raised.
    """
    teacher.use_tree = True
    packed_PA: Tensor | None = None
    try:
        packed_PA = ask(prompts).float()
    except torch.OutOfMemoryError:  # is a RuntimeError, too
        raise
    except (ValueError, TypeError, RuntimeError):
        # This architecture does not take the mask or the positions of a tree. The ranks agree on that below.
        packed_PA = None
    finally:
        teacher.use_tree = False
    if any_rank(packed_PA is None, runtime) or packed_PA is None:
        return False
    single_PA = torch.cat([ask([prompt]) for prompt in prompts]).float()
    return not any_rank(not are_close(packed_PA, single_PA, teacher), runtime)


@torch.no_grad()
def check_head(ask: Callable[..., Tensor], teacher: TeacherNetwork, prompt: EncodedPrompt, base: str) -> None:
    """Raise ModelError if the model's own logits differ from those of its output embedding's rows.

    Granite and Cohere scale logits after the head, and Gemma 2 caps them: rows of the head alone would miss that. So
    one prompt runs through the whole model. Collective if `ask` is (the engine's forward under ZeRO-3).
    """
    try:
        own_V, raw_V = ask([prompt], by_model=True).float()
        # In a tree the trunk does not see its branch, so its hidden states are not the whole model's: read as a pair.
        ours_A = ask([replace(prompt, num_trunk=0)]).float()[0]
    except (ValueError, TypeError) as error:
        raise ModelError(f"model {base}: does not run as a teacher: {first_line(error)}") from None
    # Unless the model changes its logits, they are what the head returned: equal to the bit in any precision.
    is_same = bool(torch.isclose(own_V, raw_V, rtol=0, atol=0, equal_nan=True).all())
    if is_same and are_close(ours_A, own_V[teacher.family.answer_ids], teacher):
        return
    if is_same and isinstance(teacher.network, PeftModel):
        raise ModelError(
            f"model {base}: with its adapter it computes other logits as a whole than part by part, as a teacher runs "
            "it; choose another kind of adapter"
        )
    # For the message alone: which setting is likely to be the cause.
    config = getattr(teacher.network, "config", None)
    keys = [key for key in LOGIT_KEYS if getattr(config, key, None) not in (None, 1, 1.0)]
    raise ModelError(
        f"model {base}: changes its logits after the output embedding ({', '.join(keys) or 'by an unknown setting'}), "
        "whereas a teacher reads the output embedding directly; choose another model"
    )


def are_close(ours: Tensor, expected: Tensor, teacher: TeacherNetwork) -> bool:
    """Whether two computations of the same logits agree within the rounding of the teacher's dtype (`TOLERANCES`)."""
    dtype = next(teacher.network.parameters()).dtype
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])  # 4-bit weights are stored as bytes
    # Against the largest logit and not each against itself: of a logit near 0, rounding may leave no digit.
    difference = (ours - expected).abs().max()
    return bool(difference <= tolerance * expected.abs().max())
