"""Figures of `kdecs corpus stats --plots`: emotions, cause distance, prompt length. Needs matplotlib."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdecs.artifact import atomic_path
from kdecs.corpus.prompt_lengths import prompt_tokens, prompt_words
from kdecs.corpus.schema import Corpus
from kdecs.corpus.statistics import cause_distances, display_names
from kdecs.errors import DependencyError

_FAR = 10
_NUM_BINS = 40


def write_plots(corpora: Sequence[Corpus], directory: Path, tokenizer: Any = None) -> list[Path]:
    """Write emotions.png, cause_distance.png and prompt_lengths.png; returns their paths.

    Prompts are counted in words, or in the tokens of a Transformers tokenizer.
    Raises DependencyError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(
            'figures need matplotlib, which is not installed: pip install "kdecs[sweep]"'
        ) from None
    named = dict(zip(display_names([corpus.path for corpus in corpora]), corpora, strict=True))
    drawings: dict[str, Callable[[Any, Mapping[str, Corpus]], None]] = {
        "emotions.png": _draw_emotions,
        "cause_distance.png": _draw_distances,
        "prompt_lengths.png": partial(_draw_prompt_lengths, tokenizer=tokenizer),
    }
    written = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        draw(figure.subplots(), named)
        with atomic_path(directory / name) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        written.append(directory / name)
    return written


def _draw_emotions(axes: Any, corpora: Mapping[str, Corpus]) -> None:
    counts = {
        name: Counter(u.emotion or "none" for d in corpus.dialogues for u in d.utterances)
        for name, corpus in corpora.items()
    }
    total = sum(counts.values(), Counter[str]())
    labels = sorted(total, key=lambda label: (-total[label], label))
    _grouped_bars(axes, labels, {name: [found[label] for label in labels] for name, found in counts.items()})
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_title("Emotions")
    axes.set_ylabel("share of utterances (%)")


def _draw_distances(axes: Any, corpora: Mapping[str, Corpus]) -> None:
    labels = [*(str(distance) for distance in range(_FAR)), f"{_FAR}+"]
    shares = {}
    for name, corpus in corpora.items():
        distances = cause_distances(corpus)
        far = sum(count for distance, count in distances.items() if distance >= _FAR)
        shares[name] = [*(distances[distance] for distance in range(_FAR)), far]
    _grouped_bars(axes, labels, shares)
    axes.set_title("Distance of a cause from its target")
    axes.set_xlabel("turns back (0: the target itself)")
    axes.set_ylabel("share of positive rows (%)")


def _draw_prompt_lengths(axes: Any, corpora: Mapping[str, Corpus], tokenizer: Any) -> None:
    lengths = {
        name: prompt_words(corpus) if tokenizer is None else prompt_tokens(corpus, tokenizer)
        for name, corpus in corpora.items()
    }
    longest = max((max(found, default=1) for found in lengths.values()), default=1)
    width = math.ceil((longest + 1) / _NUM_BINS)  # whole, so that every bar covers as many lengths
    bins = np.arange(0, longest + 1 + width, width)
    for name, found in lengths.items():
        weights = np.full(len(found), 100 / max(1, len(found)))
        axes.hist(found, bins=bins, weights=weights, histtype="step", linewidth=1.5, label=name)
    axes.legend()
    reader = "student" if tokenizer is None or tokenizer.mask_token is not None else "teacher"
    axes.set_title(f"Length of the {reader}'s prompts")
    axes.set_xlabel("words" if tokenizer is None else "tokens")
    axes.set_ylabel("share of fold 1 pairs (%)")


def _grouped_bars(axes: Any, labels: Sequence[str], counts: dict[str, list[int]]) -> None:
    """Bars of each group side by side, in percent of the group's total."""
    width = 0.8 / max(1, len(counts))
    for number, (name, found) in enumerate(counts.items()):
        positions = np.arange(len(labels)) + (number - (len(counts) - 1) / 2) * width
        axes.bar(positions, [100 * count / max(1, sum(found)) for count in found], width, label=name)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.legend()
