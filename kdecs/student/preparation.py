"""What stands before a training's first step: tokenizer, model, data, and the card of the student to be."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import PROMPT_VERSION
from kdecs.runtime import Runtime, on_main_first, seed_everything
from kdecs.student.config import StudentConfig
from kdecs.student.data import TrainingData, given_emotions, load_training_data
from kdecs.student.model import (
    StudentModel,
    load_language_model,
    load_tokenizer,
    longest_prompt,
    student_answer_ids,
)
from kdecs.student.priors import begin_at_counts
from kdecs.student.product import StudentCard
from kdecs.student.threshold import DEFAULT_THRESHOLD

_PROBE_PAIRS = 64  # the untrained logits' means are taken over so many


@dataclass(frozen=True)
class Prepared:
    """A student before its training, on the rank's device; the card has no chosen decision yet."""

    tokenizer: Any
    model: StudentModel
    data: TrainingData
    card: StudentCard


def prepare(config: StudentConfig, runtime: Runtime) -> Prepared:
    """Load what a config names. Collective: rank 0 builds caches first. Raises what loading the inputs raises."""
    seed_everything(config.optimization.seed)
    tokenizer = load_tokenizer(config.model.base)
    language_model = load_language_model(config.model.base, logs=runtime.is_main)
    max_prompt_tokens = longest_prompt(tokenizer, language_model, config.model.max_prompt_tokens)
    data: TrainingData = on_main_first(
        lambda: load_training_data(config, tokenizer, max_prompt_tokens), runtime
    )
    card = _first_card(config, data.emotions, max_prompt_tokens)
    model = StudentModel(
        language_model,
        student_answer_ids(tokenizer, data.emotions, config.model.stand_ins),
        span_head=config.model.span_head,
        max_prompt_tokens=max_prompt_tokens,
        outputs=card.outputs,
    )
    return Prepared(tokenizer, model.to(runtime.device), data, card)


def begin_at_training(model: StudentModel, data: TrainingData, device: torch.device) -> None:
    """Set the priors from the counts of the training pairs, given what the untrained logits are on some of them."""
    assert model.priors is not None
    gold = data.rows[data.is_gold[data.rows]]
    some = gold[np.unique(np.linspace(0, len(gold) - 1, _PROBE_PAIRS).astype(int))]
    some = some[np.argsort(data.train.num_tokens[some], kind="stable")]
    emotions, connectives = [], []
    model.eval()
    with torch.inference_mode():
        for rows in np.array_split(some, max(1, len(some) // 16)):
            batch, _ = data.batch(rows, np.ones(len(rows), dtype=np.float32))
            output = model(batch.to(device))
            emotions.append(output.emotion_BE)
            connectives.append(output.connective_BA)
    begin_at_counts(
        model.priors,
        data.counts(),
        None if emotions[0] is None else torch.cat(emotions),
        None if connectives[0] is None else torch.cat(connectives),
        is_classifier=model.classifier is not None,
    )


def _first_card(config: StudentConfig, emotions: tuple[str, ...], max_prompt_tokens: int) -> StudentCard:
    return StudentCard(
        emotions=emotions,
        stand_ins=config.model.stand_ins,
        connectives=CONNECTIVES,
        span_head=config.model.span_head,
        max_prompt_tokens=max_prompt_tokens,
        prompt_version=PROMPT_VERSION,
        threshold=DEFAULT_THRESHOLD,
        mode=config.distillation.mode,
        task=config.task,
        priors=config.model.priors == "training",
        given_emotions=given_emotions(config),
        history_utterances=config.model.history_utterances,
    )
