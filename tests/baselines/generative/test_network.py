"""Questions in tokens, the loss of answers, and decoding, each against a slow loop over the plain model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, MistralConfig, PretrainedConfig

from kdecs.baselines.generative.answering import targets_of
from kdecs.baselines.generative.answers import gold_answer, prompt, render
from kdecs.baselines.generative.network import (
    AnswerNetwork,
    Decoder,
    check_answers,
    num_answer_tokens,
)
from kdecs.corpus.schema import Dialogue
from kdecs.errors import DialogueError, ModelError
from kdecs.teacher.tree.prefix_tree import common_prefix_length

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2}  # fmt: skip


@torch.no_grad()
def test_the_loss_is_that_of_the_answers_tokens_alone(
    base: Path, network_of: Callable[..., AnswerNetwork], dialogues: tuple[Dialogue, ...]
) -> None:
    model = network_of(base)
    pairs = [pair for dialogue in dialogues[:2] for pair in targets_of(dialogue)]
    prompts = [model.family.encode(pair) for pair in pairs]
    expected = []
    for pair, one in zip(pairs, prompts, strict=True):
        tokenizer = model.family.tokenizer
        question = tokenizer(prompt(pair.dialogue, pair.target, model.family.labels))["input_ids"][:-1]
        answer = tokenizer(render(gold_answer(pair.dialogue, pair.target)), add_special_tokens=False)[
            "input_ids"
        ]
        tokens = [*question, *answer, tokenizer.eos_token_id]
        assert one.tokens.tolist() == tokens
        logits = model.network(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected += [float(logits[place - 1, tokens[place]]) for place in range(len(question), len(tokens))]
        assert num_answer_tokens(one) == len(answer) + 1
    for model.use_tree in (False, True):
        assert np.allclose(model(prompts).numpy(), expected, atol=2e-5)
    assert np.allclose(model(prompts, by_model=True).numpy(), expected, atol=2e-5)


@torch.no_grad()
def tokens_without_cache(model: AnswerNetwork, dialogue: Dialogue, target: int) -> list[int]:
    """Greedy decoding that reads the whole text again for every token."""
    tokens = model.family.question(dialogue, target).tolist()
    size = len(tokens)
    for _ in range(model.family.max_answer_tokens):
        token = int(model.network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if token == model.family.tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokens[size:]


def without_cache(model: AnswerNetwork, dialogue: Dialogue, target: int) -> str:
    """The same in words."""
    tokens = tokens_without_cache(model, dialogue, target)
    return str(model.family.tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("window", [None, 16, 2100])
def test_greedy_answers_are_those_without_a_cache(
    window: int | None,
    base: Path,
    network_of: Callable[..., AnswerNetwork],
    dialogues: tuple[Dialogue, ...],
    make_base: Callable[[PretrainedConfig], Path],
) -> None:
    if window:
        base = make_base(MistralConfig(**SHAPE, sliding_window=window))
    model = network_of(base)
    shares = Decoder(model, shares=True).is_exact(dialogues[0])
    assert shares == (window != 16), "2100 tokens hold any two questions of 1024 and an answer of 5"
    decoder = Decoder(model, shares=shares)
    expected = [without_cache(model, dialogues[0], target) for target in (1, 3, 4)]
    assert len(set(expected)) == 3
    for batch_tokens in (100_000, 16) if shares else (100_000,):
        assert decoder.answers(dialogues[0], [1, 3, 4], batch_tokens=batch_tokens) == expected


def test_a_dialogue_is_read_once_for_all_of_its_targets(
    base: Path, network_of: Callable[..., AnswerNetwork], dialogues: tuple[Dialogue, ...]
) -> None:
    model = network_of(base)
    dialogue = dialogues[0]
    turns = [utterance.turn for utterance in dialogue.utterances]
    read: list[int] = []
    hook = model.network.register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )

    def tokens_read(answer: Callable[[], list[str]]) -> tuple[list[str], int]:
        read.clear()
        return answer(), sum(read)

    answers, again = tokens_read(lambda: [without_cache(model, dialogue, turn) for turn in turns])
    alone, one_by_one = tokens_read(
        lambda: Decoder(model, shares=False).answers(dialogue, turns, batch_tokens=10**6)
    )
    shared, side_by_side = tokens_read(
        lambda: Decoder(model, shares=True).answers(dialogue, turns, batch_tokens=10**6)
    )
    assert answers == alone == shared
    # Without a cache all tokens again for each token of an answer; with one each question once, and each of its
    # answer's tokens but the last; over shared keys the longest question once, and of each what it does not share.
    size = model.family.max_answer_tokens
    questions = [model.family.question(dialogue, turn) for turn in turns]
    lengths = list(map(len, questions))
    assert again == sum(size * length + sum(range(size)) for length in lengths), "no answer ends early"
    assert one_by_one == sum(lengths) + len(turns) * (size - 1)
    own = max(len(one) - common_prefix_length(one, questions[-1]) for one in questions[:-1])
    begun = lengths[-1] - 1 + len(turns) * own
    assert side_by_side == begun + len(turns) * (size - 1)
    assert side_by_side < 0.4 * one_by_one < 0.1 * again
    # An answer that ends early is read no further, though others go on.
    tokenizer = model.family.tokenizer
    second = tokens_without_cache(model, dialogue, turns[0])[1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(second)
    expected = [without_cache(model, dialogue, turn) for turn in turns]
    shared, side_by_side = tokens_read(
        lambda: Decoder(model, shares=True).answers(dialogue, turns, batch_tokens=10**6)
    )
    hook.remove()
    assert shared == expected != answers
    assert side_by_side < begun + len(turns) * (size - 1)


def test_an_over_long_question_loses_its_oldest_turns(
    base: Path, network_of: Callable[..., AnswerNetwork], dialogues: tuple[Dialogue, ...]
) -> None:
    model = network_of(base)
    family, dialogue = model.family, dialogues[0]
    pair = targets_of(dialogue)[-1]
    whole = family.encode(pair)
    assert whole.cut == "nothing" and "\n1 " in family.tokenizer.decode(whole.tokens)
    family.max_prompt_tokens = len(whole.tokens) - 1
    cut = family.encode(pair)
    text = family.tokenizer.decode(cut.tokens)
    assert cut.cut == "history" and "\n1 " not in text and f"\n{pair.target} " in text
    assert '"turn": 1' not in text[text.index("Answer:\n") :]
    family.max_prompt_tokens = 100
    with pytest.raises(DialogueError, match=r"only \d+ have room; raise batches.max_prompt_tokens"):
        family.encode(pair)


def test_a_model_that_scales_its_logits_is_refused(
    base: Path,
    network_of: Callable[..., AnswerNetwork],
    dialogues: tuple[Dialogue, ...],
    make_base: Callable[[PretrainedConfig], Path],
) -> None:
    model = network_of(base)
    one = model.family.encode(targets_of(dialogues[0])[0])
    check_answers(_Engine(model), one, "base")
    scaled = network_of(make_base(GraniteConfig(**SHAPE, logits_scaling=8.0)))
    with pytest.raises(ModelError, match="changes its logits after the output embedding"):
        check_answers(_Engine(scaled), one, "base")


class _Engine:
    """What DeepSpeed's engine is to the check: a forward and the module."""

    def __init__(self, module: AnswerNetwork) -> None:
        self.module = module

    def __call__(self, *arguments: object, **options: object) -> torch.Tensor:
        return self.module(*arguments, **options)
