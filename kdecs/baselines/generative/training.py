"""Fine-tune a language model to answer the question about a target: the LLaMA rows of Table 4.

The story is a teacher's (`kdecs.teacher.training.tune`): engine, ZeRO stages, batches of prefix trees, checkpoints,
exact resume and products. Only what is learnt differs: the loss is the mean cross-entropy of the answers' tokens, and
the question's tokens count nothing. With `answered_share` a validation also answers about that share of its dialogues
and scores the answers as those of other baselines, and the training keeps the product with the highest macro F1. It
keeps the one with the lowest loss otherwise: greedy decoding takes a forward per token, and under ZeRO-3 each of them
gathers every layer.

    adapter_model.safetensors, …   as a teacher's directory (kdecs.teacher.product)
    config.json                    the resolved GenerativeConfig
    valid-predictions.jsonl        with `answered_share: 1`, the predictions that the product was chosen by
    manifest.json                  kind generative; details: the labels that the questions offer
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kdecs.baselines.generative.answering import (
    answers_in_training,
    check_questions,
    questions_about,
    read_texts,
    scores_of,
    share_of,
    targets_of,
)
from kdecs.baselines.generative.answers import labels_of
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.baselines.generative.network import (
    AnswerFamily,
    AnswerNetwork,
    check_answers,
    num_answer_tokens,
)
from kdecs.corpus.pairs import Pair
from kdecs.corpus.splits import read_split, require_causes, training_split
from kdecs.evaluation.predictions import Prediction, write_predictions
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.student.config import VALIDATION_NAME
from kdecs.student.training import scores_line
from kdecs.teacher.data import MicroBatch, PromptSet, TeacherData
from kdecs.teacher.families import EncodedPrompt
from kdecs.teacher.training import tune


def train_generative(
    config: GenerativeConfig,
    runtime: Runtime,
    stop: StopSignal,
    on_validation: Callable[[], object] | None = None,
) -> Path:
    """Train, keep the best on validation, and write the output directory. Collective.

    `on_validation` as for `tune`, and raises what that raises, and DialogueError if a question of the validation has no
    room.
    """
    labels = labels_of(training_split(config.corpus))
    return tune(
        config,
        Answers(config),
        lambda: answer_family(config, config.model.base, labels),
        runtime,
        stop,
        on_validation,
    )


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


class Answers:
    """The cross-entropy of the answers' tokens. It is an `Objective` of `kdecs.teacher.training`.

    `predictions` are those of the last validation, for the dialogues that it answered about.
    """

    kind: Literal["teacher", "generative"] = "generative"
    universe: str = "fold1+neutral"
    network = AnswerNetwork
    needs_trees = False
    criterion = "macro_f1"
    beside: tuple[str, ...] = (VALIDATION_NAME,)

    def __init__(self, config: GenerativeConfig) -> None:
        self.config = config
        self.valid = read_split(config.corpus, config.corpus.valid)
        self.answered = share_of(self.valid, config.answered_share) if config.answered_share else None
        self.asked = questions_about(self.answered) if self.answered else []
        if self.answered:
            targets = [pair for dialogue in self.answered.dialogues for pair in targets_of(dialogue)]
            require_causes(config.corpus.valid, (pair.is_cause for pair in targets))
        self.predictions: list[Prediction] = []

    def pairs(self, config: GenerativeConfig) -> tuple[list[Pair], list[Pair]]:
        """See `Objective`, as for all methods."""
        return (
            [pair for dialogue in training_split(config.corpus) for pair in targets_of(dialogue)],
            [pair for dialogue in self.valid.dialogues for pair in targets_of(dialogue)],
        )

    def encoder(self, config: GenerativeConfig, family: AnswerFamily) -> Callable[[Pair], EncodedPrompt]:
        """All prompts are the family's own."""
        del config
        return family.encode

    def check(self, engine: Any, prompt: EncodedPrompt, base: str) -> None:
        """The probabilities come from the decoder and the head, one after the other."""
        check_answers(engine, prompt, base)
        if self.asked:
            check_questions(engine.module.family, self.asked)

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
        """The loss alone: an answer has no decision per pair."""
        return self.loss(engine, data, micro, runtime), {}

    def scores(
        self, engine: Any, data: PromptSet, decisions: Mapping[int, bool], runtime: Runtime
    ) -> dict[str, float]:
        """Those of the answers about the dialogues that are answered, if any are."""
        del data, decisions
        if self.answered is None:
            return {}
        texts = answers_in_training(
            engine, self.asked, batch_tokens=self.config.batches.micro_batch_tokens, runtime=runtime
        )
        self.predictions, num_faulty = read_texts(texts, self.asked, engine.module.family.labels)
        return scores_of(self.answered, self.predictions, num_faulty)

    def save(self, folder: Path) -> None:
        """The predictions for the validation split, if all of it was answered."""
        if self.config.answered_share == 1:
            write_predictions(folder / VALIDATION_NAME, self.predictions)

    def line(self, point: Mapping[str, float | None]) -> str:
        """The loss of an answer's token, and the scores of the answers."""
        values = {key: value for key, value in point.items() if value is not None}
        line = f"valid loss {values['valid_loss']:.4f}"
        if self.criterion in values:
            line += f", valid {scores_line(values, self.criterion)}, faulty answers {values['faulty_answers']:.1f}%"
        return line

    def details(self, config: GenerativeConfig, data: TeacherData, family: AnswerFamily) -> dict[str, Any]:
        """The labels, which prediction offers again, and how many targets the validation scores are of."""
        del config, data
        details: dict[str, Any] = {"labels": list(family.labels)}
        if self.asked:
            details["valid_answers"] = sum(len(each.turns) for each in self.asked)
        return details
