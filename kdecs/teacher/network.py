"""The teacher as one torch module: a base network with LoRA adapters, asked for answer-word logits.

Shapes: P prompts, H hidden, A answer words, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from kdecs.teacher.config import LoraConfig
from kdecs.teacher.families import CausalFamily, EncodedPrompt, Family

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

    def forward(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Raw logits (P, A) at temperature 1.

        The head runs at the answers only; multiplying all of its V rows there costs P·V·H, under 1% of a forward.
        """
        logits_PV = self.family.head(self.network, self._hidden(prompts))
        return logits_PV[:, self.family.answer_ids]

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


@torch.no_grad()
def tree_is_exact(
    ask: Callable[[Sequence[EncodedPrompt]], Tensor],
    teacher: TeacherNetwork,
    prompts: Sequence[EncodedPrompt],
) -> bool:
    """Whether a tree gives the logits of its prompts one by one, for the model in hand.

    Not every decoder takes a 4-D mask and explicit positions (ALiBi, sliding windows shorter than the prompts).
    `ask` runs the teacher (its engine's forward, where parameters are partitioned). Collective if `ask` is.
    """
    try:
        teacher.use_tree = True
        packed_PA = ask(prompts).float()
    except (ValueError, TypeError, RuntimeError):
        return False
    finally:
        teacher.use_tree = False
    single_PA = torch.cat([ask([prompt]) for prompt in prompts]).float()
    # bfloat16 keeps 8 bits: two ways of summing differ in the last one or two; a wrong mask differs by units.
    is_float32 = next(teacher.network.parameters()).dtype == torch.float32
    tolerance = 1e-3 if is_float32 else 5e-2
    return bool((packed_PA - single_PA).abs().max() <= tolerance * single_PA.abs().max().clamp(min=1.0))


def add_lora(network: nn.Module, lora: LoraConfig, task: str) -> PeftModel:
    """The network with fresh LoRA adapters (B is zero), all else frozen."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return get_peft_model(
        network,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=float(lora.dropout),
            target_modules=targets,
            task_type=task,
        ),
    )


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What the optimizer moves."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
