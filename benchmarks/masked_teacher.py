"""A masked teacher in trees against the same teacher pair by pair: training (LoRA) and scoring, float32.

Both sides take the fold1 pairs of the same dialogues in steps of about 64 pairs, in micro-batches of at most 2,048
tokens: `model.layout: tree` reads a target's history and clause once, `pair` once per candidate.

    python benchmarks/masked_teacher.py [--shape minilm|base] [--max-prompt-tokens 512]

At 512 tokens no prompt is cut. At 128 most are, and a tree's are cut as its longest branch needs it.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _student_parts import SHAPES, make_base
from record import alternate, corpus_split, write_rates
from torch import nn

from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.teacher.config import LoraConfig, MaskedModel
from kdecs.teacher.data import fixed_batches, global_batches, is_padded, share_among_ranks, single_units
from kdecs.teacher.families import make_family
from kdecs.teacher.network import TeacherNetwork, add_lora, connective_loss, trainable_parameters

STEP_PAIRS, MICRO_BATCH_TOKENS = 64, 2048


def side(
    base: Path, layout: str, dialogues: list, longest: int, *, trains: bool
) -> tuple[Callable[[], float], int]:
    """One pass over the dialogues' pairs, and the tokens that it reads."""
    model = MaskedModel(family="masked", base=str(base), layout=layout)
    family = make_family(model, max_prompt_tokens=longest, emotions_shown="coarse")
    torch.manual_seed(0)
    network = add_lora(family.load_network(str(base), dtype=torch.float32), LoraConfig(), family.lora_task)
    teacher = TeacherNetwork(family, network, use_tree=False, device=torch.device("cpu"))
    pairs = [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1")]
    prompts = [family.encode(pair) for pair in pairs]
    padded = is_padded(prompts)
    units = single_units(prompts, max_tokens=MICRO_BATCH_TOKENS, max_pairs=STEP_PAIRS // 2)

    def train() -> float:
        teacher.train()
        parameters = trainable_parameters(teacher)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        for step in global_batches(
            units, batch_pairs=STEP_PAIRS, bucket_batches=50 if padded else 1, seed=0, epoch=0
        ):
            (micro_batches,) = share_among_ranks(
                step, world_size=1, micro_batch_tokens=MICRO_BATCH_TOKENS, padded=padded
            )
            for micro in micro_batches:
                is_cause_P = torch.tensor([pairs[n].is_cause for n in micro.pairs])
                loss = connective_loss(teacher([prompts[n] for n in micro.pairs]), is_cause_P)
                (loss / STEP_PAIRS).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return float(len(pairs))

    @torch.inference_mode()
    def score() -> float:
        teacher.eval()
        for micro in fixed_batches(units, micro_batch_tokens=MICRO_BATCH_TOKENS, padded=padded):
            teacher.answers_and_rest([prompts[n] for n in micro.pairs])
        return float(len(pairs))

    return (train if trains else score), sum(unit.tokens for unit in units)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES], default="minilm")
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--dialogues", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    path, corpus = corpus_split("valid")
    everything = read_corpus(path).dialogues
    # Evenly drawn, so that a few long dialogues do not decide.
    places = np.linspace(0, len(everything) - 1, min(arguments.dialogues, len(everything))).astype(int)
    dialogues = [everything[int(place)] for place in places]
    longest = arguments.max_prompt_tokens
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", SHAPES[arguments.shape], path)
        for what, trains in (("training", True), ("scoring", False)):
            ours, tokens = side(base, "tree", dialogues, longest, trains=trains)
            theirs, pair_tokens = side(base, "pair", dialogues, longest, trains=trains)
            rates = alternate(ours, theirs, rounds=arguments.rounds)
            suffix = "" if arguments.shape == "minilm" else f"_{arguments.shape}"
            suffix += "" if longest == 512 else f"_{longest}"
            write_rates(
                f"masked_teacher_{what}_tree_vs_pair{suffix}",
                rates,
                baseline_name=f"the layout pair, {SHAPES[arguments.shape].description}",
                corpus=corpus,
                target=2.5,
                details={
                    "dialogues": len(dialogues),
                    "max_prompt_tokens": longest,
                    "tokens": tokens,
                    "pair_tokens": pair_tokens,
                },
            )


if __name__ == "__main__":
    main()
