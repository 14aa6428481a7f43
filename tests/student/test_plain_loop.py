"""Cached, bucketed training against the plain loop: the same batches give the same losses and weights."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoTokenizer

from kdecs.config import config_hash
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.process import StopSignal
from kdecs.soft_labels.labels import SoftLabels
from kdecs.student.model import PointerSpanHead
from kdecs.student.training import prepare
from kdecs.training.loop import epoch_batches, learning_rate_at

STEPS = 8


class PlainLoop:
    """The student as one would write it: prompts tokenised per batch, the whole head, a loop over pairs."""

    def __init__(self, config, task) -> None:
        torch.manual_seed(7)
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.base)
        self.model = AutoModelForMaskedLM.from_pretrained(
            config.model.base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train()
        self.head = PointerSpanHead(self.model.config.hidden_size)
        self.head.load_state_dict(task.model.span_head.state_dict())
        self.encoder = PairEncoder(self.tokenizer, config.model.max_prompt_tokens)
        self.pairs = [
            pair
            for dialogue in read_corpus(config.corpus.train).dialogues
            for pair in pairs_of(dialogue, "fold1+neutral")
        ]
        self.emotions = task.data.emotions
        self.soft = SoftLabels.open(config.distillation.labels, config.cache)
        parameters = [*self.model.parameters(), *self.head.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=1e-3,
        )

    def word(self, text: str) -> int:
        return self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"][0]

    def pair_loss(self, pair, encoded, logits, hidden) -> torch.Tensor:
        emotion = logits[encoded.emotion_mask][[self.word(e) for e in self.emotions]]
        loss = 0.6 * functional.cross_entropy(emotion, torch.tensor(self.emotions.index(pair.emotion)))
        first, last = encoded.candidate_first, encoded.candidate_first + len(encoded.candidate_offsets)
        for mask, gold, query, none in (
            (encoded.start_mask, encoded.span_start, self.head.start, self.head.no_start),
            (encoded.end_mask, encoded.span_end, self.head.end, self.head.no_end),
        ):
            scores = hidden[first:last] @ query(hidden[mask]) / hidden.size(-1) ** 0.5
            places = torch.cat((none(hidden[mask]), scores))
            loss = loss + 0.6 * functional.cross_entropy(places, torch.tensor(gold))
        teacher = torch.tensor(self.soft.logits(self.soft.rows_of([pair.id], [pair.hash], split="train")))[0]
        q_t = torch.softmax(teacher / 2, dim=0)
        q_s = torch.softmax(logits[encoded.connective_mask][[self.word(w) for w in CONNECTIVES]] / 2, dim=0)
        return loss + 0.4 * 4 * (q_t * (q_t / q_s).log()).sum()

    def step(self, rows: np.ndarray, rate: float) -> float:
        chosen = [self.pairs[row] for row in rows]
        encoded = list(self.encoder.encode(chosen))
        padded = self.tokenizer.pad({"input_ids": [e.token_ids for e in encoded]}, return_tensors="pt")
        output = self.model(**padded, output_hidden_states=True)
        losses = [
            self.pair_loss(pair, e, output.logits[b], output.hidden_states[-1][b])
            for b, (pair, e) in enumerate(zip(chosen, encoded, strict=True))
        ]
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.item()


def test_training_equals_the_plain_loop(make_config, runtime, plain_base):
    config = make_config(
        model={"base": str(plain_base), "span_head": "pointer", "max_prompt_tokens": 256},
        optimization={"learning_rate": 1e-3, "weight_decay": 0.01, "epochs": 2},
    )
    task, loop = prepare(config, config_hash(config), runtime, StopSignal())
    plain = PlainLoop(config, task)
    batches = epoch_batches(
        task.data.train.num_tokens,
        task.data.rows,
        batch_size=config.batches.global_batch_pairs,
        bucket_batches=config.batches.bucket_batches,
        seed=0,
        epoch=0,
    )
    task.model.train()
    total = loop.settings.epoch_steps * config.optimization.epochs
    for step, rows in enumerate((batches * 2)[:STEPS]):
        before = loop.state.sums[0].item()
        loop.step([rows])
        loop.state.step += 1
        ours = (loop.state.sums[0].item() - before) / len(rows)
        theirs = plain.step(rows, learning_rate_at(step, total, config.optimization))
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours_by_name = dict(task.model.language_model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(ours_by_name[name], parameter, atol=2e-4, rtol=1e-3)
