"""Model families: how each kind of teacher is shown a pair and asked for the connective.

Behind one interface: encode a pair's prompt, run a batch of prompts, give the hidden state at the answer.

Shapes: P prompts, T tokens of the longest, N packed tokens, H hidden, A answer words, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from kdecs.corpus.pairs import Pair
from kdecs.errors import ModelError
from kdecs.teacher.config import ModelConfig, TreeAttention
from kdecs.teacher.family import EncodedPrompt, Family, first_line, language_model, load_tokenizer
from kdecs.teacher.prefix_tree import pack
from kdecs.teacher.tree_attention import (
    FLEX_BLOCK,
    mask_arguments,
    resolve,
    use_tree_attention,
)

__all__ = ["CausalFamily", "EncodedPrompt", "Family", "first_line", "load_tokenizer", "make_family"]


class _LinearHead(Family):
    """A family whose head is one linear map: its answer rows are multiplied in float32, whatever the dtype."""

    def head(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """The language model's head."""
        return language_model(network).lm_head(hidden_PH)

    def _rows_of_head(
        self,
        network: nn.Module,
        output: nn.Linear,
        weight_AH: Tensor,
        bias_A: Tensor | None,
        hidden_PH: Tensor,
    ) -> Tensor:
        """In float32: a bfloat16 product would keep steps of 0.1 in logits of 20."""
        del network, output
        bias_A = None if bias_A is None else bias_A.float()
        return nn.functional.linear(hidden_PH.float(), weight_AH.float(), bias_A)


class CausalFamily(_LinearHead):
    """Decoder-only: the prompt ends at "is"; the connective is the next token."""

    name = "causal"
    auto_model = AutoModelForCausalLM
    lora_task = "CAUSAL_LM"
    can_share_prefixes = True
    answer_context = ("The connective word between 3 and 2 is ", "")

    def answer_index(self, tokens: np.ndarray, offsets: Sequence[tuple[int, int]], text_end: int) -> int:
        """The last token of the text (a tokenizer may close with a special token)."""
        del tokens
        return max(n for n, (left, right) in enumerate(offsets) if right > left and right <= text_end)

    def encode(self, pair: Pair) -> EncodedPrompt:
        """As the base class, without anything after the last token of the text."""
        encoded = super().encode(pair)
        return replace(encoded, tokens=encoded.tokens[: encoded.answer + 1])

    def hidden_at_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """One forward per padded prompt."""
        ids_PT, mask_PT, answers_P = self._padded(prompts, device)
        output = _decoder(network)(input_ids=ids_PT, attention_mask=mask_PT, use_cache=False)
        return output.last_hidden_state[torch.arange(len(prompts), device=ids_PT.device), answers_P]

    def load_network(
        self, reference: str, *, dtype: torch.dtype, new_head: bool = False, **options: Any
    ) -> nn.Module:
        """As the base class, attending along a prefix tree where a forward is given one."""
        network = super().load_network(reference, dtype=dtype, new_head=new_head, **options)
        use_tree_attention(network)
        return network

    def hidden_at_leaves(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """One forward over the prompts' tree: the same hidden states (P, H) for a fraction of the tokens."""
        tree = pack([prompt.tokens for prompt in prompts])
        decoder = _decoder(network)
        kind = resolve(self.tree_attention, decoder, device)
        if kind == "flex":
            tree = tree.padded_to(FLEX_BLOCK)  # a new length may compile the kernel anew: few different ones
        output = decoder(
            input_ids=torch.from_numpy(tree.tokens_N).to(device)[None],
            position_ids=torch.from_numpy(tree.positions_N).to(device)[None],
            use_cache=False,
            **mask_arguments(tree, kind, device),
        )
        return output.last_hidden_state[0, torch.from_numpy(tree.leaves_P).to(device)]


class Seq2SeqFamily(_LinearHead):
    """Encoder-decoder (T5): `<extra_id_0>` in the mask's place; logits at the decoder's second position."""

    name = "seq2seq"
    auto_model = AutoModelForSeq2SeqLM
    lora_task = "SEQ_2_SEQ_LM"
    answer_context = ("", "")

    def __init__(self, reference: str, *, max_prompt_tokens: int, emotions_shown: str) -> None:
        super().__init__(reference, max_prompt_tokens=max_prompt_tokens, emotions_shown=emotions_shown)
        self.sentinel_id = self.tokenizer.convert_tokens_to_ids("<extra_id_0>")
        if self.sentinel_id in (None, self.tokenizer.unk_token_id):
            raise ModelError(f"tokenizer {reference}: has no <extra_id_0>, which a seq2seq teacher fills")

    @property
    def answer_suffix(self) -> str:
        """The sentinel and the full stop of Eq. 1."""
        return " <extra_id_0>."

    def answer_index(self, tokens: np.ndarray, offsets: Sequence[tuple[int, int]], text_end: int) -> int:
        """Always 1: the decoder's input is [start, <extra_id_0>]."""
        del tokens, offsets, text_end
        return 1

    def hidden_at_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """Encoder over the padded prompts, decoder over two tokens."""
        ids_PT, mask_PT, answers_P = self._padded(prompts, device)
        model = language_model(network)
        decoder_ids = self._decoder_inputs(model, device)["decoder_input_ids"].expand(len(prompts), -1)
        encoded = model.encoder(input_ids=ids_PT, attention_mask=mask_PT)
        decoded = model.decoder(
            input_ids=decoder_ids,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=mask_PT,
            use_cache=False,
        )
        hidden_PH = decoded.last_hidden_state[torch.arange(len(prompts), device=ids_PT.device), answers_P]
        # Tied T5 models scale before the head, as T5ForConditionalGeneration does.
        scale = model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0
        return hidden_PH * scale

    def _decoder_inputs(self, model: Any, device: torch.device) -> dict[str, Tensor]:
        """Start token and sentinel."""
        ids = [[model.config.decoder_start_token_id, self.sentinel_id]]
        return {"decoder_input_ids": torch.tensor(ids, device=device)}


class MaskedFamily(Family):
    """Encoder (RoBERTa, BERT): the connective fills the mask token."""

    name = "masked"
    auto_model = AutoModelForMaskedLM
    lora_task = "FEATURE_EXTRACTION"
    answer_context = ("The connective word between 3 and 2 is ", ".")

    def __init__(self, reference: str, *, max_prompt_tokens: int, emotions_shown: str) -> None:
        super().__init__(reference, max_prompt_tokens=max_prompt_tokens, emotions_shown=emotions_shown)
        if self.tokenizer.mask_token is None:
            raise ModelError(f"tokenizer {reference}: has no mask token, which a masked teacher fills")
        longest = min(self.tokenizer.model_max_length, max_prompt_tokens)
        self.max_prompt_tokens = longest

    @property
    def answer_suffix(self) -> str:
        """The mask and the full stop of Eq. 1."""
        return f" {self.tokenizer.mask_token}."

    def answer_index(self, tokens: np.ndarray, offsets: Sequence[tuple[int, int]], text_end: int) -> int:
        """The mask token behind the text (its offsets may or may not cover the space before it)."""
        found = [n for n, (left, right) in enumerate(offsets) if right > left and right > text_end + 1]
        index = found[0]
        if tokens[index] != self.tokenizer.mask_token_id:
            raise ModelError(
                f"tokenizer {self.tokenizer.name_or_path}: the mask is not one token of the prompt"
            )
        return index

    def hidden_at_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """Encoder over the padded prompts; the head's transform is part of `head`."""
        ids_PT, mask_PT, answers_P = self._padded(prompts, device)
        model = language_model(network)
        output = model.base_model(input_ids=ids_PT, attention_mask=mask_PT)
        return output.last_hidden_state[torch.arange(len(prompts), device=ids_PT.device), answers_P]

    def head(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """The masked language model's head (transform, norm and output embedding)."""
        return _masked_head(network)(hidden_PH)

    def _rows_of_head(
        self,
        network: nn.Module,
        output: nn.Linear,
        weight_AH: Tensor,
        bias_A: Tensor | None,
        hidden_PH: Tensor,
    ) -> Tensor:
        """The head with the answer words' rows in the place of its output embedding."""
        head = _masked_head(network)
        place = next(name for name, module in head.named_modules() if module is output)
        rows = {f"{place}.weight": weight_AH} | ({} if bias_A is None else {f"{place}.bias": bias_A})
        return torch.func.functional_call(head, rows, (hidden_PH,)).float()


FAMILIES: dict[str, type[Family]] = {f.name: f for f in (CausalFamily, Seq2SeqFamily, MaskedFamily)}


def make_family(
    model: ModelConfig, *, max_prompt_tokens: int, emotions_shown: str, tree_attention: TreeAttention = "auto"
) -> Family:
    """The family of a model config, with its tokenizer loaded and its answer words checked."""
    family = FAMILIES[model.family](
        model.base, max_prompt_tokens=max_prompt_tokens, emotions_shown=emotions_shown
    )
    family.tree_attention = tree_attention
    return family


def _masked_head(network: nn.Module) -> nn.Module:
    """Transform, norm and output embedding of a masked language model."""
    model = language_model(network)
    for name in ("lm_head", "cls"):
        if hasattr(model, name):
            return getattr(model, name)
    raise ModelError(f"{type(model).__name__}: no known masked-language-model head")


def _decoder(network: nn.Module) -> Any:
    """A causal model without its head."""
    return language_model(network).get_decoder()
