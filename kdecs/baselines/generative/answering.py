"""Answers about the targets of a labelled corpus: of a model that is being trained, and of one that is trained.

A training deals the dialogues to its ranks. Each dialogue is decoded by itself, as `kdecs baseline answer` does it, so
that the answers are the same on any number of ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdecs.baselines.generative.answers import parse, predictions_of
from kdecs.baselines.generative.network import AnswerFamily, AnswerNetwork, Decoder
from kdecs.corpus.pairs import Pair, causes_of, training_subset
from kdecs.corpus.schema import NEUTRAL, Corpus, Dialogue
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import Prediction
from kdecs.process import ProgressBar
from kdecs.runtime import Runtime, any_rank, gather_objects

_SHARE_SEED = 0  # fixed, so that trainings with other seeds are scored on the same dialogues

Texts = Mapping[tuple[str, int], str]
"""The answer about each target, by dialogue id and turn."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A dialogue and the turns in it that a model is asked about."""

    dialogue: Dialogue
    turns: tuple[int, ...]


def targets_of(dialogue: Dialogue) -> list[Pair]:
    """The targets whose causes are annotated or that have none, each as its pair (i, i): one question each."""
    return [
        Pair(dialogue, utterance.turn, utterance.turn, bool(causes_of(utterance)), ())
        for utterance in dialogue.utterances
        if utterance.emotion == NEUTRAL or (utterance.emotion is not None and utterance.evidence is not None)
    ]


def questions_about(corpus: Corpus) -> list[Asked]:
    """What a corpus asks a model in order to score it: its dialogues with their targets (`targets_of`)."""
    found = [Asked(d, tuple(pair.target for pair in targets_of(d))) for d in corpus.dialogues]
    return [asked for asked in found if asked.turns]


def share_of(corpus: Corpus, share: float) -> Corpus:
    """The corpus with a share of its dialogues, the same ones in every training."""
    kept = training_subset([dialogue.id for dialogue in corpus.dialogues], share, _SHARE_SEED)
    return replace(corpus, dialogues=tuple(corpus.dialogues[place] for place in kept))


def check_questions(family: AnswerFamily, asked: Sequence[Asked]) -> None:
    """Raise DialogueError for a question that has no room, before anything is trained."""
    probe = _probe(asked)
    for each in asked:
        turns = range(1, len(probe.utterances) + 1) if each.dialogue is probe else each.turns
        for turn in turns:
            family.question(each.dialogue, turn)


def answers_in_training(
    engine: Any, asked: Sequence[Asked], *, batch_tokens: int, runtime: Runtime
) -> dict[tuple[str, int], str]:
    """The answers of a model under DeepSpeed, whose evaluation mode is on, to all questions. Collective.

    Every rank returns the answers of all ranks. At most `batch_tokens` tokens are cached at a time.
    """
    # Before the ranks part, since each of them runs the same forwards here.
    is_exact = Decoder(engine.module, shares=True, ask=engine).is_exact(_probe(asked))
    together = _Together(engine, runtime)
    decoder = Decoder(engine.module, shares=not any_rank(not is_exact, runtime), ask=together)
    # The dialogues with most targets first, so that the ranks end at about the same time.
    share = sorted(asked, key=lambda each: -len(each.turns))[runtime.rank :: runtime.world_size]
    found = _answers(decoder, share, batch_tokens=batch_tokens, is_shown=runtime.is_main)
    together.wait()
    return {place: text for part in gather_objects(found, runtime) for place, text in part.items()}


def answer_trained(
    model: AnswerNetwork, asked: Sequence[Asked], *, batch_tokens: int
) -> dict[tuple[str, int], str]:
    """The answers of a loaded model in this process, over shared keys and values if the model allows it."""
    shares = bool(asked) and Decoder(model, shares=True).is_exact(_probe(asked))
    return _answers(Decoder(model, shares=shares), asked, batch_tokens=batch_tokens, is_shown=True)


def _answers(
    decoder: Decoder, asked: Sequence[Asked], *, batch_tokens: int, is_shown: bool
) -> dict[tuple[str, int], str]:
    """The answers of a decoder, one dialogue after the other."""
    found: dict[tuple[str, int], str] = {}
    number = sum(len(each.turns) for each in asked)
    with ProgressBar(number, desc="answer", unit="target", leave=False, is_shown=is_shown) as bar:
        for each in asked:
            texts = decoder.answers(each.dialogue, each.turns, batch_tokens=batch_tokens)
            found |= {(each.dialogue.id, turn): text for turn, text in zip(each.turns, texts, strict=True)}
            bar.update(len(each.turns))
    return found


def read_texts(texts: Texts, asked: Sequence[Asked], labels: Sequence[str]) -> tuple[list[Prediction], int]:
    """The predictions for every pair of the targets, in order, and how many of the answers have a fault."""
    predictions: list[Prediction] = []
    num_faulty = 0
    for each in asked:
        for turn in each.turns:
            parsed = parse(texts[each.dialogue.id, turn], each.dialogue, turn, labels)
            num_faulty += bool(parsed.faults)
            predictions += predictions_of(parsed.answer, each.dialogue, turn)
    return predictions, num_faulty


def scores_of(corpus: Corpus, predictions: Sequence[Prediction], num_faulty: int) -> dict[str, float]:
    """The scores that other baselines have on validation (fold1, protocol reccon), in percent.

    `faulty_answers` is the percentage of the targets whose answer has a fault.
    """
    num_answers = len({prediction.key[:2] for prediction in predictions})
    found = evaluate(corpus, {each.key: each for each in predictions}, universe="fold1")
    return {**found.values, "faulty_answers": 100 * num_faulty / num_answers}


def _probe(asked: Sequence[Asked]) -> Dialogue:
    """The dialogue that shows whether the model may share keys: the shortest one of at least two turns."""
    dialogues = [each.dialogue for each in asked]
    return min(dialogues, key=lambda dialogue: (len(dialogue.utterances) < 2, len(dialogue.utterances)))


class _Together:
    """The engine's forward for ranks that decode unequal numbers of tokens.

    Under ZeRO-3 every forward gathers parameters from all ranks. So before each one the ranks tell each other whether
    any of them still decodes, and one that has ended computes a token that nobody reads.
    """

    def __init__(self, engine: Any, runtime: Runtime) -> None:
        self.engine, self.runtime = engine, runtime
        self.is_partitioned = engine.zero_optimization_stage() == 3

    def __call__(self, *, step: dict[str, Any]) -> Tensor:
        if self.is_partitioned:
            any_rank(True, self.runtime)
        logits_BV: Tensor = self.engine(step=step)
        return logits_BV

    @torch.no_grad()
    def wait(self) -> None:
        """Take part in the others' forwards until all ranks have ended. Collective."""
        while self.is_partitioned and any_rank(False, self.runtime):
            self.engine(step={"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=self.runtime.device)})
