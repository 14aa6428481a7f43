"""A decoder that answers the question about a target: its tokens, its loss, and greedy decoding with a cache.

The questions about the targets of a dialogue begin alike, up to the end of the shorter one's dialogue. Training packs
them into a prefix tree, as a teacher's training does with pairs (kdecs.teacher.tree). Decoding reads a dialogue once,
keeps its keys and values, and lets all of its targets answer side by side over them: each sees as many of the shared
tokens as its own question holds.

Shapes: P prompts, N answer tokens of all prompts, H hidden, V vocabulary, B targets of a dialogue, S tokens that they
share, T tokens of a target's own.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kdecs.baselines.generative.answers import gold_answer, prompt, render
from kdecs.corpus.pairs import Pair
from kdecs.corpus.schema import Dialogue
from kdecs.errors import DialogueError, ModelError, first_line
from kdecs.models import load_tokenizer
from kdecs.teacher.families import CausalFamily, EncodedPrompt, language_model
from kdecs.teacher.network import TeacherNetwork, are_close
from kdecs.teacher.tree.prefix_tree import common_prefix_length


class AnswerFamily(CausalFamily):
    """A decoder whose prompt is a question and its answer; the loss begins behind the token `answer`.

    It stands in the place of a teacher's family, so that engine, batches and products are the teacher's own.
    """

    def __init__(
        self, reference: str, labels: Sequence[str], *, max_prompt_tokens: int, max_answer_tokens: int
    ) -> None:
        # Not the parent's: a teacher's answers are single words, which this tokenizer may split.
        self.tokenizer = load_tokenizer(reference)
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"tokenizer {reference}: has no token that ends a text, so no answer would end; choose another model"
            )
        self.labels = tuple(labels)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens

    def encode(self, pair: Pair) -> EncodedPrompt:
        """Question and gold answer of a pair's target, ended by the end of text. The candidate does not matter."""
        dialogue, target = pair.dialogue, pair.target
        room = self.max_prompt_tokens - len(self._tokens(render(gold_answer(dialogue, target)))) - 1
        question, first = self._question(dialogue, target, room)
        # Tokenised as a whole, and apart only if the tokenizer should join the seam, where generation begins.
        text = render(gold_answer(dialogue, target, first=first))
        whole = self._tokens(prompt(dialogue, target, self.labels, first=first) + text)
        is_prefix = np.array_equal(whole[: len(question)], question)
        answer = whole[len(question) :] if is_prefix else self._tokens(text, special=False)
        tokens = np.concatenate([question, answer, [self.tokenizer.eos_token_id]]).astype(np.int32)
        return EncodedPrompt(tokens, len(question) - 1, "nothing" if first == 1 else "history")

    def question(self, dialogue: Dialogue, target: int) -> np.ndarray:
        """The tokens of a question, with room for an answer; over-long ones lose their oldest turns."""
        return self._question(dialogue, target, self.max_prompt_tokens - self.max_answer_tokens)[0]

    def hidden_before_answers(
        self, network: nn.Module, prompts: Sequence[EncodedPrompt], device: torch.device, *, use_tree: bool
    ) -> list[Tensor]:
        """For each prompt the hidden states that predict its answer's tokens, from one forward over all prompts."""
        if use_tree:
            hidden_NH, tree = self._tree_forward(network, prompts, device)
            return [
                hidden_NH[torch.from_numpy(tree.path(n)[one.answer : -1]).to(device)]
                for n, one in enumerate(prompts)
            ]
        hidden_PTH, _ = self._padded_forward(network, prompts, device)
        return [hidden_PTH[n, one.answer : len(one.tokens) - 1] for n, one in enumerate(prompts)]

    def _question(self, dialogue: Dialogue, target: int, room: int) -> tuple[np.ndarray, int]:
        """The tokens of a question, and the first turn that it shows."""
        for first in range(1, target + 1):
            tokens = self._tokens(prompt(dialogue, target, self.labels, first=first))
            if len(tokens) <= room:
                return tokens, first
        raise DialogueError(
            f"dialogue {dialogue.id}, turn {target}: the question takes {len(tokens)} tokens without any history, but "
            f"only {room} have room; raise batches.max_prompt_tokens"
        )

    def _tokens(self, text: str, *, special: bool = True) -> np.ndarray:
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        # Some tokenizers append a special token, whose range is empty.
        size = len(encoded["input_ids"])
        while size and encoded["offset_mapping"][size - 1][1] == 0:
            size -= 1
        return np.asarray(encoded["input_ids"][:size], dtype=np.int32)


class AnswerNetwork(TeacherNetwork):
    """Computes the log-probabilities of the answers' tokens, over the questions' prefix tree or one by one."""

    def forward(
        self,
        prompts: Sequence[EncodedPrompt] = (),
        *,
        by_model: bool = False,
        step: dict[str, Any] | None = None,
    ) -> Tensor:
        """Log-probabilities (N,) of every answer token given what is before it, float32, in the order of the prompts.

        `by_model`, for a check: from the logits of the model as a whole, one prompt at a time. `step`, to decode: the
        model's inputs, for whose rows it returns the logits (B, V) behind the last token; keys and values go into the
        cache among them.
        """
        if step is not None:
            return self.network(**step, use_cache=True, logits_to_keep=1).logits[:, -1]
        assert isinstance(self.family, AnswerFamily)
        if by_model:
            return torch.cat([self._by_model(prompt) for prompt in prompts])
        # The head runs only where an answer's token is predicted, which is a small part of the sequence.
        hidden = self.family.hidden_before_answers(self.network, prompts, self.device, use_tree=self.use_tree)
        return _chosen(self.family.head(self.network, torch.cat(hidden)), prompts)

    def _by_model(self, one: EncodedPrompt) -> Tensor:
        ids_1T = torch.from_numpy(one.tokens.astype(np.int64)).to(self.device)[None]
        logits_TV = self.network(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0]
        return _chosen(logits_TV[one.answer : -1], [one])


def _chosen(logits_NV: Tensor, prompts: Sequence[EncodedPrompt]) -> Tensor:
    """The log-probabilities (N,) of the answers' tokens."""
    tokens = np.concatenate([each.tokens[each.answer + 1 :] for each in prompts]).astype(np.int64)
    chosen_N = torch.from_numpy(tokens).to(logits_NV.device)
    return -nn.functional.cross_entropy(logits_NV.float(), chosen_N, reduction="none")


def num_answer_tokens(one: EncodedPrompt) -> int:
    """Tokens that the loss is summed over, the end of the answer included."""
    return len(one.tokens) - one.answer - 1


@torch.no_grad()
def check_answers(engine: Any, one: EncodedPrompt, base: str) -> None:
    """Raise ModelError if the model as a whole gives other probabilities than its parts. Collective.

    Some models scale or cap their logits after the head, which a training on hidden states would miss.
    """
    try:
        ours_N, expected_N = engine([one]), engine([one], by_model=True)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"model {base}: does not run as a generative baseline: {first_line(error)}"
        ) from None
    if not are_close(ours_N, expected_N, engine.module):
        raise ModelError(
            f"model {base}: changes its logits after the output embedding, which the training reads; choose another "
            "model"
        )


class Decoder:
    """Greedy answers of a loaded model. If it `shares`, a dialogue is read once for all of its targets.

    `ask` runs the network: the engine's forward while it trains, otherwise the model's own.
    """

    def __init__(
        self, model: AnswerNetwork, *, shares: bool, ask: Callable[..., Tensor] | None = None
    ) -> None:
        assert isinstance(model.family, AnswerFamily)
        self.model, self.family, self.shares = model, model.family, shares
        self.ask = ask or model

    # Not in inference mode: ZeRO-3 keeps small parameters that a forward has gathered, and a tensor that was made in
    # that mode takes part in no gradient.
    @torch.no_grad()
    def answers(self, dialogue: Dialogue, targets: Sequence[int], *, batch_tokens: int) -> list[str]:
        """The answers about targets of a dialogue, in order. At most `batch_tokens` tokens are cached at a time."""
        questions = [self.family.question(dialogue, target) for target in targets]
        groups = self._groups(questions, batch_tokens) if self.shares else [[one] for one in questions]
        found = [tokens for group in groups for tokens in self._decode(group)]
        # Without the default clean-up, which joins " ." to the word before it: a span has to be found in its turn.
        return [
            self.family.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for tokens in found
        ]

    @torch.no_grad()
    def is_exact(self, dialogue: Dialogue) -> bool:
        """Whether the first logits over shared keys and values are those over each question alone.

        A model that has no such keys is not asked. Others may still differ, such as those that read the mask as places.
        """
        if not self._shares_keys():
            return False
        questions = [self.family.question(dialogue, turn) for turn in range(1, len(dialogue.utterances) + 1)]
        shared_BV = self.ask(step=self._begin(questions))
        alone_BV = torch.cat([self.ask(step=self._begin([one])) for one in questions])
        return are_close(shared_BV.float(), alone_BV.float(), self.model)

    def _shares_keys(self) -> bool:
        """Whether the model reads explicit positions, and each of its layers keeps the keys of whole questions.

        Layers of linear attention keep a state instead, and a sliding window drops keys that a shorter question needs.
        """
        model = language_model(self.model.network)
        if not {"position_ids", "past_key_values"} <= inspect.signature(model.forward).parameters.keys():
            return False
        # Both what is shared and what a target adds to it may be as long as a question.
        longest = 2 * self.family.max_prompt_tokens + self.family.max_answer_tokens
        return all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > longest)
            for layer in DynamicCache(config=model.config).layers
        )

    def _groups(self, questions: Sequence[np.ndarray], batch_tokens: int) -> list[list[np.ndarray]]:
        """Consecutive questions whose caches fit the budget together; a single one always does."""
        groups: list[list[np.ndarray]] = []
        for one in questions:
            group = [*groups[-1], one] if groups else [one]
            width = max(map(len, group)) + self.family.max_answer_tokens
            if groups and len(group) * width <= batch_tokens:
                groups[-1] = group
            else:
                groups.append([one])
        return groups

    def _decode(self, questions: Sequence[np.ndarray]) -> list[list[int]]:
        """The tokens of the answers to all questions, one more of each at a time."""
        inputs = self._begin(questions)
        found: list[list[int]] = [[] for _ in questions]
        open_rows = list(range(len(questions)))
        for _ in range(self.family.max_answer_tokens):
            next_B = self.ask(step=inputs).argmax(dim=-1)
            kept_B = (next_B != self.family.tokenizer.eos_token_id).nonzero().squeeze(1)
            if len(kept_B) < len(open_rows):
                open_rows = [open_rows[place] for place in kept_B.tolist()]
                if not open_rows:
                    break
                # An answer that has ended is read no further, while the longest one goes on.
                next_B = next_B[kept_B]
                inputs["past_key_values"].batch_select_indices(kept_B)
                inputs |= {name: inputs[name][kept_B] for name in ("position_ids", "attention_mask")}
            for row, token in zip(open_rows, next_B.tolist(), strict=True):
                found[row].append(token)
            inputs |= {
                "input_ids": next_B[:, None],
                "position_ids": inputs["position_ids"][:, -1:] + 1,
                "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
            }
        return found

    def _begin(self, questions: Sequence[np.ndarray]) -> dict[str, Any]:
        """The inputs that predict the answers' first tokens, after one forward over what the questions share."""
        longest = max(questions, key=len)
        # The last token of a question is always its own: its logits begin the answer.
        shared_B = [min(common_prefix_length(one, longest), len(one) - 1) for one in questions]
        size = max(shared_B) if len(questions) > 1 else 0
        shared_B = [min(shared, size) for shared in shared_B]
        cache = DynamicCache(config=language_model(self.model.network).config)
        if size:
            ids_1S = _tensor(longest[None, :size]).to(self.model.device)
            self.ask(step={"input_ids": ids_1S, "past_key_values": cache})
            cache.batch_repeat_interleave(len(questions))
        # The questions end in the same column, behind which the answers begin. A row attends to no shared column
        # beyond its own beginning, nor to the columns that fill it up on the left.
        own = [one[shared:] for one, shared in zip(questions, shared_B, strict=True)]
        width = max(map(len, own))
        ids_BT = np.zeros((len(questions), width), dtype=np.int64)
        positions_BT = np.zeros_like(ids_BT)
        seen_BC = np.zeros((len(questions), size + width), dtype=np.int64)
        for row, (tokens, shared) in enumerate(zip(own, shared_B, strict=True)):
            ids_BT[row, width - len(tokens) :] = tokens
            positions_BT[row, width - len(tokens) :] = np.arange(shared, shared + len(tokens))
            seen_BC[row, :shared] = 1
            seen_BC[row, size + width - len(tokens) :] = 1
        arrays = {"input_ids": ids_BT, "position_ids": positions_BT, "attention_mask": seen_BC}
        tensors = {name: _tensor(array).to(self.model.device) for name, array in arrays.items()}
        return {**tensors, "past_key_values": cache}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
