"""Model families (decoder, encoder-decoder, encoder): how each kind of teacher reads a pair and gives the connective.

All share one interface: encode a pair's prompt, run a batch of prompts, return the hidden states at the answers.

Shapes: P prompts, T tokens of the longest, N packed tokens, H hidden, A answer words, V vocabulary.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from kdecs.corpus.answer_words import CONNECTIVES, answer_token_ids
from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import (
    TeacherPrompt,
    history_separator,
    kept_in_tree,
    kept_tokens,
    room_for_branch,
    teacher_prompt,
    tokens_inside,
)
from kdecs.corpus.schema import FINE_TO_COARSE, Dialogue
from kdecs.errors import ModelError
from kdecs.models import load_pretrained, load_tokenizer
from kdecs.teacher.config import MaskedModel, ModelConfig, TreeAttention
from kdecs.teacher.tree.attention import FLEX_BLOCK, mask_arguments, resolve, use_tree_attention
from kdecs.teacher.tree.prefix_tree import PackedTree, pack
from kdecs.trees import check_trees, plant, tree_inputs

logger = logging.getLogger(__name__)

HEADS = ("lm_head.", "cls.")  # names that a language model's head begins with


@dataclass(frozen=True)
class EncodedPrompt:
    """A pair's prompt in tokens. `answer` is the index of the token whose output predicts the connective.

    `cut` is what an over-long prompt lost: only its oldest history, or text of u_i or u_j as well. `num_trunk` tokens
    end with the target clause: candidates of a target share them in the layout tree (0 in other layouts).
    """

    tokens: np.ndarray
    answer: int
    cut: Literal["nothing", "history", "text"] = "nothing"
    num_trunk: int = 0

    @property
    def trunk(self) -> bytes:
        """The trunk's tokens as a key."""
        return self.tokens[: self.num_trunk].tobytes()


class Family(ABC):
    """One kind of teacher: its tokenizer, answer tokens, prompt and forward."""

    name: ClassVar[str]
    auto_model: ClassVar[Any]
    lora_task: ClassVar[str]
    can_share_prefixes: ClassVar[bool] = False
    answer_context: ClassVar[tuple[str, str]]
    """The text of the prompt right before and after the connective."""
    tree_attention: TreeAttention = "auto"
    layout: Literal["pair", "tree"] = "pair"
    separator: str
    """What joins the utterances of the history. A teacher keeps the one that it was trained with."""

    def __init__(self, reference: str, *, max_prompt_tokens: int, emotions_shown: str) -> None:
        self.tokenizer = load_tokenizer(reference)
        self.max_prompt_tokens = max_prompt_tokens
        self.emotions_shown = emotions_shown
        self.separator = history_separator(self.tokenizer)
        before, after = self.answer_context
        self.answer_ids = answer_token_ids(self.tokenizer, CONNECTIVES, before=before, after=after)
        self._last_room: tuple[Dialogue | None, tuple[int, int], int] = (None, (0, 0), 0)

    def encode(self, pair: Pair) -> EncodedPrompt:
        """The tokens of a pair's prompt, cut to `max_prompt_tokens` by dropping the oldest history."""
        return self._encode(pair, shown_relation=None)

    def encode_with_hint(self, pair: Pair) -> EncodedPrompt:
        """As `encode`, but the prompt also says whether the pair is causal: for training alone."""
        return self._encode(pair, shown_relation=pair.is_cause)

    def _encode(self, pair: Pair, *, shown_relation: bool | None) -> EncodedPrompt:
        if pair.emotion is None:
            raise ModelError(
                f"pair {pair.id}: the target has no emotion, but the teacher's prompt has to show one; "
                "give each target an emotion"
            )
        emotion = pair.emotion
        if self.emotions_shown == "coarse":
            emotion = FINE_TO_COARSE.get(emotion, emotion)
        prompt = teacher_prompt(
            pair.dialogue,
            pair.target,
            pair.candidate,
            emotion=emotion,
            separator=self.separator,
            shown_relation=shown_relation,
        )
        # The prompt is tokenised as a whole: tokenizers merge characters across the seams of separate pieces.
        encoded = self.tokenizer(prompt.text + self.answer_suffix, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        num_trunk = 0
        if self.layout == "tree":
            num_trunk = _num_trunk(offsets, prompt)
            kept = kept_in_tree(
                offsets,
                prompt,
                num_trunk=num_trunk,
                room=self._room_for_branch(pair),
                max_tokens=self.max_prompt_tokens,
            )
            num_trunk = sum(n < num_trunk for n in kept)
        else:
            kept = kept_tokens(offsets, prompt, self.max_prompt_tokens)
        tokens = np.asarray(encoded["input_ids"], dtype=np.int32)[kept]
        answer = self.answer_index(tokens, [offsets[n] for n in kept], len(prompt.text))
        return EncodedPrompt(tokens, answer, _what_was_cut(offsets, kept, prompt), num_trunk)

    def _room_for_branch(self, pair: Pair) -> int:
        """What the trunk of a pair's target leaves for a branch, hints aside.

        By all candidates that the target could have, not by those asked for: a pair's prompt is the same whatever
        stands beside it.
        """
        target, last = pair.target, max(pair.target, pair.candidate)
        # Read once and replaced as a whole, since threads may share a family. Pairs come target by target.
        dialogue, key, room = self._last_room
        if dialogue is not pair.dialogue or key != (target, last):
            prompts = [
                teacher_prompt(pair.dialogue, target, candidate, emotion="", separator=self.separator)
                for candidate in range(1, last + 1)
            ]
            start = prompts[0].target_range[1] + 1
            texts = [prompt.text[start:] + self.answer_suffix for prompt in prompts]
            branches = []
            for prompt, offsets in zip(
                prompts, self.tokenizer(texts, return_offsets_mapping=True)["offset_mapping"], strict=True
            ):
                # The special tokens before the branch are the trunk's.
                num_leading = next(n for n, (_, right) in enumerate(offsets) if right > 0)
                first, end = prompt.candidate_range
                num_text = len(tokens_inside(offsets, (first - start, end - start)))
                branches.append((len(offsets) - num_leading, num_text))
            room = room_for_branch(branches, self.max_prompt_tokens)
            self._last_room = (pair.dialogue, (target, last), room)
        return room

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
        """Logits (P, A) of the answer words in float32, from only their rows of the output embedding.

        If that embedding is partitioned (ZeRO-3) or has an adapter, all of its rows are multiplied.
        """
        output = language_model(network).get_output_embeddings()
        if not _has_plain_rows(output):
            return self.head(network, hidden_PH)[:, self.answer_ids].float()
        # A vocabulary has 30,000 to 130,000 rows, the answers five. In float32 whatever the dtype: a bfloat16 product
        # would round logits of 20 to steps of 0.1.
        bias_A = None if output.bias is None else output.bias[self.answer_ids].float()
        states_PH = self._before_output(network, output, hidden_PH).float()
        return nn.functional.linear(states_PH, output.weight[self.answer_ids].float(), bias_A)

    def _before_output(self, network: nn.Module, output: nn.Linear, hidden_PH: Tensor) -> Tensor:
        """What the output embedding multiplies, from the network's hidden states (P, H)."""
        del network, output
        return hidden_PH

    def model_logits(self, network: nn.Module, prompt: EncodedPrompt, device: torch.device) -> Tensor:
        """Run a prompt through the whole model: its own logits, and those of its output embedding, (2, V).

        An adapter runs as PEFT itself would run it.
        """
        model = language_model(network)
        given: list[Tensor] = []
        # The head's output before anything that the model does to it afterwards.
        hook = model.get_output_embeddings().register_forward_hook(lambda _, __, output: given.append(output))
        ids_PT, mask_PT, answers_P = self._padded([prompt], device)
        try:
            own_PTV = network(
                input_ids=ids_PT, attention_mask=mask_PT, **self._decoder_inputs(model, device)
            ).logits
        finally:
            hook.remove()
        answer = int(answers_P[0])
        return torch.stack([own_PTV[0, answer], given[0].reshape(own_PTV.shape)[0, answer].to(own_PTV.dtype)])

    def _decoder_inputs(self, model: Any, device: torch.device) -> dict[str, Tensor]:
        """Further inputs of the model, besides the prompt."""
        del model, device
        return {}

    def load_network(
        self, reference: str, *, dtype: torch.dtype, new_head: bool = False, **options: Any
    ) -> nn.Module:
        """The pretrained network from a local directory or a hub name. Raises ModelError, one line.

        With `new_head`, a model without the language model's head gets a random one, which is logged. `options` go to
        Transformers unchanged (quantisation, device map).
        """
        network, missing = load_pretrained(self.auto_model, reference, self.name, dtype=dtype, **options)
        _check_weights(reference, missing, new_head=new_head)
        return network

    def _padded(
        self, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (P, T), attention mask (P, T) and answer index (P,)."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        # Padded positions are masked, so 0 does for a tokenizer that has no padding token.
        ids_PT = np.full((len(prompts), longest), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask_PT = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids_PT[row, : len(prompt.tokens)] = prompt.tokens
            mask_PT[row, : len(prompt.tokens)] = 1
        answers_P = torch.tensor([prompt.answer for prompt in prompts], device=device)
        return torch.from_numpy(ids_PT).to(device), torch.from_numpy(mask_PT).to(device), answers_P


def _check_weights(reference: str, missing: Collection[str], *, new_head: bool) -> None:
    """Raise ModelError if the model lacks weights that it should have; log a head that is allowed to be new.

    `missing` are names as Transformers reports them, without the second names of tied tensors.
    """
    # A pooler feeds a classifier and is never part of a teacher's forward.
    lacking = sorted(key for key in missing if ".pooler." not in key)
    of_body = [key for key in lacking if not key.startswith(HEADS)]
    if of_body:
        raise ModelError(
            f"model {reference}: has no weights for {of_body[0]} ({len(of_body)} are missing), expected a whole model; "
            "download or save it again"
        )
    if lacking and not new_head:
        raise ModelError(
            f"model {reference}: has no weights for the language model's head ({lacking[0]}), and LoRA would not train "
            "a random one; set lora: null, which trains it, or choose another model"
        )
    if lacking:
        logger.warning(
            "model %s: no weights for the language model's head (%s): it is new", reference, lacking[0]
        )


def _num_trunk(offsets: Sequence[tuple[int, int]], prompt: TeacherPrompt) -> int:
    """The tokens up to the full stop of the target clause."""
    return next(n for n, (_, right) in enumerate(offsets) if right > prompt.target_range[1] + 1)


def _what_was_cut(
    offsets: Sequence[tuple[int, int]], kept: Sequence[int], prompt: TeacherPrompt
) -> Literal["nothing", "history", "text"]:
    if len(kept) == len(offsets):
        return "nothing"
    stays = set(kept)
    lost = [right for n, (_, right) in enumerate(offsets) if n not in stays]
    return "text" if max(lost) > prompt.history_end else "history"


def language_model(network: nn.Module) -> Any:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _has_plain_rows(output: nn.Module) -> bool:
    """Whether an output embedding is a plain linear layer, held whole, so that single rows can be read.

    Do not read `output.weight` here: outside its own module, DeepSpeed would gather a partitioned one, and keep it
    gathered for the whole forward.
    """
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in output.parameters())
    return type(output) is nn.Linear and not is_partitioned


class _LinearHead(Family):
    """A family whose head is a linear layer."""

    def head(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """The language model's head."""
        return language_model(network).lm_head(hidden_PH)


class CausalFamily(_LinearHead):
    """Decoder-only: the prompt ends at "is"; the connective is the next token."""

    name = "causal"
    auto_model = AutoModelForCausalLM
    lora_task = "CAUSAL_LM"
    can_share_prefixes = True
    answer_context = ("The connective word between 3 and 2 is ", "")

    def answer_index(self, tokens: np.ndarray, offsets: Sequence[tuple[int, int]], text_end: int) -> int:
        """The last token of the text (a tokenizer may append a special token)."""
        del tokens
        # `right > left` skips special tokens, whose range is empty.
        return max(n for n, (left, right) in enumerate(offsets) if right > left and right <= text_end)

    def _encode(self, pair: Pair, *, shown_relation: bool | None) -> EncodedPrompt:
        """Encode as the base class does, and drop everything after the last token of the text."""
        encoded = super()._encode(pair, shown_relation=shown_relation)
        return replace(encoded, tokens=encoded.tokens[: encoded.answer + 1])

    def hidden_at_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """Run one forward over the padded prompts."""
        hidden_PTH, answers_P = self._padded_forward(network, prompts, device)
        return hidden_PTH[torch.arange(len(prompts), device=hidden_PTH.device), answers_P]

    def _padded_forward(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (P, T, H) of the padded prompts, and the index of each answer (P,)."""
        ids_PT, mask_PT, answers_P = self._padded(prompts, device)
        # Without the head, whose logits for every token of every prompt would be the largest tensor of the forward.
        output = _decoder(network)(input_ids=ids_PT, attention_mask=mask_PT, use_cache=False)
        return output.last_hidden_state, answers_P

    def load_network(
        self, reference: str, *, dtype: torch.dtype, new_head: bool = False, **options: Any
    ) -> nn.Module:
        """Load as the base class does, and prepare the network to attend along a prefix tree."""
        network = super().load_network(reference, dtype=dtype, new_head=new_head, **options)
        use_tree_attention(network)
        return network

    def hidden_at_leaves(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """Run one forward over the prompts' tree: the same hidden states (P, H) for a fraction of the tokens."""
        hidden_NH, tree = self._tree_forward(network, prompts, device)
        return hidden_NH[torch.from_numpy(tree.leaves_P).to(device)]

    def _tree_forward(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> tuple[Tensor, PackedTree]:
        """Hidden states (N, H) along the walk of the prompts' tree, and the walk."""
        tree = pack([prompt.tokens for prompt in prompts])
        decoder = _decoder(network)
        kind = resolve(self.tree_attention, decoder, device)
        if kind == "flex":
            tree = tree.padded_to(FLEX_BLOCK)  # each new length may compile the kernel again, so allow few
        output = decoder(
            input_ids=torch.from_numpy(tree.tokens_N).to(device)[None],
            position_ids=torch.from_numpy(tree.positions_N).to(device)[None],
            use_cache=False,
            **mask_arguments(tree, kind, device),
        )
        return output.last_hidden_state[0], tree


class Seq2SeqFamily(_LinearHead):
    """Encoder-decoder (T5): `<extra_id_0>` stands for the connective; logits at the decoder's second position."""

    name = "seq2seq"
    auto_model = AutoModelForSeq2SeqLM
    lora_task = "SEQ_2_SEQ_LM"
    answer_context = ("", "")

    def __init__(self, reference: str, *, max_prompt_tokens: int, emotions_shown: str) -> None:
        super().__init__(reference, max_prompt_tokens=max_prompt_tokens, emotions_shown=emotions_shown)
        self.sentinel_id = self.tokenizer.convert_tokens_to_ids("<extra_id_0>")
        if self.sentinel_id in (None, self.tokenizer.unk_token_id):
            raise ModelError(
                f"tokenizer {reference}: has no token <extra_id_0>, which a seq2seq teacher fills; choose a T5 model"
            )

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
        """Run the encoder over the padded prompts and the decoder over two tokens."""
        ids_PT, mask_PT, answers_P = self._padded(prompts, device)
        model = language_model(network)
        decoder_ids = self._decoder_inputs(model, device)["decoder_input_ids"].expand(len(prompts), -1)
        encoded = model.encoder(input_ids=ids_PT, attention_mask=mask_PT)
        # Without the cache, which would keep every layer's keys and values for tokens that are never generated.
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
        # T5 was pretrained to answer with the sentinel first, then the text that it stands for.
        ids = [[model.config.decoder_start_token_id, self.sentinel_id]]
        return {"decoder_input_ids": torch.tensor(ids, device=device)}


class MaskedFamily(Family):
    """Encoder (RoBERTa, BERT): the connective fills the mask token."""

    name = "masked"
    auto_model = AutoModelForMaskedLM
    # PEFT has no task for masked language models. This one runs the model as it is and adds no head.
    lora_task = "FEATURE_EXTRACTION"
    answer_context = ("The connective word between 3 and 2 is ", ".")

    def __init__(self, reference: str, *, max_prompt_tokens: int, emotions_shown: str) -> None:
        super().__init__(reference, max_prompt_tokens=max_prompt_tokens, emotions_shown=emotions_shown)
        if self.tokenizer.mask_token is None:
            raise ModelError(
                f"tokenizer {reference}: has no mask token, which a masked teacher fills; "
                "choose a masked language model"
            )
        # An encoder has no positions beyond its limit, so its prompts are cut to it.
        longest = min(self.tokenizer.model_max_length, max_prompt_tokens)
        self.max_prompt_tokens = longest

    @property
    def answer_suffix(self) -> str:
        """The mask and the full stop of Eq. 1."""
        return f" {self.tokenizer.mask_token}."

    def answer_index(self, tokens: np.ndarray, offsets: Sequence[tuple[int, int]], text_end: int) -> int:
        """The mask token after the text (its offsets may or may not cover the space before it)."""
        found = [n for n, (left, right) in enumerate(offsets) if right > left and right > text_end + 1]
        index = found[0]
        if tokens[index] != self.tokenizer.mask_token_id:
            raise ModelError(
                f"tokenizer {self.tokenizer.name_or_path}: the mask is several tokens; choose another model"
            )
        return index

    def hidden_at_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        """Run the encoder over padded prompts, or over trees if they have trunks; `head` has the head's transform."""
        encoder = language_model(network).base_model
        if prompts[0].num_trunk:
            return self._hidden_in_trees(encoder, prompts, device)
        ids_PT, mask_PT, answers_P = self._padded(prompts, device)
        output = encoder(input_ids=ids_PT, attention_mask=mask_PT)
        return output.last_hidden_state[torch.arange(len(prompts), device=ids_PT.device), answers_P]

    def _hidden_in_trees(
        self, encoder: Any, prompts: Sequence[EncodedPrompt], device: torch.device
    ) -> Tensor:
        numbers: dict[bytes, int] = {}
        trunk_of_P = np.array([numbers.setdefault(prompt.trunk, len(numbers)) for prompt in prompts])
        trunks = [np.frombuffer(trunk, dtype=np.int32) for trunk in numbers]
        branches = [prompt.tokens[prompt.num_trunk :] for prompt in prompts]
        ids_N, _, starts_P, tree = plant(trunks, branches, trunk_of_P)
        output = encoder(
            input_ids=torch.from_numpy(ids_N).to(device)[None], **tree_inputs(encoder, tree.to(device))
        )
        answers_P = starts_P + np.array([prompt.answer - prompt.num_trunk for prompt in prompts])
        return output.last_hidden_state[0, torch.from_numpy(answers_P).to(device)]

    def load_network(
        self, reference: str, *, dtype: torch.dtype, new_head: bool = False, **options: Any
    ) -> nn.Module:
        """Load as the base class does, and check that the encoder reads trees if the layout asks for them."""
        network = super().load_network(reference, dtype=dtype, new_head=new_head, **options)
        if self.layout == "tree":
            check_trees(language_model(network).base_model, f"model {reference}")
        return network

    def head(self, network: nn.Module, hidden_PH: Tensor) -> Tensor:
        """The masked language model's head (transform, norm and output embedding)."""
        return _masked_head(network)(hidden_PH)

    def _before_output(self, network: nn.Module, output: nn.Linear, hidden_PH: Tensor) -> Tensor:
        """The head's transform and norm."""
        head = _masked_head(network)
        place = next(name for name, module in head.named_modules() if module is output)
        found: list[Tensor] = []
        # Heads differ in what they do before their output embedding, so the whole head is called, with one row of it.
        row = {f"{place}.{name}": parameter[:1] for name, parameter in output.named_parameters()}
        hook = output.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            torch.func.functional_call(head, row, (hidden_PH,))
        finally:
            hook.remove()
        return found[0]


FAMILIES: dict[str, type[Family]] = {f.name: f for f in (CausalFamily, Seq2SeqFamily, MaskedFamily)}


def make_family(
    model: ModelConfig, *, max_prompt_tokens: int, emotions_shown: str, tree_attention: TreeAttention = "auto"
) -> Family:
    """The family of a model config, with its tokenizer loaded and its answer words checked."""
    family = FAMILIES[model.family](
        model.base, max_prompt_tokens=max_prompt_tokens, emotions_shown=emotions_shown
    )
    family.tree_attention = tree_attention
    if isinstance(model, MaskedModel):
        family.layout = model.layout
    return family


def _masked_head(network: nn.Module) -> nn.Module:
    """Transform, norm and output embedding of a masked language model."""
    model = language_model(network)
    for name in ("lm_head", "cls"):
        if hasattr(model, name):
            return getattr(model, name)
    raise ModelError(
        f"{type(model).__name__}: found neither lm_head nor cls, expected a masked language model; choose another model"
    )


def _decoder(network: nn.Module) -> Any:
    """A causal model without its head."""
    return language_model(network).get_decoder()
