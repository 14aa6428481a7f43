"""Predicting whole dialogues: pairs a second against the plain loop over pairs, MiniLM-L6's shape, float32.

The plain loop takes the pairs as they come, sixteen at a time: tokenises each prompt by the Transformers tokenizer,
pads to the longest of the sixteen, and runs the whole `*ForMaskedLM` with its head over every token and the vocabulary.
`Student.predict` encodes at once, sorts by length, and runs the head at the masks over the answer words. Checked in
the same run: the same cause scores to 1e-4 and the same spans.

`--against pair` sets a student in trees (`model.layout: tree`) against one pair by pair, over the same dialogues.

    python benchmarks/student_predict.py
    python benchmarks/student_predict.py --against pair --dialogues 20
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from _student_parts import SHAPES, make_base, some_dialogues
from record import alternate, corpus_split, write_rates

from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import Pair, candidate_pairs
from kdecs.corpus.prompts import PROMPT_VERSION, student_prompt
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS, NEUTRAL, Dialogue
from kdecs.models import load_tokenizer
from kdecs.student.config import StudentCard
from kdecs.student.decision import best_spans, cause_scores
from kdecs.student.model import (
    StudentModel,
    StudentOutput,
    TorchScorer,
    load_language_model,
    student_answer_ids,
)
from kdecs.student.predict.predictor import Student

BATCH_PAIRS, MAX_TOKENS = 16, 512
EMOTIONS = tuple(emotion for emotion in COARSE_EMOTIONS if emotion != NEUTRAL)  # no target is spared a cause


def make_student(directory: Path, corpus_file: Path, layout: str = "pair") -> Student:
    """An untrained student of MiniLM-L6's shape: what it predicts is noise, and costs the same."""
    base = make_base(directory / "base", SHAPES["minilm"], corpus_file)
    tokenizer = load_tokenizer(str(base))
    model = StudentModel(
        load_language_model(base),
        student_answer_ids(tokenizer, EMOTIONS),
        span_head="pointer",
        max_prompt_tokens=MAX_TOKENS,
    )
    card = StudentCard(
        emotions=EMOTIONS,
        stand_ins={},
        connectives=CONNECTIVES,
        span_head="pointer",
        max_prompt_tokens=MAX_TOKENS,
        prompt_version=PROMPT_VERSION,
        threshold=0.5,
        layout=layout,
    )
    scorer = TorchScorer(model, pad_id=tokenizer.pad_token_id, device=torch.device("cpu"))
    return Student(scorer, tokenizer, card)


@torch.inference_mode()
def plain_loop(student: Student, tokenizer: object, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """(cause scores, best spans) of the pairs, sixteen at a time in their order."""
    model = student.scorer.model
    scores, spans = [], []
    for first in range(0, len(pairs), BATCH_PAIRS):
        prompts = [
            student_prompt(p.dialogue, p.target, p.candidate, mask="<mask>", separator="</s>")
            for p in pairs[first : first + BATCH_PAIRS]
        ]
        encoded = tokenizer([p.text for p in prompts], padding=True, return_tensors="pt")  # type: ignore[operator]
        output = model.language_model(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            output_hidden_states=True,
        )
        for row, prompt in enumerate(prompts):
            hidden = output.hidden_states[-1][row]
            at = [encoded.char_to_token(row, place) for place in (prompt.connective_mask, prompt.start_mask)]
            end_mask = encoded.char_to_token(row, prompt.end_mask)
            found = {encoded.char_to_token(row, place) for place in range(*prompt.candidate_range)} - {None}
            tokens = list(range(min(found), max(found) + 1))  # with tokens that are a part of a character
            start, end = model.span_head(
                hidden[at[1]][None], hidden[end_mask][None], hidden[tokens][None], torch.tensor(tokens)[None]
            )
            words = output.logits[row, at[0], model.connective_ids][None]
            logits = StudentOutput(None, words, start, end).arrays()
            scores.append(float(cause_scores(logits)[0]))
            spans.append(best_spans(logits.start_BS, logits.end_BS)[0])
    return np.array(scores), np.stack(spans)


def dialogues_that_fit(tokenizer: object, path: Path, count: int) -> list[Dialogue]:
    """The first dialogues with no prompt longer than the model: the plain loop drops nothing."""

    def longest(dialogue: Dialogue) -> int:
        prompts = [
            student_prompt(p.dialogue, p.target, p.candidate, mask="<mask>", separator="</s>").text
            for p in candidate_pairs(dialogue)
        ]
        return max(map(len, tokenizer(prompts)["input_ids"]))  # type: ignore[operator]

    fitting = (d for d in read_corpus(path).dialogues if longest(d) <= MAX_TOKENS)
    return list(itertools.islice(fitting, count))


def check_equal(student: Student, tokenizer: object, pairs: list[Pair]) -> float:
    """The largest difference of scores. Raises SystemExit where a span differs or a score by more than 1e-4."""
    scores, spans = plain_loop(student, tokenizer, pairs)
    student.card = student.card.model_copy(
        update={"threshold": 0.0}
    )  # every pair a cause, so that spans are told
    found = student.detail(pairs)
    difference = float(np.abs(np.array([item.score for item in found]) - scores).max())
    offsets = [np.asarray(e.candidate_offsets) for e in student.encoder.encode(pairs)]
    for pair, item, span, places in zip(pairs, found, spans, offsets, strict=True):
        expected = (int(places[span[0] - 1][0]), int(places[span[1] - 1][1]))
        if item.span_range != expected:
            raise SystemExit(f"pair {pair.id}: span {item.span_range}, the plain loop has {expected}")
    if difference > 1e-4:
        raise SystemExit(f"scores differ by {difference}, expected at most 1e-4")
    return difference


def measure_trees(tree: Student, pair: Student, dialogues: list[Dialogue], corpus: str, rounds: int) -> None:
    """Whole dialogues by a student in trees against one pair by pair."""
    rates = alternate(
        lambda: float(len(tree.predict(dialogues))),
        lambda: float(len(pair.predict(dialogues))),
        rounds=rounds,
    )
    write_rates(
        "student_predict_tree_vs_pair",
        rates,
        baseline_name="the layout pair, MiniLM-L6's shape (6 layers of 384)",
        corpus=corpus,
        target=2.5,
        details={"dialogues": len(dialogues)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialogues", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", choices=("loop", "pair"), default="loop")
    arguments = parser.parse_args()
    path, corpus = corpus_split("valid")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        student = make_student(directory, some_dialogues(corpus_split("train")[0], directory, 60))
        tokenizer = load_tokenizer(str(directory / "base"))
        dialogues = dialogues_that_fit(tokenizer, path, arguments.dialogues)
        pairs = [pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]
        if arguments.against == "pair":
            tree = make_student(directory / "tree", next(directory.glob("*train*.json")), "tree")
            measure_trees(tree, student, dialogues, corpus, arguments.rounds)
            return
        difference = check_equal(student, tokenizer, pairs)

        def ours() -> float:
            return float(len(student.predict(dialogues)))

        def baseline() -> float:
            return float(len(plain_loop(student, tokenizer, pairs)[0]))

        rates = alternate(ours, baseline, rounds=arguments.rounds)
    write_rates(
        "student_predict_vs_plain_loop",
        rates,
        baseline_name="a plain loop over pairs in batches of 16",
        corpus=corpus,
        details={
            "pairs": len(pairs),
            "dialogues": len(dialogues),
            "largest_score_difference": difference,
        },
    )


if __name__ == "__main__":
    main()
