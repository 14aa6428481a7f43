"""Scoring pairs with a causal teacher: pairs a second against what its users would write or run instead.

All sides score the same pairs of some whole dialogues with one and the same network, from texts to logits of the
answer words. Ours is `TeacherScorer.score`, as the export of soft labels calls it (trees, and the mass of the rest
of the vocabulary beside the answers).

hf_loop             AutoModelForCausalLM over padded random batches of 16, logits as it returns them
corpus_order        the same in the corpus's order, in which neighbours are of like length
sorted_last_token   the best plain loop: sorted by length, the head at the last position alone
lm_eval             lm-evaluation-harness: HFLM.loglikelihood of the same answer words after the same prompts

Checked in the same run: the logits of the answer words agree (relative 1e-4 in float32); for the harness the
differences between answer words' log-likelihoods.

    python benchmarks/teacher_scoring.py
    python benchmarks/teacher_scoring.py --against hf_loop --dialogues 4
    python benchmarks/teacher_scoring.py --shape tiny --dry        # a smoke run, nothing written
"""

import argparse
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _teacher_parts import (
    BATCH_PAIRS,
    Job,
    as_baseline,
    batches_of_like_length,
    measure,
    parser_of,
    prepare,
    report,
)
from torch import nn

from kdecs.artifact import Manifest
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.prompts import teacher_prompt
from kdecs.teacher.data import make_units
from kdecs.teacher.network import DTYPES, TeacherNetwork
from kdecs.teacher.scoring import TeacherScorer
from kdecs.teacher.tree.attention import use_tree_attention

RECORDS = {
    "hf_loop": ("teacher_scoring_vs_hf_loop", 8.0, "padded random batches of 16 over AutoModelForCausalLM"),
    "corpus_order": (
        "teacher_scoring_vs_hf_loop_in_corpus_order",
        None,
        "padded batches of 16 in corpus order over AutoModelForCausalLM",
    ),
    "sorted_last_token": (
        "teacher_scoring_vs_sorted_last_token",
        3.5,
        "batches of 16 sorted by length, last position's logits",
    ),
    "lm_eval": ("teacher_scoring_vs_lm_eval", None, "lm-evaluation-harness, HFLM.loglikelihood"),
}
DIALOGUES = {"hf_loop": 3, "corpus_order": 4, "sorted_last_token": 5, "lm_eval": 5}
"""Sorting needs more of them: few pairs sorted by length still pad, which a whole split's do not."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def our_side(job: Job, network: nn.Module, found: list[np.ndarray]) -> Callable[[], float]:
    """The export's scorer over the network."""
    teacher = TeacherNetwork(job.family, network, use_tree=True, device=torch.device("cpu")).eval()
    manifest = Manifest(
        kind="teacher", format_version=1, kdecs_version="", config_hash="", inputs={}, files=()
    )
    scorer = TeacherScorer(teacher, manifest, {}, job.config.batches.micro_batch_tokens)

    def score() -> float:
        use_tree_attention(network)
        found.append(scorer.score(job.pairs)[0])
        return float(len(job.pairs))

    return score


def texts_of(job: Job) -> list[str]:
    """The prompts as text."""
    return [
        teacher_prompt(
            pair.dialogue,
            pair.target,
            pair.candidate,
            emotion=pair.emotion or "",
            separator=job.family.separator,
        ).text
        for pair in job.pairs
    ]


def loop_side(
    job: Job, network: nn.Module, found: list[np.ndarray], *, is_sorted: bool, in_corpus_order: bool
) -> Callable[[], float]:
    """A plain loop over padded batches of texts: shuffled, as they come, or sorted by length."""
    tokenizer, texts, ids = job.family.tokenizer, texts_of(job), job.family.answer_ids

    @torch.inference_mode()
    def score() -> float:
        as_baseline(network)
        network.eval()
        order = np.random.default_rng(0).permutation(len(texts)).tolist()
        if in_corpus_order:
            order = list(range(len(texts)))
        batches = [order[start : start + BATCH_PAIRS] for start in range(0, len(order), BATCH_PAIRS)]
        if is_sorted:
            batches = batches_of_like_length(job.prompts, BATCH_PAIRS)
        logits = np.zeros((len(texts), len(CONNECTIVES)), dtype=np.float32)
        for batch in batches:
            inputs = tokenizer(
                [texts[n] for n in batch],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                return_token_type_ids=False,
            )
            positions = (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)
            output = network(
                **inputs, position_ids=positions, use_cache=False, logits_to_keep=1 if is_sorted else 0
            )
            logits[batch] = output.logits[:, -1, ids].float().numpy()
        found.append(logits)
        return float(len(texts))

    return score


def harness_side(job: Job, network: nn.Module, found: list[np.ndarray]) -> Callable[[], float]:
    """lm-evaluation-harness over (prompt, " word") requests, batch size 16."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    as_baseline(network)
    harness = HFLM(
        pretrained=network,
        tokenizer=job.family.tokenizer,
        batch_size=BATCH_PAIRS,
        device="cpu",
        max_length=job.config.batches.max_prompt_tokens,
    )
    requests = [
        Instance("loglikelihood", {}, (text, f" {word}"), n)
        for n, text in enumerate(texts_of(job))
        for word in CONNECTIVES
    ]

    def score() -> float:
        as_baseline(network)
        answers = harness.loglikelihood(requests, disable_tqdm=True)
        found.append(np.array([value for value, _ in answers]).reshape(-1, len(CONNECTIVES)))
        return float(len(job.pairs))

    return score


def check_equal(ours: np.ndarray, theirs: np.ndarray, dtype: str, *, are_log_likelihoods: bool) -> float:
    """Greatest difference of logits (log-likelihoods: up to a constant a pair). Exits where they differ."""
    if are_log_likelihoods:
        ours, theirs = ours - ours[:, :1], theirs - theirs[:, :1]
    difference = float(np.abs(ours - theirs).max())
    if difference > TOLERANCE[dtype] * max(1.0, float(np.abs(ours).max())):
        raise SystemExit(f"logits differ by up to {difference}")
    return difference


def compare(against: str, job: Job, network: nn.Module, arguments: argparse.Namespace) -> None:
    """Measure one baseline and write its record."""
    ours: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    baseline = (
        harness_side(job, network, theirs)
        if against == "lm_eval"
        else loop_side(
            job,
            network,
            theirs,
            is_sorted=against == "sorted_last_token",
            in_corpus_order=against == "corpus_order",
        )
    )
    rates = measure(our_side(job, network, ours), baseline, rounds=arguments.rounds)
    is_harness = against == "lm_eval"
    difference = max(
        check_equal(a, b, arguments.dtype, are_log_likelihoods=is_harness)
        for a, b in itertools.product(ours, theirs)
    )
    units = make_units(
        job.family,
        job.pairs,
        job.prompts,
        use_tree=True,
        max_tokens=job.config.batches.micro_batch_tokens,
        max_pairs=len(job.pairs),
    )
    report(
        RECORDS[against],
        job,
        rates,
        arguments,
        tokens_in_forwards=sum(unit.tokens for unit in units),
        details={"greatest_difference_of_logits": difference},
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--against", choices=[*RECORDS, "all"], default="all")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    arguments = parser.parse_args()
    for against in RECORDS if arguments.against == "all" else [arguments.against]:
        if against == "lm_eval" and importlib.util.find_spec("lm_eval") is None:
            print("lm_eval is not installed: its record is skipped (pip install 'kdecs[bench]')")
            continue
        with tempfile.TemporaryDirectory() as directory:
            job = prepare(
                Path(directory),
                shape=arguments.shape,
                num_dialogues=arguments.dialogues or DIALOGUES[against],
                dtype=arguments.dtype,
            )
            network = job.family.load_network(job.config.model.base, dtype=DTYPES[arguments.dtype])
        compare(against, job, network, arguments)


if __name__ == "__main__":
    main()
