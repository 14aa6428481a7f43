"""Figures of `kdecs corpus stats --plots`: emotions, cause distance, prompt length. Needs matplotlib."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdecs.artifact import atomic_path
from kdecs.corpus.schema import Corpus
from kdecs.corpus.statistics import cause_distances, prompt_words
from kdecs.errors import DependencyError

_FAR = 10
_NUM_BINS = 40


def write_plots(corpora: Sequence[Corpus], directory: Path) -> list[Path]:
    """Write emotions.png, cause_distance.png and prompt_words.png; returns their paths.

    Raises DependencyError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(
            'figures need matplotlib, which is not installed: pip install "kdecs[sweep]"'
        ) from None
    drawings: dict[str, Callable[[Any, Sequence[Corpus]], None]] = {
        "emotions.png": _draw_emotions,
        "cause_distance.png": _draw_distances,
        "prompt_words.png": _draw_prompt_words,
    }
    written = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        draw(figure.subplots(), corpora)
        with atomic_path(directory / name) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        written.append(directory / name)
    return written


def _draw_emotions(axes: Any, corpora: Sequence[Corpus]) -> None:
    counts = {
        corpus.path.stem: Counter(u.emotion or "none" for d in corpus.dialogues for u in d.utterances)
        for corpus in corpora
    }
    total = sum(counts.values(), Counter[str]())
    labels = sorted(total, key=lambda label: (-total[label], label))
    _grouped_bars(axes, labels, {name: [found[label] for label in labels] for name, found in counts.items()})
    axes.tick_params(axis="x", rotation=45)
    axes.set_title("Emotions")
    axes.set_ylabel("share of utterances (%)")


def _draw_distances(axes: Any, corpora: Sequence[Corpus]) -> None:
    labels = [*(str(distance) for distance in range(_FAR)), f"{_FAR}+"]
    shares = {}
    for corpus in corpora:
        distances = cause_distances(corpus)
        far = sum(count for distance, count in distances.items() if distance >= _FAR)
        shares[corpus.path.stem] = [*(distances[distance] for distance in range(_FAR)), far]
    _grouped_bars(axes, labels, shares)
    axes.set_title("Distance of a cause from its target")
    axes.set_xlabel("turns back (0: the target itself)")
    axes.set_ylabel("share of positive rows (%)")


def _draw_prompt_words(axes: Any, corpora: Sequence[Corpus]) -> None:
    lengths = {corpus.path.stem: prompt_words(corpus) for corpus in corpora}
    longest = max((max(found, default=1) for found in lengths.values()), default=1)
    bins = np.linspace(0, longest, _NUM_BINS + 1)
    for name, found in lengths.items():
        weights = np.full(len(found), 100 / max(1, len(found)))
        axes.hist(found, bins=bins, weights=weights, histtype="step", linewidth=1.5, label=name)
    axes.legend()
    axes.set_title("Length of history, target and candidate")
    axes.set_xlabel("words")
    axes.set_ylabel("share of fold 1 pairs (%)")


def _grouped_bars(axes: Any, labels: Sequence[str], counts: dict[str, list[int]]) -> None:
    """Bars of each group side by side, in percent of the group's total."""
    width = 0.8 / max(1, len(counts))
    for number, (name, found) in enumerate(counts.items()):
        positions = np.arange(len(labels)) + (number - (len(counts) - 1) / 2) * width
        axes.bar(positions, [100 * count / max(1, sum(found)) for count in found], width, label=name)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.legend()
