"""Model families: how each kind of teacher is shown a pair and asked for the connective.

Behind one interface: encode a pair's prompt, run a batch of prompts, give the hidden state at the answer.

Shapes: P prompts, T tokens of the longest, N packed tokens, H hidden, A answer words, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from kdecs.corpus.answer_words import CONNECTIVES, answer_token_ids
from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import kept_tokens, teacher_prompt
from kdecs.corpus.schema import FINE_TO_COARSE
from kdecs.errors import ModelError
from kdecs.teacher.config import ModelConfig
from kdecs.teacher.prefix_tree import ancestor_mask, pack


@dataclass(frozen=True)
class EncodedPrompt:
    """A pair's prompt in tokens; `answer` is the index whose output predicts the connective."""

    tokens: np.ndarray
    answer: int


class Family(ABC):
    """One kind of teacher: its tokenizer, answer tokens, prompt and forward."""

    name: ClassVar[str]
    auto_model: ClassVar[Any]
    lora_task: ClassVar[str]
    can_share_prefixes: ClassVar[bool] = False
    answer_context: ClassVar[tuple[str, str]]
    """Text before and after the connective where it stands in the prompt."""

    def __init__(self, reference: str, *, max_prompt_tokens: int, emotions_shown: str) -> None:
        self.tokenizer = load_tokenizer(reference)
        self.max_prompt_tokens = max_prompt_tokens
        self.emotions_shown = emotions_shown
        before, after = self.answer_context
        self.answer_ids = answer_token_ids(self.tokenizer, CONNECTIVES, before=before, after=after)

    @property
    def separator(self) -> str:
        """What joins the utterances of the history: the tokenizer's separator, a newline where it has none."""
        return self.tokenizer.sep_token or "\n"

    def encode(self, pair: Pair) -> EncodedPrompt:
        """The tokens of a pair's prompt, cut to `max_prompt_tokens` by dropping the oldest history."""
        if pair.emotion is None:
            raise ModelError(f"pair {pair.id}: the target has no emotion, which the teacher's prompt shows")
        emotion = pair.emotion
        if self.emotions_shown == "coarse":
            emotion = FINE_TO_COARSE.get(emotion, emotion)
        prompt = teacher_prompt(
            pair.dialogue, pair.target, pair.candidate, emotion=emotion, separator=self.separator
        )
        encoded = self.tokenizer(prompt.text + self.answer_suffix, return_offsets_mapping=True)
        kept = kept_tokens(encoded["offset_mapping"], prompt, self.max_prompt_tokens)
        tokens = np.asarray(encoded["input_ids"], dtype=np.int32)[kept]
        offsets = [encoded["offset_mapping"][n] for n in kept]
        return EncodedPrompt(tokens=tokens, answer=self.answer_index(tokens, offsets, len(prompt.text)))

    @property
    def answer_suffix(self) -> str:
        """What follows the words "… is" of the prompt."""
        return ""

    @abstractmethod
    def answer_index(self, tokens: np.ndarray, offsets: Sequence[tuple[int, int]], text_end: int) -> int:
        """Index of the token whose output predicts the connective."""

    @abstractmethod
    def hidden_at_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """Hidden states (P, H) that the output embedding maps to the connective's logits."""

    @abstractmethod
    def head(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """Logits (P, V) over the whole vocabulary."""

    def answer_logits(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """Logits (P, A) of the answer words in float32; the whole parameters must be on this rank."""
        return self.head(network, hidden_PH)[:, self.answer_ids].float()

    def load_network(self, reference: str, *, dtype: torch.dtype) -> nn.Module:
        """The pretrained network from a local directory or a hub name. Raises ModelError, one line."""
        try:
            return self.auto_model.from_pretrained(reference, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"model {reference}: cannot be loaded as {self.name}: {first_line(error)}"
            ) from None

    def _padded(
        self, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (P, T), attention mask (P, T) and answer index (P,)."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        ids_PT = np.full((len(prompts), longest), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask_PT = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids_PT[row, : len(prompt.tokens)] = prompt.tokens
            mask_PT[row, : len(prompt.tokens)] = 1
        answers_P = torch.tensor([prompt.answer for prompt in prompts], device=device)
        return torch.from_numpy(ids_PT).to(device), torch.from_numpy(mask_PT).to(device), answers_P


class _LinearHead(Family):
    """A family whose head is one linear map: its answer rows are multiplied in float32, whatever the dtype."""

    def head(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """The language model's head."""
        return _language_model(network).lm_head(hidden_PH)

    def answer_logits(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """As the base class; a bfloat16 product would keep steps of 0.1 in logits of 20."""
        head = _language_model(network).lm_head
        bias_A = None if head.bias is None else head.bias[self.answer_ids].float()
        return nn.functional.linear(hidden_PH.float(), head.weight[self.answer_ids].float(), bias_A)


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
        return EncodedPrompt(tokens=encoded.tokens[: encoded.answer + 1], answer=encoded.answer)

    def hidden_at_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """One forward per padded prompt."""
        ids_PT, mask_PT, answers_P = self._padded(prompts, device)
        output = _decoder(network)(input_ids=ids_PT, attention_mask=mask_PT, use_cache=False)
        return output.last_hidden_state[torch.arange(len(prompts), device=ids_PT.device), answers_P]

    def hidden_at_leaves(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """One forward over the prompts' tree: the same hidden states (P, H) for a fraction of the tokens."""
        tree = pack([prompt.tokens for prompt in prompts])
        mask_11NN = ancestor_mask(torch.from_numpy(tree.ends_N).to(device))
        output = _decoder(network)(
            input_ids=torch.from_numpy(tree.tokens_N).to(device)[None],
            position_ids=torch.from_numpy(tree.positions_N).to(device)[None],
            attention_mask=mask_11NN,
            use_cache=False,
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
        model = _language_model(network)
        start = model.config.decoder_start_token_id
        decoder_ids = torch.tensor([[start, self.sentinel_id]], device=ids_PT.device).expand(len(prompts), -1)
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
        model = _language_model(network)
        output = model.base_model(input_ids=ids_PT, attention_mask=mask_PT)
        return output.last_hidden_state[torch.arange(len(prompts), device=ids_PT.device), answers_P]

    def head(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """The masked language model's head (transform, norm and output embedding)."""
        model = _language_model(network)
        for name in ("lm_head", "cls"):
            if hasattr(model, name):
                return getattr(model, name)(hidden_PH)
        raise ModelError(f"{type(model).__name__}: no known masked-language-model head")


FAMILIES: dict[str, type[Family]] = {f.name: f for f in (CausalFamily, Seq2SeqFamily, MaskedFamily)}


def make_family(model: ModelConfig, *, max_prompt_tokens: int, emotions_shown: str) -> Family:
    """The family of a model config, with its tokenizer loaded and its answer words checked."""
    return FAMILIES[model.family](
        model.base, max_prompt_tokens=max_prompt_tokens, emotions_shown=emotions_shown
    )


def load_tokenizer(reference: str) -> Any:
    """A fast tokenizer from a local directory or a hub name. Raises ModelError, one line."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer {reference}: cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise ModelError(f"tokenizer {reference}: no fast version, which character offsets need")
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for one-line errors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _language_model(network: nn.Module) -> Any:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _decoder(network: nn.Module) -> Any:
    """A causal model without its head."""
    return _language_model(network).get_decoder()
