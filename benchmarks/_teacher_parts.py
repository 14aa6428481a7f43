"""What the teacher benchmarks share: a network of SmolLM2-135M's shape, its family, and seeded dialogues with prompts.

The network is `models/smollm2-135m` where `make models` put it (or KDECS_SMOLLM2 names it), else random weights of
that shape with a byte-level tokenizer trained on the corpus at hand; a record says which.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import ROOT, Rates, alternate, corpus_split, write_rates
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kdecs.config import parse_config
from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.demo.base_model import train_tokenizer
from kdecs.demo.config import BaseModelConfig
from kdecs.teacher.config import TeacherConfig
from kdecs.teacher.families import CausalFamily, EncodedPrompt, make_family
from kdecs.teacher.tree.prefix_tree import tree_size

BATCH_PAIRS = 16
OUR_REPEATS = 4
SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
        "max_position_embeddings": 4096,
    },
}


@dataclass(frozen=True)
class Job:
    """The same work for both sides: pairs of some whole dialogues, in tokens, and who computes them."""

    config: TeacherConfig
    family: CausalFamily
    pairs: list[Pair]
    prompts: list[EncodedPrompt]
    corpus: str
    network_name: str
    tokens_a_pair: dict[str, dict[str, float]]
    """Tokens a pair of the dialogues and of the whole split: in trees, in prompts, in batches of 16."""


def prepare(directory: Path, *, shape: str, num_dialogues: int, dtype: str, seed: int = 0) -> Job:
    """Config, family and the prompts of `num_dialogues` seeded dialogues of the validation split."""
    path, corpus = corpus_split("valid")
    base, name = make_base(directory / "base", shape, path)
    values = {
        "name": "bench",
        "output": str(directory / "teacher"),
        "corpus": {"train": str(path), "valid": str(path)},
        "model": {"family": "causal", "base": str(base)},
        "zero": {"dtype": dtype},
        "optimization": {"seed": seed},
    }
    config = parse_config(TeacherConfig, values, source="benchmark")
    family = make_family(
        config.model, max_prompt_tokens=config.batches.max_prompt_tokens, emotions_shown="coarse"
    )
    assert isinstance(family, CausalFamily)
    of_dialogues = [pairs for d in read_corpus(path).dialogues if (pairs := pairs_of(d, "fold1"))]
    encoded = [[family.encode(pair) for pair in pairs] for pairs in of_dialogues]
    chosen = representative(encoded, num_dialogues, seed)
    return Job(
        config,
        family,
        [pair for n in chosen for pair in of_dialogues[n]],
        [prompt for n in chosen for prompt in encoded[n]],
        corpus,
        name,
        {
            "these_dialogues": tokens_a_pair([encoded[n] for n in chosen]),
            "whole_split": tokens_a_pair(encoded),
        },
    )


def representative(encoded: Sequence[Sequence[EncodedPrompt]], count: int, seed: int) -> list[int]:
    """Of 300 seeded draws of dialogues the one whose tokens a pair are most like the whole split's.

    A few dialogues drawn blindly may pad half as much, or share twice as much, as the corpus does.
    """
    whole = tokens_a_pair(encoded)
    generator = np.random.default_rng(seed)

    def distance(draw: list[int]) -> float:
        part = tokens_a_pair([encoded[n] for n in draw])
        return sum(abs(np.log(part[name] / whole[name])) for name in whole)

    draws = [sorted(generator.permutation(len(encoded))[:count].tolist()) for _ in range(300)]
    return min(draws, key=distance)


def tokens_a_pair(encoded: Sequence[Sequence[EncodedPrompt]]) -> dict[str, float]:
    """What each way of batching computes, a pair."""
    lengths = np.array([len(prompt.tokens) for prompts in encoded for prompt in prompts])
    counts = {
        "trees_of_dialogues": sum(tree_size([p.tokens for p in prompts]) for prompts in encoded),
        "prompts": lengths.sum(),
        "random_batches": padded_tokens(np.random.default_rng(0).permutation(lengths)),
        "sorted_batches": padded_tokens(np.sort(lengths)),
        "batches_in_corpus_order": padded_tokens(lengths),
    }
    return {name: float(count / len(lengths)) for name, count in counts.items()}


def make_base(directory: Path, shape: str, corpus_file: Path) -> tuple[Path, str]:
    """A Transformers directory of the shape, and what it is in words."""
    fetched = Path(os.environ.get("KDECS_SMOLLM2", ROOT / "models" / "smollm2-135m"))
    if shape == "smollm2-135m" and (fetched / "config.json").is_file():
        return fetched, "SmolLM2-135M"
    sizes = SHAPES[shape]
    tokenizer = corpus_tokenizer(corpus_file)
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, rope_theta=100_000.0))
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return (
        directory,
        f"random weights of {shape}'s shape, tokenizer of {len(tokenizer)} tokens from the corpus",
    )


def corpus_tokenizer(corpus_file: Path) -> Any:
    """Byte-level BPE of the corpus's words, in which every answer word is one token."""
    values = {
        "name": "tokenizer",
        "output": "unused",
        "corpus": {"train": str(corpus_file), "valid": str(corpus_file)},
        "architecture": "llama",
        "vocabulary_size": 2000,
    }
    texts = (u.text for d in read_corpus(corpus_file).dialogues for u in d.utterances)
    return train_tokenizer(texts, parse_config(BaseModelConfig, values, source="benchmark"))


def batches_of_like_length(prompts: Sequence[EncodedPrompt], size: int) -> list[list[int]]:
    """Batches of prompts by descending length."""
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n].tokens))
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded_tokens(lengths: np.ndarray, *, batch: int = BATCH_PAIRS) -> int:
    """Tokens that batches of `batch` in the order given compute, padding included."""
    return int(sum(part.max() * len(part) for part in np.split(lengths, range(batch, len(lengths), batch))))


def as_baseline(network: nn.Module) -> nn.Module:
    """The same network as Transformers' users have it: attention by `sdpa`."""
    model = network.get_base_model() if hasattr(network, "get_base_model") else network
    model.set_attn_implementation("sdpa")
    return network


def measure(ours: Callable[[], float], baseline: Callable[[], float], *, rounds: int) -> Rates:
    """Alternating rounds as `record.alternate` takes them, after each side has run once untimed.

    Ours does its job OUR_REPEATS times a round: a round of a few seconds says little.
    """
    ours()
    baseline()
    return alternate(lambda: sum(ours() for _ in range(OUR_REPEATS)), baseline, rounds=rounds)


def spread(rates: Rates) -> float:
    """Greatest distance of a round's ratio from the median one, as a share of it."""
    return max(abs(ratio - rates.ratio) for ratio in rates.ratios) / rates.ratio


def report(
    record: tuple[str, float | None, str],
    job: Job,
    rates: Rates,
    arguments: argparse.Namespace,
    *,
    tokens_in_forwards: int,
    details: Mapping[str, Any],
) -> None:
    """Write a record of pairs a second, or print it with `--dry`. `record`: name, target, name of the baseline."""
    name, target, baseline_name = record
    details = {
        "network": job.network_name,
        "pairs": len(job.pairs),
        "dialogues": len({pair.dialogue.id for pair in job.pairs}),
        "rounds": arguments.rounds,
        "spread": spread(rates),
        **details,
        "tokens_in_forwards": tokens_in_forwards,
        "tokens_a_pair": job.tokens_a_pair,
        "micro_batch_tokens": job.config.batches.micro_batch_tokens,
    }
    if arguments.dry:
        print(name, rates.ratio, details)
        return
    write_rates(
        name,
        rates,
        baseline_name=baseline_name,
        corpus=job.corpus,
        dtype=arguments.dtype,
        target=target,
        details=details,
    )


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """What both teacher benchmarks can be asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dialogues", type=int, help="as many whole dialogues (default: by record)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, write no record")
    return parser
