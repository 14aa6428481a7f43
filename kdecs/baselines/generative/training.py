"""Fine-tune a language model to answer the question about a target: the LLaMA rows of Table 4.

The story is a teacher's (`kdecs.teacher.training.tune`): engine, ZeRO stages, batches of prefix trees, checkpoints,
exact resume and products. Only what is learnt differs: the loss is the mean cross-entropy of the answers' tokens, the
question's tokens count nothing, and the training keeps the product with the lowest loss on validation. Decoding the
validation split for its macro F1 would gather every layer once per token under ZeRO-3.

    adapter_model.safetensors, …   as a teacher's directory (kdecs.teacher.product)
    config.json                    the resolved GenerativeConfig
    manifest.json                  kind generative; details: the labels that the questions offer
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kdecs.baselines.generative.answers import labels_of
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.baselines.generative.network import (
    AnswerFamily,
    AnswerNetwork,
    check_answers,
    num_answer_tokens,
)
from kdecs.corpus.pairs import Pair, causes_of
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.corpus.splits import read_split, training_split
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.teacher.data import MicroBatch, PromptSet, TeacherData
from kdecs.teacher.families import EncodedPrompt
from kdecs.teacher.training import tune


def train_generative(config: GenerativeConfig, runtime: Runtime, stop: StopSignal) -> Path:
    """Train, keep the best on validation, and write the output directory. Collective; raises what `tune` raises."""
    labels = labels_of(training_split(config.corpus))
    return tune(config, Answers(), lambda: answer_family(config, config.model.base, labels), runtime, stop)


def answer_family(config: GenerativeConfig, base: str, labels: Sequence[str]) -> AnswerFamily:
    """The tokenizer of a base, and how it asks and answers."""
    family = AnswerFamily(
        base,
        labels,
        max_prompt_tokens=config.batches.max_prompt_tokens,
        max_answer_tokens=config.max_answer_tokens,
    )
    family.tree_attention = config.batches.tree_attention
    return family


def targets_of(dialogue: Dialogue) -> list[Pair]:
    """The targets whose causes are annotated or that have none, each as its pair (i, i): one question each."""
    return [
        Pair(dialogue, utterance.turn, utterance.turn, bool(causes_of(utterance)), ())
        for utterance in dialogue.utterances
        if utterance.emotion == NEUTRAL or (utterance.emotion is not None and utterance.evidence is not None)
    ]


class Answers:
    """The cross-entropy of the answers' tokens. It is an `Objective` of `kdecs.teacher.training`."""

    kind: Literal["teacher", "generative"] = "generative"
    universe: str = "fold1+neutral"
    network = AnswerNetwork
    needs_trees = False

    def pairs(self, config: GenerativeConfig) -> tuple[list[Pair], list[Pair]]:
        """See `Objective`, as for all methods."""
        valid = read_split(config.corpus, config.corpus.valid).dialogues
        return (
            [pair for dialogue in training_split(config.corpus) for pair in targets_of(dialogue)],
            [pair for dialogue in valid for pair in targets_of(dialogue)],
        )

    def encoder(self, config: GenerativeConfig, family: AnswerFamily) -> Callable[[Pair], EncodedPrompt]:
        """All prompts are the family's own."""
        del config
        return family.encode

    def check(self, engine: Any, prompt: EncodedPrompt, base: str) -> None:
        """The probabilities come from the decoder and the head, one after the other."""
        check_answers(engine, prompt, base)

    def weight(self, data: PromptSet, indices: Iterable[int]) -> int:
        """The number of the answers' tokens."""
        return sum(num_answer_tokens(data.prompts[n]) for n in indices)

    def loss(self, engine: Any, data: PromptSet, micro: MicroBatch, runtime: Runtime) -> torch.Tensor:
        """The sum over the answers' tokens."""
        del runtime  # the network knows its device
        return -engine([data.prompts[n] for n in micro.pairs or (data.shortest,)]).sum()

    def judge(
        self, engine: Any, data: PromptSet, micro: MicroBatch, runtime: Runtime
    ) -> tuple[torch.Tensor, dict[int, bool]]:
        """The loss alone: nothing is decoded."""
        return self.loss(engine, data, micro, runtime), {}

    def scores(self, data: PromptSet, decisions: Mapping[int, bool]) -> dict[str, float]:
        """No scores."""
        del data, decisions
        return {}

    def line(self, point: Mapping[str, float | None]) -> str:
        """The loss of an answer's token."""
        return f"valid loss {point['valid_loss']:.4f}"

    def details(self, config: GenerativeConfig, data: TeacherData, family: AnswerFamily) -> dict[str, Any]:
        """The labels, which prediction offers again."""
        del config, data
        return {"labels": list(family.labels)}
