"""The MRC baseline in training (kdecs.baselines.training)."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from kdecs.baselines.config import QUESTION_VERSION, MrcConfig
from kdecs.baselines.model import LossPart
from kdecs.baselines.mrc.model import (
    READER_NAMES,
    MrcCard,
    answer_logits,
    answer_loss,
    load_reader,
    question_batch,
    save_reader,
)
from kdecs.baselines.mrc.prediction import answer_questions, decide
from kdecs.baselines.mrc.questions import UNKNOWN_ANSWER, QuestionEncoder, answer_text, load_mrc_data
from kdecs.baselines.task import BaselineTask
from kdecs.evaluation.metrics import evaluate
from kdecs.models import load_tokenizer
from kdecs.runtime import Runtime, autocast, seed_everything
from kdecs.student.decision import choose_threshold, pair_gains
from kdecs.student.model import longest_prompt
from kdecs.training.loop import Floats, Ints, Metrics, adamw


class MrcTask(BaselineTask):
    """Its rows are questions, one per pair of fold1."""

    unit = "pair"
    files = READER_NAMES

    def __init__(self, config: MrcConfig, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.config = config
        seed_everything(config.optimization.seed)
        self.tokenizer = load_tokenizer(config.model.base)
        self.pad_id: int = self.tokenizer.pad_token_id or 0
        self.model = load_reader(config.model.base).to(runtime.device)
        self.max_tokens = longest_prompt(self.tokenizer, self.model, config.model.max_tokens)
        encoder = QuestionEncoder(
            self.tokenizer, self.max_tokens, only_candidate=config.model.answer_within == "candidate"
        )
        self.data = load_mrc_data(config, encoder, shows=runtime.is_main)
        self.optimizer = adamw(self.model, config.optimization)
        self.threshold = 0.0
        train = self.data.train
        self.num_tokens = np.array([len(question.token_ids) for question in train])
        self.batch_size = config.batches.global_batch_pairs
        # Those that lost ends of utterances, not only old context.
        num_cut = sum(question.num_truncated > 0 for question in train)
        cut = f", {num_cut} cut to {self.max_tokens} tokens beyond their old context" if num_cut else ""
        num_causes = sum(question.answer_start != 0 for question in train)
        self.what = f"{len(train)} questions ({num_causes} with an answer{cut})"
        self.details = {"num_questions": len(train), "num_cut": num_cut}

    def losses(self, rows_B: Ints, weights_B: Floats) -> list[LossPart]:
        """SQuAD's loss alone."""
        questions = [
            question if weight else replace(question, answer_start=UNKNOWN_ANSWER, answer_end=UNKNOWN_ANSWER)
            for question, weight in zip([self.data.train[row] for row in rows_B], weights_B, strict=True)
        ]
        batch = question_batch(questions, self.pad_id).to(self.runtime.device)
        with autocast(self.runtime.device, self.config.precision):
            start_BT, end_BT = answer_logits(self.network, batch)
        return [answer_loss(start_BT, end_BT, batch.start_B, batch.end_B)]

    def score(self) -> Metrics:
        """With the threshold that is best for macro F1."""
        data = self.data
        score_P, span_P2 = answer_questions(
            self.model,
            data.valid,
            self.pad_id,
            device=self.runtime.device,
            batch_tokens=self.config.batches.evaluation_batch_tokens,
        )
        texts = [
            answer_text(question, *map(int, span))[0]
            for question, span in zip(data.valid, span_P2, strict=True)
        ]
        gold = [pair.spans for pair in data.valid_pairs]
        # Emotions are left out: they would bar the pairs of neutral targets, of which fold1 has none.
        self.threshold, _ = choose_threshold(pair_gains(score_P, [None] * len(gold), gold, texts))
        found = [
            decide(*item, self.threshold).prediction
            for item in zip(data.valid_pairs, data.valid, score_P.tolist(), span_P2, strict=True)
        ]
        scores = evaluate(data.valid_corpus, {item.key: item for item in found}, universe="fold1")
        return {"threshold": self.threshold, **scores.values}

    def save(self, folder: Path) -> None:
        """Write weights, tokenizer and card with the chosen threshold."""
        card = MrcCard(
            question_version=QUESTION_VERSION,
            max_tokens=self.max_tokens,
            answer_within=self.config.model.answer_within,
            threshold=self.threshold,
        )
        save_reader(folder, self.model, self.tokenizer, card)
