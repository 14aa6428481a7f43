"""Answers in the middle of a training: shared out among ranks, and scored as other baselines are."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdecs.baselines.generative import answering
from kdecs.baselines.generative.answering import (
    Asked,
    answer_trained,
    answers_in_training,
    check_questions,
    questions_about,
    read_texts,
    scores_of,
    share_of,
)
from kdecs.baselines.generative.answers import Answer, gold_answer, labels_of, render
from kdecs.baselines.generative.network import AnswerNetwork, Decoder
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Corpus
from kdecs.errors import DialogueError
from kdecs.runtime import Runtime


@pytest.fixture(scope="module")
def corpus(few: Path) -> Corpus:
    return read_corpus(few)


class Ranks:
    """Two ranks as threads, with the collectives that they need; a wait in vain fails."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.given: dict[int, Any] = {}
        self.forwards = [0, 0]

    def exchange(self, value: Any, runtime: Runtime) -> list[Any]:
        self.given[runtime.rank] = value
        self.barrier.wait()
        both = [self.given[0], self.given[1]]
        self.barrier.wait()
        return both

    def any_rank(self, flag: bool, runtime: Runtime) -> bool:
        return any(self.exchange(flag, runtime))


class Engine:
    """DeepSpeed's engine of a rank. In stage 3 a forward needs the other rank's."""

    def __init__(self, module: AnswerNetwork, stage: int, ranks: Ranks, rank: int) -> None:
        self.module, self.stage, self.ranks, self.rank = module, stage, ranks, rank

    def zero_optimization_stage(self) -> int:
        return self.stage

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.ranks.forwards[self.rank] += 1
        if self.stage == 3:
            self.ranks.barrier.wait()
        return self.module(**inputs)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_decode_unequal_numbers_of_tokens_answer_as_one(
    stage: int,
    base: Path,
    corpus: Corpus,
    network_of: Callable[..., AnswerNetwork],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three dialogues, so that one rank has two of them.
    asked = [*questions_about(corpus), Asked(read_corpus(bundled_sample("valid")).dialogues[0], (1,))]
    model = network_of(base)
    expected = {
        (each.dialogue.id, turn): Decoder(model, shares=False).answers(
            each.dialogue, [turn], batch_tokens=10**6
        )[0]
        for each in asked
        for turn in each.turns
    }
    assert answer_trained(model, asked, batch_tokens=10**6) == expected and len(set(expected.values())) > 1
    ranks = Ranks()
    monkeypatch.setattr(answering, "any_rank", ranks.any_rank)
    monkeypatch.setattr(answering, "gather_objects", ranks.exchange)
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        runtime = Runtime(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"))
        found[rank] = answers_in_training(
            Engine(model, stage, ranks, rank), asked, batch_tokens=10**6, runtime=runtime
        )

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]
    # Only where a forward needs all ranks do they run equally many.
    assert (ranks.forwards[0] == ranks.forwards[1]) == (stage == 3)


def test_answers_score_what_their_predictions_score(corpus: Corpus) -> None:
    labels = labels_of(corpus.dialogues)
    asked = questions_about(corpus)
    gold = {
        (each.dialogue.id, turn): render(gold_answer(each.dialogue, turn))
        for each in asked
        for turn in each.turns
    }
    predictions, num_faulty = read_texts(gold, asked, labels)
    scores = scores_of(corpus, predictions, num_faulty)
    assert scores["emotion_accuracy"] == scores["positive_f1"] == scores["macro_f1"] == 100
    assert scores["faulty_answers"] == 0
    # One answer names no cause, and one is no answer at all: both lose the causes of their target.
    silent, broken = [place for place, text in gold.items() if '"turn"' in text][:2]
    texts = {**gold, silent: render(Answer(labels[0])), broken: "I cannot tell."}
    predictions, num_faulty = read_texts(texts, asked, labels)
    lost = {each.key for each in read_texts(gold, asked, labels)[0] if each.is_cause} - {
        each.key for each in predictions if each.is_cause
    }
    assert {key[:2] for key in lost} == {silent, broken} and num_faulty == 1
    scores = scores_of(corpus, predictions, num_faulty)
    assert scores["faulty_answers"] == pytest.approx(100 / len(gold))
    num_causes = sum(text.count('"turn"') for text in gold.values())
    recall = 1 - len(lost) / num_causes
    assert scores["utterance_positive_f1"] == pytest.approx(100 * 2 * recall / (1 + recall))


def test_a_share_is_of_whole_dialogues_and_nested() -> None:
    corpus = read_corpus(bundled_sample("train"))
    shares = [share_of(corpus, share) for share in (0.25, 0.5, 1.0)]
    kept = [[dialogue.id for dialogue in each.dialogues] for each in shares]
    assert kept[2] == [dialogue.id for dialogue in corpus.dialogues]
    assert set(kept[0]) < set(kept[1]) < set(kept[2]) and len(kept[1]) == -(-len(kept[2]) // 2)


def test_a_question_without_room_is_refused_before_the_training(
    base: Path, corpus: Corpus, network_of: Callable[..., AnswerNetwork]
) -> None:
    asked = questions_about(corpus)
    check_questions(network_of(base).family, asked)
    with pytest.raises(DialogueError, match=r"only 95 have room; raise batches\.max_prompt_tokens"):
        check_questions(network_of(base, max_prompt_tokens=100).family, asked)
