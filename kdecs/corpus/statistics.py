"""Count what a corpus holds (`kdecs corpus stats`), and draw it (`--plots`): emotions, cause distances, prompt lengths.

numpy, matplotlib and Transformers are imported by the functions that need them, since counting must answer at once.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdecs.artifact import atomic_path
from kdecs.corpus.pairs import Pair, count_rows, pairs_of
from kdecs.corpus.prompts import history_separator, student_prompt, teacher_prompt
from kdecs.corpus.schema import Corpus
from kdecs.errors import DependencyError

# Causes farther back than this share the last bar.
_FAR = 10
_NUM_BINS = 40
PLOT_NAMES = ("emotions.png", "cause_distance.png", "prompt_lengths.png")
"""The files that `write_plots` writes."""


@dataclass(frozen=True)
class CorpusStatistics:
    """The counts of one file: rows are those of fold 1, `pairs_all` the pairs of the universe "all".

    `causes` counts the annotated causes by place: own (the target itself), earlier and later.
    """

    file: str
    dialogues: int
    utterances: int
    positive_rows: int
    negative_rows: int
    pairs_all: int
    emotions: dict[str, int]
    pairs_of_several_spans: int
    targets_caused_outside_alone: int
    causes: dict[str, int]
    normalised: dict[str, int]
    warnings: tuple[str, ...]
    faults: int

    def as_dict(self) -> dict[str, Any]:
        """The values of one file in `kdecs corpus stats --json`."""
        return {**vars(self), "warnings": list(self.warnings)}


def statistics_of(corpus: Corpus, num_faults: int = 0) -> CorpusStatistics:
    """Count a corpus; emotions are ordered by falling count, then name."""
    utterances = [u for dialogue in corpus.dialogues for u in dialogue.utterances]
    pairs = [pair for dialogue in corpus.dialogues for pair in pairs_of(dialogue)]
    positive, negative = count_rows(pairs)
    emotions = Counter(u.emotion for u in utterances if u.emotion is not None)
    return CorpusStatistics(
        file=str(corpus.path),
        dialogues=len(corpus.dialogues),
        utterances=len(utterances),
        positive_rows=positive,
        negative_rows=negative,
        # n (n + 1) / 2 pairs j <= i, by formula: to make them would take n² objects for one number.
        pairs_all=sum(math.comb(len(dialogue.utterances) + 1, 2) for dialogue in corpus.dialogues),
        emotions=dict(sorted(emotions.items(), key=lambda item: (-item[1], item[0]))),
        pairs_of_several_spans=sum(len(pair.spans) > 1 for pair in pairs),
        targets_caused_outside_alone=sum(
            bool(u.evidence) and all(e.turn is None for e in u.evidence or ()) for u in utterances
        ),
        causes=_places_of_causes(corpus),
        normalised=dict(sorted(corpus.normalised.items())),
        warnings=corpus.warnings,
        faults=num_faults,
    )


def _places_of_causes(corpus: Corpus) -> dict[str, int]:
    places = Counter(
        "own" if cause.turn == u.turn else "earlier" if cause.turn < u.turn else "later"
        for dialogue in corpus.dialogues
        for u in dialogue.utterances
        for cause in u.evidence or ()
        if cause.turn is not None
    )
    return {name: places[name] for name in ("own", "earlier", "later")}


def cause_distances(corpus: Corpus) -> Counter[int]:
    """Number of positive rows of fold 1 by target minus candidate; 0 is the target itself."""
    return Counter(
        pair.target - pair.candidate
        for dialogue in corpus.dialogues
        for pair in pairs_of(dialogue)
        for _ in pair.spans
    )


def display_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each file: its stem, or the whole path if two files share a stem."""
    counts = Counter(path.stem for path in paths)
    return [path.stem if counts[path.stem] == 1 else str(path) for path in paths]


def prompt_words(corpus: Corpus) -> list[int]:
    """Number of words (split at white space) of every pair's student prompt; a mask is one word."""
    return [
        len(_student_text(pair, "<mask>", "\n").split())
        for dialogue in corpus.dialogues
        for pair in pairs_of(dialogue)
    ]


def prompt_tokens(corpus: Corpus, tokenizer: Any) -> list[int]:
    """Number of tokens of every pair's whole prompt, with special tokens and without truncation."""
    text_of = _prompt_writer(tokenizer)
    lengths: list[int] = []
    for dialogue in corpus.dialogues:
        if texts := [text_of(pair) for pair in pairs_of(dialogue)]:
            # Quietly: Transformers would warn of each prompt beyond the model's limit.
            lengths += map(len, tokenizer(texts, verbose=False)["input_ids"])
    return lengths


def _prompt_writer(tokenizer: Any) -> Callable[[Pair], str]:
    # A tokenizer with a mask token belongs to a student, any other to a decoder as teacher.
    mask, separator = tokenizer.mask_token, history_separator(tokenizer)
    if mask is not None:
        return lambda pair: _student_text(pair, mask, separator)
    return lambda pair: (
        teacher_prompt(
            pair.dialogue, pair.target, pair.candidate, emotion=str(pair.emotion), separator=separator
        ).text
    )


def _student_text(pair: Pair, mask: str, separator: str) -> str:
    prompt = student_prompt(pair.dialogue, pair.target, pair.candidate, mask=mask, separator=separator)
    return prompt.text


def write_plots(corpora: Sequence[Corpus], directory: Path, tokenizer: Any = None) -> list[Path]:
    """Write PLOT_NAMES into a directory; returns their paths.

    Prompts are counted in words, or in the tokens of a Transformers tokenizer.
    Raises DependencyError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError(
            'figures need matplotlib, which is not installed; run: pip install "kdecs[sweep]"'
        ) from None
    named = dict(zip(display_names([corpus.path for corpus in corpora]), corpora, strict=True))
    drawings: tuple[Callable[[Any, Mapping[str, Corpus]], None], ...] = (
        _draw_emotions,
        _draw_distances,
        partial(_draw_prompt_lengths, tokenizer=tokenizer),
    )
    written = []
    for name, draw in zip(PLOT_NAMES, drawings, strict=True):
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
    import numpy as np

    longest = max((max(found, default=1) for found in lengths.values()), default=1)
    width = math.ceil((longest + 1) / _NUM_BINS)  # whole, so that every bar covers as many lengths
    bins = np.arange(0, longest + 1 + width, width)
    for name, found in lengths.items():
        # In percent, so that splits of different sizes can be compared.
        weights = np.full(len(found), 100 / max(1, len(found)))
        axes.hist(found, bins=bins, weights=weights, histtype="step", linewidth=1.5, label=name)
    axes.legend()
    reader = "student" if tokenizer is None or tokenizer.mask_token is not None else "teacher"
    axes.set_title(f"Length of the {reader}'s prompts")
    axes.set_xlabel("words" if tokenizer is None else "tokens")
    axes.set_ylabel("share of fold 1 pairs (%)")


def _grouped_bars(axes: Any, labels: Sequence[str], counts: dict[str, list[int]]) -> None:
    """Draw the bars of all groups side by side, in percent of each group's total."""
    import numpy as np

    width = 0.8 / max(1, len(counts))
    for number, (name, found) in enumerate(counts.items()):
        positions = np.arange(len(labels)) + (number - (len(counts) - 1) / 2) * width
        axes.bar(positions, [100 * count / max(1, sum(found)) for count in found], width, label=name)
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.legend()
